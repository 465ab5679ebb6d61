"""History: which events of a user lie before a moment. The one place that answers it, with a guard against leaks.

Events are sorted once by (user, time, strength of the action, row of the table); a question is then two binary
searches. Order among events of one second: order before like before click before every other action, then the row of
the table, so the strongest action on a result page comes first. Only events **strictly before** the asked time count:
what happens in the same second may be the answer itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.ragged import Ragged, offsets_of
from sidtune.data_builders.tables.columns import encode

ACTIONS = ("order", "like", "click", "cart", "follow", "share", "dwell", "view")
STRENGTH = {"order": 0, "like": 1, "click": 2}
_OTHER = 3
FOREVER = int(np.iinfo(np.int64).max)
if TYPE_CHECKING:  # pyarrow's classes take no parameters at run time
    Ids: TypeAlias = Sequence[str] | pa.Array[Any] | pa.ChunkedArray[Any]
else:
    Ids = Sequence[str] | pa.Array | pa.ChunkedArray


@dataclass(frozen=True)
class TimeCut:
    """The first moment training must not see: one for all, or one per user.

    Attributes:
        default: the cut of every user that is not listed.
        user_ids, times: users with an own cut.
    """

    default: int = FOREVER
    user_ids: pa.Array | None = None
    times: np.ndarray | None = None

    def of(self, user_ids: Ids) -> np.ndarray:
        """(n,) int64: the cut of each user."""
        if self.user_ids is None or self.times is None or not len(self.user_ids):
            return np.full(len(user_ids), self.default, dtype=np.int64)
        place = pc.fill_null(pc.index_in(_as_array(user_ids), value_set=self.user_ids), -1).to_numpy()
        return np.where(place >= 0, self.times[place], self.default).astype(np.int64)


class History:
    """Sorted view of an events table.

    Args:
        events: table in the `events` schema; users, times and actions must not be null.
        actions: keep only these actions (None = all), see `ACTIONS`.

    Attributes:
        user_ids: the users that have events, in the order `of_users` uses by default (first occurrence).

    Raises:
        ConfigError: an unknown action.
        DataError: a null user, time or action.
    """

    def __init__(self, events: pa.Table, actions: tuple[str, ...] | None = None) -> None:
        self.events = events
        for name in ("user_id", "time", "action"):
            if events[name].null_count:
                raise DataError(
                    f"The events have {events[name].null_count} rows without '{name}'; run validate.check_folder."
                )
        rows = np.arange(events.num_rows, dtype=np.int64)
        kept = events
        if actions is not None:
            for action in actions:
                if action not in ACTIONS:
                    raise ConfigError(f"There is no action '{action}': {nearest(action, ACTIONS)}")
            rows = np.flatnonzero(pc.is_in(events["action"], value_set=pa.array(actions, pa.string())).to_numpy())
            kept = events.select(["user_id", "time", "action"]).take(rows)
        users, self.user_ids = encode(kept["user_id"])
        self._times, ranks = np.unique(kept["time"].to_numpy(), return_inverse=True)
        strength = action_strength(kept["action"])
        self._step = len(self._times) + 1
        key = users * self._step + ranks  # < 2^63: both factors are counts of rows
        order = np.lexsort((strength, key)) if len(np.unique(strength)) > 1 else np.argsort(key, kind="stable")
        self._key = key[order]
        self._rows = rows[order]
        self._all_times = events["time"].to_numpy()

    def before(self, user_ids: Ids, times: np.ndarray, max_len: int | None = None) -> Ragged:
        """The events of each user strictly before a time.

        Args:
            user_ids: n user ids; one without events gets an empty list.
            times: (n,) integers, in the unit of the events.
            max_len: keep only the latest so many; None keeps all.

        Returns:
            Row numbers of the events table, oldest first.

        Raises:
            DataError: lengths differ, a time is no integer, or the guard saw an event that is not before its time.
        """
        times = np.asarray(times)
        users = pc.index_in(_as_array(user_ids), value_set=self.user_ids).to_numpy(zero_copy_only=False)
        if times.shape != (len(users),) or (len(times) and not np.issubdtype(times.dtype, np.integer)):
            raise DataError(
                f"History needs one integer time for each of {len(users)} users, got times of shape "
                f"{times.shape} and type {times.dtype}."
            )
        if max_len is not None and max_len < 0:
            raise ConfigError(f"max_len of a history must be 0 or more, got {max_len}.")
        known = ~np.isnan(users) if users.dtype.kind == "f" else np.ones(len(users), bool)
        codes = np.where(known, users, 0).astype(np.int64)
        starts = np.searchsorted(self._key, codes * self._step)
        ends = np.searchsorted(self._key, codes * self._step + np.searchsorted(self._times, times))
        ends = np.where(known, ends, starts)
        if max_len is not None:
            starts = np.maximum(starts, ends - max_len)
        lengths = ends - starts
        offsets = offsets_of(lengths)
        places = np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths)
        found = Ragged(offsets, self._rows[places])
        assert_before(found, self._all_times, times)
        return found

    def of_users(
        self, until: int | TimeCut | None = None, user_ids: Ids | None = None, max_len: int | None = None
    ) -> Ragged:
        """The whole ordered history of users, up to a cut.

        Args:
            until: only events strictly before this time (a number, or a `TimeCut` with a time per user); None = all.
            user_ids: the users; default `self.user_ids`.
            max_len: keep only the latest so many.

        Returns:
            One list per user, oldest first.
        """
        users = self.user_ids if user_ids is None else user_ids
        cut = until if isinstance(until, TimeCut) else TimeCut(FOREVER if until is None else int(until))
        return self.before(users, cut.of(users), max_len)


def assert_before(found: Ragged, event_times: np.ndarray, times: np.ndarray) -> None:
    """The no-leak guard: raises DataError when a listed event is not strictly before the time it is listed for."""
    late = event_times[found.rows] >= np.repeat(times, found.lengths)
    if late.any():
        place = int(np.flatnonzero(late)[0])
        request = int(np.searchsorted(found.offsets, place, side="right") - 1)
        event = int(found.rows[place])
        raise DataError(
            f"A history leaks the future: event {event} at time {int(event_times[event])} is listed before time "
            f"{int(times[request])} ({int(late.sum())} such events); do not change the events after History was made."
        )


def action_strength(actions: pa.ChunkedArray) -> np.ndarray:
    """(n,) int8: 0 order, 1 like, 2 click, 3 everything else."""
    codes, names = encode(actions)
    table = np.array([STRENGTH.get(name, _OTHER) for name in names.to_pylist()], dtype=np.int8)
    return table[codes] if len(table) else np.zeros(len(codes), np.int8)


def _as_array(ids: Ids) -> pa.Array | pa.ChunkedArray:
    return ids if isinstance(ids, (pa.Array, pa.ChunkedArray)) else pa.array(ids, type=pa.string())
