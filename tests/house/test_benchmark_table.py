"""The script that writes benchmark rows into a README."""

import importlib.util
import json

import pytest


@pytest.fixture(scope="module")
def script(repo_root):
    spec = importlib.util.spec_from_file_location("benchmark_table", repo_root / "benchmarks" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(*rows):
    return {"machine": {"cpus": 2, "torch_threads": 1}, "rows": list(rows)}


def test_rows_of_all_files_replace_what_stood_between_the_marks(script, tmp_path):
    first = {"name": "a", "baseline": "generate", "ours_s": 0.10012, "baseline_s": 5.0, "ratio": 49.94, "equal": True}
    second = {"name": "b", "baseline": "a", "ours_s": 1.0, "baseline_s": 0.9, "ratio": 0.9, "equal": None}
    for number, row in enumerate((first, second)):
        (tmp_path / f"{number}.json").write_text(json.dumps(result(row)))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    script.main([str(tmp_path / "0.json"), str(tmp_path / "1.json"), "--readme", str(readme), "--mark", "speed"])
    assert readme.read_text() == (
        "before\n<!-- speed -->\n"
        "| case | against | ours, s | other, s | ratio | equal |\n|---|---|---:|---:|---:|---|\n"
        "| a | generate | 0.1 | 5 | 49.9× | yes |\n| b | a | 1 | 0.9 | 0.90× | – |\n\n"
        "Measured with: cpus 2, torch threads 1.\n\nFigures: `0.json`.\n<!-- /speed -->\nafter\n"
    )


def test_a_readme_without_the_marks_is_refused(script, tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(result({"name": "a"})))
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "r.json"), "--readme", str(tmp_path / "README.md"), "--mark", "speed"])
    assert "has no lines '<!-- speed -->'" in capsys.readouterr().err
