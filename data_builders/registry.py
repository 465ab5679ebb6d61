"""Readers by name. A reader is one file with `read(path, **options) -> Tables` and one line here."""

from __future__ import annotations

from sidtune.core.registry import Registry

READERS = Registry(
    "reader",
    {
        "sidtune": "sidtune.data_builders.readers.own:read",
        "hub": "sidtune.data_builders.readers.hub:read",
        "amazon_sid": "sidtune.data_builders.readers.amazon_sid:read",
        "letter": "sidtune.data_builders.readers.letter:read",
        "kuaisearch": "sidtune.data_builders.readers.kuaisearch:read",
        "jdsearch": "sidtune.data_builders.readers.jdsearch:read",
        "amazon_search": "sidtune.data_builders.readers.amazon_search:read",
        "movielens": "sidtune.data_builders.readers.movielens:read",
        "shop_world": "sidtune.data_builders.shop_world.world:read",
    },
)
