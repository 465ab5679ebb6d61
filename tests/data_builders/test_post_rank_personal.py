"""Personal query vectors: what they hold, counted by hand."""

import numpy as np
import pytest
from post_rank_sources import rating_rows, recbole

from sidtune.data_builders.post_ranking.movielens_segments import SegmentConfig, movielens_segments
from sidtune.data_builders.post_ranking.personal_queries import personal_queries
from sidtune.data_builders.post_ranking.text import request_of
from sidtune.data_builders.readers.movielens import read_ratings


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    ratings = read_ratings(recbole(tmp_path_factory.mktemp("ml") / "r", rating_rows()))
    return movielens_segments(ratings, SegmentConfig(width=4, d_q=6, history=7, upstream_share=0.3))


def by_hand(table, row, scale, most):
    """The vector of one request, from the request in words of its own."""
    one = request_of(table, row, most)

    def standard(side, field, value):
        if value is None:
            return np.zeros(field.dim)
        value = np.asarray(value, float)
        if value.size == 1 and field.kind == "categorical" and field.dim > 1:
            value = np.eye(field.dim)[int(value.item())]
        if field.kind == "numeric":
            mean, spread = scale[side, field.name]
            value = (value - mean) / spread
        return value

    parts = [np.zeros(table.d_q) if one.query_vector is None else one.query_vector]
    parts += [standard("user", field, one.user[field.name]) for field in table.fields_of("user")]
    for field in table.fields_of("item"):
        past = [standard("item", field, item[field.name]) for item in one.history]
        parts.append(np.mean(past, axis=0) if past else np.zeros(field.dim))
    return np.concatenate(parts)


@pytest.mark.parametrize("most", [None, 2])
def test_a_personal_query_is_query_user_and_mean_of_the_history(table, most):
    train = table.rows_of("train")
    scale = table.statistics(train)
    found = personal_queries(table, train, most)
    width = table.d_q + sum(field.dim for field in table.fields)
    assert found.d_q == width and len(found) == len(table)
    vectors = found.batch(np.arange(len(table)), 0).query
    rows = range(0, len(table), max(1, len(table) // 40))
    assert sum(len(request_of(table, row, most or 7).history) > 0 for row in rows) > 5
    for row in rows:
        assert np.allclose(vectors[row], by_hand(table, row, scale, most or 7), atol=1e-5)
    for other in (table.batch(train, 3), found.batch(train, 3)):  # nothing else changes
        assert np.array_equal(other.item_rows, table.batch(train, 3).item_rows)
        assert np.array_equal(other.relevance, table.batch(train, 3).relevance, equal_nan=True)
