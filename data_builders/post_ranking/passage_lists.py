"""BEIR-style passage lists by file → post-ranking requests: queries, passages, a first-stage run and judgements.

The files are those of BEIR and TREC; nothing is downloaded. Plain text or `.gz`:

* queries and passages: JSON lines with `_id`, `text` (passages also `title`), or tab-separated `id text` without header;
* run: TREC (`query Q0 passage rank score tag`) or tab-separated `query passage score`;
* qrels: tab-separated `query passage score`, with or without BEIR's header, or TREC (`query 0 passage score`).

The paper re-ranks BM25's top 100 with Sentence-BERT vectors; here the run is whatever the file holds, and vectors are
hashed words. A passage that nobody judged counts as 0, as BEIR's own evaluation does, or stays unknown.
With the passage vector as its only field the adapter's attention has nothing to choose from; the run's score is
therefore a field of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.text import read_lines
from sidtune.data_builders.post_ranking.columns import REQUEST_SCHEMA
from sidtune.data_builders.post_ranking.schema import PostRankField, PostRankTable
from sidtune.data_builders.post_ranking.text_hashing import hashed_bag


@dataclass(frozen=True)
class PassageFiles:
    """Where the files are, and how they are read.

    Attributes:
        queries, passages, run: paths. qrels: path, or None: every relevance is unknown.
        top: candidates kept of each query's run, by falling score, ties by their line.
        width: of hashed vectors. split: split name of all requests.
        unjudged: `zero` or `unknown`.

    Raises:
        ConfigError: a value out of range.
    """

    queries: str | Path
    passages: str | Path
    run: str | Path
    qrels: str | Path | None = None
    top: int = 100
    width: int = 128
    split: str = "test"
    unjudged: Literal["zero", "unknown"] = "zero"

    def __post_init__(self) -> None:
        if self.top < 1 or self.width < 1 or self.unjudged not in ("zero", "unknown"):
            raise ConfigError(
                f"Passage lists need top and width >= 1 and unjudged 'zero' or 'unknown', got {self.top}, {self.width}, "
                f"'{self.unjudged}'."
            )


def passage_lists(files: PassageFiles) -> PostRankTable:
    """Builds the table: one request per query that the run names, in order of its first line.

    Raises:
        DataError: a file is missing or damaged, or names an id that the others lack.
    """
    queries, passages = _texts(Path(files.queries)), _texts(Path(files.passages))
    run = _run(Path(files.run), files.top)
    judged = _qrels(Path(files.qrels)) if files.qrels is not None else None
    if not run:
        raise DataError(f"The run {files.run} is empty; check the path.")
    _check_ids(files, run, queries, passages)
    rows: dict[str, int] = {}
    listed, scores, unjudged = [], [], 0
    for query, found in run.items():
        known = None if judged is None else judged.get(query, {})
        entry = []
        for passage, score in found:
            relevance = None if known is None else known.get(passage)
            if known is not None and relevance is None:
                unjudged += 1
                relevance = 0.0 if files.unjudged == "zero" else None
            scores.append(score)
            entry.append({"item_row": rows.setdefault(passage, len(rows)), "init_score": score, "relevance": relevance})
        listed.append(entry)
    requests = pa.table(
        [
            pa.array(list(run)),
            pa.array([files.split] * len(run)),
            pa.array([queries[query][1] for query in run]),
            pa.array(np.arange(len(run))),
            pa.nulls(len(run), pa.int64()),
            pa.array(listed, REQUEST_SCHEMA.field("candidates").type),
            pa.array([[] for _ in run], pa.list_(pa.int64())),
        ],
        schema=REQUEST_SCHEMA,
    )
    asked = [queries[query][1] for query in run]
    fields = (
        PostRankField("passage", "text_vector", "item", files.width),
        PostRankField("ranking", "numeric", "item", 1, ("ranking score",), dynamic=True),
    )
    matrices = {
        "query": hashed_bag(asked, files.width),
        "item/passage": hashed_bag([" ".join(passages[passage]) for passage in rows], files.width),
        "candidate/ranking": np.array(scores, np.float32)[:, None],
        "history/ranking": np.zeros((0, 1), np.float32),
    }
    texts = [
        [(name, text) for name, text in zip(("title", "text"), passages[one], strict=True) if text] for one in rows
    ]
    note = f"{unjudged} candidates are unjudged; their relevance is {files.unjudged}."
    return PostRankTable(requests, list(rows), [], fields, matrices, texts, notes=[note] if judged is not None else [])


def _texts(path: Path) -> dict[str, tuple[str, str]]:
    """id → (title, text) of a JSON-lines or tab-separated file."""
    made: dict[str, tuple[str, str]] = {}
    as_json = ".jsonl" in path.suffixes or path.suffix == ".json"
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        if as_json:
            name, value = _json_line(path, number, line)
        else:
            name, tab, text = line.partition("\t")
            value = ("", text)
            if not tab:
                raise DataError(f"The file {path} has no tab in line {number}; expected 'id<tab>text'.")
        if name in made:
            raise DataError(f"The file {path} names '{name}' again in line {number}; keep each id once.")
        made[name] = value
    return made


def _json_line(path: Path, number: int, line: str) -> tuple[str, tuple[str, str]]:
    try:
        row = json.loads(line)
        return str(row["_id"]), (str(row.get("title") or ""), str(row["text"]))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f"The file {path} has in line {number} no JSON object with '_id' and 'text'; correct it."
        ) from None


def _run(path: Path, top: int) -> dict[str, list[tuple[str, float]]]:
    """query → its candidates with scores, best first."""
    found: dict[str, list[tuple[str, float]]] = {}
    for number, cells in _cells(path):
        query, passage, score = (cells[0], cells[2], cells[4]) if len(cells) == 6 else cells[:3]
        found.setdefault(query, []).append((passage, _score(path, number, score)))
    for query, entries in found.items():
        if len({passage for passage, _ in entries}) < len(entries):
            raise DataError(f"The run {path} names a passage twice for query '{query}'; keep each once.")
        found[query] = sorted(entries, key=lambda entry: -entry[1])[:top]
    return found


def _qrels(path: Path) -> dict[str, dict[str, float]]:
    made: dict[str, dict[str, float]] = {}
    for number, cells in _cells(path):
        if number == 1 and cells[-1] == "score":
            continue
        query, passage, score = (cells[0], cells[2], cells[3]) if len(cells) == 4 else cells[:3]
        # TREC marks spam with negative judgements: not relevant
        made.setdefault(query, {})[passage] = max(_score(path, number, score), 0.0)
    return made


def _cells(path: Path) -> list[tuple[int, list[str]]]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        cells = line.split()
        if len(cells) in (3, 4, 6):
            rows.append((number, cells))
        elif cells:
            raise DataError(f"The file {path} has {len(cells)} fields in line {number}; expected 3, 4 or 6.")
    return rows


def _score(path: Path, number: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise DataError(f"The file {path} has the score '{text}' in line {number}, which is no number; correct it.")
    return value


def _check_ids(files: PassageFiles, run: dict[str, Any], queries: dict[str, Any], passages: dict[str, Any]) -> None:
    for what, path, missing in (
        ("query", files.queries, [query for query in run if query not in queries]),
        ("passage", files.passages, [p for found in run.values() for p, _ in found if p not in passages]),
    ):
        if missing:
            raise DataError(
                f"The run {files.run} names the {what} '{missing[0]}' (and {len(missing) - 1} more), which {path} "
                "lacks; give the files that belong together."
            )
