"""The whole way on a tiny shop: results, skipping, resuming after a kill at any step, preflight of every config."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from tiny_pipeline import run_in_process, write_pipeline
from tiny_pipeline import whole_pipeline as pipeline

from sidtune.core import pipeline as run
from sidtune.core.config import parse
from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.core.folders import read_json
from sidtune.metrics.report.readme_table import replace_table
from sidtune.recipes.steps import evaluate, report, seeds

pytestmark = pytest.mark.medium

STEPS = ("data", "sids", "model", "sft", "grpo", "eval", "post_rank", "bundle", "report")
NO_STEPS = ("run", "seeds", "ablation", "serve", "next_item")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(config: Path, output: Path, *options: str) -> subprocess.Popen:
    words = [
        sys.executable,
        "-m",
        "sidtune.recipes.run",
        "--config",
        str(config),
        "--output_dir",
        str(output),
        *options,
    ]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, start_new_session=True
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The tiny pipeline, run once without interruption."""
    return run_in_process(pipeline(), tmp_path_factory.mktemp("finished"))


def test_every_step_leaves_a_complete_folder(finished):
    for name in STEPS:
        record = read_json(finished / name / "run.json")
        assert record["versions"]["torch"] and record["seconds"] >= 0
    assert not [p for p in finished.rglob("*") if ".partial-" in p.name]


def test_metrics_are_of_all_systems_and_the_bound_is_above(finished):
    systems = {s["name"]: s for s in read_json(finished / "eval" / "metrics.json")["systems"]}
    assert set(systems) == {"sidtune", "sft", "popularity", "bm25", "item_knn", "best_for_log"}
    value = {name: system["metrics"]["ndcg@10"]["value"] for name, system in systems.items()}
    assert value["best_for_log"] > max(v for name, v in value.items() if name != "best_for_log")
    assert all(0 <= v <= 1 for v in value.values())


def test_the_start_model_stands_beside_the_trained_one_as_if_evaluated_alone(finished, tmp_path, capsys):
    folders = {f"{name}_dir": str(finished / name) for name in ("data", "sids")}
    alone = evaluate.Arguments(
        **folders, model_dir=str(finished / "sft"), output_dir=str(tmp_path / "alone"), num_beams=10, ks=[5, 10],
        samples=200, baselines=[], upper_bound=False,
    )  # fmt: skip
    evaluate.main(alone)
    assert "against" not in capsys.readouterr().out
    both, one = finished / "eval" / "predictions", tmp_path / "alone" / "predictions" / "sidtune.parquet"
    assert pq.read_table(both / "sft.parquet")["items"].equals(pq.read_table(one)["items"])
    assert not pq.read_table(both / "sidtune.parquet")["items"].equals(pq.read_table(one)["items"])
    values = pq.read_table(finished / "eval" / "per_request.parquet")
    pair = read_json(finished / "eval" / "metrics.json")["against"]["sft"]
    means = [values[f"{name}/ndcg@10"].to_numpy().mean() for name in ("sidtune", "sft")]
    assert (
        pair["difference"] == pytest.approx(means[0] - means[1]) and pair["low"] <= pair["difference"] <= pair["high"]
    )
    assert {"model_dir", "start_dir"} <= set(read_json(finished / "eval" / "run.json")["inputs"])
    with pytest.raises(ConfigError, match="name of another system"):
        dataclasses.replace(alone, start_dir=alone.model_dir, start_name="bm25", baselines=["bm25"])


def test_what_trained_the_published_model_is_told(finished):
    card = (finished / "bundle" / "README.md").read_text("utf-8")
    assert "Training stages: stage_1_align → stage_2_personalise → grpo" in card or "align → personalise → grpo" in card


def test_predictions_are_catalogue_items_and_metrics_follow_from_them(finished):
    import math

    items = set(pq.read_table(finished / "data" / "items.parquet")["item_id"].to_pylist())
    table = pq.read_table(finished / "eval" / "predictions" / "sidtune.parquet").to_pylist()
    requests = {r["request_id"]: r for r in pq.read_table(finished / "data" / "requests" / "test.parquet").to_pylist()}
    total = 0.0
    for row in table:
        assert len(set(row["items"])) == len(row["items"]) and set(row["items"]) <= items
        candidates = requests[row["request_id"]]["candidates"]
        wanted = {c["item_id"] for c in candidates if c["click"] == 1 or c["order"] == 1 or c["like"] == 1}
        gain = sum(1 / math.log2(n + 2) for n, item in enumerate(row["items"][:10]) if item in wanted)
        total += gain / sum(1 / math.log2(n + 2) for n in range(min(10, len(wanted))))
    recorded = read_json(finished / "eval" / "metrics.json")["systems"][0]
    assert recorded["name"] == "sidtune"
    assert recorded["metrics"]["ndcg@10"]["value"] == pytest.approx(total / len(table), abs=1e-9)


def test_another_run_is_compared_request_by_request(finished, tmp_path, capsys):
    folders = {f"{option}_dir": str(finished / name) for option, name in (("data", "data"), ("sids", "sids"))}
    start = evaluate.Arguments(
        **folders,
        model_dir=str(finished / "model"),
        output_dir=str(tmp_path / "start"),
        num_beams=10,
        ks=[10],
        samples=200,
    )
    evaluate.main(start)
    trained = dataclasses.replace(
        start, model_dir=str(finished / "sft"), output_dir=str(tmp_path / "two"), compare_to={"start": start.output_dir}
    )
    evaluate.main(trained)
    assert "ndcg@10 against start: " in capsys.readouterr().out
    record = read_json(tmp_path / "two" / "metrics.json")
    value = {s["name"]: s["metrics"]["ndcg@10"]["value"] for s in record["systems"]}
    first = read_json(tmp_path / "start" / "metrics.json")["systems"][0]["metrics"]["ndcg@10"]["value"]
    assert value["start"] == pytest.approx(first) and value["sidtune"] != value["start"]
    pair = record["against"]["start"]
    assert pair["difference"] == pytest.approx(value["sidtune"] - value["start"])
    assert pair["low"] <= pair["difference"] <= pair["high"]
    with pytest.raises(DataError, match="does not exist"):
        evaluate.main(dataclasses.replace(trained, compare_to={"x": str(tmp_path / "nothing")}))


def test_the_report_shows_the_run(finished):
    page = (finished / "report" / "report.html").read_text("utf-8")
    for words in ("best_for_log", "item_knn", "<svg", "stage_2_personalise", "grpo", "KL to the start", "random order"):
        assert words in page
    record = read_json(finished / "post_rank" / "metrics.json")
    clicks = {row["name"]: f"{row['metrics']['expected clicks']['value']:.4f}" for row in record["systems"]}
    section = page.partition('<section id="post-ranking">')[2].partition("</section>")[0]
    assert all(value in section for value in clicks.values()) and "best list (bound)" in section
    assert "random order (bound)" not in section and "sorted by click probability" in section


def test_a_report_without_grpo_and_post_ranking_says_so(finished, tmp_path):
    folders = {f"{name}_dir": str(finished / name) for name in ("data", "sids")} | {"model_dir": str(finished / "sft")}
    few = {"num_beams": 10, "ks": [10], "samples": 200, "baselines": [], "upper_bound": False}
    evaluate.main(evaluate.Arguments(**folders, output_dir=str(tmp_path / "eval"), **few))
    report.main(report.Arguments(**folders, eval_dir=str(tmp_path / "eval"), output_dir=str(tmp_path / "report")))
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "No post-ranking belongs to this report." in page and "KL to the start" not in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("http://matplotlib.org", "")


def test_a_second_run_skips_everything_and_a_change_reruns_what_follows(finished, tmp_path):
    arguments = run.RunArguments(steps=pipeline()["steps"], output_dir=str(finished))
    assert [run.is_done(step) for step in run.resolve(arguments)] == [True] * 9
    changed = pipeline()
    changed["steps"][5]["args"]["num_beams"] = 12
    done = [
        run.is_done(step) for step in run.resolve(run.RunArguments(steps=changed["steps"], output_dir=str(finished)))
    ]
    assert done == [True] * 5 + [False] + [True] * 3  # bundle and report follow once the new evaluation is written


def test_an_option_added_since_does_not_make_a_step_run_again(finished, tmp_path, monkeypatch):
    steps = run.resolve(run.RunArguments(steps=pipeline()["steps"], output_dir=str(finished)))
    step = next(step for step in steps if step.name == "sids")
    record = read_json(step.folder / "run.json")
    older = {key: value for key, value in record["config"].items() if key != "suffix"}
    monkeypatch.setattr(run, "read_json", lambda path: {**record, "config": older})
    assert run.is_done(step)
    step.config.suffix = True
    assert not run.is_done(step)


def test_only_steps_that_divide_are_launched_in_many_processes(tmp_path):
    steps = run.resolve(run.RunArguments(steps=pipeline()["steps"], output_dir=str(tmp_path)))
    launched = {
        step.name
        for step in steps
        if "accelerate.commands.launch" in run.launch_command(step.script, {"num_processes": 8}, [])
    }
    assert launched == {"sft", "grpo", "eval"}


@pytest.mark.parametrize("inside", [False, True])
def test_only_a_runner_inside_a_launcher_hides_what_it_was_told(tmp_path, monkeypatch, inside):
    step, seen = run.resolve(run.RunArguments(steps=pipeline()["steps"][:1], output_dir=str(tmp_path)))[0], {}
    monkeypatch.setattr(run, "run_tied", lambda words, environment, **_: seen.update(environment))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("FSDP_VERSION", "2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0") if inside else monkeypatch.delenv(name, raising=False)
    run.run_step(step, {})
    assert seen["SIDTUNE_ERROR_FILE"]
    assert [name in seen for name in ("ACCELERATE_MIXED_PRECISION", "FSDP_VERSION")] == [not inside] * 2
    assert not {"RANK", "LOCAL_RANK"} & seen.keys()


def test_a_tracker_is_named_once_and_reaches_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to: trackio is not installed; pip install trackio"):
        run.RunArguments([], str(tmp_path), report_to="trackio")
    with pytest.raises(ConfigError, match="'report_to' must be"):
        run.build(run.RunArguments, {"steps": [], "output_dir": "x", "report_to": "clearml"}, "run")
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: object())
    arguments = run.RunArguments(pipeline()["steps"][:1], str(tmp_path / "p"), report_to="tensorboard")
    monkeypatch.undo()
    seen = {}
    monkeypatch.setenv("SIDTUNE_REPORT_TO", "none")
    monkeypatch.setattr(run, "run_tied", lambda words, environment, **_: seen.update(environment) or 1)
    with pytest.raises(SidtuneError):
        run.run_pipeline(arguments)
    assert seen["SIDTUNE_REPORT_TO"] == "tensorboard"
    assert seen["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "p" / "logs" / "tensorboard" / "data")


def test_the_seed_reaches_every_step(tmp_path):
    arguments = run.RunArguments(steps=pipeline()["steps"], output_dir=str(tmp_path), seed=7)
    seeds_of = {step.name: step.config.seed for step in run.resolve(arguments) if hasattr(step.config, "seed")}
    assert set(seeds_of.values()) == {7} and {"data", "sids", "model", "sft", "eval"} <= set(seeds_of)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p["steps"][0].update(script="bild_data"), "did you mean 'build_data'?"),
        (lambda p: p["steps"][0].update(nam="x"), "unknown key 'nam'"),
        (lambda p: p["steps"][5]["args"].update(num_beam=3), "did you mean 'num_beams'?"),
        (lambda p: p["steps"][5]["args"].update(num_beams="many"), "must be an integer"),
        (lambda p: p["steps"][5]["args"].update(primary="ndgc@10"), "primary is 'ndgc@10'"),
        (lambda p: p["steps"][5]["args"].update(baselines=["bm52"]), "did you mean 'bm25'?"),
        (lambda p: p["steps"][3]["args"]["stages"][0].update(task={}), "did you mean 'tasks'?"),
        (lambda p: p["steps"][3]["args"]["stages"][0]["tasks"].update(item_to_sidd={}), "did you mean 'item_to_sid'?"),
        (
            lambda p: p["steps"][3]["args"]["stages"][0]["args"].update(lerning_rate=1.0),
            "did you mean 'learning_rate'?",
        ),
        (lambda p: p["steps"][3].update(inputs={"data_dir": "dta"}), "no earlier step"),
        (lambda p: p["steps"][8].update(name="eval"), "used twice"),
        (lambda p: p["steps"][7]["args"].update(push_to_hub=True), "hub_model_id is missing"),
        *((lambda p, name=name: p["steps"][0].update(script=name), "is no step") for name in NO_STEPS),
    ],
)
def test_every_config_is_checked_before_the_first_step(tmp_path, change, words):
    values = pipeline()
    change(values)
    with pytest.raises(ConfigError) as caught:
        run.run_pipeline(run.RunArguments(steps=values["steps"], output_dir=str(tmp_path)))
    assert words in str(caught.value), str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_one_value_of_a_step_s_config_file_can_be_changed(tmp_path):
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(pipeline()["steps"][3]["args"]), "utf-8")
    values = pipeline()
    values["steps"][3] = {**values["steps"][3], "config": "sft.yaml", "args": {}}
    file = write_pipeline(tmp_path / "p.yaml", values)
    argv = ["--config", str(file), "--output_dir", "out", "--steps.3.args.stages.1.args.max_steps", "5"]
    steps = run.resolve(parse(run.RunArguments, argv))
    stages = steps[3].config.stages
    assert stages[1]["args"] == {**pipeline()["steps"][3]["args"]["stages"][1]["args"], "max_steps": 5}
    assert stages[0] == pipeline()["steps"][3]["args"]["stages"][0] and steps[3].config.prompt_max_length == 256
    with pytest.raises(ConfigError, match="element '7' of a list of 2"):
        run.resolve(parse(run.RunArguments, [*argv, "--steps.3.args.stages.7.name", "x"]))


def test_seeds_are_summarised_as_mean_and_spread(finished, tmp_path):
    record = read_json(finished / "eval" / "metrics.json")
    other = json.loads(json.dumps(record))
    for system in other["systems"]:
        for estimate in system["metrics"].values():
            estimate["value"] += 0.02
    summary = seeds.summarise({0: record, 1: other}, ["ndcg@10"])
    one = summary["systems"]["bm25"]["metrics"]["ndcg@10"]
    base = next(s for s in record["systems"] if s["name"] == "bm25")["metrics"]["ndcg@10"]["value"]
    assert one["mean"] == pytest.approx(base + 0.01) and one["std"] == pytest.approx(0.02 / 2**0.5)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    replace_table(readme, seeds.markdown(summary))
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "**sidtune**" in text
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert names == ["system", "popularity", "bm25", "item_knn", "sft", "**sidtune**", "best_for_log"]
    assert (
        "sidtune minus sft on ndcg@10, seed by seed: " in text
        and text.count(f"{record['against']['sft']['low']:+.4f}") == 2
    )


@pytest.mark.slow
def test_two_processes_evaluate_exactly_as_one(finished, tmp_path, repo_root):
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    words += [
        str(repo_root / "accelerate_configs" / "ddp_cpu.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    words += ["-m", "sidtune.recipes.steps.evaluate", "--output_dir", str(tmp_path / "eval"), "--num_beams", "10"]
    words += ["--ks", "[5, 10]", "--samples", "200", "--start_name", "sft"]
    for option, folder in (("data_dir", "data"), ("sids_dir", "sids"), ("model_dir", "grpo"), ("start_dir", "sft")):
        words += [f"--{option}", str(finished / folder)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one = pq.read_table(finished / "eval" / "predictions" / "sidtune.parquet")
    two = pq.read_table(tmp_path / "eval" / "predictions" / "sidtune.parquet")
    assert one["request_id"].equals(two["request_id"]) and one["items"].equals(two["items"])
    assert _values(tmp_path) == _values(finished)


@pytest.mark.slow
def test_a_pipeline_killed_at_every_step_ends_with_the_metrics_of_an_uninterrupted_one(finished, tmp_path):
    """Kills the runner and all its children soon after each step has begun; the kill of `sft` falls into its stages."""
    values = pipeline()
    values["steps"][3]["args"]["stages"][1]["args"].update(save_strategy="steps", save_steps=1)
    config = write_pipeline(tmp_path / "p.yaml", values)
    output = tmp_path / "out"
    kills = [
        ("data", 1.0),
        ("sids", 4.0),
        ("model", 4.0),
        ("sft", 9.0),
        ("grpo", 8.0),
        ("eval", 6.0),
        ("post_rank", 7.0),
        ("bundle", 4.0),
        ("report", 3.0),
    ]
    landed = 0
    for step, seconds in kills:
        process = start(config, output)
        try:
            for line in process.stdout:
                assert "failed" not in line, line
                if f"] {step}: started" in line:
                    break
                if "finished in" in line:
                    break
            time.sleep(seconds)
        finally:
            landed += process.poll() is None
            _kill_tree(process.pid)
            process.stdout.close()
            process.wait()
    assert landed >= 7, "most kills must hit a running pipeline"
    process = start(config, output)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert _values(output) == _values(finished) and _values(output, "post_rank") == _values(finished, "post_rank")


def _values(folder: Path, step: str = "eval") -> dict:
    record = read_json(folder / step / "metrics.json")
    return {s["name"]: {m: e["value"] for m, e in s["metrics"].items()} for s in record["systems"]}


def _kill_tree(pid: int) -> None:
    import contextlib

    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_failing_step_is_one_sentence_and_exit_code_2(tmp_path):
    values = pipeline()
    values["steps"] = values["steps"][:1]
    values["steps"][0]["args"] = {"reader": "sidtune", "path": str(tmp_path / "empty")}
    (tmp_path / "empty").mkdir()
    process = start(write_pipeline(tmp_path / "p.yaml", values), tmp_path / "out")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "error: The step 'data' failed: " in out and "Traceback" not in out
    assert not (tmp_path / "out" / "data").exists()
