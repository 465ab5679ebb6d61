"""Resume: what an interrupted run left is used by the same run only, and only what is whole."""

import json

import numpy as np
import pytest

from sidtune.core.errors import ConfigError
from sidtune.core.folders import write_run
from sidtune.core.resume import COMPLETE_FILE, Work, digest, identity_of, is_complete, last_complete_checkpoint
from sidtune.recipes.steps.grpo import Arguments


def finished(work: Work, text: str = "weights") -> None:
    with work.finish("test") as scratch:
        (scratch / "model.bin").write_text(text)
        write_run(scratch, step="test", config={})


def prepare(folder) -> dict:
    (folder / "examples").write_text("made")
    return {"examples": 3}


def never(folder) -> None:
    raise AssertionError("what an interrupted run has prepared was prepared again")


def test_an_interrupted_run_goes_on_and_a_finished_one_is_known(tmp_path):
    work = Work(tmp_path / "out", {"seed": 1, "data": "abc"})
    assert not work.is_done() and work.begin(prepare) == {"examples": 3}
    again = Work(tmp_path / "out", {"data": "abc", "seed": 1})
    assert again.begin(never) == {"examples": 3} and not again.is_done()
    finished(again)
    assert work.is_done() and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    # A stop between the two last operations leaves a work folder beside a whole output.
    work.begin(prepare)
    assert work.is_done() and not work.folder.exists()
    assert not Work(tmp_path / "out", {"data": "abc", "seed": 2}).is_done()
    (tmp_path / "out" / "model.bin").write_text("weigh")
    assert not work.is_done(), "an output that was cut short counts as done"


def test_a_stop_while_preparing_or_writing_leaves_nothing_that_counts(tmp_path):
    work = Work(tmp_path / "out", {"seed": 1})

    def stopped(folder) -> None:
        prepare(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.begin(stopped)
    assert work.begin(prepare) == {"examples": 3}
    with pytest.raises(KeyboardInterrupt), work.finish("test") as scratch:
        (scratch / "model.bin").write_text("half")
        raise KeyboardInterrupt
    assert not work.is_done() and not (tmp_path / "out").exists() and work.begin(never) == {"examples": 3}


@pytest.mark.parametrize(
    ("identity", "place", "words"),
    [
        ({"seed": 2, "data": "abc"}, 2, "differs in seed; it is thrown away"),
        ({"seed": 1, "data": "abd", "more": 0}, 2, "differs in data, more; it is thrown away"),
        ({"seed": 1, "data": "abc"}, 3, "differs in the number or kind of its processes"),
    ],
)
def test_what_another_run_left_is_thrown_away_with_a_notice_or_refused(tmp_path, caplog, identity, place, words):
    Work(tmp_path / "out", {"seed": 1, "data": "abc"}, place=2).begin(prepare)
    other = Work(tmp_path / "out", identity, place=place)
    with pytest.raises(ConfigError, match="set restart, or run as before") as caught:
        other.begin(never, refuse="set restart")
    assert words.partition(";")[0] in str(caught.value) and (other.folder / "examples").exists()
    assert other.begin() is None and not (other.folder / "examples").exists()
    assert words in caplog.text


def test_what_an_earlier_version_or_a_crash_left_is_not_mistaken(tmp_path, caplog):
    work = Work(tmp_path / "out", {"seed": 1})
    (work.folder / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (work.folder / "stage.json").write_text(json.dumps({"identity": "x"}))
    assert work.begin(prepare) == {"examples": 3} and not work.checkpoints.exists()
    assert "no run that can go on; it is thrown away" in caplog.text
    (work.folder / "work.json").write_text('{"identity": ')
    assert work.begin(prepare) == {"examples": 3}


def test_only_whole_checkpoints_count(tmp_path):
    work = Work(tmp_path / "out", {})
    assert last_complete_checkpoint(work.checkpoints) is None
    for number in (1, 10):
        with work.checkpoint(number) as folder:
            (folder / "state").write_text("0123")
    assert [p.name for p in work.checkpoints.iterdir()] == ["checkpoint-10"]
    (last,) = work.checkpoints.iterdir()
    with pytest.raises(KeyboardInterrupt), work.checkpoint(12) as folder:
        (folder / "state").write_text("01")
        raise KeyboardInterrupt
    (work.checkpoints / "notes").mkdir()
    assert last_complete_checkpoint(work.checkpoints) == last
    for damage in ("012", "01234", None):
        (last / "state").unlink() if damage is None else (last / "state").write_text(damage)
        assert not is_complete(last)
    (last / "state").write_text("0123")
    for text in ("", "[]", '{"files": 3}', '{"files": {"state": 4'):
        (last / COMPLETE_FILE).write_text(text)
        assert not is_complete(last), text
    assert last_complete_checkpoint(work.checkpoints, remove_broken=True) is None
    assert [p.name for p in work.checkpoints.iterdir()] == ["notes"]


def test_an_identity_is_the_content_of_what_is_read(tmp_path):
    assert digest({"a": 1, "b": [np.arange(3)]}) == digest({"b": [np.arange(3)], "a": 1})
    assert len({digest(v) for v in (np.arange(3), np.arange(3.0), np.arange(3)[::-1], np.arange(3)[None], 3)}) == 5
    for name in ("data", "sids", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    (tmp_path / "hard.parquet").write_text("one")

    def told(output="out", **changes) -> str:
        folders = {f"{name}_dir": str(tmp_path / name) for name in ("data", "sids", "model")}
        given = Arguments(
            **folders, output_dir=str(tmp_path / output), hard_set=str(tmp_path / "hard.parquet"), **changes
        )
        return digest(identity_of(given))

    first = told()
    assert told("elsewhere") == first and told(seed=1) != first
    (tmp_path / "hard.parquet").write_text("two")
    second = told()
    (tmp_path / "data" / "content").write_text("other")
    assert len({first, second, told()}) == 3
