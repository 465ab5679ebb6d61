"""The self-evolving loop of CRS: cold start on reasoning seeds, then rounds of hard set, GRPO, trajectories and SFT.

    sidtune crs.self-evolve --config recipes/crs/evolve.yaml --data_dir runs/crs/data --sids_dir runs/crs/sids \\
        --model_dir runs/crs/sft --output_dir runs/crs/evolve

    M_0 = SFT(aligned model, seeds)
    for r = 1 ... rounds:
        hard   = train requests whose target M_(r-1) does not rank first behind its greedy reasoning
        M_rl   = GRPO(M_(r-1), hard)                                                    explore
        solved = reasonings sampled from M_rl that rank the target first, at most two per request
        M_r    = SFT(base, solved + some seeds)                                         exploit
        stop when M_r is not better than the best model so far on the validation requests by more than noise

Source: `specs/crs_debiased_grpo.md` 2.5; the number of rounds, the base of each SFT, the share of replay and the stop rule are our
choices (the paper gives none). Every step is a folder with a `run.json`, started by `accelerate launch` as a pipeline's step is;
a step that is done, with the same config and the same inputs, is skipped, so the same command goes on after a kill. `run.json`
of the loop names the model with the best validation mean, the cold start among them, and says whether it answers better with its
reasoning than the aligned model without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from sidtune.core.config import SEEDS, as_dict, build, check_range, command, merged, renamed
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import fingerprint, read_json, write_json, write_run, writes
from sidtune.core.pipeline import Step, do_step, launch_options, run_step
from sidtune.core.scripts import find_script
from sidtune.core.shapes import misfit
from sidtune.metrics.statistics.bootstrap import PairedResult, check_bootstrap, paired_bootstrap

LAUNCH = "alone"
HISTORY = "rounds.json"
START = "cold_start"
_RESERVED = ("data_dir", "sids_dir", "model_dir", "output_dir")


@dataclass
class Arguments:
    """Options of self_evolve.

    Attributes:
        data_dir, sids_dir, model_dir: folders of the earlier steps; `model_dir` is the aligned model (a folder of `sft`).
        output_dir: folder to write.
        rounds: most rounds.
        seeds: options of `crs.trajectories` for the cold start (source `templated` or `file`, max_requests, top_k, ...).
        cold_start: options of `sft` for M_0: one stage, whose task `reason_to_sid` gets the seeds.
        hard: options of `crs.reason` on the train split (hard_k, max_requests, ...).
        grpo: options of `grpo`.
        trajectories: options of `crs.trajectories` (samples, keep, temperature, replay_share, ...).
        sft: options of `sft` for each round: one stage, whose task `reason_to_sid` gets the trajectories.
        sft_from: what that SFT starts from: `rl` (M_rl), `previous` (M_(r-1)) or `aligned` (the aligned model).
        validate: options of `crs.reason` on the validation split.
        stop_within_noise: false runs all rounds whatever they gain, for comparisons; the best model is still named.
        level: confidence level of the paired bootstrap (over users) that decides whether a round gained.
        samples: its resamples.
        launch: options of `accelerate launch` by name, for example `config_file` or `num_processes`.
        seed: given to every step that does not set its own.
    """

    data_dir: str
    sids_dir: str
    model_dir: str
    output_dir: str
    rounds: int = 3
    seeds: dict = field(default_factory=lambda: {"max_requests": 1000})
    cold_start: dict = field(default_factory=dict)
    hard: dict = field(default_factory=lambda: {"max_requests": 2000})
    grpo: dict = field(default_factory=dict)
    trajectories: dict = field(default_factory=dict)
    sft: dict = field(default_factory=dict)
    sft_from: Literal["rl", "previous", "aligned"] = "rl"
    validate: dict = field(default_factory=dict)
    stop_within_noise: bool = True
    level: float = 0.95
    samples: int = 1000
    launch: dict = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, 0, "rounds")
        check_range(self, 0, "seed", most=SEEDS)
        check_bootstrap(self.level, self.samples)
        launch_options(self.launch)
        for name in ("seeds", "cold_start", "hard", "grpo", "trajectories", "sft", "validate"):
            if found := [key for key in getattr(self, name) if key in _RESERVED]:
                raise ConfigError(f"{name}: '{found[0]}' is set by the loop; remove it.")
        if "source" in self.trajectories:
            raise ConfigError("trajectories: the loop samples them from its own model; remove 'source'.")
        Loop(self).steps()


def preflight(step: Step) -> None:
    """Refuses what the steps of the loop refuse."""
    for part in Loop(step.config).steps():
        part.before = step.before
        preflight = getattr(part.script.load(), "preflight", None)
        if preflight is not None:
            preflight(part)


Launch = Callable[[Step, dict[str, Any]], None]


class Loop:
    """Runs the steps of the loop, one after another.

    Args:
        arguments: the options.
        launch: starts a step; default: `accelerate launch`.
    """

    def __init__(self, arguments: Arguments, launch: Launch = run_step) -> None:
        self.arguments, self.launch = arguments, launch
        self.output = Path(arguments.output_dir)
        self.primary = arguments.validate.get("primary", "ndcg@10")

    def run(self) -> dict[str, Any]:
        """All rounds; returns what `run.json` says."""
        arguments, rounds = self.arguments, []
        self._validate("aligned", arguments.model_dir, reasoning=False)
        seeds = self._seeds()
        best = previous = self._fine_tune(START, self._stages("cold_start", seeds), arguments.model_dir)
        best_name = START
        self._validate(START, previous)
        reason = f"all {arguments.rounds} rounds are done"
        for number in range(1, arguments.rounds + 1):
            name = f"round_{number}"
            model = self._round(name, previous, seeds)
            if model is None:
                reason = f"{name}: no sampled reasoning ranked its target first, so there is nothing to learn from"
                break
            self._validate(name, model)
            gain = self._gain(name, best_name)
            rounds.append({"name": name, "against": best_name, **as_dict(gain)})
            self._tell(name, best_name, gain)
            if gain.difference > 0:
                best, best_name = model, name
            if gain.low <= 0 and arguments.stop_within_noise:
                reason = f"{name}: the validation gain over {rounds[-1]['against']} is within noise"
                break
            previous = model
        return self._finish(best, best_name, rounds, reason)

    def steps(self) -> list[Step]:
        """Every kind of step once, with stand-in folders, so that a mistake in the last one shows before the first runs.

        Raises:
            ConfigError: an unknown option, a value of the wrong type, or a stage that does not take the trajectories.
        """
        made = []
        for name, script in (
            ("seeds", "trajectories"),
            ("trajectories", "trajectories"),
            ("hard", "reason"),
            ("validate", "reason"),
            ("grpo", "grpo"),
        ):
            made.append(self._step(f"check/{name}", script, getattr(self.arguments, name), "model", where=name))
        for name in ("cold_start", "sft"):
            made.append(self._step(f"check/{name}", "sft", self._stages(name, None), "model", where=name))
        return made

    def _round(self, name: str, previous: Path, seeds: Path) -> Path | None:
        arguments = self.arguments
        hard = self._do(f"{name}/hard", "reason", {"hard_k": 1, **arguments.hard, "split": "train"}, previous)
        if not read_json(hard / "metrics.json")["hard"]:
            return None
        rl = self._do(f"{name}/rl", "grpo", {**arguments.grpo, "hard_set": str(hard / "hard_set.parquet")}, previous)
        rendering(rl)  # a model without its prompt settings would be asked in other words than it was trained on
        options = {"source": "sampled", "hard_set": str(hard / "hard_set.parquet"), "replay": str(seeds)}
        found = self._do(f"{name}/trajectories", "trajectories", {**arguments.trajectories, **options}, rl)
        if not read_json(found / "run.json")["metrics"]["trajectories"]:
            return None
        base = {"rl": rl, "previous": previous, "aligned": Path(arguments.model_dir)}[arguments.sft_from]
        return self._fine_tune(name, self._stages("sft", found / "trajectories.jsonl"), base)

    def _seeds(self) -> Path:
        return self._do("seeds", "trajectories", self.arguments.seeds, self.arguments.model_dir) / "trajectories.jsonl"

    def _fine_tune(self, name: str, config: dict[str, Any], base: str | Path) -> Path:
        from sidtune.decoding.retrieval.loading import final_model

        config = {**rendering(self.arguments.model_dir), **renamed(find_script("sft").load().Arguments, config, "sft")}
        return self._do(f"{name}/sft", "sft", config, final_model(base))

    def _validate(self, name: str, model: str | Path, reasoning: bool = True) -> None:
        config = {"split": "valid", **self.arguments.validate, "reasoning": reasoning}
        self._do(f"{name}/valid", "reason", config, model)

    def _stages(self, name: str, file: Path | None) -> dict[str, Any]:
        """The config of an SFT step with the file of reasonings in its stage, identified by its content."""
        config = getattr(self.arguments, name)
        stages = config.get("stages", [{"name": "reason", "tasks": {"reason_to_sid": {}}}])
        if misfit(stages, [{"tasks": {"reason_to_sid": dict | None}}]) or len(stages) != 1:
            raise ConfigError(f"{name}: give it exactly one stage, and that stage the task reason_to_sid.")
        given = {} if file is None else {"file": str(file), "sha256": fingerprint(file)}
        return {**config, "stages": [merged(stages[0], {"tasks": {"reason_to_sid": {"options": given}}}, name)]}

    def _step(
        self, name: str, script: str, config: dict[str, Any], model: str | Path, where: str | None = None
    ) -> Step:
        arguments = self.arguments
        found = find_script(script)
        folders = {"data_dir": arguments.data_dir, "sids_dir": arguments.sids_dir, "model_dir": str(model)}
        values = {"seed": arguments.seed, **config, **folders, "output_dir": str(self.output / name)}
        made = build(found.load().Arguments, values, where or name)
        return Step(name, found, made, {role: role for role in folders})

    def _do(self, name: str, script: str, config: dict[str, Any], model: str | Path) -> Path:
        """Runs a step unless it is done; returns its folder."""
        step = self._step(name, script, config, model)
        do_step(step, self.arguments.launch, name, launch=self.launch)
        return step.folder

    def _gain(self, new: str, old: str) -> PairedResult:
        """The primary validation metric of one model minus that of another, request by request."""
        metric = self.primary
        tables = [pq.read_table(self.output / name / "valid" / "per_request.parquet") for name in (new, old)]
        if tables[0]["request_id"].to_pylist() != tables[1]["request_id"].to_pylist():
            raise DataError(
                f"{new} and {old} were validated on other requests; remove the folders of one and run again."
            )
        values = [np.asarray(table[metric]) for table in tables]
        users = tables[0]["user_id"].to_pylist()
        options = {"level": self.arguments.level, "samples": self.arguments.samples, "seed": self.arguments.seed}
        return paired_bootstrap(*values, clusters=users, **options)

    def _tell(self, name: str, against: str, gain: PairedResult) -> None:
        print(
            f"{name}: {self.primary} {gain.difference:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}] against "
            f"{against} (paired bootstrap over {gain.clusters} users)",
            flush=True,
        )

    def _finish(self, best: Path, name: str, rounds: list[dict[str, Any]], reason: str) -> dict[str, Any]:
        from sidtune.decoding.retrieval.loading import final_model

        arguments = self.arguments
        names = ["aligned", START, *(r["name"] for r in rounds)]
        valid = {n: read_json(self.output / n / "valid" / "metrics.json") for n in names}
        final = final_model(best).relative_to(self.output).as_posix()
        reasoning = self._gain(name, "aligned")
        metrics = {"final": final, "best": name, "stopped": reason, "rounds": rounds, "valid": valid}
        metrics["reasoning"] = as_dict(reasoning)
        write_json(self.output / HISTORY, metrics)
        write_run(self.output, step="self_evolve", config=as_dict(self.arguments), metrics=metrics)
        print(f"{self.output.name}: {reason}; the best model is {final}", flush=True)
        self._tell(f"{name} with reasoning", "the aligned model without", reasoning)
        if reasoning.high < 0:
            print(f"On these requests, {arguments.model_dir} answers better without reasoning; use it.", flush=True)
        return metrics


def rendering(model_dir: str | Path) -> dict[str, Any]:
    """The options of `sft` that render prompts as the aligned model knows them.

    Raises:
        DataError: the folder holds no model, or no prompt settings.
    """
    from sidtune.decoding.retrieval.model_folder import final_model, read_settings

    folder, settings = read_settings(final_model(model_dir))
    told = {"templates": str(folder / "templates"), **as_dict(settings), "max_chars": settings.max_chars or {}}
    return renamed(find_script("sft").load().Arguments, told, str(folder))


@writes("self_evolve", tree=True)
def main(arguments: Arguments) -> None:
    """Runs the loop."""
    Loop(arguments).run()


if __name__ == "__main__":
    command(main, Arguments)
