"""Position bias of a click log: how likely each position is looked at, from interventions.

The position-based click model: P(click on i at position k) = theta_k * a_g, where a_g is the attraction of the group g the
impression belongs to (normally: this item under this query). Only ratios of theta can be learned, so the largest is set to 1.

*Interventions* (`estimate_by_interventions`): some groups were shown at several positions for reasons that have nothing to do with
their attraction (a randomised page, swaps, drifting ranks: "intervention harvesting", Agarwal et al. 2019). The mean model
E[clicks] = impressions * theta_k * alpha_g with a free alpha for every group is fitted by Poisson maximum likelihood with the
group effects profiled out:

    l(theta) = sum_k C_k log theta_k - sum_g C_g log sum_k N_gk theta_k

which is concave in log theta and needs the mean model only, not the Poisson law; free group effects cost no bias however few
impressions a group has. This differs from the pairwise ratios of that paper and uses all pairs at once.

It first checks that theta is identified, and say which positions hang together if it is not. Standard errors are bootstrap ones
over whole requests. No paper of the specs treats this; row 20 of `specs/crs_debiased_grpo.md` 4 asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json, write_json

FILE = "position_bias.json"
_CELLS = 1 << 21
_TOLERANCE = 1e-12
_STEPS = 100


@dataclass(frozen=True)
class PositionLog:
    """Impressions with known feedback.

    Attributes:
        positions: (P,) distinct positions, rising.
        place: (n,) number into `positions` of each impression.
        click: (n,) 0 or 1.
        group: (n,) numbers 0 ... G - 1; impressions of a group have the same attraction on average at every position.
        cluster: (n,) numbers of the independent units (requests), for standard errors.
    """

    positions: np.ndarray
    place: np.ndarray
    click: np.ndarray
    group: np.ndarray
    cluster: np.ndarray

    @classmethod
    def make(cls, position: Any, click: Any, group: Any, cluster: Any = None) -> PositionLog:
        """Builds from (n,) arrays; groups and clusters may be any integers, clicks must be 0 or 1.

        Raises:
            DataError: arrays that do not fit, clicks other than 0 and 1, or no impression.
        """
        position, click, group = np.asarray(position), np.asarray(click, np.float64), np.asarray(group)
        cluster = np.arange(len(position)) if cluster is None else np.asarray(cluster)
        if not len(position) == len(click) == len(group) == len(cluster) or not len(position):
            raise DataError(
                f"A position log needs equally many positions, clicks, groups and clusters, at least one, got {len(position)}, "
                f"{len(click)}, {len(group)} and {len(cluster)}."
            )
        if position.dtype.kind == "f" and not np.isfinite(position).all():
            raise DataError(
                "A position of a position log is NaN or infinite; leave impressions of unknown position out."
            )
        if not np.isin(click, (0.0, 1.0)).all():
            raise DataError("Clicks of a position log must be 0 or 1; leave impressions with unknown feedback out.")
        positions, place = np.unique(position, return_inverse=True)
        _, groups = np.unique(group, return_inverse=True)
        _, clusters = np.unique(cluster, return_inverse=True)
        return cls(positions, place.ravel(), click, groups.ravel(), clusters.ravel())

    @classmethod
    def of_requests(cls, requests: pa.Table, label: str = "click", group: str = "query_item") -> PositionLog:
        """Reads the candidates of a requests table; a null label or position is unknown and left out.

        Args:
            label: the feedback ("click", "like", "order").
            group: what keeps its attraction when it moves: "query_item" (the item under the same query and context), or
                "page" where pages were shuffled as a whole, so that every position shows the same mixture.

        Raises:
            ConfigError: an unknown `group`. DataError: no impression with a known label and position.
        """
        if group not in ("query_item", "page"):
            raise ConfigError(f"group must be 'query_item' or 'page', got '{group}'.")
        lists = requests["candidates"].combine_chunks()
        lists = lists if isinstance(lists, pa.Array) else pa.concat_arrays(lists.chunks)
        flat = pc.list_flatten(lists)
        known = pc.and_(pc.is_valid(flat.field(label)), pc.is_valid(flat.field("position")))
        known = known.to_numpy(zero_copy_only=False)
        if not known.any():
            raise DataError(
                f"No candidate has both a position and a known '{label}', so position bias cannot be estimated."
            )
        owner = pc.list_parent_indices(lists).to_numpy()[known]
        position = flat.field("position").filter(pa.array(known)).to_numpy()
        click = (flat.field(label).filter(pa.array(known)).to_numpy() > 0).astype(np.float64)
        groups = np.zeros(len(owner), np.int64)
        if group == "query_item":
            item = flat.field("item_id").filter(pa.array(known)).dictionary_encode().indices.to_numpy().astype(np.int64)
            groups = situations(requests)[owner] * (int(item.max()) + 1) + item
        return cls.make(position, click, groups, owner)

    def __len__(self) -> int:
        return len(self.place)


def situations(requests: pa.Table) -> np.ndarray:
    """(R,) number of each distinct query; requests without a query are told apart by their context."""
    query = pc.fill_null(requests["query"], "")
    context = requests["context"].combine_chunks()
    context = context if isinstance(context, pa.Array) else pa.concat_arrays(context.chunks)
    flat = pc.list_flatten(context)
    pair = pc.binary_join_element_wise(*(pc.fill_null(flat.field(n), "") for n in ("name", "value")), "\x1f")
    lengths = pc.fill_null(pc.list_value_length(context), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    where = pc.binary_join(pa.ListArray.from_arrays(offsets, pair.cast(pa.string())), "\x1e")
    asked = pc.greater(pc.binary_length(query), 0)
    told = pc.if_else(asked, query, pc.binary_join_element_wise("\x1d", pa.chunked_array([where]), ""))
    return pa.chunked_array(told.chunks).combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


@dataclass(frozen=True)
class PositionBias:
    """Examination of positions, the largest set to 1.

    Attributes:
        positions: (P,) int64 positions, rising.
        examination: (P,) theta in [0, 1].
        standard_error: (P,) bootstrap standard errors, NaN where none were asked for.
        impressions: (P,) impressions that were used.
        method: how it was estimated.
    """

    positions: np.ndarray
    examination: np.ndarray
    standard_error: np.ndarray
    impressions: np.ndarray
    method: str

    def propensity(self, positions: Any, floor: float = 0.05) -> np.ndarray:
        """(n,) examination of positions, at least `floor`; a position never logged takes the nearest logged one's.

        The floor bounds every inverse weight by 1 / floor: a little bias for a bounded variance.

        Raises:
            ConfigError: a floor outside (0, 1].
        """
        if not 0 < floor <= 1:
            raise ConfigError(f"The floor of propensities must lie in (0, 1], got {floor}.")
        wanted = np.asarray(positions, np.float64)
        right = np.clip(np.searchsorted(self.positions, wanted), 1, max(1, len(self.positions) - 1))
        left = right - 1
        right = np.minimum(right, len(self.positions) - 1)
        nearer = np.abs(self.positions[right] - wanted) < np.abs(self.positions[left] - wanted)
        return np.maximum(self.examination[np.where(nearer, right, left)], floor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `position_bias.json` into `folder`, made if needed."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        columns = {
            "positions": self.positions.tolist(),
            "examination": self.examination.tolist(),
            "standard_error": [None if np.isnan(x) else x for x in self.standard_error.tolist()],
            "impressions": self.impressions.tolist(),
        }
        write_json(Path(folder) / FILE, {"format": 1, "method": self.method, **columns})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PositionBias:
        """Reads what `save_pretrained` wrote. Raises DataError when the file is missing or damaged."""
        numbers = {"positions": list[int], "examination": list[float], "impressions": list[int]}
        file = Path(folder) / FILE
        record = read_json(file, {**numbers, "standard_error": list[float | None], "method": str})
        theta = np.array(record["examination"], np.float64)
        positions, impressions = (np.array(record[name], np.int64) for name in ("positions", "impressions"))
        errors = np.array([np.nan if x is None else x for x in record["standard_error"]], np.float64)
        fits = len({len(positions), len(theta), len(errors), len(impressions)}) == 1 and len(theta)
        if not fits or not ((theta >= 0) & (theta <= 1)).all() or (np.diff(positions) <= 0).any():
            raise DataError(f"The file {file} is damaged; estimate the bias again.")
        return cls(positions, theta, errors, impressions, record["method"])


@dataclass(frozen=True)
class Cells:
    """Counts of the occupied (group, position) pairs."""

    group: np.ndarray
    place: np.ndarray
    shown: np.ndarray
    clicked: np.ndarray
    groups: int
    places: int

    @classmethod
    def of(cls, log: PositionLog) -> tuple[Cells, np.ndarray]:
        """The cells, and the cell of each impression."""
        places = len(log.positions)
        key, cell = np.unique(log.group.astype(np.int64) * places + log.place, return_inverse=True)
        cells = cls(key // places, key % places, np.zeros(0), np.zeros(0), int(log.group.max()) + 1, places)
        return cells.counted(log, cell.ravel(), np.ones(len(log))), cell.ravel()

    def counted(self, log: PositionLog, cell: np.ndarray, weight: np.ndarray) -> Cells:
        size = len(self.group)
        return replace(self, shown=np.bincount(cell, weight, size), clicked=np.bincount(cell, weight * log.click, size))


def components(cells: Cells) -> np.ndarray:
    """(P,) component of each position: positions are comparable only if groups with a click link them."""
    alive = np.bincount(cells.group, cells.clicked, cells.groups) > 0
    used = alive[cells.group]
    rows, columns = cells.place[used], cells.places + cells.group[used]
    size = cells.places + cells.groups
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    _, labels = np.unique(labels[: cells.places], return_inverse=True)
    return labels.ravel()


def _refuse_unlinked(log: PositionLog, cells: Cells) -> None:
    labels = components(cells)
    if labels.max(initial=0) == 0:
        return
    parts = [log.positions[labels == label].tolist() for label in range(min(4, int(labels.max()) + 1))]
    raise DataError(
        f"Position bias is not identified: nothing with a click was shown at positions of different parts {parts}"
        f"{' and more' if labels.max() > 3 else ''}. Log some random swaps between them or use more data."
    )


def estimate_by_interventions(log: PositionLog, samples: int = 0, seed: int = 0) -> PositionBias:
    """Examination from groups that were shown at several positions; see the top of the file.

    Args:
        log: impressions, with groups whose place does not depend on their attraction.
        samples: bootstrap resamples of whole clusters for standard errors; 0 gives none.
        seed: of the resampling.

    Raises:
        DataError: the log does not identify the ratios, or holds no click.
    """
    cells, cell = Cells.of(log)
    if not cells.clicked.any():
        raise DataError("The log holds no click, so position bias cannot be estimated; check the label.")
    _refuse_unlinked(log, cells)
    theta = _poisson(cells, None)
    errors = _bootstrap(log, cells, cell, theta, samples, seed)
    shown = np.bincount(log.place, minlength=len(log.positions))
    return PositionBias(log.positions.astype(np.int64), np.clip(theta, 0.0, 1.0), errors, shown, "interventions")


def _poisson(cells: Cells, start: np.ndarray | None) -> np.ndarray:
    """Newton's method on the profile likelihood; theta of positions without a click is 0, which is its maximum."""
    blocks, clicks = _blocks(cells)
    free = clicks > 0
    theta = np.ones(cells.places) if start is None else np.maximum(start, 1e-3)
    theta = np.where(free, theta, 0.0)
    value, gradient, information = _profile(blocks, clicks, theta, free)
    for _ in range(_STEPS):
        step = np.zeros(cells.places)
        step[free] = np.clip(np.linalg.lstsq(information, gradient, rcond=1e-12)[0], -2.0, 2.0)
        gain, size = float(gradient @ step[free]), 1.0
        while True:
            new = theta * np.exp(size * step)
            found = _profile(blocks, clicks, new, free)
            if found[0] >= value - 1e-12 * abs(value) or size < 1e-6:
                break
            size /= 2
        theta, (value, gradient, information) = new, found
        if gain < _TOLERANCE * clicks.sum():
            break
    return theta / theta.max()


def _blocks(cells: Cells) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Pieces of (groups x positions) impressions with the clicks of each group, and the clicks of each position.

    Groups without a click, or at one position only, cancel out of the likelihood and are left out.
    """
    total = np.bincount(cells.group, cells.clicked, cells.groups)
    used = (total > 0) & (np.bincount(cells.group, cells.shown > 0, cells.groups) > 1)
    number, mine = np.cumsum(used) - 1, used[cells.group]
    group, place, shown = number[cells.group[mine]], cells.place[mine], cells.shown[mine]
    clicks = np.bincount(place, cells.clicked[mine], cells.places)
    total, blocks = total[used], []
    step = max(1, _CELLS // cells.places)
    for first in range(0, len(total), step):
        part = slice(*np.searchsorted(group, [first, first + step]))
        table = np.zeros((min(step, len(total) - first), cells.places))
        table[group[part] - first, place[part]] = shown[part]
        blocks.append((table, total[first : first + step]))
    return blocks, clicks


def _profile(
    blocks: list[tuple[np.ndarray, np.ndarray]], clicks: np.ndarray, theta: np.ndarray, free: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log-likelihood, gradient and information of the log examinations of the free positions."""
    own, spread = np.zeros(len(clicks)), np.zeros((len(clicks), len(clicks)))
    value = float(clicks[free] @ np.log(theta[free]))
    for table, total in blocks:
        expected = table * theta
        mass = expected.sum(axis=1)
        # A resample can leave a group with clicks at positions of examination 0 only; it says nothing.
        mass = np.where(mass > 0, mass, 1.0)
        share = expected / mass[:, None]
        own += total @ share
        spread += share.T @ (total[:, None] * share)
        value -= float(total @ np.log(mass))
    information = np.diag(own) - spread
    return value, (clicks - own)[free], information[np.ix_(free, free)]


def _bootstrap(
    log: PositionLog, cells: Cells, cell: np.ndarray, theta: np.ndarray, samples: int, seed: int
) -> np.ndarray:
    """(P,) standard errors of the fit, started at theta, over resampled clusters; NaN for fewer than two samples.

    Raises:
        ConfigError: a negative number of samples.
    """
    if samples < 0:
        raise ConfigError(f"samples must be 0 or more, got {samples}.")
    if samples < 2:
        return np.full(len(log.positions), np.nan)
    rng, size = np.random.default_rng(seed), int(log.cluster.max()) + 1
    found = []
    for _ in range(samples):
        weight = np.bincount(rng.integers(0, size, size), minlength=size).astype(np.float64)
        found.append(_poisson(cells.counted(log, cell, weight[log.cluster]), theta))
    return np.std(found, axis=0, ddof=1)
