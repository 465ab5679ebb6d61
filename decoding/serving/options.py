"""Options of batch retrieval and their checks; light, so that `sidtune retrieve --help` is instant."""

from __future__ import annotations

from dataclasses import dataclass, field

from sidtune.core.config import SEEDS, check_range
from sidtune.core.errors import ConfigError


def check_policy(name: str, value: str) -> None:
    """Raises ConfigError unless `value` is error or ignore."""
    if value not in ("error", "ignore"):
        raise ConfigError(f"{name} must be error or ignore, got '{value}'.")


@dataclass
class BatchOptions:
    """Options of retrieve.

    Attributes:
        model_dir: a bundle of publish; or, with sids_dir, a model folder or the folder of sft.
        output_dir: folder to write.
        requests: a .parquet or .jsonl file of requests, or a folder of such files.
        data_dir: data folder whose requests are asked, instead of `requests`.
        split: which requests of data_dir: train, valid or test.
        max_requests: ask a random part of the split (null = all).
        sids_dir: folder of learn_sids.
        k: items per request.
        num_beams: beams per request; default k, at least 10.
        batch_size: requests decoded together.
        shard_size: requests that are written together, and lost together when a process is killed.
        unknown_items: error, or ignore for item ids that the catalogue lacks (in histories, filters, stock list).
        extra_columns: error, or ignore for columns of `requests` that are no part of a request.
        exclude_seen: never find an item of the user's history.
        only_categories: find items of these categories only, for requests that name none themselves.
        in_stock: file of the item ids that may be found, one a line or parquet with `item_id`.
        limits: of a request in a file; keys as in serve.
        seed: of the random part.
        restart: throw away the finished shards of an interrupted run with other options or inputs.
    """

    model_dir: str
    output_dir: str
    requests: str | None = None
    data_dir: str | None = None
    split: str = "test"
    max_requests: int | None = None
    sids_dir: str | None = None
    k: int = 100
    num_beams: int | None = None
    batch_size: int = 64
    shard_size: int = 1024
    unknown_items: str = "error"
    extra_columns: str = "error"
    exclude_seen: bool = False
    only_categories: list[str] = field(default_factory=list)
    in_stock: str | None = None
    limits: dict = field(default_factory=dict)
    seed: int = 0
    restart: bool = False

    def __post_init__(self) -> None:
        if (self.requests is None) == (self.data_dir is None):
            raise ConfigError(
                "Give either requests (a file) or data_dir (a data folder and its split), not both or none."
            )
        if self.split not in ("train", "valid", "test"):
            raise ConfigError(f"split must be train, valid or test, got '{self.split}'.")
        if self.max_requests is not None and self.data_dir is None:
            raise ConfigError("max_requests draws from a data folder; give data_dir, or shorten the file of requests.")
        check_range(self, 1, "k", "num_beams", "batch_size", "shard_size")
        check_range(self, 1, "max_requests", most=2**63)
        check_range(self, 0, "seed", most=SEEDS)
        check_policy("unknown_items", self.unknown_items)
        check_policy("extra_columns", self.extra_columns)
