"""Batch retrieval: requests in, the top K items of each out, as parquet in the order of the input.

The requests are cut into shards of `shard_size`, whatever the number of processes; the batches, and with them every bit of the
result, do not depend on that number. A process waits for no other until the end, where the first one joins the shards.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from sidtune.core.config import as_dict, build
from sidtune.core.errors import DataError, Problem
from sidtune.core.folders import versions, write_run
from sidtune.core.processes import on_all, on_main
from sidtune.core.resume import Work, identity_of
from sidtune.data_builders.tables.store import load_folder
from sidtune.decoding.retrieval.model_folder import ModelFolder
from sidtune.decoding.retrieval.prompter import Prompter
from sidtune.decoding.retrieval.retriever import SidRetriever
from sidtune.decoding.retrieval.search_request import RequestLimits
from sidtune.decoding.serving.options import BatchOptions
from sidtune.decoding.serving.request_files import FileRequests, Requests, Rules, SplitRequests
from sidtune.decoding.serving.shards import Shards
from sidtune.decoding.serving.stock import read_item_ids

SCHEMA = pa.schema(
    {
        "request_id": pa.string(),
        "items": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()),
        "sids": pa.list_(pa.string()),
    }
)
RESULT_FILE = "results.parquet"
_PACKAGES = ("sidtune", "torch", "transformers")


def answer_requests(options: BatchOptions) -> None:
    """Answers the requests. Every input is checked before the model is loaded."""
    import torch
    from accelerate import PartialState

    # Several CPU processes form a group only when told that the CPU is meant.
    started, state = time.time(), PartialState(cpu=not torch.accelerator.is_available())
    prompter, requests = on_all(lambda: _inputs(options))
    work = Work(options.output_dir, on_main(lambda: _identity(options, len(requests.ids))))
    if on_main(work.is_done):
        if state.is_main_process:
            print(f"{options.output_dir}: complete already, nothing to do")
        return
    begin = lambda: work.begin(refuse="set restart: true to throw it away")  # noqa: E731
    on_main(lambda: begin() if work.folder.is_dir() and not options.restart else None)
    shards = Shards(work.folder, options.shard_size, len(requests.ids), SCHEMA)
    mine = [n for n in range(len(shards)) if n % state.num_processes == state.process_index]
    todo = [n for n in mine if options.restart or not shards.is_done(n)]
    # Nothing is made or thrown away for wrong requests.
    on_all(lambda: _check(prompter, requests, shards, todo))
    if options.restart:
        on_main(work.close)
    on_main(begin)
    if todo:
        _decode(options, state, prompter, requests, shards, mine, todo)
    if state.is_main_process:
        _join(options, shards, work, len(requests.ids), started)


def _inputs(options: BatchOptions) -> tuple[Prompter, Requests]:
    """All but the model, read and checked."""
    limits = build(RequestLimits, options.limits, "limits")
    data = None if options.data_dir is None else load_folder(options.data_dir)
    opened = ModelFolder.open(options.model_dir, options.sids_dir)
    prompter = Prompter.of(opened, None if data is None or options.sids_dir is None else data.items)
    catalogue, unknown = prompter.catalogue, options.unknown_items
    if options.in_stock is not None:
        catalogue.set_stock(read_item_ids(options.in_stock), unknown)
    rules = Rules(
        options.k,
        max(options.k, 10) if options.num_beams is None else options.num_beams,
        unknown,
        options.exclude_seen,
        tuple(options.only_categories),
        options.in_stock is not None,
        limits,
    )
    catalogue.scope(rules.only_categories, rules.in_stock)  # names an unknown category
    if data is not None:
        part = (options.max_requests, options.seed)
        return prompter, SplitRequests(data, options.split, prompter, rules, *part)
    assert options.requests is not None
    return prompter, FileRequests(options.requests, prompter, rules, options.extra_columns)


def _identity(options: BatchOptions, count: int) -> dict[str, Any]:
    """What the result depends on."""
    numbers = {f"version of {name}": version for name, version in versions().items() if name in _PACKAGES}
    values = {**identity_of(options), "number of requests": count, **numbers}
    return {name: value for name, value in values.items() if name != "restart"}


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
    options: BatchOptions,
    state: Any,
    prompter: Prompter,
    requests: Requests,
    shards: Shards,
    mine: list[int],
    todo: list[int],
) -> None:
    retriever = SidRetriever.from_prompter(prompter, state.device)
    total, left = (sum(len(shards.rows(n)) for n in some) for some in (mine, todo))
    label = "retrieving" if state.num_processes == 1 else f"retrieving (process 1 of {state.num_processes})"
    hide = None if state.is_main_process else True
    with tqdm(total=total, initial=total - left, desc=label, unit="request", disable=hide) as bar:
        for number in todo:
            prompts, targets = requests.read(shards.rows(number))
            found = retriever.rank_targets(prompts, targets, options.batch_size, bar.update)
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


def _join(options: BatchOptions, shards: Shards, work: Work, count: int, started: float) -> None:
    """Puts all shards into the output folder."""
    tables, short = shards.joined(), 0
    with work.finish("retrieve") as scratch:
        with pq.ParquetWriter(scratch / RESULT_FILE, SCHEMA, compression="zstd") as writer:
            for table in tables:
                short += int((np.asarray(pc.list_value_length(table["items"])) < options.k).sum())
                writer.write_table(table)
        metrics = {"requests": count, "short_lists": short, "shards": len(shards)}
        write_run(scratch, step="retrieve", config=as_dict(options), metrics=metrics, started=started)
    print(f"{options.output_dir}: {count} requests answered, {short} with fewer than {options.k} items")
