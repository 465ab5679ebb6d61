"""Writes reasonings to learn from: templated seeds, a teacher's, or the model's own by rejection sampling.

    sidtune crs.trajectories --data_dir runs/crs/data --sids_dir runs/crs/sids \\
        --model_dir runs/crs/evolve/round_1/rl --source sampled --hard_set runs/crs/evolve/round_1/hard/hard_set.parquet \\
        --output_dir runs/crs/evolve/round_1/trajectories

`trajectories.jsonl` has one reasoning per line and is what the task `reason_to_sid` reads. A sampled reasoning is kept only when
the search behind it ranks the target first; with `top_k` the same test (target among the first `top_k`) filters seeds. Nothing
that holds the SID or the title of its target is kept. When no sampled reasoning passes, the file is empty and nothing is mixed in.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sidtune.core.config import SEEDS, as_dict, check_range, command
from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.folders import write_folder, write_run, writes
from sidtune.core.pipeline import Step, check_there
from sidtune.core.ragged import drawn, own_rows
from sidtune.data_builders.tables.columns import rows_of

FILE = "trajectories.jsonl"


@dataclass
class Arguments:
    """Options of trajectories.

    Attributes:
        data_dir, sids_dir, model_dir: folders of the earlier steps; `model_dir` is a model folder or a folder that names one.
        output_dir: folder to write.
        source: `templated` (from the request's own features), `file` (a teacher's), or `sampled` (the model's own).
        file: the teacher's JSON lines, for source `file`.
        hard_set: parquet with a column `request_id`: sample for these train requests only.
        aspects: what templated reasonings may name, of `data_builders.tasks.reasoning.ASPECTS`; null for all.
        max_requests: at most so many requests, drawn at random; null for all.
        samples, keep, temperature: reasonings sampled per request, how many correct ones stay at most, and how they are sampled.
        top_k: keep a seed only when its target is then among the first `top_k` places; null keeps all.
        shortest, longest: limits of a seed's reasoning in tokens, its marks included; null sets none.
        replay: a file of trajectories to mix in, for example the seeds.
        replay_share: how many of those, as a share of the new ones.
        max_reasoning_tokens, num_beams, batch_size: of the reasoning and the search.
        seed: of every random choice.
    """

    data_dir: str
    sids_dir: str
    model_dir: str
    output_dir: str
    source: Literal["templated", "file", "sampled"] = "templated"
    file: str | None = None
    hard_set: str | None = None
    aspects: list[str] | None = None
    max_requests: int | None = None
    samples: int = 8
    keep: int = 2
    temperature: float = 1.0
    top_k: int | None = None
    shortest: int | None = None
    longest: int | None = None
    replay: str | None = None
    replay_share: float = 0.15
    max_reasoning_tokens: int = 48
    num_beams: int = 10
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        from sidtune.data_builders.tasks.reasoning import ASPECTS

        if (self.source == "file") != (self.file is not None):
            raise ConfigError("source 'file' and the option 'file' go together; set both or neither.")
        if self.hard_set is not None and self.source != "sampled":
            raise ConfigError("hard_set limits what is sampled; set source: sampled or remove it.")
        check_range(self, 1, "samples", "keep", "top_k", "num_beams", "batch_size", "max_requests", "longest")
        check_range(self, 1, "max_reasoning_tokens")
        check_range(self, 0, "replay_share", "shortest")
        check_range(self, 0, "seed", most=SEEDS)
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}.")
        for aspect in self.aspects or []:
            if aspect not in ASPECTS:
                raise ConfigError(f"aspects: there is no '{aspect}': {nearest(aspect, ASPECTS)}")


def preflight(step: Step) -> None:
    """Refuses files that are not there."""
    check_there(step, **{name: getattr(step.config, name) for name in ("file", "hard_set", "replay")})


@writes("trajectories")
def main(arguments: Arguments) -> None:
    """Makes, tests and writes the trajectories."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from sidtune.decoding.retrieval.reasoning_requests import load_requests

    started, state = time.time(), PartialState(cpu=not torch.accelerator.is_available())
    found = load_requests(
        arguments.data_dir,
        arguments.sids_dir,
        arguments.model_dir,
        "train",
        arguments.seed,
        num_beams=arguments.num_beams,
        max_reasoning_tokens=arguments.max_reasoning_tokens,
        batch_size=arguments.batch_size,
    )
    found.reasoner.retriever.model.to(state.device)
    make = _sampled if arguments.source == "sampled" else _given
    parts = gather_object([make(arguments, found, state)])
    if state.is_main_process:
        lines = sorted((line for part in parts for line in part[0]), key=lambda line: line[0])
        counts = {name: sum(part[1].get(name, 0) for part in parts) for part in parts for name in part[1]}
        _write(arguments, found.source, [line for _, line in lines], counts, started)


def _sampled(arguments: Arguments, found: Any, state: Any) -> tuple[list[tuple[int, dict]], dict[str, int]]:
    """(place, line) of each kept trajectory of this process, and counts."""
    from tqdm.auto import tqdm

    from sidtune.decoding.retrieval.reasoner import sample_trajectories

    if arguments.hard_set is not None:
        from sidtune.trainers.grpo.examples import hard_rows

        found = found.take(hard_rows(arguments.hard_set, found.requests["request_id"]))
    found = found.take(drawn(len(found.item), arguments.max_requests, arguments.seed))
    mine = own_rows(len(found.item), state.process_index, state.num_processes)
    found = found.take(mine)
    prompts = found.reasoner.prompts(found.pieces(np.arange(len(mine))))
    with tqdm(
        total=len(prompts), desc="sampling", unit="request", disable=None if state.is_main_process else True
    ) as bar:
        kept = sample_trajectories(
            found.reasoner,
            prompts,
            found.leaf,
            found.sids,
            found.titles,
            samples=arguments.samples,
            keep=arguments.keep,
            temperature=arguments.temperature,
            seed=arguments.seed + 1000 * state.process_index,
            progress=lambda n: bar.update(min(n, bar.total - bar.n)),
        )
    ids, items = found.ids, found.item_ids
    lines = [
        (int(mine[row]), {"request_id": ids[row], "item_id": items[row], "reasoning": text})
        for row, text in zip(kept.row.tolist(), kept.text, strict=True)
    ]
    return lines, {"requests": len(prompts), **kept.counts}


def _given(arguments: Arguments, found: Any, state: Any) -> tuple[list[tuple[int, dict]], dict[str, int]]:
    """Templated or a teacher's reasonings; made by the main process alone, because they are few."""
    from sidtune.data_builders.tasks.reasoning import ASPECTS, read_reasonings, templated
    from sidtune.decoding.retrieval.reasoner import accept

    if not state.is_main_process:
        return [], {}
    source, reasoner = found.source, found.reasoner
    if arguments.source == "templated":
        given = templated(source, arguments.max_requests, arguments.aspects or ASPECTS)
    else:
        given = read_reasonings(source, arguments.file)
        given = given.take(drawn(len(given.text), arguments.max_requests, arguments.seed))
    counts = {"given": len(given.text)}
    sizes = np.array([len(reasoner.closed_ids(text)) for text in given.text], np.int64)
    longest = min(arguments.longest or arguments.max_reasoning_tokens, arguments.max_reasoning_tokens)
    given = given.take(np.flatnonzero((sizes >= (arguments.shortest or 0)) & (sizes <= longest)))
    counts["fitting_length"] = len(given.text)
    if arguments.top_k is not None:
        place = rows_of(source.requests["request_id"].take(pa.array(given.request)), found.requests["request_id"])
        chosen = found.take(place)
        prompts = reasoner.prompts(chosen.pieces(np.arange(len(place))))
        options = (chosen.leaf, chosen.sids, chosen.titles, arguments.top_k)
        good = accept(reasoner, prompts, [[text] for text in given.text], *options)
        given = given.take(np.flatnonzero([bool(texts) for texts in good]))
    counts["kept"] = len(given.text)
    ids = source.requests["request_id"].take(pa.array(given.request)).to_pylist()
    items = source.sid_ids.take(pa.array(given.item)).to_pylist()
    lines = [
        (place, {"request_id": request, "item_id": item, "reasoning": text})
        for place, (request, item, text) in enumerate(zip(ids, items, given.text, strict=True))
    ]
    return lines, counts


def _write(arguments: Arguments, source: Any, lines: list[dict], counts: dict[str, int], started: float) -> None:
    if not lines and arguments.source != "sampled":
        raise DataError(
            f"No reasoning passed the tests ({counts}); loosen the limits or top_k, or train the model longer first."
        )
    own = len(lines)
    lines = lines + _replayed(arguments, own)
    counts = {**counts, "trajectories": own, "replayed": len(lines) - own}
    with write_folder(arguments.output_dir) as scratch:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (scratch / FILE).write_text(text, encoding="utf-8")
        write_run(scratch, step="trajectories", config=as_dict(arguments), metrics=counts, started=started)
    print(
        f"{Path(arguments.output_dir).name}: "
        + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items())
    )


def _replayed(arguments: Arguments, own: int) -> list[dict]:
    if arguments.replay is None or arguments.replay_share == 0 or own == 0:
        return []
    from sidtune.data_builders.tasks.reasoning import reasoning_lines

    lines = reasoning_lines(arguments.replay)
    count = min(len(lines), max(1, round(own * arguments.replay_share)))
    chosen = np.random.default_rng([arguments.seed, 7]).choice(len(lines), count, replace=False)
    return [lines[row] for row in np.sort(chosen).tolist()]


if __name__ == "__main__":
    command(main, Arguments)
