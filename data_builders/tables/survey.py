"""What a set of tables holds, and so which parts of the suite apply to it. Our choice.

`survey` counts; `Survey.parts` says what can be done with the data and, where something cannot, what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.data_builders.tables.schema import Tables
from sidtune.data_builders.tables.splits import FEEDBACK

FEW_TITLES = 0.5  # with fewer items in words than this share, vectors from texts place the others by chance
FEW_REQUESTS = 300  # of fewer test requests, intervals are too wide to say which system is better


@dataclass(frozen=True)
class Survey:
    """Counts of one data set.

    Attributes:
        items, users, events, requests: rows.
        titled, described, priced, categorised: share of the items with such a value.
        searches: share of the requests with a query.
        feedback: share of the shown candidates whose label is known, by name (`click`, `like`, `order`, `dwell`).
        positioned: share of the shown candidates with a position.
        shown: mean candidates of a request.
        actions: events by action, most frequent first.
        history: median events of a user.
        prescribed: the source says which request is for training and which for the test.
        clock: times of different users compare, so that a moment can split them.
        counts: what the reader did to dirty input, by name.
        notes: what it says of the source.
    """

    items: int
    users: int
    events: int
    requests: int
    titled: float
    described: float
    priced: float
    categorised: float
    searches: float
    feedback: dict[str, float]
    positioned: float
    shown: float
    actions: dict[str, int]
    history: float
    prescribed: bool
    clock: bool
    counts: dict[str, int]
    notes: list[str]

    @property
    def has_words(self) -> bool:
        """Whether the items are in words, so that vectors and prompts can be made of them."""
        return self.titled >= FEW_TITLES

    @property
    def has_choices(self) -> bool:
        """Whether lists were shown of which some candidates were taken and others, at known places, were not."""
        return self.positioned > 0 and self.shown > 1 and self.feedback["click"] > 0

    def parts(self) -> dict[str, str]:
        """Part of the suite -> "yes" with a reason, or "no: " with what is missing."""
        taken = [name for name in FEEDBACK if self.feedback[name]]
        return {
            "semantic IDs": f"yes, of {self.titled:.0%} titles"
            if self.has_words
            else "yes, of who took what (encoder 'collaborative') or of vectors you give: too few items have a title",
            "search": f"yes, {self.searches:.0%} of the requests have a query"
            if self.searches
            else "no: requests have no query; put the searched words into the column 'query'",
            "recommendation": f"yes, a user has {self.history:g} events in the middle"
            if self.history >= 2
            else "no: most users have fewer than two events",
            "training on whole histories": "yes" if self.history >= 2 else "no: most users have fewer than two events",
            "GRPO, rewarded by what was logged": f"yes, by {', '.join(taken)}"
            if taken
            else "no: candidates need a known 'click', 'like' or 'order'",
            "correction of position and exposure": "yes, candidates have positions and clicks"
            if self.has_choices
            else "no: candidates need 'position' and 'click' (0 where it was shown and not clicked)",
            "post-ranking of the model's own lists": f"yes, judged by {', '.join(taken)}"
            if taken
            else "no: candidates need a known 'click', 'like' or 'order'",
            "filters by category": "yes" if self.categorised else "no: items have no 'category'",
        }


def survey(tables: Tables) -> Survey:
    """Counts what `tables` hold.

    >>> from sidtune.data_builders.shop_world.world import ShopWorld
    >>> found = survey(ShopWorld.from_options(n_items=150, n_users=10, n_requests=60).to_tables())
    >>> found.items, found.has_words, found.has_choices
    (150, True, True)
    """
    shown = pc.list_flatten(tables.requests["candidates"]).combine_chunks()
    actions = pc.value_counts(pc.drop_null(tables.events["action"])).to_pylist()
    _, lengths = np.unique(tables.events["user_id"].to_numpy(zero_copy_only=False).astype(str), return_counts=True)
    return Survey(
        tables.items.num_rows,
        tables.users.num_rows,
        tables.events.num_rows,
        tables.requests.num_rows,
        *(_share(tables.items[name]) for name in ("title", "description", "price", "category")),
        searches=_share(tables.requests["query"]),
        feedback={name: _share(shown.field(name)) for name in (*FEEDBACK, "dwell")},
        positioned=_share(shown.field("position")),
        shown=len(shown) / max(tables.requests.num_rows, 1),
        actions={one["values"]: one["counts"] for one in sorted(actions, key=lambda one: -one["counts"])},
        history=float(np.median(lengths)) if len(lengths) else 0.0,
        prescribed=tables.split_of_request is not None,
        clock=tables.clock,
        counts=dict(tables.counts),
        notes=list(tables.notes),
    )


def _share(column: pa.Array | pa.ChunkedArray) -> float:
    return (len(column) - column.null_count) / len(column) if len(column) else 0.0
