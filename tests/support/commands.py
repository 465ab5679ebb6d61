"""Commands as a person types them, and the one sentence of those that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidtune.core.config import command


def refused(recipe, argv, capsys, tmp_path: Path) -> str:
    """Runs a recipe as a command and returns its one sentence."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        command(recipe.main, recipe.Arguments, [str(word) for word in argv])
    out = capsys.readouterr()
    assert caught.value.code == 2
    lines = [line for line in out.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in out.err, out.err
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
    return out.err[out.err.index("error: ") :]
