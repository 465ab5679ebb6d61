"""Runs a pipeline, skipping what is done and going on where a run was interrupted.

    python -m sidtune.recipes.run --config recipes/quickstart/pipeline.yaml

A pipeline file lists steps; a step names a script of `recipes/`, its config (a YAML beside the pipeline and inline `args`) and
which earlier steps its inputs come from. All configs are checked before the first step starts. A step is skipped when its
folder is complete, its resolved config is the one recorded in its `run.json`, and the fingerprints of its inputs are the
recorded ones. A folder holds its `run.json` only when it is complete, so after a kill the same command goes on. What trains or
decodes is started by `accelerate launch`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sidtune.core.config import ERROR_FILE_VARIABLE, as_dict, build, command, load_yaml
from sidtune.core.errors import ConfigError, SidtuneError, nearest
from sidtune.core.folders import RUN_FILE, fingerprint, read_json

SCRIPTS = {
    "build_data": "sidtune.recipes.steps.build_data",
    "align_encoder": "sidtune.recipes.steps.align_encoder",
    "learn_sids": "sidtune.recipes.steps.learn_sids",
    "extend_sids": "sidtune.recipes.steps.extend_sids",
    "init_model": "sidtune.recipes.steps.init_model",
    "sft": "sidtune.recipes.steps.sft",
    "grpo": "sidtune.recipes.steps.grpo",
    "trajectories": "sidtune.recipes.crs.trajectories",
    "self_evolve": "sidtune.recipes.crs.self_evolve",
    "reason": "sidtune.recipes.crs.reason",
    "evaluate": "sidtune.recipes.steps.evaluate",
    "post_rank": "sidtune.recipes.llm4pr.post_rank",
    "publish": "sidtune.recipes.steps.publish",
    "retrieve": "sidtune.recipes.steps.retrieve",
    "report": "sidtune.recipes.steps.report",
}
# What these do does not divide into processes: they run as one, whatever `launch` says.
ALONE = ("build_data", "learn_sids", "extend_sids", "init_model", "post_rank", "publish", "report")
# These fields say where a result lies or how fast it is made, not what it is.
_PLACES = ("output_dir",)


@dataclass
class StepConfig:
    """One step of a pipeline.

    Attributes:
        name: name of the step and of its folder below the pipeline's output_dir.
        script: script of `recipes/` without `.py`.
        config: YAML file with the script's options, relative to the pipeline file.
        inputs: option of the script → earlier step whose folder it gets; a `/` reaches below that folder.
        args: options of the script, over those of `config`.
    """

    name: str
    script: str
    config: str | None = None
    inputs: dict = field(default_factory=dict)
    args: dict = field(default_factory=dict)


@dataclass
class RunArguments:
    """Options of the pipeline runner.

    Attributes:
        name: name of the pipeline, shown in messages.
        steps: list of steps in order, see `StepConfig`.
        output_dir: folder that receives one folder per step.
        launch: options of `accelerate launch` by name, for example `config_file` or `num_processes`.
        seed: given to every step that has a `seed` option and does not set it.
        until: stop after this step.
        force: names of steps to run again even when nothing changed.
        root: folder that relative config paths start from; default the folder of this pipeline file. Set by the runner.
    """

    steps: list[dict]
    output_dir: str
    name: str = "pipeline"
    launch: dict = field(default_factory=dict)
    seed: int = 0
    until: str | None = None
    force: list[str] = field(default_factory=list)
    root: str | None = None


@dataclass
class Step:
    """A resolved step: `config` is the filled dataclass of its script."""

    name: str
    module: str
    config: Any
    inputs: dict[str, str]

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    def record(self) -> dict[str, Any]:
        """What decides whether a finished step is still valid."""
        values = as_dict(self.config)
        return {key: value for key, value in values.items() if key not in (*_PLACES, *self.inputs)}


def resolve(arguments: RunArguments) -> list[Step]:
    """Checks every step and fills its config. Raises ConfigError for the first wrong one, before anything runs."""
    root = Path(arguments.root or ".")
    steps: list[Step] = []
    for place, raw in enumerate(arguments.steps):
        spec = build(StepConfig, raw, f"steps[{place}]")
        if spec.script not in SCRIPTS:
            raise ConfigError(f"steps[{place}]: there is no script '{spec.script}': {nearest(spec.script, SCRIPTS)}")
        if spec.name in (step.name for step in steps):
            raise ConfigError(f"steps[{place}]: the name '{spec.name}' is used twice; give every step its own name.")
        module = importlib.import_module(SCRIPTS[spec.script])
        values = load_yaml(root / spec.config) if spec.config else {}
        values = merged(values, spec.args, f"steps[{place}].args")
        names = {f.name for f in dataclasses.fields(module.Arguments)}
        if "seed" in names:
            values.setdefault("seed", arguments.seed)
        for option, source in spec.inputs.items():
            values[option] = _input_path(source, steps, arguments, place)
        values["output_dir"] = str(Path(arguments.output_dir) / spec.name)
        where = f"steps[{place}] ('{spec.name}', {spec.config or 'inline args'})"
        steps.append(Step(spec.name, SCRIPTS[spec.script], build(module.Arguments, values, where), dict(spec.inputs)))
    for name in (*arguments.force, *([arguments.until] if arguments.until else [])):
        if name not in (step.name for step in steps):
            raise ConfigError(f"There is no step '{name}': {nearest(name, [step.name for step in steps])}")
    return steps


def merged(values: Any, changes: Any, where: str) -> Any:
    """`values` with `changes` laid over them: mappings key by key, a list by the numbers of its elements, anything else replaced.

    So `args: {stages: {2: {args: {max_steps: 5}}}}`, or the option `--steps.3.args.stages.2.args.max_steps 5`, changes one value
    of the step's config file.

    Raises:
        ConfigError: a number that the list does not have.
    """
    if isinstance(values, dict) and isinstance(changes, dict):
        return {**values, **{key: merged(values.get(key), new, f"{where}.{key}") for key, new in changes.items()}}
    if isinstance(values, list) and isinstance(changes, dict) and all(str(key).isdigit() for key in changes):
        made = list(values)
        for key, new in changes.items():
            if int(key) >= len(made):
                raise ConfigError(f"{where} names element {key} of a list of {len(made)}; count from 0.")
            made[int(key)] = merged(made[int(key)], new, f"{where}.{key}")
        return made
    return changes


def _input_path(source: str, steps: list[Step], arguments: RunArguments, place: int) -> str:
    name, _, below = str(source).partition("/")
    if name not in (step.name for step in steps):
        known = nearest(name, [step.name for step in steps])
        raise ConfigError(f"steps[{place}]: the input '{name}' is no earlier step; {known}")
    return str(Path(arguments.output_dir) / name / below)


def is_done(step: Step) -> bool:
    """True when the folder of `step` is complete and was made from the same config and the same inputs.

    An option that the record does not know yet counts as one with its default.
    """
    if not (step.folder / RUN_FILE).exists():
        return False
    record = read_json(step.folder / RUN_FILE)
    old = {k: v for k, v in record.get("config", {}).items() if k not in (*_PLACES, *step.inputs)}
    if {**_defaults(type(step.config)), **old} != {**_defaults(type(step.config)), **step.record()}:
        return False
    recorded = record.get("inputs", {})
    if any(option not in recorded for option in step.inputs):
        return False
    # A step may record more than its wired inputs, for example the raw files a reader read.
    return all(entry["sha256"] == fingerprint(getattr(step.config, option)) for option, entry in recorded.items())


def _defaults(cls: type) -> dict[str, Any]:
    """Defaults of the options of a script, so that an option added since a step ran does not make it run again."""
    made = {}
    for one in dataclasses.fields(cls):
        if one.default_factory is not dataclasses.MISSING:
            made[one.name] = one.default_factory()
        elif one.default is not dataclasses.MISSING:
            made[one.name] = one.default
    return made


def launch_command(step: Step, options: dict[str, Any], config_file: Path) -> list[str]:
    """The command line of a step: `accelerate launch`, or plain Python for one that runs alone."""
    if step.module in [SCRIPTS[name] for name in ALONE]:
        return [sys.executable, "-m", step.module, "--config", str(config_file)]
    words = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    for key, value in options.items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return [*words, "-m", step.module, "--config", str(config_file)]


def run_step(step: Step, options: dict[str, Any]) -> None:
    """Starts one step and waits for it. Raises SidtuneError with the step's own sentence when it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        config_file, error_file = Path(scratch) / "config.yaml", Path(scratch) / "error.txt"
        config_file.write_text(yaml.safe_dump(as_dict(step.config), allow_unicode=True, sort_keys=False), "utf-8")
        environment = {**os.environ, ERROR_FILE_VARIABLE: str(error_file)}
        words = launch_command(step, options, config_file)
        # An own session, so that a stop reaches the workers of the launcher too.
        process = subprocess.Popen(words, env=environment, start_new_session=True)
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        if code:
            reason = (
                error_file.read_text("utf-8") if error_file.exists() else f"it ended with exit code {code}, see above"
            )
            raise SidtuneError(f"The step '{step.name}' failed: {reason}")
    if not (step.folder / RUN_FILE).exists():
        raise SidtuneError(f"The step '{step.name}' ended but left no {step.folder / RUN_FILE}; run it again.")


def main(arguments: RunArguments) -> None:
    """Runs the pipeline."""
    steps = resolve(arguments)
    started = time.time()
    for number, step in enumerate(steps, 1):
        title = f"[{number}/{len(steps)}] {step.name}"
        if step.name not in arguments.force and is_done(step):
            print(f"{title}: unchanged, skipped", flush=True)
        else:
            print(f"{title}: started", flush=True)
            begin = time.time()
            run_step(step, launch_options(arguments))
            print(f"{title}: done in {time.time() - begin:.0f} s", flush=True)
        if step.name == arguments.until:
            break
    print(f"{arguments.name}: finished in {time.time() - started:.0f} s, results in {arguments.output_dir}", flush=True)


def launch_options(arguments: RunArguments) -> dict[str, Any]:
    options = dict(arguments.launch)
    file = options.get("config_file")
    if file is not None and not Path(file).exists():
        packaged = Path(__file__).parent.parent / "accelerate_configs" / Path(file).name
        if not packaged.exists():
            raise ConfigError(f"launch.config_file {file} does not exist; use a file of accelerate_configs/.")
        options["config_file"] = str(packaged)
    return options


def with_root(argv: list[str]) -> list[str]:
    """Adds `--root` from the place of the pipeline file, which `parse` does not pass on."""
    if "--root" in argv:
        return argv
    for place, word in enumerate(argv):
        if word == "--config" and place + 1 < len(argv):
            return [*argv, "--root", str(Path(argv[place + 1]).parent)]
        if word.startswith("--config="):
            return [*argv, "--root", str(Path(word.partition("=")[2]).parent)]
    return argv


if __name__ == "__main__":
    command(main, RunArguments, with_root(sys.argv[1:]))
