"""Queries in the code space of the items: a query's text → vector → codes → SID tokens, on the fly.

OneSearch (section 3.1.3) trains one set of codebooks on queries and items together, and shows the model a query's text
with its SID behind it. Items get their codes once, queries when they come: by the frozen encoder and quantizer of
`learn_sids`. Queries the codebooks were trained on keep the codes of training (with a balanced level these differ from
the nearest ones), as items do.

Where it differs from the paper: keywords of a query are found by the encoder itself (`keyword_fusion`), if at all. The
release has no code for new queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidtune.core.errors import DataError
from sidtune.core.folders import write_files
from sidtune.core.hub import Published, resolve_folder
from sidtune.data_builders.mining.query_pairs import squeezed
from sidtune.tokenizers.encoders.base import Encoder, load_encoder
from sidtune.tokenizers.quantizers.base import Quantizer, check_codes, load_quantizer
from sidtune.tokenizers.sids.arguments import check_quantizer
from sidtune.tokenizers.sids.semantic_ids import SemanticIds

QUERY_FILE = "queries.parquet"
CODER_FOLDER = "query_coder"  # where a published bundle keeps a query coder
CODER_PARTS = ENCODER_FOLDER, QUANTIZER_FOLDER, SID_FOLDER = "encoder", "quantizer", "sids"


class QueryCoder(Published):
    """Codes and SID tokens of query texts.

    Args:
        encoder: fitted encoder of texts.
        quantizer: fitted on vectors of that encoder.
        sids: the items' semantic IDs, which say how a code is written; a suffix level is the items' own affair.
        known: query text → code (depth,) of queries that have one already, for example from training.
        cache_size: how many further queries are remembered; when it is full, all of these are forgotten.

    Raises:
        DataError: encoder `precomputed`, which knows no texts, or SIDs of another quantizer.
    """

    def __init__(
        self,
        encoder: Encoder,
        quantizer: Quantizer,
        sids: SemanticIds,
        known: dict[str, np.ndarray] | None = None,
        cache_size: int = 1 << 18,
    ) -> None:
        check_text_encoder(encoder)
        check_quantizer(sids, quantizer)
        self.encoder, self.quantizer, self.sids = encoder, quantizer, sids
        self.known = dict(known or {})
        self.cache_size = cache_size
        self._cache: dict[str, np.ndarray] = {}

    @property
    def depth(self) -> int:
        """Number of levels of a query's code."""
        return self.quantizer.depth

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (n, d) float32 of the texts, white space squeezed."""
        return self.encoder.encode([squeezed(text) for text in texts])

    def codes(self, texts: Sequence[str | None]) -> np.ndarray:
        """Codes (n, depth) int32; -1 in all levels for null and for a text without a character.

        New texts are encoded together, each once. A text the encoder knows nothing of (see `Encoder.empty_texts`) gets
        the code of the encoder's fallback vector.
        """
        asked = [squeezed(text) for text in texts]
        new = [t for t in dict.fromkeys(asked) if t and t not in self.known and t not in self._cache]
        fresh = dict(zip(new, self.quantizer.encode(self.encoder.encode(new)), strict=True)) if new else {}
        none = np.full(self.depth, -1, dtype=np.int32)
        rows = [fresh.get(t, self.known.get(t, self._cache.get(t, none))) for t in asked]
        if len(self._cache) + len(fresh) > self.cache_size:
            self._cache.clear()
        if len(fresh) <= self.cache_size:
            self._cache.update(fresh)
        return np.array(rows, dtype=np.int32).reshape(len(asked), self.depth)

    def token_texts(self, texts: Sequence[str | None]) -> list[str]:
        """SID text of each query, for example `<a_12><b_7><c_0>`; "" where there is no query."""
        return ["" if code[0] < 0 else self.sids.code_text(code) for code in self.codes(texts)]

    __call__ = token_texts  # so that a coder can be given to `Serializer` as `query_sids`

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes encoder, quantizer, SIDs and the known queries, whole or not at all."""
        with write_files(folder, [QUERY_FILE]) as scratch:
            self.encoder.save_pretrained(scratch / ENCODER_FOLDER)
            self.quantizer.save_pretrained(scratch / QUANTIZER_FOLDER)
            self.sids.save_pretrained(scratch / SID_FOLDER)
            if self.known:
                write_query_codes(scratch / QUERY_FILE, list(self.known), np.stack(list(self.known.values())))

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, **hub: Any) -> Self:
        """Loads from the folder of learn_sids or extend_sids, of `save_pretrained`, or a bundle or hub repository that holds one as
        `query_coder` (`hub`: options of `resolve_folder`).

        Raises:
            DataError: no encoder and quantizer there, damaged files, or parts of different runs.
        """
        folder = resolve_folder(folder_or_repo, what="query coder", **hub)
        if (folder / CODER_FOLDER).is_dir():
            folder = folder / CODER_FOLDER
        if not (folder / ENCODER_FOLDER).is_dir() or not (folder / QUANTIZER_FOLDER).is_dir():
            raise DataError(
                f"{folder} has no encoder and quantizer, so queries cannot be coded there; give the folder of learn_sids."
            )
        encoder, quantizer = load_encoder(folder / ENCODER_FOLDER), load_quantizer(folder / QUANTIZER_FOLDER)
        sids = SemanticIds.from_pretrained(folder / SID_FOLDER)
        known: dict[str, np.ndarray] = {}
        if (folder / QUERY_FILE).exists():
            queries, codes = read_query_codes(folder / QUERY_FILE, quantizer.level_sizes)
            known = dict(zip(queries, codes, strict=True))
        return cls(encoder, quantizer, sids, known)


def check_text_encoder(encoder: Encoder) -> None:
    """Raises ConfigError for an encoder that only looks item vectors up."""
    if encoder.name in ("precomputed", "collaborative"):
        raise DataError(
            f"The vectors of the '{encoder.name}' encoder are of items only, so queries have none; use an encoder of texts "
            "(tfidf_svd, keyword_fusion, transformers, ...) to code queries."
        )


def write_query_codes(path: Path, queries: Sequence[str], codes: np.ndarray) -> None:
    """Writes parquet with the columns `query` and `code` (list of `depth` integers)."""
    array = np.ascontiguousarray(codes, dtype=np.int32)
    code = pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
    pq.write_table(pa.table({"query": pa.array(queries, pa.string()), "code": code}), path)


def read_query_codes(path: Path, level_sizes: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """Texts (Q,) and codes (Q, depth) int32 of `write_query_codes`. Raises DataError when unreadable, or of another quantizer."""
    try:
        table = pq.read_table(path)
        queries, column = table.column("query").to_pylist(), table.column("code").combine_chunks()
        codes = column.flatten().to_numpy().reshape(len(queries), -1)
    except (pa.ArrowException, OSError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is no readable list of query codes ({' '.join(str(error).split())}).") from None
    if len(queries) and codes.shape[1] != len(level_sizes):
        raise DataError(f"The codes in {path} have {codes.shape[1]} levels, the quantizer {len(level_sizes)}.")
    return queries, check_codes(codes, level_sizes) if len(queries) else codes
