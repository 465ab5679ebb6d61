"""Rivals by name: one file and one line here for each."""

from __future__ import annotations

from sidtune.core.registry import Registry

RERANKERS = Registry(
    "re-ranker",
    {
        "mlp": "sidtune.benchmarks.rivals.rerankers.listwise:ListMlp",
        "dlcm": "sidtune.benchmarks.rivals.rerankers.listwise:Dlcm",
        "prm": "sidtune.benchmarks.rivals.rerankers.listwise:Prm",
        "setrank": "sidtune.benchmarks.rivals.rerankers.listwise:SetRank",
        "seq2slate": "sidtune.benchmarks.rivals.rerankers.seq2slate:Seq2Slate",
        "prs": "sidtune.benchmarks.rivals.rerankers.prs:PrsEvaluator",
    },
)
