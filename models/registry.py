"""Models by name: one file and one line here for each."""

from __future__ import annotations

from sidtune.core.registry import Registry

RERANKERS = Registry(
    "re-ranker",
    {
        "initial": "sidtune.models.rerankers.listwise:InitialOrder",
        "mlp": "sidtune.models.rerankers.listwise:ListMlp",
        "dlcm": "sidtune.models.rerankers.listwise:Dlcm",
        "prm": "sidtune.models.rerankers.listwise:Prm",
        "setrank": "sidtune.models.rerankers.listwise:SetRank",
        "seq2slate": "sidtune.models.rerankers.sequential:Seq2Slate",
        "prs": "sidtune.models.rerankers.sequential:PrsEvaluator",
    },
)

NETWORKS = Registry(
    "next-item network",
    {
        "tokens": "sidtune.models.next_item.decoders:TokenDecoder",
        "items": "sidtune.models.next_item.decoders:ItemDecoder",
        "t5": "sidtune.models.next_item.t5:NextItemT5",
    },
)
