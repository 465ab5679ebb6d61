"""Trainings killed (SIGKILL) at chosen moments and started again by the same command: are the weights those of a whole run?

    python benchmarks/kills.py [--quick] [--json FILE] [--work FOLDER] [--kills N] [--only sft grpo]

Each trainer runs through its recipe, on tiny data. A whole run is recorded first: every optimizer step, and every file that is
opened for writing, renamed or removed. Of these events some are drawn from each of three phases: while it trains, while it writes
checkpoints, while it writes its result. At each of them a run kills itself; every other time the file written last is cut in half
first, as if the kill had come a moment earlier. The same command then runs to its end, and all weights in the output are compared
bit by bit with those of the whole run; nothing unfinished may lie beside them. A kill that did not happen, or not in its phase, is
not counted. Runs are forks of one process that has loaded the libraries. What is in FILE is not done again, so an interrupted
measurement goes on. Our own; POSIX only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PHASES = {"training": 0.4, "checkpoint": 0.35, "result": 0.25}
_FILES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
_SCRATCH = re.compile(r"\.[^/]+\.partial-\d+(/|$)")
_SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "disable_tqdm": True}


class Watch:
    """Counts the events of a run below a folder, and kills the process at one of them.

    Args:
        folder: of the run. target: number of the event at which to die, None to record only. tear: cut a file first.
        file: receives the events, one `phase<TAB>event` a line, or the one at which the run died.
    """

    def __init__(self, folder: Path, target: int | None, tear: bool, file: Path) -> None:
        self.folder, self.target, self.tear, self.file = str(folder), target, tear, file
        self.events: list[str] = []
        self.phase, self.below, self.quiet, self.steps = "preparation", "", False, 0

    def start(self) -> None:
        """From now on events count."""
        from torch.optim import optimizer

        optimizer.register_optimizer_step_pre_hook(lambda *_: self._step("step begins"))
        optimizer.register_optimizer_step_post_hook(lambda *_: self._step("step ends"))
        sys.addaudithook(self._audit)

    def _step(self, what: str) -> None:
        self.steps += what == "step begins"
        self.phase = "training"
        self._event("training", f"{what} ({self.steps})")

    def _audit(self, event: str, given: tuple) -> None:
        if event not in _FILES or self.quiet:
            return
        if event == "open" and not ((given[1] or "")[:1] in ("w", "a", "x") or given[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = os.fsdecode(given[0]) if isinstance(given[0], (str, bytes, os.PathLike)) else ""
        if event == "shutil.rmtree":
            self.below = path
        if not path.startswith("/") and event in ("os.remove", "os.rmdir"):
            path = f"{self.below}/{path}"  # rmtree names what it removes relative to open folders
        if path.startswith(self.folder):
            self._file(event, path[len(self.folder) + 1 :])

    def _file(self, event: str, path: str) -> None:
        hidden = path.partition(".work_")[1]
        if self.phase == "training" and _SCRATCH.search(path) and not hidden:
            self.phase = "result"
        elif event == "os.mkdir" and hidden and "checkpoint" not in path and self.phase == "result":
            self.phase = "preparation"  # of the next training
        own = self.phase == "training" and "checkpoint-" in path
        self._event("checkpoint" if own else self.phase, f"{event} {re.sub('partial-[0-9]+', 'partial', path)}")

    def _event(self, phase: str, what: str) -> None:
        self.events.append(f"{phase}\t{what}")
        if len(self.events) - 1 == self.target:
            self.quiet = True
            torn = _tear(Path(self.folder)) if self.tear and phase != "training" else ""
            self.file.write_text(f"{phase}\t{what}{torn}")
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        """Writes what was recorded."""
        self.quiet = True
        self.file.write_text("\n".join(self.events))


def _tear(folder: Path) -> str:
    """Cuts the youngest file of what is not finished in half: of a checkpoint without its list, or of a scratch folder."""
    files = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        above = next((one for one in path.parents if one.name.startswith("checkpoint-")), None)
        if (above is not None and not (above / "complete.json").exists()) or _SCRATCH.search(str(path.parent) + "/"):
            files.append((path.stat().st_mtime_ns, path))
    if not files:
        return ""
    youngest = max(files)[1]
    os.truncate(youngest, youngest.stat().st_size // 2)
    return f"; {youngest.name} cut in half"


def forked(work: Callable[[], Any], log: Path) -> int:
    """Runs `work` in a fork, its words in `log`; the exit code, negative for a signal."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def weights(folder: Path) -> dict[str, str]:
    """Relative path → SHA-256 of every file of weights in an output."""
    found = (p for p in sorted(folder.rglob("*.safetensors")) if not p.relative_to(folder).as_posix().startswith("."))
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def trial(
    command: Callable[[Path], None], folder: Path, target: int | None, tear: bool = False
) -> tuple[int, list[str]]:
    """Runs a command with output `folder/out`; exit code and recorded events."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder.parent / f"{folder.name}.events"
    told.unlink(missing_ok=True)

    def work() -> None:
        watch = Watch(folder, target, tear, told)
        watch.start()
        command(folder / "out")
        watch.close()

    code = forked(work, folder.parent / f"{folder.name}.log")
    return code, told.read_text().splitlines() if told.exists() else []


def moments(events: list[str], count: int) -> list[int]:
    """`count` numbers of events, spread over each phase; two are one in a checkpoint and one in the result."""
    chosen: list[int] = []
    for phase, share in PHASES.items():
        places = [n for n, event in enumerate(events) if event.startswith(f"{phase}\t")]
        many = min(len(places), max(1, round(share * count)))
        chosen += [places[int((n + 0.5) * len(places) / many)] for n in range(many)]
    rest = [n for n, event in enumerate(events) if not event.startswith("preparation") and n not in chosen]
    missing = max(0, count - len(set(chosen)))
    return sorted({*chosen[-count:], *(rest[n] for n in np.linspace(0, len(rest) - 1, missing).round().astype(int))})


def measure(
    name: str, command: Callable[[Path], None], work: Path, count: int, rows: list[dict], save: Callable[[], None]
) -> None:
    """All kills of one trainer; adds a row each."""
    code, events = trial(command, work / name / "whole", None)
    if code:
        raise SystemExit(f"{name}: the whole run ended with {code}, see {work / name / 'whole.log'}.")
    whole = weights(work / name / "whole" / "out")
    for number, target in enumerate(moments(events, count)):
        if any(row["name"] == name and row["target"] == target for row in rows):
            continue
        started, folder = time.time(), work / name / f"kill_{target}"
        shutil.rmtree(folder, ignore_errors=True)
        code, died = trial(command, folder, target, tear=number % 2 == 1)
        phase, _, moment = (died or ["\t"])[0].partition("\t")
        again, later = trial(command, folder, None)
        found = weights(folder / "out") if again == 0 else {}
        left = [p.name for p in folder.rglob(".*") if re.search(r"^\.work_|\.partial-|\.lock$", p.name)]
        steps = sum("step begins" in event for event in later)
        row = {
            "name": name, "target": target, "phase": phase, "moment": moment, "counted": code == -signal.SIGKILL,
            "steps_again": steps, "steps_whole": sum("step begins" in event for event in events),
            "equal": found == whole, "left": left, "seconds": round(time.time() - started, 1),
        }  # fmt: skip
        row["counted"] = row["counted"] and events[target].partition("\t")[0] == phase in PHASES
        rows.append(row)
        save()
        verdict = "equal" if row["equal"] and not left else f"DIFFERENT (exit {again}, left {left})"
        print(f"{name}: killed in {phase}: {moment}; {steps} steps again; {verdict}", flush=True)
        if row["equal"]:
            shutil.rmtree(folder)


def prepare(root: Path) -> None:
    """What the trainers read: a small shop, its SIDs, a start model, and next-item sequences."""
    from sidtune.recipes.steps import build_data, init_model, learn_sids

    shop = {"n_items": 150, "n_users": 40, "n_requests": 700, "n_departments": 2, "leaves_per_department": 4}
    build_data.main(build_data.Arguments(output_dir=f"{root}/data", reader="shop_world", options=shop))
    encoder, quantizer = {"name": "tfidf_svd", "dims": 16}, {"name": "residual_kmeans", "level_sizes": [8, 8, 8]}
    folders = {"data_dir": f"{root}/data"}
    learn_sids.main(learn_sids.Arguments(**folders, output_dir=f"{root}/sids", encoder=encoder, quantizer=quantizer))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    scratch = {"model_type": "qwen3", **sizes, "head_dim": 16, "intermediate_size": 48, "tie_word_embeddings": True}
    folders |= {"sids_dir": f"{root}/sids", "output_dir": f"{root}/model"}
    init_model.main(init_model.Arguments(**folders, scratch=scratch, text_vocab_size=512))
    draw, items = np.random.default_rng(0), 60
    (root / "chain").mkdir()
    rows = {str(user): draw.integers(0, items, draw.integers(4, 10)).tolist() for user in range(120)}
    index = {str(n): [f"<a_{n // 10}>", f"<b_{n % 10 // 2}>", f"<c_{n % 2}>"] for n in range(items)}
    (root / "chain" / "X.inter.json").write_text(json.dumps(rows))
    (root / "chain" / "X.index.json").write_text(json.dumps(index))


def commands(root: Path) -> dict[str, Callable[[Path], None]]:
    """Trainer → a run of its recipe with that output folder."""
    from sidtune.recipes.llm4pr import post_rank
    from sidtune.recipes.next_item import train as next_item
    from sidtune.recipes.steps import align_encoder, grpo, sft

    data = {"data_dir": f"{root}/data"}
    folders = {**data, "sids_dir": f"{root}/sids", "model_dir": f"{root}/model"}
    few = {**_SAVING, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    common = {"tasks": {"item_to_sid": {"limit": 20}}, "max_length": 256, "args": few}
    stages = [
        {"name": "align", **common},
        {"name": "adapt", "train": "lora", "lora": {"r": 4, "lora_dropout": 0.1}, **common},
    ]
    rollouts = {**_SAVING, "num_generations": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "beta": 0.02}
    shop = {
        "kind": "shop",
        "world": {"n_items": 200, "n_users": 40, "n_requests": 400, "days": 10},
        "count": 60,
        "candidates": 4,
    }
    training = {
        "backbone": f"{root}/model", "lora": {"r": 4, "alpha": 4, "dropout": 0.1}, "d_h": 8, "max_history": 2,
        "adaptation": {**_SAVING, "max_steps": 4, "per_device_train_batch_size": 4},
        "post_rank": {**_SAVING, "per_device_train_batch_size": 4},
    }  # fmt: skip
    ranking = {
        "methods": ["greedy"],
        "primary": "ndcg@4",
        "seeds": [0],
        "samples": 100,
        "metrics": {"ks": [4], "gain": "linear"},
    }
    arguments = {"num_train_epochs": 4, "per_device_train_batch_size": 48, "learning_rate": 1e-2, "warmup_steps": 2}
    system = {
        "network": {"width": 16, "layers": 1, "heads": 2, "feed_forward": 32, "dropout": 0.1},
        "noise": {"codes": 0.1},
        "fit": {"average": 0.9, "evaluate_every": 1, "patience": 3, "args": arguments},
    }
    table = {
        "systems": {"items": system},
        "seeds": [0],
        "test": False,
        "baselines": [],
        "num_beams": 10,
        "samples": 100,
    }
    text = {
        "scratch": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        "text_vocab_size": 500, "max_length": 16, "base": {"name": "tfidf_svd", "dims": 16},
        "thresholds": {"q2q": 0.5, "i2i": 0.3, "q2i": 0.2}, "args": {**_SAVING, "per_device_train_batch_size": 4},
    }  # fmt: skip
    made: dict[str, tuple[Any, dict]] = {
        "sft": (sft, {**folders, "stages": stages}),
        "grpo": (grpo, {**folders, "max_requests": 40, "rewards": {"list_ndcg": 1.0}, "args": rollouts}),
        "post_rank": (post_rank, {"source": shop, "training": training, **ranking}),
        "next_item": (next_item, {"source": {"path": f"{root}/chain"}, **table}),
        "encoder": (align_encoder, {**data, **text}),
    }  # fmt: skip
    return {
        name: lambda output, step=step, given=given: step.main(step.Arguments(**given, output_dir=str(output)))
        for name, (step, given) in made.items()
    }


def load_libraries() -> None:
    """What every run would load, once; nothing is computed here, because threads do not survive a fork."""
    import sidtune.recipes.llm4pr.training
    import sidtune.recipes.next_item.table
    import sidtune.trainers.contrastive.trainer
    import sidtune.trainers.grpo.stage
    import sidtune.trainers.next_item.trainer
    import sidtune.trainers.post_ranking.trainer
    import sidtune.trainers.sft.stages  # noqa: F401


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two kills of each trainer")
    parser.add_argument("--kills", type=int, default=24, help="kills of each trainer")
    parser.add_argument("--only", nargs="*", help="names of trainers")
    parser.add_argument("--json", type=Path, help="file of the results")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: one that is removed")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    load_libraries()
    rows = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else []

    def save() -> None:
        if options.json:
            machine = {"machine": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()}
            lines = ",\n".join(json.dumps(row) for row in rows)
            options.json.write_text(f'{{"machine": {json.dumps(machine)}, "rows": [\n{lines}\n]}}\n')

    with tempfile.TemporaryDirectory() as scratch:
        root = (options.work or Path(scratch)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        if not (root / "inputs").is_dir():
            shutil.rmtree(root / "preparing", ignore_errors=True)
            (root / "preparing").mkdir()
            if forked(lambda: prepare(root / "preparing"), root / "prepare.log"):
                raise SystemExit((root / "prepare.log").read_text())
            os.rename(root / "preparing", root / "inputs")
        for name, command in commands(root / "inputs").items():
            if not options.only or name in options.only:
                shutil.rmtree(root / name, ignore_errors=True)
                measure(name, command, root, 2 if options.quick else options.kills, rows, save)
    good = [row for row in rows if row["counted"] and row["equal"] and not row["left"]]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name and row["counted"]]
        phases = ", ".join(f"{sum(row['phase'] == phase for row in own)} in {phase}" for phase in PHASES)
        print(f"{name}: {sum(row in good for row in own)} of {len(own)} kills ended in the same weights ({phases})")
    return 0 if len(good) == sum(row["counted"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
