"""A small upstream ranker of rated items, fitted on the past only: item vectors, fold-in user vectors, scores.

Own design, standing in for the ranking stage that the paper takes its features from (a deep ranker fed with text).
Item vectors are a truncated SVD of the residuals of all ratings before one moment, the *cut*; nothing later touches
them. A user's vector at a moment is the ridge solution on the user's own earlier residuals (features: 1 and the item
vector), so it too is of the past, and exists for users who came after the cut. The score of an item is its mean rating
so far plus the inner product. All means are shrunk towards the mean of everything earlier.

    mean(i, t)     = (sum of ratings of i before t + shrink * mean(t)) / (count + shrink)
    residual(u, i) = rating − mean(i, time of the rating)
    vector(u, t)   = argmin_w sum over own ratings before t of (residual − w · [1, v_i])^2 + ridge |w|^2
    score(u, i, t) = mean(i, t) + vector(u, t) · [1, v_i]
"""

from __future__ import annotations

import numpy as np

GLOBAL_PRIOR = 3.5  # the mean rating before any rating is known
_BLOCK = 1 << 22


class PastMeans:
    """Mean rating and number of ratings of a key strictly before a moment.

    Args:
        key: (n,) row of a movie (or user) for each rating. rating: (n,). time: (n,) int64.
        shrink: weight of the prior, in ratings.
    """

    def __init__(self, key: np.ndarray, rating: np.ndarray, time: np.ndarray, shrink: float = 5.0) -> None:
        self.shrink = shrink
        self._times = np.unique(time)
        self._step = len(self._times) + 1
        flat = key * self._step + np.searchsorted(self._times, time)
        order = np.argsort(flat, kind="stable")
        self._flat = flat[order]
        self._sum = np.concatenate([[0.0], np.cumsum(rating[order], dtype=np.float64)])
        in_time = np.argsort(time, kind="stable")
        self._all_times = time[in_time]
        self._all_sum = np.concatenate([[0.0], np.cumsum(rating[in_time], dtype=np.float64)])

    def before(self, key: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shrunk mean, count) of each key strictly before each time; both (m,) float64."""
        start = np.searchsorted(self._flat, key * self._step, side="left")
        end = np.searchsorted(self._flat, key * self._step + np.searchsorted(self._times, time), side="left")
        count = (end - start).astype(np.float64)
        total = self._sum[end] - self._sum[start]
        earlier = np.searchsorted(self._all_times, time, side="left")
        overall = (self._all_sum[earlier] + GLOBAL_PRIOR) / (earlier + 1.0)
        return (total + self.shrink * overall) / (count + self.shrink), count


def fit_item_factors(
    user: np.ndarray, item: np.ndarray, residual: np.ndarray, users: int, items: int, width: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Item vectors from the ratings before the cut: right singular vectors of the residuals, times root singular value.

    Args:
        user, item, residual: (n,) the ratings before the cut.
        users, items: numbers of rows. width: k; a smaller rank is filled up with zeros.
        seed: start vector of the solver; signs are fixed, so equal data gives equal vectors.

    Returns:
        (I, k) float64 vectors, zeros for an item without a rating before the cut; and (I,) bool, False for those items.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import svds

    vectors = np.zeros((items, width))
    known = np.zeros(items, bool)
    known[item] = True
    rank = min(width, min(len(np.unique(user)), len(np.unique(item))) - 1)
    if rank < 1 or not np.any(residual):
        return vectors, known
    matrix = csr_matrix((residual.astype(np.float64), (user, item)), shape=(users, items))
    start = np.random.default_rng(seed).standard_normal(min(matrix.shape))
    _, values, right = svds(matrix, k=rank, v0=start)
    order = np.argsort(-values, kind="stable")
    right = right[order] * np.sqrt(values[order])[:, None]
    signs = np.sign(right[np.arange(rank), np.abs(right).argmax(axis=1)])
    vectors[:, :rank] = (right * np.where(signs == 0, 1.0, signs)[:, None]).T
    vectors[~known] = 0.0
    return vectors, known


def fold_in(
    features: np.ndarray, residual: np.ndarray, starts: np.ndarray, ends: np.ndarray, ridge: float = 5.0
) -> np.ndarray:
    """Ridge solutions on stretches of one ordered list of ratings.

    Args:
        features: (n, d) of each rating, users end to end, each in order of time. residual: (n,).
        starts, ends: (m,) stretch of ratings that each solution reads (its user's past); an empty one gives zeros.
        ridge: weight of the penalty.

    Returns:
        (m, d) float64.
    """
    d = features.shape[1]
    made = np.zeros((len(starts), d))
    step = max(1, _BLOCK // (d * d))
    base = ridge * np.eye(d)
    for first in range(0, len(starts), step):
        part = slice(first, first + step)
        low, high = int(starts[part].min()), int(ends[part].max(initial=0))
        if high <= low:
            continue
        x = features[low:high]
        outer = _running(x[:, :, None] * x[:, None, :])
        right = _running(x * residual[low:high, None])
        a, b = starts[part] - low, np.maximum(ends[part], starts[part]) - low
        made[part] = np.linalg.solve(base + outer[b] - outer[a], (right[b] - right[a])[..., None])[..., 0]
    return made


def _running(values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])
