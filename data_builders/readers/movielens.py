"""Reader `movielens`: ratings of movies, as RecBole's atomic files (`*.inter/.item/.user`) or as ML-1M's `*.dat` files.

A rating becomes one event: `like` from `like_from` stars on, else `click` (watched, not liked). The stars themselves do
not fit the suite's four tables; who needs them (`movielens_segments`) calls `read_ratings`, which both share. A request
is made from every event that has an earlier one of its user. Genres and the year are attributes; MovieLens has no
categories from coarse to fine.

ML-1M codes ages and occupations as numbers; they are spelled out as its own description does. Its files are Latin-1.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.text import read_text
from sidtune.data_builders.readers.raw_files import one_file, pairs_of, source_folder
from sidtune.data_builders.readers.reader import reader
from sidtune.data_builders.tables.columns import encode
from sidtune.data_builders.tables.schema import SCHEMAS, Tables, table_from_columns
from sidtune.data_builders.tables.splits import next_item_requests, tie_events

LAYOUTS = ("auto", "recbole", "dat")
AGES = {"1": "under 18", "18": "18-24", "25": "25-34", "35": "35-44", "45": "45-49", "50": "50-55", "56": "56+"}
OCCUPATIONS = (
    "other", "educator", "artist", "clerical", "college student", "customer service", "doctor", "executive", "farmer",
    "homemaker", "student", "lawyer", "programmer", "retired", "sales", "scientist", "self-employed", "technician",
    "tradesman", "unemployed", "writer",
)  # fmt: skip
_YEAR = re.compile(r"\s*\((\d{4})\)\s*$")
_DAT_COLUMNS = {
    "ratings": ("user_id", "item_id", "rating", "timestamp"),
    "movies": ("item_id", "movie_title", "class"),
    "users": ("user_id", "gender", "age", "occupation", "zip_code"),
}


@dataclass
class Options:
    """Options of the reader.

    Attributes:
        layout: `recbole`, `dat`, or `auto` (whichever files are there).
        like_from: stars from which a rating is a like.
    """

    layout: str = "auto"
    like_from: float = 4.0

    def __post_init__(self) -> None:
        _check_layout(self.layout)


@dataclass(frozen=True)
class Ratings:
    """Ratings as arrays; n ratings, U users, I movies.

    Attributes:
        user, item (n,) int64: rows into the ids. rating (n,) float32: stars. time (n,) int64: unix seconds.
        user_ids (U,), item_ids (I,): in the order of their files.
        titles, years (I,): text and year, None where unknown. genres: list of genres of each movie.
        ages, genders, occupations (U,): text, None where unknown.
        counts: what was done to dirty input.
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray
    user_ids: list[str]
    item_ids: list[str]
    titles: list[str | None]
    years: list[int | None]
    genres: list[list[str]]
    ages: list[str | None]
    genders: list[str | None]
    occupations: list[str | None]
    counts: dict[str, int]


@reader("movielens", Options)
def read(folder: Path, chosen: Options) -> Tables:
    """Reads the folder into the suite's tables; see the module's docstring."""
    found = read_ratings(folder, chosen.layout)
    users, items = pa.array(found.user_ids, pa.string()), pa.array(found.item_ids, pa.string())
    order = np.argsort(found.time, kind="stable")
    liked = pa.array(found.rating[order] >= chosen.like_from)
    columns = {
        "user_id": users.take(pa.array(found.user[order])),
        "item_id": items.take(pa.array(found.item[order])),
        "time": found.time[order],
        "action": pc.if_else(liked, "like", "click"),
    }
    events = table_from_columns("events", columns, len(order))
    requests, rows = next_item_requests(events)
    return Tables(
        items=_item_table(found),
        users=_user_table(found),
        requests=requests,
        events=tie_events(events, rows, requests["request_id"]),
        counts=found.counts,
        notes=[
            f"A rating of {chosen.like_from:g} stars or more is a like, any other a click; the source has no queries.",
            "Many ratings of one user share a second; they keep the order of the file.",
        ],
    )


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ConfigError(f"reader 'movielens': there is no layout '{layout}': {nearest(layout, LAYOUTS)}")


def read_ratings(path: str | Path, layout: str = "auto") -> Ratings:
    """Reads the ratings with what is known of users and movies; of a repeated (user, movie) the first rating counts.

    Args:
        path: the folder.
        layout: `auto`, `recbole` or `dat`.

    Raises:
        ConfigError: an unknown layout. DataError: a file is missing or damaged, or a number is none.
    """
    _check_layout(layout)
    folder = source_folder(path, "movielens")
    if layout == "auto":
        layout = "dat" if (folder / "ratings.dat").is_file() else "recbole"
    if layout == "dat":
        tables = [_read_dat(folder / f"{name}.dat", _DAT_COLUMNS[name]) for name in ("ratings", "movies", "users")]
    else:
        parts = (
            ("inter", ("user_id", "item_id", "rating", "timestamp")),
            ("item", ("item_id", "movie_title")),
            ("user", ("user_id",)),
        )
        tables = [_read_atomic(one_file(folder, f"*.{end}"), needed) for end, needed in parts]
    ratings, movies, people = tables
    if not ratings.num_rows:
        raise DataError(f"The folder {folder} has no ratings; check the path.")
    return _assemble(folder, ratings, movies, people)


def _assemble(folder: Path, ratings: pa.Table, movies: pa.Table, people: pa.Table) -> Ratings:
    stars = _numbers(folder, ratings, "rating", pa.float32())
    times = _numbers(folder, ratings, "timestamp", pa.float64()).astype(np.int64)
    user_ids, user, no_profile = _rows_of(folder, ratings["user_id"], people["user_id"])
    item_ids, item, no_text = _rows_of(folder, ratings["item_id"], movies["item_id"])
    _, first = np.unique(user * len(item_ids) + item, return_index=True)
    kept = np.sort(first)
    titles, years = _titles(movies, len(item_ids))
    genres = [value.replace("|", " ").split() if value else [] for value in _column(movies, "class", len(item_ids))]
    ages = _column(people, "age", len(user_ids))
    jobs = _column(people, "occupation", len(user_ids))
    if _is_coded(people):
        ages = [AGES.get(age or "", age) for age in ages]
        jobs = [OCCUPATIONS[int(job)] if job and int(job) < len(OCCUPATIONS) else job for job in jobs]
    counts = {
        "repeated_ratings": len(user) - len(kept),
        "users_without_profile": no_profile,
        "items_without_text": no_text,
    }
    return Ratings(
        user[kept], item[kept], stars[kept], times[kept], user_ids, item_ids, titles, years, genres, ages,
        _column(people, "gender", len(user_ids)), jobs, counts,
    )  # fmt: skip


def _is_coded(people: pa.Table) -> bool:
    """True where occupations are ML-1M's numbers."""
    jobs = people["occupation"].drop_null() if "occupation" in people.column_names else []
    return len(jobs) > 0 and all(job.as_py().isdecimal() for job in jobs)


def _read_dat(path: Path, columns: tuple[str, ...]) -> pa.Table:
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("latin-1").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"The file {path} cannot be read ({error.strerror or error}); check the path.") from None
    return _parse(path, text.replace("::", "\t"), list(columns))


def _read_atomic(path: Path | None, needed: tuple[str, ...]) -> pa.Table:
    assert path is not None
    head, _, body = read_text(path).partition("\n")
    names = [name.split(":")[0] for name in head.split("\t")]
    for name in needed:
        if name not in names:
            raise DataError(f"The file {path} has no column '{name}' ({nearest(name, names)})")
    return _parse(path, body, names)


def _parse(path: Path, body: str, names: list[str]) -> pa.Table:
    """Tab-separated text, every column as text; an empty field is null."""
    if not body.strip("\n"):
        return pa.table({name: pa.array([], pa.string()) for name in names})
    try:
        return pa_csv.read_csv(
            io.BytesIO(body.encode("utf-8")),
            read_options=pa_csv.ReadOptions(column_names=names),
            parse_options=pa_csv.ParseOptions(delimiter="\t", quote_char=False, escape_char=False),
            convert_options=pa_csv.ConvertOptions(
                column_types={name: pa.string() for name in names}, strings_can_be_null=True, null_values=[""]
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"The file {path} is damaged ({error}); copy or download it again.") from None


def _numbers(folder: Path, table: pa.Table, name: str, kind: pa.DataType) -> np.ndarray:
    try:
        values = table[name].cast(kind)
    except pa.ArrowInvalid as error:
        raise DataError(f"The ratings in {folder} have a '{name}' that is no number ({error}); correct it.") from None
    out = values.to_numpy()
    if values.null_count or not np.isfinite(out).all():
        raise DataError(f"The ratings in {folder} have an empty or infinite '{name}'; correct or remove those lines.")
    return out


def _rows_of(folder: Path, used: pa.ChunkedArray, listed: pa.ChunkedArray) -> tuple[list[str], np.ndarray, int]:
    """Ids (those listed, then those that only occur in the ratings), the row of each use, how many were not listed."""
    if used.null_count or listed.null_count:
        raise DataError(f"The files in {folder} have an empty user or movie id; correct or remove those lines.")
    known = listed.to_pylist()
    if len(set(known)) < len(known):
        raise DataError(f"The files in {folder} list an id twice in the users or movies; keep one line for each.")
    codes, distinct = encode(used)
    place = {name: row for row, name in enumerate(known)}
    rows = np.array([place.setdefault(name, len(place)) for name in distinct.to_pylist()], dtype=np.int64)
    return list(place), rows[codes], len(place) - len(known)


def _column(table: pa.Table, name: str, rows: int) -> list[str | None]:
    values = table[name].to_pylist() if name in table.column_names else []
    return values + [None] * (rows - len(values))


def _titles(movies: pa.Table, rows: int) -> tuple[list[str | None], list[int | None]]:
    """Titles without the year in brackets, and the years (own column, else from the brackets)."""
    titles, years = _column(movies, "movie_title", rows), _column(movies, "release_year", rows)
    out: list[int | None] = []
    for row, title in enumerate(titles):
        match = _YEAR.search(title or "")
        given = years[row] if years[row] and years[row].isdecimal() else (match.group(1) if match else None)
        out.append(int(given) if given else None)
        titles[row] = _YEAR.sub("", title) if title else title
    return titles, out


def _item_table(found: Ratings) -> pa.Table:
    kind = SCHEMAS["items"].arrow_schema.field("attributes").type
    pairs = [
        [{"name": "genre", "value": one} for one in genres] + ([{"name": "year", "value": str(year)}] if year else [])
        for genres, year in zip(found.genres, found.years, strict=True)
    ]
    columns = {"item_id": found.item_ids, "title": found.titles, "attributes": pa.array(pairs, kind)}
    return table_from_columns("items", columns, len(found.item_ids))


def _user_table(found: Ratings) -> pa.Table:
    values = [pa.array(column, pa.string()) for column in (found.ages, found.genders, found.occupations)]
    columns = {"user_id": found.user_ids, "profile": pairs_of(("age", "gender", "occupation"), values)}
    return table_from_columns("users", columns, len(found.user_ids))
