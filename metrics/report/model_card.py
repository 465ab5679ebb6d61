"""Model cards with the facts that make a number believable: metric table, data revision, seed, command, SID report.

No peer writes recommendation metrics into a card; here they come from the step folders, never from a person's memory. Text
that strangers wrote (queries, names) is escaped, so it can neither break the YAML header nor smuggle Markdown.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2


@dataclass
class CardData:
    """What a card says.

    Attributes:
        name: name of the model. repo_id: hub id or local folder.
        table: Markdown metric table with intervals.
        index_rows: `{"metric": name, "value": float}` for the hub's model index.
        catalogue, requests: counts of items and evaluated requests.
        split: evaluated split. level: confidence level of the intervals.
        resampled: what the intervals resample.
        command: the command that made the model.
        data_revision: SHA-256 of the data folder. dataset_name, dataset_type: how the data is called.
        stages: names of the training stages. level_sizes, icr, collision_rate: the SIDs.
        versions: package → version. seed, license, base_model, sample_query: as named.
    """

    name: str
    repo_id: str
    table: str
    index_rows: list[dict]
    catalogue: int
    requests: int
    split: str
    level: float
    resampled: str
    command: str
    data_revision: str
    dataset_name: str
    dataset_type: str
    stages: list[str]
    level_sizes: list[int]
    icr: float
    collision_rate: float
    versions: dict[str, str]
    seed: int = 0
    license: str = "apache-2.0"
    base_model: str | None = None
    sample_query: str = ""


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", " ".join(str(text).split()))


def _escape_code(text: str) -> str:
    return re.sub(r'[`"\\\r\n]', " ", str(text)).strip()


def write_card(path: str | Path, data: CardData) -> Path:
    """Renders `data` to a README.md with the hub's YAML header."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    environment.filters["escape_markdown"] = _escape_markdown
    environment.filters["escape_code"] = _escape_code
    text = environment.get_template("model_card.md.jinja").render(**asdict(data))
    path = Path(path)
    path.write_text(text, encoding="utf-8")
    return path
