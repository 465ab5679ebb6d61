"""Item and query vectors with their core keywords put first: any encoder, plus the vectors of the keywords in the text.

`e° = normalise(1/2 * (e + (1/m) * Σ e_k))` over the m core keywords of the text (OneSearch, section 3.1.2, Eq. 2). A
long title is mostly noise around a few words that decide what a thing is; the mean of their vectors pulls items and
queries with the same keywords together.

Where it differs from the paper and its released code (our choices):
- A text without keywords is normalised too; the release returns it as it is, on another scale than the rest.
- Keywords of items come from their text, as those of queries do; the paper lets a vision-language model read them off
  title and image.
- A keyword of several types has one vector and counts once in the mean.
- A keyword the base encoder knows nothing of (all words unseen) has no vector of its own and is left out of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp

from sidtune.core.config import build
from sidtune.core.errors import ConfigError, DataError
from sidtune.tokenizers.encoders.base import TENSOR_FILE, Encoder, check_texts
from sidtune.tokenizers.keywords.matcher import KeywordMatcher
from sidtune.tokenizers.keywords.mining import PoolConfig
from sidtune.tokenizers.keywords.pool import KeywordPool, read_pool
from sidtune.tokenizers.registry import ENCODERS, made_by
from sidtune.tokenizers.vectors import load_tensors, unit_rows

MINED = "mined"
BASE_FOLDER = "base"
POOL_FOLDER = "keywords"


def fuse(vectors: np.ndarray, keyword_vectors: np.ndarray, found: sp.csr_array) -> np.ndarray:
    """Eq. 2 of OneSearch.

    Args:
        vectors: (n, d) e, one per text.
        keyword_vectors: (K, d) e_k; a zero row marks a keyword that is left out.
        found: (n, K) 1.0 where a text holds a keyword.

    Returns:
        (n, d) float32 rows of length 1: the mean of a text's vector and the mean of its keywords' vectors, or its own
        vector where it has no keyword.
    """
    known = np.linalg.norm(keyword_vectors, axis=1) > 0
    count = (found @ known.astype(np.float64))[:, None]
    mean = (found @ keyword_vectors.astype(np.float64)) / np.maximum(count, 1.0)
    fused = np.where(count > 0, 0.5 * (vectors + mean), vectors.astype(np.float64))
    return np.ascontiguousarray(unit_rows(fused), dtype=np.float32)


@dataclass
class KeywordFusionConfig:
    """Options of `KeywordFusionEncoder`.

    Attributes:
        base: the encoder below, `name` and options, as `encoder` of learn_sids takes them. Not `precomputed`, which has
            no vectors for keywords.
        pool: `mined` (learn_sids mines the pool from its data folder), or the path of a pool: a file with
            `keyword<TAB>type` a line, or a folder.
        mining: options of `mining.PoolConfig`, for `pool: mined`.
        word_boundaries: as in `KeywordMatcher`.
        seed: of the base encoder, where it draws anything and `base` sets none.
    """

    base: dict = field(default_factory=lambda: {"name": "tfidf_svd"})
    pool: str = MINED
    mining: dict = field(default_factory=dict)
    word_boundaries: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self.base = {"name": "tfidf_svd", **self.base}
        if self.base["name"] in ("precomputed", "keyword_fusion"):
            raise ConfigError(
                f"keyword_fusion cannot stand on '{self.base['name']}': its base must make vectors of any text, keywords "
                "among them; use a text encoder such as tfidf_svd or transformers."
            )
        if self.mining and self.pool != MINED:
            raise ConfigError("The options 'mining' are for pool: mined; leave them out where 'pool' names a file.")
        self.pool_config()
        self.new_base()

    def pool_config(self) -> PoolConfig:
        """Options of mining; raises ConfigError on a wrong key or value."""
        return build(PoolConfig, {"word_boundaries": self.word_boundaries, **self.mining}, "mining of keyword_fusion")

    def new_base(self) -> Encoder:
        """The base encoder, unfitted; raises ConfigError on a wrong name or option."""
        return made_by(ENCODERS, self.base, self.seed)


class KeywordFusionEncoder(Encoder):
    """Encodes with the base encoder and fuses each text with its core keywords.

    Attributes:
        base: the encoder below.
        pool: the keywords; None until `use_pool` or `fit` with a pool file.
        matcher: finds them in texts; None as long as there is no pool.
        keyword_vectors: (K, d) float32, rows of length 1, one per distinct keyword; zero where the base encoder knows
            nothing of it.
    """

    name: ClassVar[str] = "keyword_fusion"
    config_class: ClassVar[type] = KeywordFusionConfig

    def __init__(self, config: KeywordFusionConfig | None = None) -> None:
        super().__init__(config)
        self.base = self.config.new_base()
        self.pool: KeywordPool | None = None
        self.matcher: KeywordMatcher | None = None
        self.keyword_vectors: np.ndarray | None = None

    def use_pool(self, pool: KeywordPool) -> Self:
        """Takes a pool, before `fit`."""
        self.pool, self.matcher = pool, KeywordMatcher(pool.distinct, self.config.word_boundaries)
        self.keyword_vectors = None
        return self

    def fit(self, texts: Sequence[str]) -> Self:
        """Fits the base encoder on the texts and encodes the keywords with it.

        Raises:
            ConfigError: `pool: mined` and no pool was given; learn_sids mines one.
            DataError: no texts, or a pool file that cannot be read.
        """
        if self.pool is None:
            if self.config.pool == MINED:
                raise ConfigError(
                    "The keyword pool of this keyword_fusion encoder has not been mined yet; call "
                    "use_pool(mine_pool(data)), or set 'pool' to a pool file or folder."
                )
            self.use_pool(read_pool(self.config.pool))
        self.base.fit(texts)
        self.keyword_vectors = self._encode_keywords()
        return self

    def _encode_keywords(self) -> np.ndarray:
        """Unit vectors of the keywords, zero where a keyword gets what a text without any word gets."""
        vectors = self.base.encode([*self.matcher.keywords, ""])
        unknown = (vectors == vectors[-1]).all(axis=1)
        return np.where(unknown[:, None], 0.0, unit_rows(vectors)).astype(np.float32)[:-1]

    def encode(self, texts: Sequence[str], item_ids: Sequence[str] | None = None) -> np.ndarray:
        """Vectors (n, d) float32, rows of length 1. Each row depends on its own text only."""
        if self.keyword_vectors is None:
            raise DataError("This keyword_fusion encoder is not fitted yet; call fit(texts) or load a saved one.")
        texts = check_texts(texts)
        vectors = unit_rows(self.base.encode(texts, item_ids))
        self.empty_texts = self.base.empty_texts
        return fuse(vectors, self.keyword_vectors, self.matcher.match(texts))

    def _save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        if self.keyword_vectors is None:
            raise DataError("This keyword_fusion encoder is not fitted yet, so there is nothing to save; call fit.")
        self.base.save_pretrained(folder / BASE_FOLDER)
        self.pool.save_pretrained(folder / POOL_FOLDER)
        save_file({"keyword_vectors": self.keyword_vectors}, folder / TENSOR_FILE)

    def _load(self, folder: Path) -> None:
        self.base = Encoder.from_pretrained(folder / BASE_FOLDER)
        self.use_pool(KeywordPool.from_pretrained(folder / POOL_FOLDER))
        vectors: Any = load_tensors(folder / TENSOR_FILE).get("keyword_vectors")
        if vectors is None or vectors.ndim != 2 or len(vectors) != len(self.matcher.keywords):
            raise DataError(f"Keywords and their vectors in {folder} do not fit together; write the folder again.")
        self.keyword_vectors = vectors
