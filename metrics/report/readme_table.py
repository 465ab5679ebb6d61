"""Tables that scripts write into a README, between the lines `<!-- NAME -->` and `<!-- /NAME -->`. Our own plumbing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sidtune.core.config import as_dict
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


def signed(record: dict[str, Any], table: str, results: str | Path) -> str:
    """A table with a line that says where its figures lie, and of which config, seeds and number of settings if they say so."""
    told = [f"Figures: `{Path(results).name}`"]
    told += [f"config `{record['config'][:8]}`"] if "config" in record else []
    told += [f"seeds {', '.join(map(str, record['seeds']))}"] if "seeds" in record else []
    told += [f"{record['tried']} settings tried"] if "tried" in record else []
    return f"{table.rstrip()}\n\n{', '.join(told)}.\n"


def publish(
    record: dict[str, Any], table: str, results: str | None, readmes: list[str], *, config: Any = None, tried: int = 1
) -> None:
    """Writes all figures to `results`, the table into the READMEs, and prints it.

    Args:
        config: what was run; its hash goes into the figures. tried: how many settings the table compares, or was chosen among.
    """
    digest = hashlib.sha256(json.dumps(as_dict(config), sort_keys=True).encode()).hexdigest()
    record |= {"config": digest, "tried": tried}
    if results is not None:
        write_json(results, record)
        table = signed(record, table, results)
    for readme in readmes:
        replace_table(readme, table)
    print(table)
