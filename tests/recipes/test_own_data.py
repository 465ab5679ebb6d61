"""From a folder of tables to a pipeline: `doctor` counts what a plain count counts, `new` writes what the pipeline accepts."""

import json
from pathlib import Path

import pytest
import yaml

from sidtune.core.config import parse
from sidtune.core.errors import ConfigError
from sidtune.core.pipeline import RunArguments, resolve, run_pipeline
from sidtune.data_builders.registry import read_source
from sidtune.data_builders.shop_world.world import ShopWorld
from sidtune.data_builders.tables.survey import survey
from sidtune.recipes import doctor, new
from sidtune.recipes.new import FILE

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def rows():
    tables = ShopWorld.from_options(n_items=150, n_users=25, n_requests=300).to_tables()
    return {name: getattr(tables, name).to_pylist() for name in ("items", "users", "events", "requests")}


def written(folder: Path, rows: dict) -> Path:
    folder.mkdir()
    for name, table in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder


@pytest.fixture
def tables(tmp_path, rows):
    return written(tmp_path / "tables", rows)


def test_the_survey_counts_like_a_plain_loop(tables, rows):
    found = survey(read_source("sidtune", str(tables), {}))
    shown = [one for request in rows["requests"] for one in request["candidates"]]
    assert (found.items, found.users, found.requests) == (150, 25, 300)
    assert found.searches == sum(request["query"] is not None for request in rows["requests"]) / 300
    for name, share in found.feedback.items():
        assert share == pytest.approx(sum(one[name] is not None for one in shown) / len(shown))
    actions = [event["action"] for event in rows["events"]]
    assert found.actions == {
        name: actions.count(name) for name in sorted(set(actions), key=lambda a: -actions.count(a))
    }
    assert found.has_words and found.has_choices


def test_what_is_missing_is_said(tmp_path, rows, capsys):
    bare = [{**request, "query": None, "candidates": [{"item_id": one["item_id"], "order": 1} for one in request["candidates"][:1]]}
            for request in rows["requests"]]  # fmt: skip
    folder = written(tmp_path / "bare", {**rows, "requests": bare})
    doctor.main(doctor.Arguments(str(folder)))
    told = capsys.readouterr().out
    assert "- search: no: requests have no query" in told
    assert "- correction of position and exposure: no: candidates need 'position' and 'click'" in told
    assert "+ recommendation: yes" in told and f"sidtune new my_shop --data {folder}" in told


def resolved(folder: Path, **options) -> list:
    file = folder / FILE
    return resolve(RunArguments(**yaml.safe_load(file.read_text()), root=str(folder), **options))


@pytest.mark.slow
def test_a_new_pipeline_passes_the_checks_of_every_step_and_runs(tables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new.main(parse(new.Arguments, ["shops/mine", "--data", str(tables)]))
    assert [step.name for step in resolved(Path("shops/mine"))] == [
        "data", "sids", "model", "sft", "eval", "bundle", "report"
    ]  # fmt: skip
    few = [f"--steps.sft.args.stages.{stage}.args.max_steps=2" for stage in ("align", "personalise")]
    run_pipeline(parse(RunArguments, [*few, "--config", "shops/mine/pipeline.yaml", "--until", "sft"]))
    assert (tmp_path / "runs/mine/sft/run.json").is_file()
    before = Path("shops/mine", FILE).read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        parse(new.Arguments, ["shops/mine", "--data", str(tables)])
    assert Path("shops/mine", FILE).read_bytes() == before


def encoder_of(shop: str) -> str:
    return next(step for step in resolved(Path(shop)) if step.name == "sids").config.encoder["name"]


def test_without_queries_or_words_other_things_are_planned(tmp_path, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    feed = written(tmp_path / "feed", {**rows, "requests": [{**one, "query": None} for one in rows["requests"]]})
    new.main(new.Arguments("feed_shop", str(feed)))
    sft = next(step for step in resolved(Path("feed_shop")) if step.name == "sft")
    assert [list(stage["tasks"]) for stage in sft.config.stages] == [["item_to_sid", "sid_to_item"], ["whole_history"]]
    mute = written(tmp_path / "mute", {**rows, "items": [{"item_id": one["item_id"]} for one in rows["items"]]})
    new.main(new.Arguments("log_shop", str(mute)))
    assert encoder_of("log_shop") == "collaborative"
    (tmp_path / "vectors.npy").write_bytes(b"")
    new.main(new.Arguments("mute_shop", str(mute), vectors="vectors.npy"))
    assert encoder_of("mute_shop") == "precomputed"


@pytest.mark.parametrize(("items", "size"), [(1, 8), (2_000, 64), (19_999, 256), (10**7, 256)])
def test_sizes_of_sids_leave_room_for_every_item(items, size):
    levels, codes = new.sid_sizes(items)
    assert codes == size and codes**levels >= 8 * items


def test_a_pipeline_of_the_suite_is_found_by_name_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = resolve(parse(RunArguments, ["quickstart", "--output_dir", str(tmp_path / "runs")]))
    assert [step.name for step in steps][:2] == ["data", "sids"] and steps[0].config.options["n_items"] == 2000
    with pytest.raises(ConfigError, match="called 'quikstart': did you mean 'quickstart'"):
        parse(RunArguments, ["quikstart"])
    with pytest.raises(ConfigError, match="sidtune run quickstart"):
        parse(RunArguments, [])


def test_names_and_folders_that_are_odd_text_stay_text(tmp_path, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = written(tmp_path / "a\n# b: 'c'", rows)
    new.main(new.Arguments("2024", str(odd)))
    steps = resolved(Path("2024"))
    assert steps[0].config.path == str(odd) and steps[0].folder == Path("runs/2024/data")
    with pytest.raises(ConfigError, match="runs/mine exists already"):
        Path("runs/mine").mkdir(parents=True)
        new.Arguments("mine", str(odd))


def test_a_strangers_file_beside_the_steps_is_kept(tables, tmp_path):
    stranger = tmp_path / "runs/logs/data.log"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("mine\n")
    step = {"name": "data", "script": "build_data", "args": {"reader": "sidtune", "path": str(tables)}}
    for _ in range(2):
        run_pipeline(RunArguments([step], str(tmp_path / "runs"), force=["data"]))
        told = stranger.read_text()
        assert told.startswith("mine\nsidtune build-data\n") and "150 items" in told
