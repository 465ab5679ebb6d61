"""Small post-ranking sources made here: MovieLens ratings in both layouts, and a table with a known truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from sidtune.data_builders.post_ranking.columns import REQUEST_SCHEMA
from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankTable

GENRES = ("Action", "Comedy", "Drama", "Sci-Fi")


def rating_rows(users: int = 20, movies: int = 30, seed: int = 0) -> list[tuple[int, int, int, int]]:
    """(user, movie, stars, time) of hand-sized people: each rates 16-23 movies, one an hour from an own start."""
    rng = np.random.default_rng(seed)
    taste, appeal = rng.normal(size=(users, 2)), rng.normal(size=(movies, 2))
    rows = []
    for user in range(users):
        count = int(rng.integers(16, 24))
        start = 1000 + int(rng.integers(0, 40)) * 3600
        for place, movie in enumerate(rng.choice(movies, count, replace=False).tolist()):
            stars = int(np.clip(np.rint(3.3 + taste[user] @ appeal[movie] + rng.normal(0, 0.4)), 1, 5))
            rows.append((user + 1, movie + 1, stars, start + place * 3600))
    order = rng.permutation(len(rows))
    return [rows[n] for n in order]


def recbole(folder: Path, rows: list[tuple[int, int, int, int]], movies: int = 30, users: int = 20) -> Path:
    folder.mkdir(exist_ok=True)
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "x.inter").write_text(head + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    lines = [f'{m}\tFilm "{m}"\t{1950 + m}\t{GENRES[m % 4]} {GENRES[(m + 1) % 4]}\n' for m in range(1, movies + 1)]
    (folder / "x.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + "".join(lines)
    )
    people = [f"{u}\t{15 + 3 * u % 50}\t{'MF'[u % 2]}\twriter\t12345\n" for u in range(1, users + 1)]
    (folder / "x.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n" + "".join(people)
    )
    return folder


def dat(folder: Path, rows: list[tuple[int, int, int, int]], movies: int = 30, users: int = 20) -> Path:
    """The same ratings as ML-1M has them."""
    folder.mkdir(exist_ok=True)
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in rows))
    lines = [f'{m}::Film "{m}" ({1950 + m})::{GENRES[m % 4]}|{GENRES[(m + 1) % 4]}\n' for m in range(1, movies + 1)]
    (folder / "movies.dat").write_bytes("".join(lines).encode("latin-1"))
    people = [f"{u}::{'MF'[u % 2]}::{(1, 18, 25, 35)[u % 4]}::{20}::12345\n" for u in range(1, users + 1)]
    (folder / "users.dat").write_text("".join(people))
    return folder


def toy_table(
    relevance: np.ndarray,
    features: np.ndarray,
    queries: np.ndarray,
    splits: list[str],
    scores: np.ndarray | None = None,
) -> PostRankTable:
    """Requests whose candidates carry `features` (R, n, d) and known `relevance` (R, n; NaN = no such candidate)."""
    rows, flat = [], []
    item = 0
    for number in range(len(relevance)):
        listed = []
        for place in np.flatnonzero(~np.isnan(relevance[number])):
            score = None if scores is None else float(scores[number, place])
            listed.append({"item_row": item, "init_score": score, "relevance": float(relevance[number, place])})
            flat.append(features[number, place])
            item += 1
        rows.append((f"r{number}", splits[number], "q", number, None, listed, []))
    table = pa.Table.from_pylist([dict(zip(REQUEST_SCHEMA.names, r, strict=True)) for r in rows], schema=REQUEST_SCHEMA)
    fields = (PostRankField("x", "text_vector", "item", features.shape[2]),)
    matrices = {"query": queries.astype(np.float32), "item/x": np.stack(flat).astype(np.float32)}
    return PostRankTable(table, [str(n) for n in range(item)], [], fields, matrices)
