"""The one place where a language model's vocabulary grows by semantic-ID tokens.

`extend_vocabulary` adds the tokens to the tokenizer, grows every token matrix of the model, chooses the first values of
the new rows, and returns a `Vocabulary`: which token id each code has. The tokens are *ordinary* added tokens. Special
ones would be stripped from the text that TRL hands to reward functions.

The way it differs from `resize_token_embeddings` (our choices): nothing ever shrinks (Qwen3 has more rows than tokens,
and the spare ones are used), an untied head stays untied, the first values are chosen, every row behind the last token
holds the mean row, and everything is checked on a copy of the tokenizer before the first change.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.folders import read_json, write_json
from sidtune.data_builders.prompts.encoding import is_sid
from sidtune.tokenizers.letters import SidLetters
from sidtune.tokenizers.vocabulary.embedding_init import (
    INITS,
    OldRows,
    check_codebooks,
    check_texts,
    codebook_rows,
    noisy,
    text_rows,
    token_shares,
)
from sidtune.tokenizers.vocabulary.token_matrices import VocabMatrix, base_of, grow, is_split, vocab_matrices

if TYPE_CHECKING:
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds

VOCABULARY_FILE = "sid_vocabulary.json"
logger = logging.getLogger(__name__)
_PROBES = 64  # random SIDs spelled out to see that the tokenizer gives one id per token


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Which token ids the semantic IDs have in one language model.

    Attributes:
        level_sizes: number of codes per level.
        sid_token_ids: (sum level_sizes,) int64, aligned with `SemanticIds.tokens()`; consecutive, ascending, read-only.
        base_vocab_size: number of tokens before the semantic IDs; the first SID token has this id.
        embedding_rows: rows of the token matrices, padding included.
        letters: one letter per level in the token texts; default a, b, c, ...
        sids_fingerprint: of the semantic IDs the model learned; None for a model saved before models carried it.
        source: the folder it was loaded from, for messages.

    Raises:
        DataError: ids that are not consecutive from `base_vocab_size`, or do not fit the levels or the rows.
        ConfigError: letters that do not fit the levels.
    """

    level_sizes: tuple[int, ...]
    sid_token_ids: np.ndarray = field(repr=False)
    base_vocab_size: int
    embedding_rows: int
    letters: str | None = None
    sids_fingerprint: str | None = None
    source: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        ids = np.array(self.sid_token_ids, dtype=np.int64)
        count = sum(self.level_sizes)
        if not np.array_equal(ids, np.arange(self.base_vocab_size, self.base_vocab_size + count)) or not count:
            raise DataError(
                f"The SID token ids must be the {count} consecutive ids from {self.base_vocab_size} on, got {len(ids)} "
                "others; extend the vocabulary again."
            )
        if self.stop > self.embedding_rows:
            raise DataError(
                f"The SID tokens end at id {self.stop - 1}, but the model has {self.embedding_rows} rows; the "
                "vocabulary belongs to another model."
            )
        ids.flags.writeable = False
        object.__setattr__(self, "sid_token_ids", ids)
        object.__setattr__(self, "level_sizes", tuple(int(size) for size in self.level_sizes))
        object.__setattr__(self, "letters", SidLetters(self.level_sizes, self.letters).letters)

    @property
    def start(self) -> int:
        """First SID token id."""
        return self.base_vocab_size

    @property
    def stop(self) -> int:
        """One past the last SID token id."""
        return self.base_vocab_size + sum(self.level_sizes)

    @property
    def depth(self) -> int:
        """Number of levels."""
        return len(self.level_sizes)

    def level_token_ids(self, level: int) -> np.ndarray:
        """(level_sizes[level],) int64 token ids of one level, code order. Raises ConfigError for an unknown level."""
        if not 0 <= level < self.depth:
            raise ConfigError(f"There is no level {level}; this vocabulary has the levels 0 to {self.depth - 1}.")
        first = sum(self.level_sizes[:level])
        return self.sid_token_ids[first : first + self.level_sizes[level]]

    def token_ids(self, codes: np.ndarray) -> np.ndarray:
        """(..., L) codes → (..., L) int64 token ids."""
        offsets = np.concatenate([[0], np.cumsum(self.level_sizes[:-1])]).astype(np.int64)
        return self.sid_token_ids[np.asarray(codes, dtype=np.int64) + offsets]

    def check(
        self, tokenizer: PreTrainedTokenizerBase | None = None, sids: SemanticIds | None = None, rows: int | None = None
    ) -> None:
        """The one place where a model refuses what is not its own.

        Args:
            tokenizer: must hold the SID tokens at their ids.
            sids: must be those the model was trained on, or have added items to them (`SemanticIds.extended`).
            rows: of the model's token matrices.

        Raises:
            DataError: one of them belongs to something else; names both folders where they are known.
        """
        if sids is not None:
            self._check_sids(sids)
        if rows is not None and rows < self.stop:
            raise DataError(
                f"The model has {rows} token rows, but the SID tokens end at id {self.stop - 1}; use the extended "
                "model."
            )
        if tokenizer is not None:
            ends = tokenizer.convert_ids_to_tokens([self.start, self.stop - 1]) if len(tokenizer) >= self.stop else []
            last = SidLetters(self.level_sizes, self.letters).level_tokens(self.depth - 1)[-1]
            if ends != ["<a_0>", last]:
                raise DataError(
                    f"The tokenizer does not hold the SID tokens <a_0> to {last} at the ids {self.start} to "
                    f"{self.stop - 1}; use the tokenizer saved with this vocabulary."
                )

    def _check_sids(self, sids: SemanticIds) -> None:
        """Sizes and letters first, which say more; then the codes themselves."""
        problem = None
        if tuple(sids.level_sizes) != self.level_sizes:
            problem = f"the vocabulary has levels of {list(self.level_sizes)} codes, the semantic IDs of {list(sids.level_sizes)}"
        elif sids.letters != self.letters:
            problem = f"the vocabulary writes its levels with the letters '{self.letters}', the semantic IDs with '{sids.letters}'"
        elif self.sids_fingerprint is None:
            logger.warning("%s carries no fingerprint of its semantic IDs: only their sizes are compared.", self.source)
        elif self.sids_fingerprint not in (sids.fingerprint(), *sids.extends):
            problem = "it learned other items or codes"
        if problem is not None:
            model, codes = (f" in {folder}" if folder else "" for folder in (self.source, sids.source))
            raise DataError(
                f"The model{model} and the semantic IDs{codes} do not belong together: {problem}; use the semantic IDs the "
                "model was extended with, or train it on these."
            )

    def of(self, sids: SemanticIds) -> Vocabulary:
        """The same, for a model that was trained on these semantic IDs. Raises DataError when they do not fit."""
        self._check_sids(sids)
        return replace(self, sids_fingerprint=sids.fingerprint())

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `sid_vocabulary.json` into a folder, which is made if missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        value = {
            "format": 1,
            "level_sizes": list(self.level_sizes),
            "base_vocab_size": self.base_vocab_size,
            "embedding_rows": self.embedding_rows,
            "letters": self.letters,
            "sids_fingerprint": self.sids_fingerprint,
            "sid_token_ids": self.sid_token_ids.tolist(),
        }
        write_json(Path(folder) / VOCABULARY_FILE, value)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads `sid_vocabulary.json` of a local model folder. Raises DataError when missing or damaged."""
        path = Path(folder) / VOCABULARY_FILE
        value = read_json(path)
        try:
            counts = (value["base_vocab_size"], value["embedding_rows"])
            numbers = [*counts, *value["level_sizes"], *value["sid_token_ids"]]
            if any(type(number) is not int or number < 0 for number in numbers):
                raise TypeError("a value that is no count")
            return cls(
                level_sizes=tuple(value["level_sizes"]),
                sid_token_ids=np.array(value["sid_token_ids"], dtype=np.int64),
                base_vocab_size=value["base_vocab_size"],
                embedding_rows=value["embedding_rows"],
                letters=value.get("letters"),
                sids_fingerprint=value.get("sids_fingerprint"),
                source=Path(folder),
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise DataError(f"The file {path} is damaged ({error}); copy it from the extended model again.") from None


def extend_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sids: SemanticIds,
    init: str = "codebook",
    codebooks: Sequence[np.ndarray] | None = None,
    item_texts: Mapping[str, str] | Sequence[str] | None = None,
    pad_to_multiple_of: int | None = 64,
    noise: float = 0.02,
    shrink: float = 2.0,
    seed: int = 0,
) -> Vocabulary:
    """Adds all SID tokens to tokenizer and model, in place.

    Args:
        model, tokenizer: causal or encoder-decoder language model, whole (not sharded, no adapter), and its tokenizer.
        init: first values of the new rows, see `embedding_init`: "codebook", "text" or "mean".
        codebooks: L arrays (k_l, d_c) for "codebook"; a suffix level of the SIDs needs none and gets the mean row.
        item_texts: item id → text, or N texts in row order, for "text".
        pad_to_multiple_of: the number of rows is rounded up to a multiple; None or 1 rounds nothing. A model that has
            enough rows keeps their number.
        noise: Gaussian noise of the new rows, in standard deviations of the old values. 0 gives none.
        shrink: pseudo-items that pull "text" rows to the mean row.
        seed: seed of projection and noise.

    Every row behind the last token, spare rows of the original model included, gets the mean of the old rows; it
    belongs to no token and is never legal in decoding.

    Raises:
        ConfigError: unknown init, a bad number, a sharded or adapted model, a tokenizer that holds SID tokens already
            or cannot take them, or one that does not belong to the model. Nothing has changed then.
        DataError: codebooks or texts that do not fit the semantic IDs. Nothing has changed then.
    """
    check_options(init, pad_to_multiple_of, noise, shrink)
    _check_model(model)
    codes = check_codebooks(codebooks, sids.level_sizes, sids.suffix_level) if init == "codebook" else []
    texts = check_texts(item_texts, sids) if init == "text" else []
    matrices = vocab_matrices(model)
    base, rows = len(tokenizer), matrices[0].parameter.shape[0]
    if rows < base:
        raise ConfigError(
            f"The tokenizer has {base} tokens but the model only {rows} rows; they do not belong together."
        )
    tokens = sids.tokens()
    _check_tokenizer(tokenizer, tokens, sids)
    shares = token_shares(tokenizer, texts, base) if init == "text" else None

    tokenizer.add_tokens(_added(tokens))
    stop, multiple = base + len(tokens), pad_to_multiple_of or 1
    grow(model, max(rows, -(-stop // multiple) * multiple))
    for number, matrix in enumerate(vocab_matrices(model)):
        old = OldRows(matrix.parameter[:base])
        if init == "codebook":
            values = codebook_rows(old, codes, sids.level_sizes, seed)
        elif shares is not None:
            values = text_rows(old, sids, shares, shrink)
        else:
            values = np.tile(old.mean, (len(tokens), 1))
        with torch.no_grad():
            matrix.parameter[base:stop] = noisy(values, old, noise, seed + 1 + number).to(matrix.parameter)
        fill_spare_rows(matrix, base, stop, old)
    return Vocabulary(
        level_sizes=tuple(sids.level_sizes),
        sid_token_ids=np.arange(base, stop, dtype=np.int64),
        base_vocab_size=base,
        embedding_rows=vocab_matrices(model)[0].parameter.shape[0],
        letters=sids.letters,
        sids_fingerprint=sids.fingerprint(),
    )


def check_words(tokens: Sequence[str]) -> None:
    """Raises ConfigError for an extra token that can be none."""
    for token in tokens:
        if not isinstance(token, str) or not token or any(c.isspace() for c in token) or is_sid(token):
            raise ConfigError(f"An extra token must be a word without white space that is no SID, got {token!r}.")


def add_plain_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], model: PreTrainedModel | None = None, seed: int = 0
) -> list[int]:
    """Adds words such as `</think>` as ordinary tokens, before the vocabulary grows by semantic IDs; known ones stay.

    Ordinary and not special, because TRL leaves special tokens out of the texts it decodes. Given a model, its token matrices
    grow where they must, and the rows of new tokens get the mean row with a little noise.

    Args:
        tokenizer, model: changed in place; no model when it is built afterwards.
        tokens: the words; no white space, no semantic-ID tokens (ConfigError).
        seed: of the noise.

    Returns:
        The token id of each word.
    """
    check_words(tokens)
    known, base = tokenizer.get_vocab(), len(tokenizer)
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    tokenizer.add_tokens(_added(new))
    if model is not None and new:
        grow(model, len(tokenizer))
        for number, matrix in enumerate(vocab_matrices(model)):
            old = OldRows(matrix.parameter[:base])
            rows = noisy(np.tile(old.mean, (len(new), 1)), old, 0.02, seed + number)
            with torch.no_grad():
                matrix.parameter[base : len(tokenizer)] = rows.to(matrix.parameter)
    return tokenizer.convert_tokens_to_ids(list(tokens))


@torch.no_grad()
def fill_spare_rows(matrix: VocabMatrix, base: int, stop: int, old: OldRows | None = None) -> None:
    """Sets the rows from `stop` on to the mean of the first `base` rows."""
    old = OldRows(matrix.parameter[:base]) if old is None else old
    matrix.parameter[stop:] = torch.from_numpy(old.mean.astype(np.float32)).to(matrix.parameter)


def _added(tokens: list[str]) -> list[AddedToken]:
    return [
        AddedToken(t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=False) for t in tokens
    ]


def check_options(init: str, multiple: int | None, noise: float = 0.0, shrink: float = 0.0) -> None:
    """Raises ConfigError for wrong options of `extend_vocabulary`."""
    if init not in INITS:
        raise ConfigError(f"There is no init '{init}' for new token rows: {nearest(str(init), INITS)}")
    if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
        raise ConfigError(f"pad_to_multiple_of must be a positive integer or null, got {multiple!r}.")
    for name, value in (("noise", noise), ("shrink", shrink)):
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name} must be a finite number of at least 0, got {value!r}.")


def _check_model(model: PreTrainedModel) -> None:
    if base_of(model) is not model or any("sid_rows" in name for name, _ in model.named_parameters()):
        raise ConfigError("The vocabulary grows before an adapter or row training is added; pass the plain model.")
    if any(is_split(parameter) for parameter in model.parameters()):
        raise ConfigError(
            "The model is sharded (ZeRO-3 or FSDP2), and its vocabulary cannot grow then; extend it in one process "
            "with `sidtune init-model` and train from that folder."
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: list[str], sids: SemanticIds) -> None:
    """Refuses a tokenizer that knows SID tokens or would not give one fresh id per token; tried on a copy."""
    known: dict[str, Any] = tokenizer.get_vocab()
    present = [token for token in tokens if token in known]
    if len(present) == len(tokens):
        raise ConfigError(
            f"The tokenizer holds all {len(tokens)} SID tokens already; load its vocabulary with "
            "Vocabulary.from_pretrained, or start from the original tokenizer."
        )
    if present:
        raise ConfigError(
            f"The tokenizer holds {len(present)} of the {len(tokens)} SID tokens already (first: '{present[0]}'), so "
            "they belong to other semantic IDs or mean something else; start from the original tokenizer."
        )
    name, base = type(tokenizer).__name__, len(tokenizer)
    trial = copy.deepcopy(tokenizer)
    trial.add_tokens(_added(tokens))
    if max(known.values()) >= base or trial.convert_tokens_to_ids(tokens) != list(range(base, base + len(tokens))):
        raise ConfigError(
            f"{name} has {base} tokens but ids up to {max(known.values())}, with gaps that new tokens would fall into; "
            "use a tokenizer whose ids run from 0 to its length."
        )
    random = np.random.default_rng(0)
    drawn = np.stack([random.integers(0, size, _PROBES) for size in sids.level_sizes], axis=1)
    levels = [sids.level_tokens(level) for level in range(sids.depth)]
    texts = ["".join(levels[n][code] for n, code in enumerate(path)) for path in drawn]
    expected = (drawn + sids.token_offsets + base).tolist()
    for text, ids in zip(texts, expected, strict=True):
        alone, inside = (trial.encode(words, add_special_tokens=False) for words in (text, f"a {text}: b"))
        if alone != ids or not any(inside[n : n + len(ids)] == ids for n in range(len(inside))):
            raise ConfigError(
                f"{name} does not split '{text}' into its {sids.depth} SID tokens, because it changes the text around "
                "added tokens; use a fast tokenizer."
            )
