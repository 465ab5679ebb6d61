"""Models by name: one file and one line here for each."""

from __future__ import annotations

from sidtune.core.registry import Registry

NETWORKS = Registry(
    "next-item network",
    {
        "tokens": "sidtune.models.next_item.decoders:TokenDecoder",
        "items": "sidtune.models.next_item.decoders:ItemDecoder",
        "t5": "sidtune.models.next_item.t5:NextItemT5",
    },
)
