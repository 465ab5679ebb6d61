"""Reads a source with a reader and says what it holds, which parts of the suite apply to it, and what is missing.

    sidtune doctor my_tables
    sidtune doctor $SIDTUNE_DATA/amazon_office --reader amazon_sid

Nothing is written. Problems of the tables are listed all at once.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sidtune.core.config import command
from sidtune.data_builders.registry import read_source, reader_options
from sidtune.data_builders.tables.survey import Survey, survey

LAUNCH = "alone"


@dataclass
class Arguments:
    """Options of doctor.

    Attributes:
        path: folder or id that the reader reads; may stand without a name: `sidtune doctor my_tables`.
        reader: name of a reader in `data_builders/registry.py`; `sidtune` is the folder of your own tables.
        options: options of the reader.
    """

    POSITIONAL: ClassVar[str] = "path"
    path: str
    reader: str = "sidtune"
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        reader_options(self.reader, self.options, self.path)


def main(arguments: Arguments) -> None:
    """Prints the report."""
    found = survey(read_source(arguments.reader, arguments.path, arguments.options))
    print("\n".join([*described(arguments.path, arguments.reader, found), "", "What applies:"]))
    for part, answer in found.parts().items():
        print(f"  {'-' if answer.startswith('no') else '+'} {part}: {answer}")
    reader = "" if arguments.reader == "sidtune" else f" --reader {arguments.reader}"
    print(f"\nNext: sidtune new my_shop --data {shlex.quote(arguments.path)}{reader}")


def described(path: str, reader: str, found: Survey) -> list[str]:
    """Lines that say what was read and what it holds."""
    shares = {"title": found.titled, "description": found.described, "price": found.priced}
    shares["category"] = found.categorised
    known = {name: share for name, share in found.feedback.items() if share}
    lines = [
        f"{path} (reader '{reader}')",
        f"  {found.items:,} items, {found.users:,} users, {found.events:,} events, {found.requests:,} requests",
        f"  items with {_listed(shares)}",
        f"  requests with a query {found.searches:.0%}, candidates of a request {found.shown:.1f}",
        f"  known labels of candidates: {_listed(known) or 'none'}; positions {found.positioned:.0%}",
        f"  events: {', '.join(f'{name} {count:,}' for name, count in found.actions.items()) or 'none'}",
        f"  split: {'prescribed by the source' if found.prescribed else 'by time' if found.clock else 'last request of each user'}",
    ]
    lines += [f"  {name.replace('_', ' ')}: {count:,}" for name, count in found.counts.items()]
    return [*lines, *(f"  note: {note}" for note in found.notes)]


def _listed(shares: dict[str, Any]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


if __name__ == "__main__":
    command(main, Arguments)
