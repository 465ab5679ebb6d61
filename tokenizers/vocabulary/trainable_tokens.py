"""What trains: only the rows of new tokens ("rows"), LoRA on the linear layers beside them ("lora"), or "all".

Mechanism. The new rows become a small parameter of their own, `sid_rows` (n, d), attached to the embedding (and to an
untied head); the matrix itself stays frozen. The embedding looks new ids up in `sid_rows`; the head multiplies by the
frozen matrix with the new rows put in. So old rows cannot move under any optimizer, weight decay or sharding, gradient
norm and optimizer state count the new rows only, and a tied head stays tied: it reads the embedding's `sid_rows`.

Why not something simpler (TRL 1.16, PEFT 0.21): TRL multiplies hidden states by `lm_head.weight` directly, hence it
refuses PEFT layers on an untied head and does not see PEFT's trainable tokens through a tied one. A gradient mask on
the whole matrix would need weight decay off, keeps optimizer state for every row, and is lost where parameters are
rebuilt (FSDP2). Here `weight` of the head is a property that every reader gets right.

The modules keep their identity (only their class is swapped), so parameter names, PEFT targets and `save_pretrained`
work as before; the state dict of an unsharded model in "rows" mode is that of a plain model. In "lora" mode `sid_rows`
is a `modules_to_save` of PEFT, so a trainer's checkpoints hold and restore it. Our choice; no paper is involved.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from sidtune.core.config import check_keys
from sidtune.core.errors import ConfigError, nearest
from sidtune.tokenizers.vocabulary.extension import Vocabulary
from sidtune.tokenizers.vocabulary.token_matrices import VocabMatrix, base_of, gathered, is_split, vocab_matrices

MODES = ("rows", "lora", "all")
ROWS = "sid_rows"
LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
_LORA_RESERVED = ("task_type", "inference_mode", "trainable_token_indices", "base_model_name_or_path", "peft_type")


class _Forward:
    """Shared by a model and its heads: is a forward running, and is this process about to shard with FSDP?"""

    def __init__(self) -> None:
        self.depth = 0
        self.fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def _enter(module: nn.Module, arguments: Any) -> None:
    module.__dict__["_rows_forward"].depth += 1


def _leave(module: nn.Module, arguments: Any, output: Any) -> None:
    module.__dict__["_rows_forward"].depth -= 1


def _watch_forward(module: nn.Module, state: _Forward) -> None:
    module.__dict__["_rows_forward"] = state
    module.register_forward_pre_hook(_enter)
    module.register_forward_hook(_leave, always_call=True)


def _forget_forward(module: nn.Module) -> None:
    # By function, not by handle: the handles of a deep copy still point at the original.
    for hooks, ours in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
    module.__dict__.pop("_rows_forward", None)


class NewRows(nn.Module):
    """The trainable rows of one matrix: `weight` (n, d). A module, so that ZeRO-3 gathers it and PEFT can save it."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)
        self.written = False  # True while a state dict holds these rows inside the whole matrix

    def forward(self) -> torch.Tensor:
        """(n, d), whole; a copy where ZeRO-3 frees the parameter after this call."""
        weight = self.weight
        if hasattr(weight, "full_tensor"):
            return _whole_with_mean_gradient(weight)
        return weight.clone() if hasattr(weight, "ds_id") else weight

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if not self.written:
            super()._save_to_state_dict(destination, prefix, keep_vars)


def _whole_with_mean_gradient(weight: Any) -> torch.Tensor:
    """A DTensor put together, whose gradient is averaged over the processes as FSDP2 does for what it gathers itself.

    Needed where the head is a unit of its own, which TRL never calls, so that FSDP2 neither gathers nor reduces it.
    """
    from torch.distributed.tensor import Partial

    mesh = weight.device_mesh
    whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


class _SplitMatrix:
    """Behaviour of a module whose matrix has new rows in a `NewRows` (its own, or that of the module it is tied to)."""

    def _new_rows(self) -> torch.Tensor:
        rows = self.__dict__["_rows_owner"][0]._modules[ROWS]()
        return rows.to(self._parameters["weight"].dtype)  # type: ignore[attr-defined]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        rows = self._modules.get(ROWS)  # type: ignore[attr-defined]
        if isinstance(rows, NewRows):
            weight, (start, stop) = self._parameters["weight"], self._rows_span  # type: ignore[attr-defined]
            rows.written = not (is_split(weight) or is_split(rows.weight) or self._rows_forward.fsdp)  # type: ignore[attr-defined]
            if rows.written:
                with torch.no_grad():
                    weight.data[start:stop] = rows.weight.data.to(weight)
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        own, whole = f"{prefix}{ROWS}.weight", state_dict.get(f"{prefix}weight")
        if isinstance(self._modules.get(ROWS), NewRows) and own not in state_dict and whole is not None:  # type: ignore[attr-defined]
            start, stop = self._rows_span  # type: ignore[attr-defined]
            state_dict[own] = whole[start:stop]
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


class _SplitEmbedding(_SplitMatrix):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        start, stop = self._rows_span  # type: ignore[attr-defined]
        rows = self._new_rows()
        old = F.embedding(input, self.weight, self.padding_idx)  # type: ignore[attr-defined]
        new = F.embedding((input - start).clamp(0, stop - start - 1), rows)
        found = torch.where(((input >= start) & (input < stop)).unsqueeze(-1), new, old)
        scale = getattr(self, "embed_scale", None)
        if scale is None:
            return found
        return found * (scale.to(found.dtype) if torch.is_tensor(scale) else scale)


class _SplitHead(_SplitMatrix):
    @property
    def weight(self) -> torch.Tensor:
        """(rows, d): the frozen matrix with the trainable rows in place.

        Outside of a forward FSDP2 gets the stored parameter: it and accelerate compare parameters by identity.
        """
        try:
            start, stop = self._rows_span  # type: ignore[attr-defined]
            stored = self._parameters["weight"]  # type: ignore[attr-defined]
            state = self._rows_forward  # type: ignore[attr-defined]
            if state.depth == 0 and (state.fsdp or hasattr(stored, "full_tensor")):
                return stored
            rows = self._new_rows()
            with gathered(stored) as old:
                whole = torch.cat([old[:start], rows, old[stop:]])
            if hasattr(stored, "ds_id"):
                whole.ds_status = _zero_available()  # TRL asks every head under ZeRO-3 whether it must be gathered
            return whole
        except AttributeError as error:  # nn.Module would answer with the out-of-date parameter instead
            raise RuntimeError(f"The head's matrix cannot be put together: {error}") from error


def _zero_available() -> Any:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return ZeroParamStatus.AVAILABLE


_CLASSES: dict[type, type] = {}


def _split_class(module: nn.Module) -> type:
    cls = type(module)
    if cls not in _CLASSES:
        behaviour = _SplitEmbedding if isinstance(module, nn.Embedding) else _SplitHead
        _CLASSES[cls] = type(f"Rows{cls.__name__}", (behaviour, cls), {"_plain_class": cls})
    return _CLASSES[cls]


def split_matrices(model: nn.Module) -> list[VocabMatrix]:
    """The matrices whose new rows are attached as `sid_rows`; empty for a plain model."""
    return [matrix for matrix in vocab_matrices(model) if ROWS in matrix.owner._modules]


def split_rows(model: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Attaches `sid_rows` to every token matrix that is used; nothing is frozen yet.

    Raises:
        ConfigError: an embedding whose lookup is not the plain (optionally scaled) one.
    """
    start, stop = vocabulary.start, vocabulary.stop
    matrices = [matrix for matrix in vocab_matrices(model) if matrix.used]
    for matrix in matrices:
        for module in matrix.modules:
            _check_lookup(module)
    state = _Forward()
    for matrix in matrices:
        with gathered(matrix.parameter) as whole:
            vocabulary.check(rows=whole.shape[0])
            matrix.owner.add_module(ROWS, NewRows(whole[start:stop].clone()))
        for module in matrix.modules:
            module.__dict__["_rows_owner"] = [matrix.owner]  # in a list: a reference, not a second registration
            module.__dict__["_rows_span"] = (start, stop)
            module.__dict__["_rows_forward"] = state
            module.__class__ = _split_class(module)
    _watch_forward(model, state)


def _check_lookup(module: nn.Module) -> None:
    if not isinstance(module, nn.Embedding):
        return
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if not plain or module.max_norm is not None or module.sparse:
        raise ConfigError(
            f"The embedding {type(module).__name__} does more than look rows up, so its new rows cannot train alone; "
            "train with mode 'all'."
        )


@torch.no_grad()
def _join_rows(model: PreTrainedModel) -> None:
    _forget_forward(model)
    for matrix in split_matrices(model):
        rows = matrix.owner._modules[ROWS].weight
        if is_split(rows) or is_split(matrix.parameter):
            raise ConfigError("A sharded model cannot be merged in place; save it with save_trained and load it again.")
        start, stop = matrix.owner._rows_span
        matrix.parameter.data[start:stop] = rows.data.to(matrix.parameter)
        del matrix.owner._modules[ROWS]
        for module in matrix.modules:
            module.__class__ = type(module)._plain_class
            for name in ("_rows_owner", "_rows_span", "_rows_forward"):
                del module.__dict__[name]
        if len(matrix.modules) > 1 and base_of(model).get_output_embeddings() in matrix.modules:
            # PEFT compares addresses after merging, takes our put-together head for an untied one and says so here.
            model.config.tie_word_embeddings = True


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The plain transformers model with LoRA and new rows merged in, all parameters trainable. Consumes `model`.

    Raises:
        ConfigError: the model is sharded.
    """
    if hasattr(model, "merge_and_unload"):
        if any(is_split(parameter) for parameter in model.parameters()):
            raise ConfigError("A sharded model cannot be merged in place; save it with save_trained and load it again.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
            model = model.merge_and_unload()
        for leftover in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(leftover, None)
    _join_rows(model)  # type: ignore[arg-type]
    _set_grad(model, True)
    return model  # type: ignore[return-value]


def set_trainable(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    mode: str = "rows",
    lora: dict[str, Any] | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Chooses what trains and returns the model to train.

    Args:
        model: the extended model; one prepared by this function for "rows" or "all" before may be given again.
        vocabulary: its vocabulary.
        mode: "rows" trains the SID rows of embedding and head, nothing else. "lora" trains LoRA factors and the SID
            rows and returns a `PeftModel`. "all" trains everything, the spare rows behind the last token included.
        lora: fields of `peft.LoraConfig` for "lora"; defaults r=16, lora_alpha=32, no dropout, all linear layers.
        seed: seed of the LoRA factors, which then leaves the caller's random state alone; default that state, so seed it
            before, equally on every process.

    Under DeepSpeed and FSDP2 call it before the trainer is made, on every process. Weights keep their dtype: train
    float32 weights under `bf16=True` rather than bfloat16 weights, whose small updates are lost.

    Raises:
        ConfigError: unknown mode or LoRA field, LoRA options without "lora", LoRA on embedding or head, or a model that
            carries an adapter (merge it first with `plain_model`).
        DataError: the vocabulary belongs to another model.
    """
    if mode not in MODES:
        raise ConfigError(f"There is no training mode '{mode}': {nearest(str(mode), MODES)}")
    if lora is not None and mode != "lora":
        raise ConfigError(f"LoRA options need mode 'lora', but the mode is '{mode}'; change one of them.")
    if base_of(model) is not model or getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError("The model carries an adapter already; merge it with plain_model or load it with load_model.")
    _join_rows(model)
    first = vocab_matrices(model)[0].parameter
    vocabulary.check(rows=getattr(first, "ds_shape", first.shape)[0])
    _set_grad(model, mode == "all")
    if mode == "all":
        return model
    if mode == "rows":
        split_rows(model, vocabulary)
        return model
    return _with_lora(model, vocabulary, lora or {}, seed)


def _set_grad(model: nn.Module, trains: bool) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(trains)


def _with_lora(model: PreTrainedModel, vocabulary: Vocabulary, options: dict[str, Any], seed: int | None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    known = [f.name for f in dataclasses.fields(LoraConfig) if f.name not in _LORA_RESERVED]
    check_keys(options, known, "The LoRA options")
    _check_targets(model, options)
    also = options.get("modules_to_save") or []
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    try:
        config = LoraConfig(**{**LORA_DEFAULTS, **options, "task_type": task, "modules_to_save": [*also, ROWS]})
        split_rows(model, vocabulary)
        # ZeRO-3 gathers parameters in groups of one dtype, so LoRA factors must not be raised to float32 there.
        sharded = any(is_split(parameter) for parameter in model.parameters()) or _zero3()
        devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            adapted = get_peft_model(model, config, autocast_adapter_dtype=not sharded)
        _watch_forward(adapted, model.__dict__["_rows_forward"])  # PEFT skips the hooks of the model inside
        return adapted
    except (ValueError, TypeError) as error:
        _join_rows(model)
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ConfigError(f"The LoRA options do not fit {type(model).__name__} ({reason}); correct them.") from None


def _check_targets(model: PreTrainedModel, options: dict[str, Any]) -> None:
    names = {matrix.name.rpartition(".")[2] for matrix in vocab_matrices(model)}
    token = (model.get_output_embeddings(), model.get_input_embeddings())
    names |= {name.rpartition(".")[2] for name, module in model.named_modules() if any(module is one for one in token)}
    for key in ("target_modules", "modules_to_save"):
        chosen = options.get(key) or []
        listed = [chosen] if isinstance(chosen, str) else list(chosen)
        clash = sorted(name for name in names if any(str(target).rpartition(".")[2] == name for target in listed))
        if clash:
            raise ConfigError(
                f"'{clash[0]}' in {key} would adapt the whole vocabulary matrix; leave it out, its SID rows train "
                "anyway."
            )


def _zero3() -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def trained_rows(model: nn.Module) -> dict[str, torch.Tensor]:
    """Path of each split matrix → its new rows (n, d) on the CPU. Collective: call on every process of a sharded run.

    Raises:
        ConfigError: no rows are attached (mode "all", or a merged model).
    """
    matrices = split_matrices(model)
    if not matrices:
        raise ConfigError("The model has no rows that train on their own; call set_trainable with 'rows' or 'lora'.")
    found = {}
    for matrix in matrices:
        with gathered(matrix.owner._modules[ROWS].weight) as rows:
            found[matrix.name] = rows.detach().cpu().clone()
    return found
