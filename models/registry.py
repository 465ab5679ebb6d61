"""Models by name: one file and one line here for each."""

from __future__ import annotations

from sidtune.core.registry import Registry

RERANKERS = Registry(
    "re-ranker",
    {
        "initial": "sidtune.models.rerankers:InitialOrder",
        "mlp": "sidtune.models.rerankers:ListMlp",
        "dlcm": "sidtune.models.rerankers:Dlcm",
        "prm": "sidtune.models.rerankers:Prm",
        "setrank": "sidtune.models.rerankers:SetRank",
        "seq2slate": "sidtune.models.rerankers_sequential:Seq2Slate",
        "prs": "sidtune.models.rerankers_sequential:PrsEvaluator",
    },
)
