"""Step folders are whole or absent, and nothing is lost: what a step may replace, locks, permissions, what fingerprints see."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass

import pytest

from sidtune.core.errors import ConfigError, DataError, SidtuneError
from sidtune.core.folders import (
    check_output,
    fingerprint,
    is_whole,
    locked,
    read_json,
    write_files,
    write_folder,
    write_json,
    write_run,
    writes,
)
from sidtune.core.registry import Registry
from sidtune.core.scripts import scripts


@dataclass
class Arguments:
    output_dir: str
    data_dir: str | None = None


def made(folder, step="a", **files):
    """A folder as the step leaves it."""
    with write_folder(folder, step) as scratch:
        for name, text in (files or {"x": "1"}).items():
            (scratch / name).write_text(text)
        write_run(scratch, step=step, config={})
    return folder


def test_a_failing_block_leaves_nothing_and_keeps_the_old_folder(tmp_path):
    final = tmp_path / "out"
    with pytest.raises(RuntimeError), write_folder(final, "a") as scratch:
        (scratch / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    made(final, a="old")
    with pytest.raises(KeyboardInterrupt), write_folder(final, "a") as scratch:
        (scratch / "a").write_text("new")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (final / "a").read_text() == "old"
    made(final, b="new")
    assert sorted(p.name for p in final.iterdir()) == ["b", "run.json"]


def test_a_stale_scratch_folder_of_a_killed_run_is_removed(tmp_path):
    (tmp_path / ".out.partial-1").mkdir()
    with write_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_run_json_lists_the_files_with_their_sizes(tmp_path):
    with write_folder(tmp_path / "out", "a") as scratch:
        write_run(scratch, step="a", config={})
        (scratch / "below").mkdir()
        (scratch / "below" / "late").write_text("12345")  # after the record, and still in it
        (scratch / "empty").mkdir()
    assert read_json(tmp_path / "out" / "run.json")["files"] == {"below/late": 5}


def foreign_file(folder):
    made(folder)
    (folder / "notes.txt").write_text("the only copy")


def hidden_file(folder):
    made(folder)
    (folder / ".env").write_text("the only copy")


def file_below(folder):
    made(folder)
    (folder / "sub" / "dir").mkdir(parents=True)
    (folder / "sub" / "dir" / "notes.txt").write_text("the only copy")


def link_to_a_folder(folder):
    made(folder)
    folder.with_name("elsewhere").mkdir()
    (folder / "linked").symlink_to(folder.with_name("elsewhere"))


def raw_tables(folder):
    folder.mkdir()
    (folder / "events.jsonl").write_text("{}\n")


def other_step(folder):
    made(folder, "b")


def other_step_without_files(folder):
    with write_folder(folder, "b"):
        pass


def parent_of_steps(folder):
    made(folder / "data"), made(folder / "sids", "b")


def bundle(folder):
    made(folder)
    (folder / "run.json").unlink()  # as from a hub


def damaged_record(folder):
    made(folder)
    (folder / "run.json").write_text('{"step": "a"')


def of_before(folder):
    made(folder)
    record = read_json(folder / "run.json")
    del record["files"]
    write_json(folder / "run.json", record)


REFUSED = {
    foreign_file: "holds notes.txt, which 'a' did not write", hidden_file: "holds .env, which 'a' did not write",
    file_below: "holds sub/dir/notes.txt, which", link_to_a_folder: "holds linked, which 'a' did not write",
    raw_tables: "holds events.jsonl, which no step wrote", other_step: "holds the result of 'b', not of 'a'",
    other_step_without_files: "holds the result of 'b', not of 'a'", parent_of_steps: "holds data/run.json, which no step",
    bundle: "holds x, which no step wrote", damaged_record: "holds x, which no step wrote",
    of_before: "of an earlier version that did not list its files; move it away",
}  # fmt: skip


def everything(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("stands", REFUSED, ids=lambda one: one.__name__)
@pytest.mark.parametrize("kind", ["step", "tree", "plain"])
def test_what_another_hand_wrote_is_not_replaced(tmp_path, stands, kind):
    """Before any work, and every file stays."""
    out = tmp_path / "out"
    stands(out)
    before = everything(tmp_path)

    @writes("a", tree=kind == "tree")
    def main(arguments):
        raise AssertionError("the work has begun")

    with pytest.raises(ConfigError, match=REFUSED[stands]) as caught:
        if kind == "plain":
            with write_folder(out, "a"):
                raise AssertionError("the work has begun")
        main(Arguments(str(out)))
    assert str(caught.value).count(".") <= str(caught.value).count("/") * 3 + 3 and "\n" not in str(caught.value)
    assert everything(tmp_path) == before


def test_what_comes_while_the_step_works_is_not_replaced_either(tmp_path):
    made(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"notes\.txt"), write_folder(tmp_path / "out", "a") as scratch:
        (scratch / "x").write_text("new")
        (tmp_path / "out" / "notes.txt").write_text("the only copy")
    assert everything(tmp_path / "out").keys() == {"x", "run.json", "notes.txt"}


def test_own_empty_and_cut_short_folders_are_replaced(tmp_path):
    (tmp_path / "empty" / "in" / "it").mkdir(parents=True)
    made(tmp_path / "empty", x="2"), made(tmp_path / "own"), made(tmp_path / "own", x="2")
    made(tmp_path / "cut", x="1234567")
    (tmp_path / "cut" / "x").write_text("12")
    assert not is_whole(tmp_path / "cut")
    made(tmp_path / "cut", x="2")
    (tmp_path / "missing").mkdir(), made(tmp_path / "missing", y="1")
    (tmp_path / "missing" / "y").unlink()
    assert not is_whole(tmp_path / "missing") and not is_whole(tmp_path / "none")
    made(tmp_path / "missing", x="2")
    for name in ("empty", "own", "cut", "missing"):
        assert (tmp_path / name / "x").read_text() == "2" and is_whole(tmp_path / name)


def test_the_target_of_a_link_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    made(tmp_path / "out"), made(tmp_path / "out", x="2")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "out" / "x").read_text() == "2"


@pytest.mark.parametrize(
    ("output", "how"),
    [
        ("in", "is the input"), ("in/out", "lies inside the input"), (".", "holds the input"), ("link", "is the input"),
        ("link/out", "lies inside the input"), ("in/../in", "is the input"),
    ],
)  # fmt: skip
def test_an_output_that_is_holds_or_lies_inside_an_input_is_refused(tmp_path, output, how):
    made(tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = everything(tmp_path)

    @writes("a")
    def main(arguments):
        raise AssertionError("the work has begun")

    with pytest.raises(ConfigError, match=f"{how} data_dir"):
        main(Arguments(str(tmp_path / output), data_dir=str(tmp_path / "in")))
    assert everything(tmp_path) == before


def test_an_input_that_is_a_link_is_where_it_leads(tmp_path):
    made(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="is the input data"):
        check_output(tmp_path / "real", "a", {"data": tmp_path / "link"})


@pytest.mark.parametrize("output", ["file", "file/below/it", "file.link"])
def test_a_file_in_the_way_is_refused_and_stays(tmp_path, output):
    (tmp_path / "file").write_text("the only copy")
    (tmp_path / "file.link").symlink_to(tmp_path / "file")
    for write in (lambda path: made(path), lambda path: check_output(path, "a")):
        with pytest.raises(ConfigError, match="cannot be written"):
            write(tmp_path / output)
    with pytest.raises(ConfigError, match="is a file"), write_files(tmp_path / output):
        pass
    assert (tmp_path / "file").read_text() == "the only copy"


def test_every_script_with_an_output_checks_it():
    """The rule is the same for a script that comes later."""
    count = 0
    for script in scripts().values():
        module = importlib.import_module(script.module)
        if "output_dir" in {one.name for one in dataclasses.fields(module.Arguments)} and script.name != "run":
            assert hasattr(module.main, "check"), f"{script.name}: decorate main with core.folders.writes"
            count += 1
    assert count >= 19


# -- trees ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_tree_goes_on_and_is_complete_only_at_its_end(tmp_path):
    out, stop = tmp_path / "out", [True]

    @writes("a", tree=True)
    def main(arguments):
        made(out / "part", "part")
        if stop[0]:
            raise KeyboardInterrupt
        write_run(out, step="a", config={})

    with pytest.raises(KeyboardInterrupt):
        main(Arguments(str(out)))
    assert not is_whole(out)
    with pytest.raises(ConfigError, match="which no step wrote"):
        check_output(out, "b", tree=True)  # another step must not go on there
    stop[0] = False
    main(Arguments(str(out)))
    assert is_whole(out) and set(read_json(out / "run.json")["files"]) == {"part/x", "part/run.json"}
    stop[0] = True
    with pytest.raises(KeyboardInterrupt):
        main(Arguments(str(out)))
    assert not (out / "run.json").exists()  # parts are of two runs now


# -- saving parts -----------------------------------------------------------------------------------------------------


def test_saving_into_a_folder_of_a_user_deletes_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("the only copy")
    for text, names in (("1", ["a.json", "b/c", "maybe"]), ("2", ["a.json", "b/c"])):
        with write_files(tmp_path / "mine", ["maybe"]) as scratch:
            (scratch / "b").mkdir()
            for name in names:
                (scratch / name).write_text(text)
    found = {name: content.decode() for name, content in everything(tmp_path / "mine").items()}
    assert found == {"notes.txt": "the only copy", "a.json": "2", "b/c": "2"}
    with pytest.raises(RuntimeError), write_files(tmp_path / "mine") as scratch:
        (scratch / "a.json").write_text("3")
        raise RuntimeError
    assert (tmp_path / "mine" / "a.json").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["mine"]


# -- permissions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_and_folders_get_the_permissions_of_ordinary_ones(tmp_path, mask):
    old = os.umask(mask)
    try:
        for write in (lambda: write_folder(tmp_path / "a", "a"), lambda: write_files(tmp_path / "b")):
            with write() as scratch:
                (scratch / "below").mkdir(mode=0o700)
                (scratch / "below" / "model.safetensors").touch(mode=0o600)
    finally:
        os.umask(old)
    for path in (p for name in "ab" for p in (tmp_path / name, *(tmp_path / name).rglob("*"))):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


# -- locks ------------------------------------------------------------------------------------------------------------

HOLD = (
    "import sys; from sidtune.core.folders import locked\n"
    "with locked(sys.argv[1]): print('held', flush=True); sys.stdin.readline()"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `out`."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_ends_in_one_sentence_that_names_the_first(tmp_path, holder):
    @writes("a")
    def main(arguments):
        raise AssertionError("the work has begun")

    for write in (main, lambda arguments: made(tmp_path / "out")):
        with pytest.raises(SidtuneError, match=f"Process {holder.pid} on .*since .*writes .*out now; wait") as caught:
            write(Arguments(str(tmp_path / "out")))
        assert "\n" not in str(caught.value)
    made(tmp_path / "other")
    holder.communicate("end\n")
    made(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / ".out.lock").read_text())["pid"] == holder.pid
    made(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_lock_is_free_for_its_owner_ends_with_an_error_and_is_not_inherited_by_a_fork(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "out"), locked(tmp_path / "out"):
        raise RuntimeError
    with locked(tmp_path / "out"):
        if (child := os.fork()) == 0:
            try:
                with locked(tmp_path / "out"):
                    os._exit(1)
            except SidtuneError:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    with locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_step_inside_a_locked_tree_has_its_own_lock(tmp_path, holder):
    (tmp_path / "out").mkdir()
    made(tmp_path / "out" / "step")
    assert is_whole(tmp_path / "out" / "step")


def test_only_the_main_process_of_a_launcher_locks_and_checks(tmp_path, holder, monkeypatch):
    began = []
    main = writes("a")(lambda arguments: began.append(arguments))
    monkeypatch.setenv("RANK", "1")
    main(Arguments(str(tmp_path / "out")))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SidtuneError, match="now; wait"):
        main(Arguments(str(tmp_path / "out")))
    assert len(began) == 1


# -- fingerprints and JSON --------------------------------------------------------------------------------------------


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


def test_fingerprint_follows_links_but_not_in_a_circle(tmp_path):
    for name in ("f", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "a").write_text("x")
    (tmp_path / "f" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "f")
    before = fingerprint(tmp_path / "f")
    (tmp_path / "elsewhere" / "a").write_text("y")
    assert fingerprint(tmp_path / "f") != before
    (tmp_path / "elsewhere" / "a").unlink()
    (tmp_path / "elsewhere" / "a").symlink_to(tmp_path / "gone")
    shutil.rmtree(tmp_path / "elsewhere")
    assert fingerprint(tmp_path / "f")  # a link to nothing holds nothing


def test_fingerprint_of_a_pattern_is_of_its_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("1")
    one = fingerprint(tmp_path / "*.jsonl")
    (tmp_path / "b.jsonl").write_text("2")
    assert fingerprint(tmp_path / "*.jsonl") != one
    with pytest.raises(DataError, match="does not exist"):
        fingerprint(tmp_path / "*.parquet")


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
