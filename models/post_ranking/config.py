"""Configuration of the post-ranking model: which features a user and an item have, and which token ids mean what.

A `FieldSpec` describes one feature field; `PostRankConfig` holds all of them, with the statistics that standardise the numeric
ones, so that a saved model needs no other file to read raw features. The two placeholder ids lie *outside* the vocabulary:
nothing a tokenizer writes can be mistaken for one, and no embedding matrix is resized.

Differs from the paper (arXiv 2411.01178), which fetches every feature ready embedded: categories and semantic IDs may also be
given as codes, which is the same as a one-hot vector before the field's own matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from sidtune.core.config import check_range
from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.shapes import misfit

KINDS = ("id_embedding", "categorical", "numeric", "text_vector", "sid")
SIDES = ("user", "item")
MAIN_LOSSES = ("tokens", "permutation")
ADAPTERS = ("qia", "mlp", "mlp_query")
NUMERIC = "numeric"
_NUMBERS = {"d_q": int, "d_h": int, "aux_weight": float}


@dataclass(frozen=True)
class FieldSpec:
    """One feature field of a user or of an item.

    Attributes:
        name: name of the field, unique on its side.
        kind: `id_embedding` and `text_vector`: a fixed vector of `dim` numbers from the ranking stage. `numeric`: `dim` raw
            numbers; all numeric fields of a side become ONE field of the adapter. `categorical`: with `size`, a code in
            0 ... size - 1; without it, a vector of `dim` numbers (one-hot, several-hot or upstream embedding). `sid`: with
            `size`, one code per level (`dim` levels); without it, a vector of `dim` numbers.
        side: `user` or `item`; candidates and history are both items.
        dim: numbers in a row of the field's input.
        size: categories of a `categorical` field, or the level sizes of a `sid` field; None for vectors.
        source: fingerprint of the semantic IDs that a `sid` field was trained on; None for others.
        mean, std: training statistics of a `numeric` field, `dim` numbers each; the model reads (x - mean) / std.

    A missing value is NaN anywhere in a vector, or a negative code. A number missing among several is read as its mean.

    Raises:
        ConfigError: an unknown kind or side, or sizes that do not fit.
    """

    name: str
    kind: str
    side: str
    dim: int = 1
    size: int | tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        for what, value, known in (("kind", self.kind, KINDS), ("side", self.side, SIDES)):
            if value not in known:
                raise ConfigError(f"Field '{self.name}' has the {what} '{value}': {nearest(str(value), known)}")
        if not isinstance(self.dim, int) or self.dim < 1:
            raise ConfigError(f"Field '{self.name}' needs a dim of at least 1, got {self.dim!r}.")
        if isinstance(self.size, Sequence):
            object.__setattr__(self, "size", tuple(int(n) for n in self.size))
        for key in ("mean", "std"):
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, tuple(float(v) for v in _as_list(value)))
        self._check_size()
        self._check_statistics()

    def _check_size(self) -> None:
        if self.size is None:
            return
        if self.kind not in ("categorical", "sid"):
            raise ConfigError(f"Field '{self.name}' is {self.kind}, which has no size; leave size out.")
        if len(self.level_sizes) != self.dim or min(self.level_sizes) < 1:
            raise ConfigError(
                f"Field '{self.name}' ({self.kind}) has dim {self.dim} and size {self.size}; give one size of at least 1 for "
                "each of its codes."
            )

    def _check_statistics(self) -> None:
        for key in ("mean", "std"):
            value = getattr(self, key)
            if value is None:
                continue
            if self.kind != NUMERIC or len(value) != self.dim:
                raise ConfigError(
                    f"Field '{self.name}' ({self.kind}, dim {self.dim}) has {len(value)} numbers in {key}; only numeric fields "
                    "have statistics, one for each number."
                )
            if not all(abs(v) < float("inf") for v in value) or (key == "std" and min(value) < 0):
                raise ConfigError(
                    f"Field '{self.name}' has {key} {list(value)}; it must be finite, and std not negative."
                )

    @property
    def coded(self) -> bool:
        """Whether the input is codes rather than numbers."""
        return self.size is not None

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Sizes of the codes of a coded field."""
        return self.size if isinstance(self.size, tuple) else (int(self.size or 0),)

    @property
    def width(self) -> int:
        """d_j of the adapter: rows of the field's key and value matrices."""
        return sum(self.level_sizes) if self.coded else self.dim

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, without empty entries."""
        found = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {key: value for key, value in found.items() if value is not None}


def _as_list(value: Any) -> list[float]:
    return list(value) if isinstance(value, Sequence) or hasattr(value, "__len__") else [value]


def field_from(value: FieldSpec | dict[str, Any]) -> FieldSpec:
    """A FieldSpec from itself or from its dict. Raises ConfigError that names the nearest known key."""
    if isinstance(value, FieldSpec):
        return value
    known = set(FieldSpec.__dataclass_fields__)
    for key in value:
        if key not in known:
            raise ConfigError(f"A field has the unknown key '{key}': {nearest(key, known)}")
    if missing := [key for key in ("name", "kind", "side") if key not in value]:
        raise ConfigError(f"The field {value} lacks {missing}; add them.")
    return FieldSpec(
        **{**value, "size": tuple(value["size"]) if isinstance(value.get("size"), list) else value.get("size")}
    )


@strict
class PostRankConfig(PreTrainedConfig):
    """Everything `PostRankForCausalLM` needs besides weights.

    Attributes:
        text_config: config of the language model.
        base_model_name_or_path, base_model_revision: where the language model came from; layouts A and B load it again.
        fields: dicts of `FieldSpec`; read them as `field_specs`.
        d_q: width of the query vector.
        d_h: attention width of the adapter, 512 in the paper.
        user_token_id, item_token_id: placeholder ids, outside the vocabulary; None takes the two ids behind its end.
        label_token_ids: vocabulary ids of the labels, first incoming candidate first; distinct.
        end_token_id: closes every response; None takes the language model's eos.
        template_version: which templates the model was trained with, see `templates`.
        adapter: `qia`, or the ablations `mlp` (fields only) and `mlp_query` (fields and query).
        aux_weight: weight of the auxiliary task's loss, 1 by default (the paper names none).
        main_loss: `tokens`, the paper's likelihood over the whole vocabulary, or `permutation` (ours): each place competes with
            the candidates that are not placed yet, as in constrained decoding (Plackett and Luce's model of a list). A model
            trained so need not learn the form of an answer, and does not: its unconstrained answers are no permutations.
        label_sum: adds the embedding of its label to each candidate's soft token (ours; false is the paper's prompt). The label
            stands before the candidate either way, but a small model must otherwise first learn to look one token back.

    Raises:
        ConfigError: ids that clash, no item field, names used twice.
    """

    model_type = "postrank"
    keys_to_ignore_at_inference = ["main_loss", "aux_loss"]
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    fields: list | tuple | None = None
    d_q: int = 64
    d_h: int = 512
    user_token_id: int | None = None
    item_token_id: int | None = None
    label_token_ids: list | tuple | None = None
    end_token_id: int | None = None
    template_version: str = "v1"
    adapter: str = "qia"
    aux_weight: float = 1.0
    main_loss: str = "tokens"
    label_sum: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # A copy: transformers would otherwise switch off the attention of the live model this config was taken from.
        self.text_config = copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        specs = [field_from(value) for value in self.fields or []]
        self.fields = [spec.to_dict() for spec in specs]
        self.label_token_ids = [int(token) for token in self.label_token_ids or []]
        size = self.text_config.vocab_size
        if self.end_token_id is None:
            eos = getattr(self.text_config, "eos_token_id", None)
            self.end_token_id = eos[0] if isinstance(eos, list) and eos else eos
        self.user_token_id = size if self.user_token_id is None else self.user_token_id
        self.item_token_id = self.user_token_id + 1 if self.item_token_id is None else self.item_token_id
        # transformers builds every config once without arguments, to see its defaults.
        if specs or self.label_token_ids:
            self._check(specs, size)

    def _check(self, specs: list[FieldSpec], size: int) -> None:
        if self.main_loss not in MAIN_LOSSES:
            raise ConfigError(f"There is no main_loss '{self.main_loss}': {nearest(self.main_loss, MAIN_LOSSES)}")
        if self.adapter not in ADAPTERS:
            raise ConfigError(f"There is no adapter '{self.adapter}': {nearest(self.adapter, ADAPTERS)}")
        names = [(spec.side, spec.name) for spec in specs]
        if len(set(names)) < len(names):
            raise ConfigError(f"Field names must differ on one side, got {names}.")
        if not any(spec.side == "item" for spec in specs):
            raise ConfigError("The post-ranking model has no item field; give at least one FieldSpec with side 'item'.")
        if why := misfit({name: getattr(self, name) for name in _NUMBERS}, _NUMBERS):
            raise ConfigError(f"The post-ranking config: {why}; correct it.")
        check_range(self, 1, "d_q", "d_h")
        check_range(self, 0, "aux_weight")
        if self.user_token_id == self.item_token_id or min(self.user_token_id, self.item_token_id) < size:
            raise ConfigError(
                f"user_token_id and item_token_id must differ and lie outside the vocabulary of {size} tokens, got "
                f"{self.user_token_id} and {self.item_token_id}; {size} and {size + 1} will do."
            )
        labels = self.label_token_ids
        if self.end_token_id is None or self.end_token_id in labels:
            raise ConfigError(
                f"end_token_id must be a token that is no label, got {self.end_token_id}; name the eos token."
            )
        if not labels or len(set(labels)) < len(labels) or not all(0 <= token < size for token in labels):
            raise ConfigError(
                f"label_token_ids must be distinct ids of the vocabulary of {size} tokens, got {labels}; choose_labels finds some."
            )

    @property
    def field_specs(self) -> tuple[FieldSpec, ...]:
        """All fields."""
        return tuple(field_from(value) for value in self.fields)

    def check_sources(self, sources: Mapping[str, Sequence[str]]) -> None:
        """Refuses semantic IDs that the model was not trained on.

        Args:
            sources: `"{side}/{field}"` → fingerprints of what the values come from and extend; unknown ones are not compared.

        Raises:
            DataError: a field holds other semantic IDs.
        """
        for spec in self.field_specs:
            given = sources.get(f"{spec.side}/{spec.name}", ())
            if spec.source and given and spec.source not in given:
                raise DataError(
                    f"The post-ranking model learned its field '{spec.name}' from the semantic IDs {spec.source[:12]}, but these "
                    f"requests hold those of {given[0][:12]}; give requests with the model's own semantic IDs, or train anew."
                )

    def side_fields(self, side: str) -> tuple[FieldSpec, ...]:
        """The fields of `user` or `item`, in order."""
        return tuple(spec for spec in self.field_specs if spec.side == side)


AutoConfig.register("postrank", PostRankConfig, exist_ok=True)
