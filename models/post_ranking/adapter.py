"""Query-Instructed Adapter: the features of one user or item, read in the light of the query, become one soft token.

For a query vector x_q and feature fields x_1 ... x_k (LLM4PR, arXiv 2411.01178, section 3.2):

    Q = x_q W_Q;  K_j = x_j W_Kj;  V_j = x_j W_Vj;  h = softmax(Q K^T / sqrt(d_h)) V;  e = Linear(h)

with one key and one value matrix per field, one head, no bias on Q, K, V and a bias on the last layer (the paper writes bare
matrices and "a linear layer"). All numeric fields are concatenated into one field. With a single field the softmax is 1 and the
query has no effect; a warning says so.

Ours, where the paper is silent: missing fields are masked (at least one must remain); numeric fields are standardised with the
statistics of their FieldSpec; codes (categories, semantic IDs) are one-hot vectors before the field's matrices, computed as a
look-up, so a SID has a vector per code of each level and these are added. Everything runs in float32 whatever the language
model's dtype. `MLPAdapter` is the "w/o QIA" ablation, blind to the query or not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sidtune.core.errors import DataError
from sidtune.models.post_ranking.config import NUMERIC, FieldSpec

_NUMERIC_FIELD = "numeric fields"


class CodeHead(nn.Embedding):
    """One-hot codes of all levels times a matrix, as a look-up: codes (N, L) -> (N, d_out)."""

    def __init__(self, level_sizes: Sequence[int], d_out: int) -> None:
        super().__init__(sum(level_sizes), d_out)
        # A plain list: a buffer would be lost where a model is built on the meta device.
        self._starts = [sum(level_sizes[:level]) for level in range(len(level_sizes))]

    def forward(self, codes: Tensor) -> Tensor:
        return super().forward(codes + codes.new_tensor(self._starts)).sum(-2)


class FieldReader(nn.Module):
    """Raw field tensors -> adapter inputs: standardises, groups the numeric fields, finds what is missing.

    Attributes:
        specs: the fields, as given.
        names: names of the k adapter fields; numeric fields share one.
        widths: d_j of each.
    """

    def __init__(self, fields: Sequence[FieldSpec]) -> None:
        super().__init__()
        if not fields:
            raise DataError("An adapter needs at least one field, got none; add a FieldSpec for its side.")
        self.specs = tuple(fields)
        self.numeric = tuple(spec for spec in fields if spec.kind == NUMERIC)
        self.others = tuple(spec for spec in fields if spec.kind != NUMERIC)
        self.names = tuple(spec.name for spec in self.others) + ((_NUMERIC_FIELD,) if self.numeric else ())
        self.widths = tuple(spec.width for spec in self.others)
        self.widths += (sum(spec.dim for spec in self.numeric),) if self.numeric else ()
        # Plain lists: unlike a buffer they need no saving, and ZeRO and the meta device cannot lose them.
        self._mean = [v for spec in self.numeric for v in (spec.mean or (0.0,) * spec.dim)]
        self._std = [v if v > 0 else 1.0 for spec in self.numeric for v in (spec.std or (1.0,) * spec.dim)]

    def heads(self, d_out: int) -> nn.ModuleList:
        """One bias-free matrix d_j -> d_out per adapter field."""
        made = [
            CodeHead(spec.level_sizes, d_out) if spec.coded else nn.Linear(spec.dim, d_out, bias=False)
            for spec in self.others
        ]
        return nn.ModuleList(made + ([nn.Linear(self.widths[-1], d_out, bias=False)] if self.numeric else []))

    def forward(self, fields: dict[str, Tensor], mask: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Inputs of the k heads and their mask (N, k), True where present; missing inputs are zeros (code 0).

        Args:
            fields: name -> (N, dim); NaN or a negative code means missing.
            mask: (N, number of FieldSpecs) in the order of `specs`, False hides a field on top of that.

        Raises:
            DataError: an absent field, wrong widths, codes out of range, or a row with no field left.
        """
        given = {spec.name: self._checked(spec, fields) for spec in self.specs}
        place = {spec.name: number for number, spec in enumerate(self.specs)}
        inputs, present = [], []
        for spec in self.others:
            value, here = self._codes(spec, given[spec.name]) if spec.coded else _vectors(given[spec.name])
            inputs.append(value)
            present.append(here if mask is None else here & mask[:, place[spec.name]])
        if self.numeric:
            value, here = self._numbers(
                given, None if mask is None else {s.name: mask[:, place[s.name]] for s in self.numeric}
            )
            inputs.append(value)
            present.append(here)
        found = torch.stack(present, dim=1)
        if not bool(found.any(dim=1).all()):
            rows = (~found.any(dim=1)).nonzero()[:3, 0].tolist()
            raise DataError(
                f"Every user and item needs at least one known feature, but rows {rows} have all of {list(self.names)} missing; "
                "fill one of them, or leave the row out."
            )
        return inputs, found

    def _checked(self, spec: FieldSpec, fields: dict[str, Tensor]) -> Tensor:
        if spec.name not in fields:
            raise DataError(f"The {spec.side} field '{spec.name}' is absent; given are {sorted(fields)}.")
        value = fields[spec.name]
        value = value[:, None] if value.dim() == 1 and spec.dim == 1 else value
        if value.dim() != 2 or value.shape[1] != spec.dim:
            raise DataError(f"The {spec.side} field '{spec.name}' must be (N, {spec.dim}), got {tuple(value.shape)}.")
        return value

    def _codes(self, spec: FieldSpec, value: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.nan_to_num(value, nan=-1.0) if value.is_floating_point() else value
        codes = value.long()
        present = (codes >= 0).all(dim=1)
        sizes = torch.tensor(spec.level_sizes, device=codes.device)
        # On a GPU this check would stall the queue; the processor has made it before.
        if codes.device.type == "cpu" and bool((codes >= sizes).any()):
            raise DataError(
                f"The {spec.side} field '{spec.name}' has a code of {int(codes.max())}, but its sizes are "
                f"{list(spec.level_sizes)}; use -1 for a value that is not known."
            )
        return torch.where(present[:, None], codes, 0), present

    def _numbers(self, given: dict[str, Tensor], mask: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        parts = []
        for spec in self.numeric:
            value = given[spec.name].float()
            parts.append(value if mask is None else value.masked_fill(~mask[spec.name][:, None], torch.nan))
        raw = torch.cat(parts, dim=1)
        here = ~raw.isnan()
        scaled = (raw - raw.new_tensor(self._mean)) / raw.new_tensor(self._std)
        return torch.where(here, scaled, 0.0), here.any(dim=1)


def _vectors(value: Tensor) -> tuple[Tensor, Tensor]:
    value = value.float()
    present = ~value.isnan().any(dim=1)
    return torch.where(present[:, None], value, 0.0), present


def _apply(head: nn.Module, value: Tensor) -> Tensor:
    # An engine may have cast the module to bfloat16; inputs follow it then.
    return head(value.to(head.weight.dtype) if value.is_floating_point() else value)


class QueryInstructedAdapter(nn.Module):
    """One soft token per row from a query vector and feature fields, see the module's text.

    Args:
        fields: the FieldSpecs of one side.
        d_q: width of the query vector.
        d_h: attention width.
        d_llm: hidden size of the language model.

    Has d_q d_h + 2 d_h sum(d_j) + d_h d_llm + d_llm parameters.
    """

    def __init__(self, fields: Sequence[FieldSpec], d_q: int, d_h: int, d_llm: int) -> None:
        super().__init__()
        self.reader = FieldReader(fields)
        self.d_q, self.d_h = d_q, d_h
        self.query_head = nn.Linear(d_q, d_h, bias=False)
        self.key_heads = self.reader.heads(d_h)
        self.value_heads = self.reader.heads(d_h)
        self.out = nn.Linear(d_h, d_llm)
        if len(self.reader.names) == 1:
            warnings.warn(
                f"The adapter has one field only ({self.reader.names[0]}), so its softmax is 1 and the query has no effect on the "
                "soft token; add a second field, or use adapter 'mlp_query'."
            )

    def forward(self, x_q: Tensor, fields: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """Soft tokens (N, d_llm), float32.

        Args:
            x_q: (N, d_q) query vector of each row.
            fields: name -> (N, dim) as `FieldSpec` says; missing values are NaN or negative codes.
            mask: (N, number of FieldSpecs), False hides a field.

        Raises:
            DataError: see `FieldReader`; or a query of another width, or one that is not finite.
        """
        return self.attend(x_q, fields, mask)[0]

    def attend(self, x_q: Tensor, fields: dict[str, Tensor], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Soft tokens (N, d_llm) and attention weights (N, k) over `reader.names`."""
        check_query(x_q, self.d_q)
        with torch.autocast(x_q.device.type, enabled=False):
            inputs, present = self.reader(fields, mask)
            query = _apply(self.query_head, x_q.float()).float()
            keys = torch.stack([_apply(h, v) for h, v in zip(self.key_heads, inputs, strict=True)], 1).float()
            values = torch.stack([_apply(h, v) for h, v in zip(self.value_heads, inputs, strict=True)], 1).float()
            scores = (query[:, None] * keys).sum(-1) / math.sqrt(self.d_h)
            scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
            weights = scores.softmax(dim=-1)
            mixed = (weights[..., None] * values).sum(1)
            return _apply(self.out, mixed).float(), weights


class MLPAdapter(nn.Module):
    """The adapter without its attention: one hidden layer on the concatenated fields ("w/o QIA" of the paper, width ours).

    Args:
        fields, d_q, d_h, d_llm: as in `QueryInstructedAdapter`.
        with_query: also concatenate the query vector.
    """

    def __init__(
        self, fields: Sequence[FieldSpec], d_q: int, d_h: int, d_llm: int, *, with_query: bool = False
    ) -> None:
        super().__init__()
        self.reader = FieldReader(fields)
        self.d_q, self.with_query = d_q, with_query
        self.field_heads = self.reader.heads(d_h)
        self.query_head = nn.Linear(d_q, d_h, bias=False) if with_query else None
        self.hidden_bias = nn.Parameter(torch.zeros(d_h))
        self.out = nn.Linear(d_h, d_llm)

    def forward(self, x_q: Tensor, fields: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """Soft tokens (N, d_llm), float32; arguments and errors as in `QueryInstructedAdapter.forward`."""
        check_query(x_q, self.d_q)
        with torch.autocast(x_q.device.type, enabled=False):
            inputs, present = self.reader(fields, mask)
            # A matrix on a concatenation is the sum of one matrix per part; a missing part adds nothing.
            hidden = self.hidden_bias.float()
            for number, (head, value) in enumerate(zip(self.field_heads, inputs, strict=True)):
                hidden = hidden + _apply(head, value).float() * present[:, number, None]
            if self.query_head is not None:
                hidden = hidden + _apply(self.query_head, x_q.float()).float()
            return _apply(self.out, nn.functional.gelu(hidden)).float()


def check_query(x_q: Tensor, d_q: int) -> None:
    """Raises DataError unless x_q is (N, d_q) and finite."""
    if x_q.dim() != 2 or x_q.shape[1] != d_q:
        raise DataError(f"Query vectors must be (N, {d_q}), got {tuple(x_q.shape)}.")
    if x_q.device.type == "cpu" and not bool(x_q.isfinite().all()):
        raise DataError("A query vector holds NaN or infinity; give zeros where there is no query.")


def build_adapter(kind: str, fields: Sequence[FieldSpec], d_q: int, d_h: int, d_llm: int) -> nn.Module:
    """The adapter of a config: `qia`, `mlp` or `mlp_query`."""
    if kind == "qia":
        return QueryInstructedAdapter(fields, d_q, d_h, d_llm)
    return MLPAdapter(fields, d_q, d_h, d_llm, with_query=kind == "mlp_query")
