"""The matrices of a language model that have one row per token: where they are, who shares them, how they grow.

A causal model has an embedding and a head, tied or not; an encoder-decoder adds the embeddings of its two stacks, tied
or not. Everything here goes by *identity of the parameter*, never by config: transformers 5.23 unties the head of a T5
v1.1 at load time while its config goes on saying "tied", and its own `resize_token_embeddings` would then throw the
trained head away. Our choice; no paper is involved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sidtune.core.errors import ConfigError


@dataclass
class VocabMatrix:
    """One parameter with a row per token and all modules that share it.

    Attributes:
        name: path of the owning module in the base model, for example `model.embed_tokens`.
        owner: the module the new rows are attached to when only they train.
        modules: all modules that hold the parameter, the owner included.
        used: False for the shared table of an encoder-decoder whose stacks have their own; no forward reads it.
    """

    name: str
    owner: nn.Module
    modules: list[nn.Module]
    used: bool = True

    @property
    def parameter(self) -> nn.Parameter:
        """The stored matrix (rows, d); while only new rows train, its new rows are out of date."""
        return self.owner._parameters["weight"]


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value]


def vocab_matrices(model: nn.Module) -> list[VocabMatrix]:
    """All matrices with a row per token, embeddings first.

    Raises:
        ConfigError: the model has no head, a head or embedding of an unknown kind, or matrices of different length.
    """
    base = base_of(model)
    head = base.get_output_embeddings()
    if head is None:
        raise ConfigError(f"{type(base).__name__} has no language-model head; load a causal or seq2seq language model.")
    main = base.get_input_embeddings()
    used = [main]
    if base.config.is_encoder_decoder:
        used = [base.get_encoder().get_input_embeddings(), base.get_decoder().get_input_embeddings()]
    for module in (main, *used, head):
        _check_kind(base, module, nn.Linear if module is head else nn.Embedding)
    read = {id(module._parameters["weight"]) for module in (*used, head)}
    sharing: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in base.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            sharing.setdefault(id(weight), []).append((name, module))
    found = []
    for parameter in dict.fromkeys(id(module._parameters["weight"]) for module in (main, *used, head)):
        members = sharing[parameter]
        name, owner = next(((n, m) for n, m in members if m is main), members[0])
        found.append(VocabMatrix(name, owner, [m for _, m in members], parameter in read))
    lengths = {matrix.owner._parameters["weight"].shape[0] for matrix in found} - {0}
    if len(lengths) > 1:
        raise ConfigError(
            f"{type(base).__name__} has token matrices of {sorted(lengths)} rows; embedding and head must have the "
            "same number of rows."
        )
    return found


def _check_kind(base: nn.Module, module: Any, kind: type[nn.Module]) -> None:
    if not isinstance(module, kind) or "weight" not in module._parameters:
        role = "head" if kind is nn.Linear else "embedding"
        raise ConfigError(
            f"{type(base).__name__} has a {role} of type {type(module).__name__}; only torch.nn.{kind.__name__} and "
            "its kinds can be extended. Load the model unquantised and without an adapter."
        )


@contextlib.contextmanager
def gathered(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the whole tensor of a parameter that ZeRO-3 or FSDP2 may have split; collective where it is split."""
    if hasattr(parameter, "ds_id"):
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if parameter.ds_status != ZeroParamStatus.AVAILABLE:
            with deepspeed.zero.GatheredParameters([parameter]):
                yield parameter.data
            return
    yield parameter.detach().full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def is_split(parameter: torch.Tensor) -> bool:
    """True for a parameter that ZeRO-3 or FSDP2 holds in pieces."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor")


@torch.no_grad()
def grow(model: PreTrainedModel, rows: int) -> None:
    """Gives every token matrix `rows` rows, keeping the old ones bit by bit; never shrinks. New rows hold zeros.

    Head biases get the mean of the old ones, `final_logits_bias` zeros; configs and size attributes follow.
    """
    matrices = vocab_matrices(model)
    old = matrices[0].parameter.shape[0]
    if rows <= old:
        return
    for matrix in matrices:
        weight = matrix.parameter
        larger = weight.new_zeros(rows, weight.shape[1])
        larger[:old] = weight
        parameter = nn.Parameter(larger, requires_grad=weight.requires_grad)
        for module in matrix.modules:
            module._parameters["weight"] = parameter
            _resized(module, rows)
    bias = getattr(model, "final_logits_bias", None)
    if isinstance(bias, torch.Tensor):
        model.final_logits_bias = torch.cat([bias, bias.new_zeros(*bias.shape[:-1], rows - old)], dim=-1)
    for module in model.modules():
        if getattr(module, "vocab_size", None) == old:
            module.vocab_size = rows
    for config in _configs(model):
        if getattr(config, "vocab_size", None) == old:
            config.vocab_size = rows


def _resized(module: nn.Module, rows: int) -> None:
    if isinstance(module, nn.Embedding):
        module.num_embeddings = rows
    else:
        module.out_features = rows
        bias = module._parameters.get("bias")
        if bias is not None:
            tail = bias.mean().expand(rows - bias.shape[0])
            module.bias = nn.Parameter(torch.cat([bias, tail]), requires_grad=bias.requires_grad)


def _configs(model: PreTrainedModel) -> list[Any]:
    found = [model.config, model.config.get_text_config()]
    found += [module.config for module in model.modules() if hasattr(module, "config")]
    return list({id(config): config for config in found}.values())
