"""Pipelines: steps that are run in order, skipped when they are done, gone on with where a run was interrupted.

A pipeline file lists steps; a step names a script (`core/scripts.py`), its config (a YAML beside the pipeline, inline `args`) and
which earlier steps its inputs come from. Everything that needs no data is checked before the first step starts, by the steps
themselves: each config when it is filled (`Arguments`), the output folder (`core/folders.py`), what takes several steps to see in
the script's `preflight(step)`, where it has one. A step is skipped when its folder is complete, its resolved config is the one
recorded in its `run.json`, and everything that its options name has the content recorded there. A folder holds its `run.json` only
when it is complete, so after a kill the same command goes on. What trains or decodes is started by `accelerate launch`. A step ends
with its runner (`core/stopping.py`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO

import yaml

from sidtune.core.config import (
    ERROR_FILE_VARIABLE,
    SEEDS,
    as_dict,
    build,
    check_keys,
    check_range,
    defaults_of,
    load_yaml,
    merged,
    renamed,
)
from sidtune.core.console import LOGGED_VARIABLE, TRACKER_VARIABLE
from sidtune.core.errors import ConfigError, SidtuneError, nearest
from sidtune.core.folders import RUN_FILE, is_whole, locked, read_json, same_inputs
from sidtune.core.scripts import Script, find_script
from sidtune.core.stopping import run_tied

LOGS = "logs"  # folder beside those of the steps
CLEAR = "\x1b[2K"  # tells a terminal to empty the line
CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"

# What a launcher tells its processes; a launcher started by one of them must not believe that it is meant for it.
_LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
_LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_")


@dataclass
class StepConfig:
    """One step of a pipeline.

    Attributes:
        name: name of the step and of its folder below the pipeline's output_dir.
        script: name of a script, for example `sft` or `crs.reason`.
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
        report_to: tracker that every training logs to, beside its files.
        root: folder that relative config paths start from; default the folder of the pipeline file.
    """

    POSITIONAL: ClassVar[str] = "config"
    steps: list[dict]
    output_dir: str
    name: str = "pipeline"
    launch: dict = field(default_factory=dict)
    seed: int = 0
    until: str | None = None
    force: list[str] = field(default_factory=list)
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    root: str | None = None

    def __post_init__(self) -> None:
        check_range(self, 0, "seed", most=SEEDS)
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise ConfigError(f"report_to: {self.report_to} is not installed; pip install {self.report_to}.")


@dataclass
class Step:
    """A resolved step.

    Attributes:
        config: the filled dataclass of its script.
        inputs: option → folder of an earlier step, as the pipeline names it. before: option → that step.
        processes: how many processes the launcher starts, as far as its options say; else 1.
    """

    name: str
    script: Script
    config: Any
    inputs: dict[str, str]
    before: dict[str, Step] = field(default_factory=dict)
    processes: int = 1

    @property
    def module(self) -> str:
        """Importable name of its script."""
        return self.script.module

    @property
    def folder(self) -> Path:
        """Where its result lies."""
        return Path(self.config.output_dir)

    @property
    def log(self) -> Path:
        """What it printed when it last ran."""
        return self.folder.parent / LOGS / f"{self.name}.log"

    def record(self) -> dict[str, Any]:
        """What decides whether a finished step is still valid."""
        return {key: value for key, value in as_dict(self.config).items() if key not in ("output_dir", *self.inputs)}


def check_there(step: Step, **paths: str | None) -> None:
    """Raises ConfigError for an option that names what is not there, unless a step of the same run may write it."""
    for option, path in paths.items():
        own = step.folder.parent.resolve() in Path(path or "").resolve().parents
        if path and option not in step.before and not own and not Path(path).exists():
            raise ConfigError(f"{option}: {path} does not exist; check the path.")


def resolve(arguments: RunArguments) -> list[Step]:
    """Checks every step and fills its config. Raises ConfigError for the first wrong one, before anything runs."""
    steps: dict[str, Step] = {}
    processes = _processes(launch_options(arguments.launch))
    for place, raw in enumerate(arguments.steps):
        named = f" ('{raw['name']}')" if isinstance(raw, dict) and "name" in raw else ""
        spec = build(StepConfig, raw, f"steps[{place}]{named}")
        where = f"steps[{place}] ('{spec.name}', {spec.config or 'inline args'})"
        if spec.name in steps:
            raise ConfigError(f"{where}: the name '{spec.name}' is used twice; give every step its own name.")
        if spec.name in ("", LOGS) or "/" in spec.name or spec.name.startswith("."):
            raise ConfigError(
                f"{where}: the name of a step is the name of its folder, without '/' and a '.' in front, and not '{LOGS}'."
            )
        try:
            step = _resolved(spec, arguments, steps)
            step.processes = 1 if step.script.alone else processes
            module = step.script.load()
            if hasattr(module, "preflight"):
                module.preflight(step)
            try:
                module.main.check(step.config)
            except ConfigError:  # it has nothing to do there, so it need not be able to write
                if step.name in arguments.force or not is_done(step):
                    raise
        except SidtuneError as error:
            raise ConfigError(f"{where}: {error}") from None
        steps[spec.name] = step
    for name in (*arguments.force, *([arguments.until] if arguments.until else [])):
        if name not in steps:
            raise ConfigError(f"There is no step '{name}': {nearest(name, steps)}")
    return [*steps.values()]


def _resolved(spec: StepConfig, arguments: RunArguments, known: dict[str, Step]) -> Step:
    script = find_script(spec.script)
    module = script.load()
    if getattr(module.main, "step", None) is None:
        raise ConfigError(f"'{script.name}' is no step, because it writes no folder with a run.json; run it by itself.")
    cls = module.Arguments
    values = load_yaml(Path(arguments.root or ".") / spec.config) if spec.config else {}
    values = merged(renamed(cls, values, "config"), renamed(cls, spec.args, "args"), "args")
    if any(one.name == "seed" for one in dataclasses.fields(cls)):
        values.setdefault("seed", arguments.seed)
    before = {}
    for option, source in spec.inputs.items():
        name, _, below = str(source).partition("/")
        if name not in known:
            raise ConfigError(f"the input '{name}' is no earlier step; {nearest(name, known)}")
        values[option], before[option] = str(Path(arguments.output_dir) / name / below), known[name]
    values["output_dir"] = str(Path(arguments.output_dir) / spec.name)
    return Step(spec.name, script, build(cls, values, "args"), dict(spec.inputs), before)


def _processes(launch: dict[str, Any]) -> int:
    """How many processes a launch starts, 1 where its options do not say."""
    file = launch.get("config_file")
    said = {**(load_yaml(file) if file else {}), **launch}.get("num_processes", 1)
    if not isinstance(said, int) or said < 1:
        raise ConfigError(f"launch.num_processes must be at least 1, got {said!r}.")
    return said


def is_done(step: Step) -> bool:
    """True when the folder of `step` is complete and was made from the same config and the same inputs.

    An option that the record does not know yet counts as one with its default.
    """
    if not is_whole(step.folder):
        return False
    record = read_json(step.folder / RUN_FILE)
    left_out = ("output_dir", *step.inputs, *getattr(type(step.config), "GONE", ()))
    old = {key: value for key, value in record.get("config", {}).items() if key not in left_out}
    old = renamed(type(step.config), old, str(step.folder / RUN_FILE))
    defaults = defaults_of(type(step.config))
    if {**defaults, **old} != {**defaults, **step.record()}:
        return False
    return set(step.inputs) <= set(record.get("inputs", {})) and same_inputs(record, step.config)


def launch_command(script: Script, options: dict[str, Any], words: Sequence[str]) -> list[str]:
    """The command line of a script with the options `words`: `accelerate launch`, or plain Python for one that runs alone."""
    if script.alone:
        return [sys.executable, "-m", script.module, *words]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *_launcher_words(options)]
    return [*launch, "-m", script.module, *words]


def _launcher_words(options: dict[str, Any]) -> list[str]:
    """Options of `accelerate launch` as its own parser takes them; YAML's true and false are words again where it wants words.

    Raises:
        ConfigError: an option that it does not have, or a value that it refuses.
    """
    if not options:
        return []
    from accelerate.commands.launch import launch_command_parser

    def refuse(message: str) -> None:
        raise ConfigError(f"launch: accelerate launch says '{message}'; correct it.")

    parser = launch_command_parser()
    parser.error = refuse  # type: ignore[method-assign]
    known = {name.removeprefix("--"): one for one in parser._actions for name in one.option_strings}
    options = {name.replace("-", "_"): value for name, value in options.items()}
    check_keys(options, [name for name in known if "-" not in name], "launch")
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, (list, dict)):
            raise ConfigError(f"launch: {name} must be one value, got {value!r}.")
        if known[name].nargs != 0:  # no flag
            no = "no" if "no" in (known[name].choices or ()) else "false"
            text = {"True": "true", "False": no}.get(str(value), str(value))
            words += [] if value is None else [f"--{name}", text]
        elif str(value).lower() == "true":
            words.append(f"--{name}")
        elif str(value).lower() != "false":
            raise ConfigError(f"launch: {name} must be true or false, got {value!r}.")
    parser.parse_args([*words, "-m", "module"])
    return words


def run_step(step: Step, options: dict[str, Any]) -> None:
    """Starts one step and waits for it. Raises SidtuneError with the step's own sentence when it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        config_file, error_file = Path(scratch) / "config.yaml", Path(scratch) / "error.txt"
        config_file.write_text(yaml.safe_dump(as_dict(step.config), allow_unicode=True, sort_keys=False), "utf-8")
        inherited = dict(os.environ)
        if "RANK" in inherited or "LOCAL_RANK" in inherited:
            inherited = {k: v for k, v in inherited.items() if k not in _LAUNCHER and not k.startswith(_LAUNCHERS)}
        words = launch_command(step.script, options, ["--config", str(config_file)])
        inherited.setdefault("TENSORBOARD_LOGGING_DIR", str(step.log.parent / "tensorboard" / step.name))
        environment = {**inherited, ERROR_FILE_VARIABLE: str(error_file), LOGGED_VARIABLE: step.name}
        step.log.parent.mkdir(parents=True, exist_ok=True)
        with _own_log(step) as log:
            code = run_tied(words, environment, launcher=not step.script.alone, output=log)
        if code:
            told = f"it ended with exit code {code}, see above and {step.log}"
            reason = error_file.read_text("utf-8") if error_file.exists() else told
            raise SidtuneError(f"The step '{step.name}' failed: {reason}")


def _own_log(step: Step) -> TextIO:
    """The log of a step, begun anew where an earlier run of it wrote the file; to anybody else's file it is added."""
    head = f"sidtune {step.script.command}\n"
    ours = not step.log.exists() or step.log.read_bytes().startswith(head.encode())
    log = step.log.open("w" if ours else "a", encoding="utf-8")
    log.write(head)
    log.flush()
    return log


def do_step(
    step: Step, options: dict[str, Any], title: str, force: bool = False, launch: Callable[..., None] = run_step
) -> None:
    """Runs a step that is not done, or is to be run again by `force`; prints a line for it.

    Args:
        options: of the launcher. title: how the line begins. launch: starts the step.
    """
    if not force and is_done(step):
        print(f"{title}: unchanged, skipped", flush=True)
        return
    live = sys.stdout.isatty()  # the step's bar takes the line and gives it back
    print(f"{title} ..." if live else f"{title}: started", end="\r" if live else "\n", flush=True)
    begin, used = time.time(), _cpu_seconds()
    launch(step, launch_options(options))
    if not (step.folder / RUN_FILE).exists():
        raise SidtuneError(f"The step '{step.name}' ended but left no {step.folder / RUN_FILE}; run it again.")
    took = f"{time.time() - begin:.0f} s, CPU {_cpu_seconds() - used:.0f} s"
    print(f"{CLEAR if live else ''}{title}: done in {took}", flush=True)


def _cpu_seconds() -> float:
    """Processor time of the steps that have ended; on a shared machine it says more than the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_pipeline(arguments: RunArguments) -> None:
    """Runs the steps that are not done, and prints one line for each."""
    steps, started, used = resolve(arguments), time.time(), _cpu_seconds()
    if arguments.report_to != "none":
        os.environ[TRACKER_VARIABLE] = arguments.report_to
    with locked(arguments.output_dir):
        for number, step in enumerate(steps, 1):
            do_step(step, arguments.launch, f"[{number}/{len(steps)}] {step.name}", step.name in arguments.force)
            if step.name == arguments.until:
                break
    for step in steps[:number]:
        if getattr(step.script.load(), "SHOW_AT_END", False) and step.log.is_file():
            print(step.log.read_text("utf-8").rpartition(f"sidtune {step.script.command}\n")[2].rstrip(), flush=True)
    took = f"{time.time() - started:.0f} s, CPU {_cpu_seconds() - used:.0f} s"
    print(f"{arguments.name}: finished in {took}, results in {arguments.output_dir}", flush=True)


def launch_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options of `accelerate launch`; a `config_file` that does not exist here is looked for by name in `accelerate_configs/`."""
    options = dict(given)
    file = options.get("config_file")
    if file is not None and not Path(file).exists():
        packaged = CONFIGS / Path(file).name
        if not packaged.exists():
            raise ConfigError(f"launch.config_file {file} does not exist; use a file of accelerate_configs/.")
        options["config_file"] = str(packaged)
    _launcher_words(options)
    return options
