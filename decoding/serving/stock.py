"""Files of item ids, which the batch script and the server read, and the stock list that changes while it serves."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sidtune.core.errors import DataError
from sidtune.core.text import read_lines
from sidtune.decoding.retrieval.catalogue import Catalogue

logger = logging.getLogger(__name__)


def read_item_ids(path: str | Path) -> list[str]:
    """Item ids of a `.parquet` file (column `item_id`), or of a text file with one id a line.

    Raises:
        DataError: missing, unreadable, not UTF-8, or without any id.
    """
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            ids = [i for i in pq.read_table(path, columns=["item_id"])["item_id"].to_pylist() if i is not None]
        else:
            ids = [line.strip() for line in read_lines(path, "file of item ids") if line.strip()]
    except FileNotFoundError:
        raise DataError(f"The file of item ids {path} does not exist; check the path.") from None
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"The file of item ids {path} cannot be read ({reason}); it needs a column item_id.") from None
    if not ids or not all(isinstance(i, str) for i in ids):
        raise DataError(f"The file {path} holds no item ids, or ids that are no texts; write one id a line.")
    return ids


class StockFile:
    """A file of the item ids in stock that is read again when it changes.

    Args:
        path: see `read_item_ids`.
        catalogue: its `set_stock` is called.

    Raises:
        DataError: the file cannot be read at the start. Later, a bad file leaves the last good list in use.
    """

    def __init__(self, path: str | Path, catalogue: Catalogue) -> None:
        self.path, self._catalogue = Path(path), catalogue
        self._stamp = self._now()
        catalogue.set_stock(read_item_ids(self.path))

    def _now(self) -> tuple[int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size

    def refresh(self) -> None:
        """Reads the file again if it is another than last time."""
        stamp = self._now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._catalogue.set_stock(read_item_ids(self.path))
            logger.info("The stock list was read again: %d items are in stock.", self._catalogue.stock)
        except DataError as error:
            logger.warning("The stock list stays as it was. %s", error)
