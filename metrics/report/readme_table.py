"""Tables that scripts write into a README, between the lines `<!-- NAME -->` and `<!-- /NAME -->`. Our own plumbing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sidtune.core.errors import DataError
from sidtune.core.folders import write_json

RESULTS = "results"


def check_readme(readme: str | Path, mark: str = RESULTS) -> tuple[str, str]:
    """The text up to the table of a README and behind it, marks included. Raises DataError when there is no place for one."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    try:
        text = Path(readme).read_text("utf-8")
    except FileNotFoundError:
        raise DataError(f"The README {readme} does not exist; check the path.") from None
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise DataError(f"{readme} has no lines '{begin}' and '{end}'; add them where the table belongs.")
    return f"{before}{begin}\n", f"{end}{after}"


def replace_table(readme: str | Path, table: str, mark: str = RESULTS) -> None:
    """Writes a table between the marks of a README."""
    before, after = check_readme(readme, mark)
    Path(readme).write_text(before + table + after, "utf-8")


def publish(record: dict[str, Any], table: str, results: str | None, readmes: list[str]) -> None:
    """Writes all figures to `results`, the table into the READMEs, and prints it."""
    if results is not None:
        write_json(results, record)
    for readme in readmes:
        replace_table(readme, table)
    print(table)
