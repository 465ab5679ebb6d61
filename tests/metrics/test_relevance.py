"""Relevance equals a plain loop over random requests, and null never counts."""

import random

from sidtune.data_builders.tables.schema import table_from_rows
from sidtune.metrics.baselines.relevance import relevance_of


def test_relevance_equals_a_plain_loop():
    rng = random.Random(3)
    ids = [f"i{n}" for n in range(30)]
    items = table_from_rows("items", [{"item_id": i} for i in ids])
    rows = []
    for n in range(200):
        candidates = [
            {
                "item_id": rng.choice(ids),
                "position": p,
                "click": rng.choice([0, 1, None]),
                "like": rng.choice([0, None]),
                "order": rng.choice([0, 0, 1, None]),
            }
            for p in range(rng.randrange(8))
        ]
        rows.append({"request_id": str(n), "user_id": "u", "time": n, "candidates": candidates})
    requests = table_from_rows("requests", rows)
    for labels in (("click",), ("order",), ("click", "like", "order")):
        got = relevance_of(requests, items, labels)
        for n, row in enumerate(rows):
            wanted = sorted({int(c["item_id"][1:]) for c in row["candidates"] if any(c[x] == 1 for x in labels)})
            assert got.rows[got.offsets[n] : got.offsets[n + 1]].tolist() == wanted
