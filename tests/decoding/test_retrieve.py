"""Batch retrieval: the answers of `search` and of the evaluation, in input order, the same bits however it is run."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_pipeline import pipeline, run_in_process

from sidtune.core.config import command
from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.core.folders import read_json
from sidtune.decoding.retrieval.retriever import SidRetriever
from sidtune.decoding.retrieval.search_request import parse_request
from sidtune.decoding.serving import batch
from sidtune.recipes.steps import retrieve

pytestmark = pytest.mark.medium

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WORDS = ("red", "blue", "cup", "boots", "jacket", "leather", "canvas", "cotton", "minimal", "sporty", "tee")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return run_in_process(pipeline(), tmp_path_factory.mktemp("retrieve"), until="bundle")


@pytest.fixture(scope="module")
def retriever(shop):
    return SidRetriever.from_pretrained(shop / "bundle", "cpu")


@pytest.fixture(scope="module")
def lines(retriever):
    """50 requests of every kind."""
    ids, made = retriever.sids.item_ids, []
    for n in range(50):
        line = {"request_id": f"r{97 * n % 50:02d}", "query": f"{WORDS[n % 11]} {WORDS[n * 3 % 11]} {n}"}
        if n % 3 == 0:
            line["history"] = [{"item_id": ids[(n * 5 + i) % len(ids)], "query": "q"} for i in range(1 + n % 6)]
        if n % 4 == 1:
            line |= {"context": [{"name": "place", "value": "home"}], "profile": [{"name": "age", "value": str(n)}]}
        if n % 5 == 2:
            line["exclude_items"] = [ids[(n + i) % len(ids)] for i in range(0, 60, 2)]
        if n % 7 == 3:
            line["only_categories"] = ["shoes"]
        if n % 11 == 5:
            line["exclude_seen"] = True
        if n % 13 == 6:
            line["only_items"] = ids[n : n + 6]
        made.append(line)
    return made


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def options(shop, tmp_path, **changes):
    """Small shards, so that there are many."""
    values = {"model_dir": str(shop / "bundle"), "output_dir": str(tmp_path / "out"), "k": 9, "num_beams": 12}
    values |= {
        "batch_size": 4,
        "shard_size": 8,
        **{k: str(v) if hasattr(v, "parts") else v for k, v in changes.items()},
    }
    return retrieve.Arguments(**values)


def result(folder):
    return pq.read_table(folder / "results.parquet")


@pytest.fixture(scope="module")
def whole(shop, lines, tmp_path_factory):
    """The folder with `requests.jsonl` and the uninterrupted answer in `out`."""
    folder = tmp_path_factory.mktemp("whole")
    file = write_lines(folder / "requests.jsonl", lines)
    retrieve.main(options(shop, folder, requests=file))
    return folder


def test_rows_are_the_answers_of_search_in_the_order_of_the_input(whole, lines, retriever):
    rows = result(whole / "out").to_pylist()
    assert [row["request_id"] for row in rows] == [line["request_id"] for line in lines]
    assert result(whole / "out").schema.equals(batch.SCHEMA)
    short = 0
    for row, line in zip(rows, lines, strict=True):
        body = {key: value for key, value in line.items() if key != "request_id"}
        hits = retriever.search_batch([parse_request({**body, "k": 9, "num_beams": 12})])[0]
        assert row["items"] == [hit.item_id for hit in hits], line
        assert row["sids"] == [hit.sid for hit in hits]
        assert row["scores"] == pytest.approx([hit.score for hit in hits], abs=1e-5)
        short += len(hits) < 9
    record = read_json(whole / "out" / "run.json")
    assert record["metrics"]["short_lists"] == short > 0 and record["metrics"]["requests"] == 50
    assert set(record["inputs"]) == {"model_dir", "requests"}
    assert sorted(p.name for p in whole.iterdir()) == ["out", "requests.jsonl"], "something was left behind"


def test_parquet_and_a_folder_of_files_give_the_same_bits(whole, shop, lines, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "a.jsonl", lines[:13])
    names = sorted({name for line in lines for name in line})  # a table has all columns in all rows
    table = pa.table({name: [line.get(name) for line in lines[13:40]] for name in names})
    pq.write_table(table, folder / "b.parquet")
    write_lines(folder / "c.jsonl", lines[40:])
    retrieve.main(options(shop, tmp_path, requests=folder))
    assert result(tmp_path / "out").equals(result(whole / "out"))


def test_requests_of_a_data_folder_are_answered_as_evaluated(shop, tmp_path):
    retrieve.main(options(shop, tmp_path, data_dir=shop / "data", k=10, num_beams=10))
    asked = pq.read_table(shop / "data/requests/test.parquet")["request_id"].to_pylist()
    found = {row["request_id"]: row["items"] for row in result(tmp_path / "out").to_pylist()}
    assert list(found) == asked
    evaluated = pq.read_table(shop / "eval/predictions/sidtune.parquet").to_pylist()
    assert len(evaluated) > 20 and all(found[row["request_id"]] == row["items"] for row in evaluated)


def test_a_random_part_of_a_split_is_answered_as_in_the_whole(shop, tmp_path):
    whole = {
        row["request_id"]: row["items"] for row in pq.read_table(shop / "eval/predictions/sidtune.parquet").to_pylist()
    }
    drawn = []
    for number, (most, seed) in enumerate([(9, 0), (9, 1), (10_000, 0)]):
        chosen = options(shop, tmp_path, data_dir=shop / "data", k=10, num_beams=10, max_requests=most, seed=seed)
        retrieve.main(dataclasses.replace(chosen, output_dir=str(tmp_path / str(number))))
        drawn.append(result(tmp_path / str(number)))
    asked = pq.read_table(shop / "data/requests/test.parquet")["request_id"].to_pylist()
    names = [table["request_id"].to_pylist() for table in drawn]
    assert names[2] == asked and len(names[0]) == len(names[1]) == 9 and names[0] != names[1]
    assert names[0] == [name for name in asked if name in set(names[0])]
    rows = [row for table in drawn[:2] for row in table.to_pylist() if row["request_id"] in whole]
    assert rows and all(whole[row["request_id"]] == row["items"] for row in rows)


def test_a_million_places_are_bounded_by_the_catalogue(retriever):
    """More places and beams than items give all items, as fast and in as little memory as the catalogue needs."""
    every = retriever.search("red", k=len(retriever.sids))
    assert [h.item_id for h in retriever.search("red", k=10**6, num_beams=10**6)] == [h.item_id for h in every]
    assert len(every) == len(retriever.sids)


def test_step_folders_can_be_asked_too_and_run_wide_filters_hold(shop, retriever, tmp_path):
    ids, stock = retriever.sids.item_ids, tmp_path / "stock.parquet"
    pq.write_table(pa.table({"item_id": ids[:70]}), stock)
    folders = {"model_dir": shop / "sft", "sids_dir": shop / "sids", "data_dir": shop / "data"}
    run = options(shop, tmp_path, **folders, in_stock=stock, exclude_seen=True, only_categories=["shoes"], k=60)
    retrieve.main(dataclasses.replace(run, num_beams=150))
    data = shop / "data"
    shoes = {r["item_id"] for r in pq.read_table(data / "items.parquet").to_pylist() if "shoes" in r["category"]}
    requests = {r["request_id"]: r for r in pq.read_table(data / "requests/test.parquet").to_pylist()}
    events, hidden = pq.read_table(data / "events.parquet").to_pylist(), 0
    for row in result(tmp_path / "out").to_pylist():
        request = requests[row["request_id"]]
        seen = {e["item_id"] for e in events if e["user_id"] == request["user_id"] and e["time"] < request["time"]}
        left = (shoes & set(ids[:70])) - seen
        hidden += len(shoes & set(ids[:70])) - len(left)
        assert set(row["items"]) == left, "all that may be found is found, and nothing else"
    assert hidden > 10


def test_an_interrupted_run_goes_on_where_it_was(whole, shop, tmp_path, monkeypatch):
    run = options(shop, tmp_path, requests=whole / "requests.jsonl")
    original, calls = SidRetriever.rank_targets, []

    def counted(self, prompts, *rest):
        calls.append(len(prompts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, prompts, *rest)

    monkeypatch.setattr(SidRetriever, "rank_targets", counted)
    with pytest.raises(KeyboardInterrupt):
        retrieve.main(run)
    assert not (tmp_path / "out").exists()
    shards = tmp_path / ".work_out"
    assert sorted(p.name for p in shards.glob("*.parquet")) == [f"{n:06d}.parquet" for n in range(3)]
    # A crash of the machine may leave torn files; they are made again, and shard 0 is not.
    (shards / "000001.parquet").write_bytes((shards / "000001.parquet").read_bytes()[:50])
    pq.write_table(pq.read_table(shards / "000002.parquet").slice(1), shards / "000002.parquet")
    (shards / ".000005.partial-1").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"differs in k; set restart: true"):
        retrieve.main(dataclasses.replace(run, k=8))
    changed = write_lines(tmp_path / "other.jsonl", [{"request_id": "x"}])
    with pytest.raises(ConfigError, match="differs in requests, number of requests"):
        retrieve.main(dataclasses.replace(run, requests=str(changed)))
    retrieve.main(run)
    assert calls[4:] == [8, 8, 8, 8, 8, 2]  # the torn shard 1, the short shard 2, and 3 to 6
    assert result(tmp_path / "out").equals(result(whole / "out")) and not shards.exists()
    retrieve.main(run)
    assert len(calls) == 10, "a complete result was made again"
    retrieve.main(dataclasses.replace(run, k=3))
    assert result(tmp_path / "out")["items"].to_pylist() == [r[:3] for r in result(whole / "out")["items"].to_pylist()]


def test_restart_throws_the_old_shards_away(whole, shop, tmp_path, monkeypatch):
    run = options(shop, tmp_path, requests=whole / "requests.jsonl", k=5)
    monkeypatch.setattr(batch, "_join", lambda *rest: None)
    retrieve.main(run)
    monkeypatch.undo()
    retrieve.main(dataclasses.replace(run, k=9, restart=True))
    assert result(tmp_path / "out").equals(result(whole / "out"))


def launched(words, folder):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launcher += [
        str(folder / "accelerate_configs" / "ddp_cpu.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    return [*launcher, "-m", "sidtune.recipes.steps.retrieve", *words]


def words_of(arguments):
    values = dataclasses.asdict(arguments).items()
    return [word for key, value in values if value not in (None, [], {}) for word in (f"--{key}", str(value))]


@pytest.mark.slow
def test_two_processes_give_exactly_the_rows_of_one(whole, shop, tmp_path, repo_root):
    run = options(shop, tmp_path, requests=whole / "requests.jsonl")
    done = subprocess.run(
        launched(words_of(run), repo_root), env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert result(tmp_path / "out").equals(result(whole / "out")), "two processes must give the same bits"
    assert done.stdout.count("50 requests answered") == 1
    wrong = write_lines(tmp_path / "wrong.jsonl", [{"request_id": "a"}] * 2)
    words = words_of(dataclasses.replace(run, requests=str(wrong), output_dir=str(tmp_path / "none")))
    done = subprocess.run(launched(words, repo_root), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "earlier row" in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_killed_run_loses_at_most_one_shard(whole, shop, tmp_path):
    run = options(shop, tmp_path, requests=whole / "requests.jsonl", shard_size=3)
    process = subprocess.Popen(
        [sys.executable, "-m", "sidtune.recipes.steps.retrieve", *words_of(run)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    shards, end = tmp_path / ".work_out", time.monotonic() + 120
    try:
        while len(list(shards.glob("*.parquet"))) < 3:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in shards.glob("*.parquet")}
    assert 3 <= len(before) < 17 and not (tmp_path / "out").exists(), "the kill came too late to show anything"
    seen = {}
    original = batch.Shards.write
    try:
        batch.Shards.write = lambda self, n, table: (seen.setdefault(n, 1), original(self, n, table))
        retrieve.main(run)
    finally:
        batch.Shards.write = original
    assert sorted(seen) == sorted(set(range(17)) - {int(name[:6]) for name in before})
    retrieve.main(
        options(shop, tmp_path, requests=whole / "requests.jsonl", shard_size=3, output_dir=str(tmp_path / "b"))
    )
    assert result(tmp_path / "out").equals(result(tmp_path / "b"))


LINE = {"request_id": "a", "query": "red"}
WRONG = {
    "empty file": ([], "holds no requests"),
    "no id": ([{"query": "x"}], "row 0, column 'request_id': the id is None"),
    "id no text": ([{"request_id": 3}], "the id is 3"),
    "id twice": ([LINE, {**LINE, "query": "b"}], "row 1, column 'request_id': the id 'a' stands on an earlier row"),
    "unknown column": ([{**LINE, "qurey": "x"}], "'qurey' is no part of a request (did you mean 'query')"),
    "k in a row": ([{**LINE, "k": 3}], "'k' is an option of the whole run"),
    "long query": ([{**LINE, "query": "x" * 1001}], "row 0: 'query' has 1001 characters"),
    "unknown item": ([LINE, {"request_id": "b", "history": ["zz"]}], "row 1: The item 'zz' of the history"),
    "unknown excluded": ([{**LINE, "exclude_items": ["zz"]}], "or set unknown_items: ignore"),
    "unknown category": ([{**LINE, "only_categories": ["shoe"]}], "did you mean 'shoes'?"),
    "wrong type": ([{**LINE, "history": 3}], "'history' must be a list"),
    "too long": ([{**LINE, "context": {str(n) + "x" * 190: "y" * 199 for n in range(50)}}], "is too long"),
    "no object": (["x"], "The line is no JSON object"),
}


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test when the model is loaded: all of these must be seen before."""

    def refuse(*rest):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(SidRetriever, "from_prompter", refuse)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_are_named_before_the_model_is_loaded(shop, tmp_path, name, no_model):
    lines, words = WRONG[name]
    with pytest.raises(DataError) as caught:
        retrieve.main(options(shop, tmp_path, requests=write_lines(tmp_path / "in.jsonl", lines)))
    assert words in str(caught.value), str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_wrong_rows_leave_an_interrupted_run_as_it_was(shop, tmp_path, monkeypatch):
    def stop(self, number, table):
        write(self, number, table)
        raise KeyboardInterrupt

    write, good = batch.Shards.write, [{**LINE, "request_id": str(n)} for n in range(9)]
    run = options(shop, tmp_path, requests=write_lines(tmp_path / "in.jsonl", good), shard_size=3)
    monkeypatch.setattr(batch.Shards, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        retrieve.main(run)
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "in.jsonl"}
    assert any(path.name == "000000.parquet" for path in before)
    write_lines(tmp_path / "in.jsonl", [*good[:8], {**good[8], "k": 3}])
    for restart in (False, True):
        with pytest.raises(SidtuneError, match="restart|option of the whole run"):
            retrieve.main(dataclasses.replace(run, restart=restart))
        assert before == {path: path.read_bytes() for path in before}
    write_lines(tmp_path / "in.jsonl", good)
    retrieve.main(run)
    assert result(tmp_path / "out")["request_id"].to_pylist() == [str(n) for n in range(9)]


def test_all_wrong_rows_are_listed_at_once(shop, tmp_path, no_model):
    lines = [{"request_id": str(n), "history": ["zz"] if n % 5 == 4 else []} for n in range(40)]
    with pytest.raises(DataError) as caught:
        retrieve.main(options(shop, tmp_path, requests=write_lines(tmp_path / "in.jsonl", lines)))
    assert [p.row for p in caught.value.problems] == list(range(4, 40, 5))


def test_files_that_are_none_are_named(shop, tmp_path, no_model):
    def refused(words, **changes):
        with pytest.raises(SidtuneError, match=words):
            retrieve.main(options(shop, tmp_path, **changes))

    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "broken.jsonl").write_bytes(b'{"request_id": "a"\n{"request_id": "\xff"}\n')
    pq.write_table(pa.table({"query": ["x"]}), tmp_path / "no_id.parquet")
    pq.write_table(pa.table({"request_id": ["a"], "time": [3]}), tmp_path / "extra.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("a")
    refused("not readable parquet", requests=tmp_path / "broken.parquet")
    refused("not valid JSON", requests=tmp_path / "broken.jsonl")
    refused("not UTF-8", requests=tmp_path / "broken.jsonl")
    refused("no column 'request_id'", requests=tmp_path / "no_id.parquet")
    refused("'time' is no part of a request", requests=tmp_path / "extra.parquet")
    refused("holds no .parquet or .jsonl file", requests=tmp_path / "empty")
    refused("do not exist", requests=tmp_path / "nothing.jsonl")
    refused("must be a .parquet or .jsonl file", requests=tmp_path / "x.csv")
    good = write_lines(tmp_path / "good.jsonl", [LINE])
    refused("does not exist", requests=good, in_stock=tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").write_text("\n")
    refused("holds no item ids", requests=good, in_stock=tmp_path / "empty.txt")
    (tmp_path / "stock.txt").write_text("zz\n")
    refused("'zz' of the stock list is not in the catalogue", requests=good, in_stock=tmp_path / "stock.txt")
    refused("no sidtune bundle", requests=good, model_dir=tmp_path / "empty")
    refused("There is no category 'shoe'", requests=good, only_categories=["shoe"])


def test_what_is_unknown_can_be_ignored(shop, retriever, tmp_path):
    known = retriever.sids.item_ids[5]
    line = {"request_id": "a", "query": "red", "history": ["zz", known], "exclude_items": ["yy"], "time": 3}
    file = write_lines(tmp_path / "in.jsonl", [line])
    retrieve.main(options(shop, tmp_path, requests=file, unknown_items="ignore", extra_columns="ignore"))
    hits = retriever.search_batch([parse_request({"query": "red", "history": [known], "k": 9, "num_beams": 12})])[0]
    assert result(tmp_path / "out")["items"].to_pylist() == [[hit.item_id for hit in hits]]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "Give either requests"),
        (["--requests", "a.jsonl", "--data_dir", "b"], "Give either requests"),
        (["--requests", "a.jsonl", "--k", "0"], "k must be at least 1"),
        (["--requests", "a.jsonl", "--shard_size", "0"], "shard_size must be at least 1"),
        (["--requests", "a.jsonl", "--unknown_items", "skip"], "unknown_items must be error or ignore"),
        (["--requests", "a.jsonl", "--num_beam", "3"], "did you mean 'num_beams'?"),
        (["--data_dir", "b", "--split", "dev"], "split must be train, valid or test"),
        (["--data_dir", "b", "--max_requests", "0"], "max_requests must be at least 1"),
        (["--requests", "a.jsonl", "--max_requests", "5"], "max_requests draws from a data folder"),
        (["--requests", "/nowhere.jsonl"], "do not exist"),
        (["--requests", "a.jsonl", "--limits", '{"max_kk": 3}'], "did you mean 'max_k'?"),
    ],
)
def test_wrong_options_are_one_sentence(shop, words, sentence, tmp_path, capsys, no_model):
    own = ["--model_dir", str(shop / "bundle"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        command(retrieve.main, retrieve.Arguments, [*own, *words])
    text = capsys.readouterr().err
    assert caught.value.code == 2 and sentence in text and text.count("error: ") == 1 and not list(tmp_path.iterdir())
