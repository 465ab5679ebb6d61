"""Step folders are whole or absent; fingerprints see every change."""

import json

import pytest

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import fingerprint, read_json, write_folder, write_json, write_run
from sidtune.core.registry import Registry


def test_a_failing_block_leaves_nothing_and_keeps_the_old_folder(tmp_path):
    final = tmp_path / "out"
    with pytest.raises(RuntimeError), write_folder(final) as scratch:
        (scratch / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with write_folder(final) as scratch:
        (scratch / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), write_folder(final) as scratch:
        (scratch / "a").write_text("new")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (final / "a").read_text() == "old"
    with write_folder(final) as scratch:
        (scratch / "b").write_text("new")
    assert [p.name for p in final.iterdir()] == ["b"]


def test_a_stale_scratch_folder_of_a_killed_run_is_removed(tmp_path):
    (tmp_path / ".out.partial-1").mkdir()
    with write_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_fingerprint_changes_with_content_name_and_nothing_else(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_text("x")
    first = fingerprint(folder)
    (folder / "run.json").write_text("{}")
    (folder / ".hidden").write_text("h")
    assert fingerprint(folder) == first
    (folder / "a").write_text("y")
    changed = fingerprint(folder)
    (folder / "a").rename(folder / "b")
    assert len({first, changed, fingerprint(folder)}) == 3
    with pytest.raises(DataError, match="does not exist"):
        fingerprint(tmp_path / "none")


def test_run_json_records_config_inputs_and_versions(tmp_path):
    (tmp_path / "in").write_text("data")
    write_run(tmp_path, step="s", config={"a": 1}, inputs={"data": tmp_path / "in"}, metrics={"m": 0.5})
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"] == {"a": 1} and record["metrics"] == {"m": 0.5} and record["versions"]["torch"]
    assert record["inputs"]["data"]["sha256"] == fingerprint(tmp_path / "in")


def test_json_refuses_nan_and_damage(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    (tmp_path / "y.json").write_text('{"a": 1')
    with pytest.raises(DataError, match="not readable JSON"):
        read_json(tmp_path / "y.json")


def test_registry_names_the_nearest_and_refuses_a_taken_name():
    registry = Registry("quantizer", {"residual_kmeans": "sidtune.core.errors:nearest"})
    with pytest.raises(ConfigError, match="did you mean 'residual_kmeans'"):
        registry.get("residual_kmean")
    with pytest.raises(ConfigError, match="registered already"):
        registry.register("residual_kmeans", object())
    assert callable(registry.get("residual_kmeans")) and list(registry) == ["residual_kmeans"]
