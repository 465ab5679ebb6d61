"""Batch retrieval: requests in, the top K items of each out, as parquet in the order of the input.

    accelerate launch -m sidtune.recipes.steps.retrieve --model_dir runs/quickstart/bundle --requests requests.jsonl \\
        --output_dir runs/quickstart/answers --k 100 --num_beams 100

The requests are cut into shards of `shard_size`, whatever the number of processes, and a shard is decoded by one process
and written whole. So the batches, and with them every bit of the result, do not depend on the number of processes, and a
killed run goes on after its last finished shards. A process waits for no other until the end, where the first one joins
the shards. `serving.md` documents the input and the output.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from sidtune.core.config import as_dict, build, command
from sidtune.core.errors import ConfigError, DataError, Problem, SidtuneError
from sidtune.core.folders import RUN_FILE, fingerprint, read_json, versions, write_folder, write_json, write_run
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.retrieval.prompter import Prompter
from sidtune.decoding.retrieval.retriever import SidRetriever
from sidtune.decoding.retrieval.search_request import RequestLimits
from sidtune.decoding.serving.request_files import FileRequests, Requests, Rules, SplitRequests, check_policy
from sidtune.decoding.serving.stock import load_prompter, read_item_ids

T = TypeVar("T")
SCHEMA = pa.schema(
    {
        "request_id": pa.string(),
        "items": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "sids": pa.list_(pa.string()),
    }
)
RESULT_FILE, PLAN_FILE = "results.parquet", "plan.json"
_PATHS = ("model_dir", "sids_dir", "requests", "data_dir", "in_stock")
_PACKAGES = ("sidtune", "torch", "transformers")
_POLL_S, _GRACE_S = 0.2, 3.0
_NOT_IN_PLAN = (*_PATHS, "output_dir", "restart")


@dataclass
class Arguments:
    """Options of retrieve.

    Attributes:
        model_dir: a bundle of publish; or, with sids_dir, a model folder or the folder of sft.
        output_dir: folder to write.
        requests: a .parquet or .jsonl file of requests, or a folder of such files.
        data_dir: data folder whose requests are asked, instead of `requests`.
        split: which requests of data_dir: train, valid or test.
        max_requests: ask a random part of the split (null = all).
        sids_dir: folder of learn_sids.
        k: items per request.
        num_beams: beams per request; default k, at least 10.
        batch_size: requests decoded together.
        shard_size: requests that are written together, and lost together when a process is killed.
        unknown_items: error, or ignore for item ids that the catalogue lacks (in histories, filters, stock list).
        extra_columns: error, or ignore for columns of `requests` that are no part of a request.
        exclude_seen: never find an item of the user's history.
        only_categories: find items of these categories only, for requests that name none themselves.
        in_stock: file of the item ids that may be found, one a line or parquet with `item_id`.
        limits: of a request in a file; keys as in serve.
        seed: of the random part.
        restart: throw away the finished shards of an interrupted run with other options or inputs.
    """

    model_dir: str
    output_dir: str
    requests: str | None = None
    data_dir: str | None = None
    split: str = "test"
    max_requests: int | None = None
    sids_dir: str | None = None
    k: int = 100
    num_beams: int | None = None
    batch_size: int = 64
    shard_size: int = 1024
    unknown_items: str = "error"
    extra_columns: str = "error"
    exclude_seen: bool = False
    only_categories: list[str] = field(default_factory=list)
    in_stock: str | None = None
    limits: dict = field(default_factory=dict)
    seed: int = 0
    restart: bool = False

    def __post_init__(self) -> None:
        if (self.requests is None) == (self.data_dir is None):
            raise ConfigError(
                "Give either requests (a file) or data_dir (a data folder and its split), not both or none."
            )
        if self.split not in ("train", "valid", "test"):
            raise ConfigError(f"split must be train, valid or test, got '{self.split}'.")
        if self.max_requests is not None and self.data_dir is None:
            raise ConfigError("max_requests draws from a data folder; give data_dir, or shorten the file of requests.")
        for name in ("k", "num_beams", "batch_size", "shard_size", "max_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        check_policy("unknown_items", self.unknown_items)
        check_policy("extra_columns", self.extra_columns)


def main(arguments: Arguments) -> None:
    """Answers the requests. Every input is checked before the model is loaded."""
    import torch
    from accelerate import PartialState

    # Several CPU processes form a group only when told that the CPU is meant.
    started, state = time.time(), PartialState(cpu=not torch.accelerator.is_available())
    prompter, model_folder, requests = _together(state, lambda: _inputs(arguments))
    plan = _from_first(state, lambda: _settle(arguments, len(requests.ids)))
    if plan is None:
        if state.is_main_process:
            print(f"{arguments.output_dir}: complete already, nothing to do")
        return
    shards = Shards(arguments, requests.ids)
    mine = [n for n in range(len(shards)) if n % state.num_processes == state.process_index]
    todo = [n for n in mine if not shards.is_done(n)]
    _together(state, lambda: _check(prompter, requests, shards, todo))
    if todo:
        _decode(arguments, state, prompter, model_folder, requests, shards, mine, todo)
    if state.is_main_process:
        _join(arguments, shards, plan, started)


class Shards:
    """The parts of the result, in a hidden folder beside the output folder.

    Attributes:
        folder: where they are.
    """

    def __init__(self, arguments: Arguments, ids: list[str]) -> None:
        self.folder, self._size, self._ids = _work_folder(arguments), arguments.shard_size, ids

    def __len__(self) -> int:
        return -(-len(self._ids) // self._size)

    def rows(self, number: int) -> range:
        return range(number * self._size, min((number + 1) * self._size, len(self._ids)))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"

    def is_done(self, number: int) -> bool:
        """Whether the shard is there and whole; a damaged file (a crash of the machine) counts as absent."""
        try:
            return pq.read_metadata(self.path(number)).num_rows == len(self.rows(number))
        except (OSError, pa.ArrowException):
            return False

    def write(self, number: int, table: pa.Table) -> None:
        scratch = self.folder / f".{number:06d}.partial-{os.getpid()}"
        pq.write_table(table, scratch)
        os.replace(scratch, self.path(number))

    def read(self, number: int) -> pa.Table:
        table = pq.read_table(self.path(number), schema=SCHEMA)
        rows = self.rows(number)
        if table["request_id"].to_pylist() != self._ids[rows.start : rows.stop]:
            raise SidtuneError(
                f"The shard {self.path(number)} holds other requests; delete {self.folder} and run again."
            )
        return table


def _work_folder(arguments: Arguments) -> Path:
    output = Path(arguments.output_dir)
    return output.parent / f".{output.name}.shards"


def _together(state: Any, call: Callable[[], T]) -> T:
    """Runs `call` on every process; an input error of any ends all of them, with one sentence from the first process."""
    from accelerate.utils import gather_object

    value, own = None, None
    try:
        value = call()
    except SidtuneError as error:
        own = error
    sentences = [one for one in gather_object([None if own is None else str(own)]) if one is not None]
    if sentences and state.is_main_process:
        raise own or SidtuneError(sentences[0])
    if sentences:
        time.sleep(_GRACE_S)
        sys.exit(2)
    return value  # type: ignore[return-value]


def _from_first(state: Any, call: Callable[[], T]) -> T:
    """What `call` gives on the first process, on all of them."""
    from accelerate.utils import gather_object

    value = _together(state, lambda: call() if state.is_main_process else None)
    return gather_object([value])[0]


def _inputs(arguments: Arguments) -> tuple[Prompter, Path, Requests]:
    """All but the model, read and checked."""
    limits = build(RequestLimits, arguments.limits, "limits")
    data = None if arguments.data_dir is None else load_folder(arguments.data_dir)
    items = None if data is None else data.items
    prompter, folder = load_prompter(arguments.model_dir, arguments.sids_dir, items)
    catalogue, unknown = prompter.catalogue, arguments.unknown_items
    if arguments.in_stock is not None:
        catalogue.set_stock(read_item_ids(arguments.in_stock), unknown)
    rules = Rules(
        arguments.k,
        max(arguments.k, 10) if arguments.num_beams is None else arguments.num_beams,
        unknown,
        arguments.exclude_seen,
        tuple(arguments.only_categories),
        arguments.in_stock is not None,
        limits,
    )
    catalogue.scope(rules.only_categories, rules.in_stock)  # names an unknown category
    if data is not None:
        part = (arguments.max_requests, arguments.seed)
        return prompter, folder, SplitRequests(data, arguments.split, prompter, rules, *part)
    assert arguments.requests is not None
    return prompter, folder, FileRequests(arguments.requests, prompter, rules, arguments.extra_columns)


def _given(arguments: Arguments) -> dict[str, str]:
    return {name: getattr(arguments, name) for name in _PATHS if getattr(arguments, name) is not None}


def _settle(arguments: Arguments, count: int) -> dict[str, Any] | None:
    """The plan of this run, written beside the output; None when the output is complete already.

    Raises:
        ConfigError: finished shards of other options or inputs are there, and `restart` is not set.
    """
    config = {key: value for key, value in as_dict(arguments).items() if key not in _NOT_IN_PLAN}
    inputs = {f"contents of {name}": fingerprint(path) for name, path in _given(arguments).items()}
    numbers = {f"version of {name}": version for name, version in versions().items() if name in _PACKAGES}
    plan = {"requests": count, **config, **inputs, **numbers}
    record = Path(arguments.output_dir) / RUN_FILE
    if record.exists() and read_json(record).get("metrics", {}).get("plan") == _digest(plan):
        return None
    folder = _work_folder(arguments)
    if arguments.restart and folder.exists():
        shutil.rmtree(folder)
    if (folder / PLAN_FILE).exists():
        old = read_json(folder / PLAN_FILE)
        differs = [key for key in {**plan, **old} if old.get(key) != plan.get(key)]
        if differs:
            raise ConfigError(
                f"{folder} holds finished shards of an interrupted run that differs in {', '.join(differs[:5])}; set "
                "restart: true to throw them away, or run with the former options and inputs to go on."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".*.partial-*"):
        stale.unlink()
    write_json(folder / PLAN_FILE, plan)
    return plan


def _digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _check(prompter: Prompter, requests: Requests, shards: Shards, todo: list[int]) -> None:
    """Reads every request of these shards once, so that a wrong one shows before the model is loaded."""
    problems: list[Problem] = []
    for number in todo:
        rows = shards.rows(number)
        try:
            prompts, _ = requests.read(rows)
        except DataError as error:
            if not error.problems:
                raise
            problems += error.problems
            continue
        problems += _too_long(prompter, requests, prompts, rows)
    if problems:
        raise DataError(problems)


def _too_long(prompter: Prompter, requests: Requests, prompts: list[list[str]], rows: range) -> list[Problem]:
    try:
        prompter.encode(prompts)
        return []
    except DataError:
        pass
    found = []
    for row, pieces in zip(rows, prompts, strict=True):
        try:
            prompter.check_length(pieces)
        except DataError as error:
            what = f"the request '{requests.ids[row][:60]}' is too long: {str(error).rstrip('.')}"
            found.append(Problem("requests", row, None, what, "correct or remove it"))
    return found


def _decode(
    arguments: Arguments,
    state: Any,
    prompter: Prompter,
    model_folder: Path,
    requests: Requests,
    shards: Shards,
    mine: list[int],
    todo: list[int],
) -> None:
    retriever = SidRetriever.from_prompter(prompter, model_folder, state.device)
    total, left = (sum(len(shards.rows(n)) for n in some) for some in (mine, todo))
    label = "retrieving" if state.num_processes == 1 else f"retrieving (process 1 of {state.num_processes})"
    hide = not state.is_main_process
    with tqdm(total=total, initial=total - left, desc=label, unit="request", disable=hide) as bar:
        for number in todo:
            prompts, targets = requests.read(shards.rows(number))
            found = retriever.rank_targets(prompts, targets, arguments.batch_size, bar.update)
            ids = [requests.ids[row] for row in shards.rows(number)]
            shards.write(number, _table(retriever, ids, found))


def _table(retriever: SidRetriever, ids: list[str], found: list[tuple[np.ndarray, np.ndarray]]) -> pa.Table:
    rows = np.concatenate([one for one, _ in found]).tolist()
    items = [retriever.sids.item_ids[row] for row in rows]
    texts = retriever.catalogue.texts
    offsets = pa.array(np.cumsum([0, *(len(one) for one, _ in found)]), pa.int32())
    scores = np.concatenate([one for _, one in found]).astype(np.float32)
    columns = (items, scores, [texts[item] for item in items])
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(values, field.type.value_type))
        for values, field in zip(columns, list(SCHEMA)[1:], strict=True)
    ]
    return pa.table([pa.array(ids, pa.string()), *lists], schema=SCHEMA)


def _join(arguments: Arguments, shards: Shards, plan: dict[str, Any], started: float) -> None:
    """Waits for the shards of the other processes and puts all into the output folder.

    No barrier of the process group: it would time out while a slower process still decodes.
    """
    for number in range(len(shards)):
        while not shards.is_done(number):
            time.sleep(_POLL_S)
    short = 0
    with write_folder(arguments.output_dir) as scratch:
        with pq.ParquetWriter(scratch / RESULT_FILE, SCHEMA, compression="zstd") as writer:
            for number in range(len(shards)):
                table = shards.read(number)
                short += int((np.asarray(pc.list_value_length(table["items"])) < arguments.k).sum())
                writer.write_table(table)
        metrics = {"requests": plan["requests"], "short_lists": short, "shards": len(shards), "plan": _digest(plan)}
        config, inputs = as_dict(arguments), _given(arguments)
        write_run(scratch, step="retrieve", config=config, inputs=inputs, metrics=metrics, started=started)
    shutil.rmtree(shards.folder)
    print(f"{arguments.output_dir}: {plan['requests']} requests answered, {short} with fewer than {arguments.k} items")


if __name__ == "__main__":
    command(main, Arguments)
