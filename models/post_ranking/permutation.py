"""Orders of candidates out of a language model that answers with one label per candidate.

*Constrained*: only labels that are not used yet, then the end token (`PermutationLogitsProcessor`), so that every answer is a
permutation, greedily or by beams. *Single forward* (`single_forward_order`): one pass, candidates sorted by the logit of their
label as the first one; an extension after FIRST (Reddy et al. 2024), not in the paper. *Unconstrained*: whatever the model says,
parsed and repaired (`parse_orders`): unknown labels dropped, repeated ones dropped, missing ones appended in incoming order, all
counted, as rank_llm does. *Long lists* (`rank_in_windows`): a window of 20 slides from the back in steps of 10 (RankGPT).
*Self-consistency* (`borda`): the mean place over several shuffles of the incoming list, against position bias; plain Borda counts
where Tang et al. 2023 search the Kemeny order.

LLM4PR (arXiv 2411.01178) states none of the decoding, so all of it is our choice. Notation: B requests, n candidates, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from sidtune.core.errors import ConfigError, DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST = len(LETTERS)


@dataclass(frozen=True)
class RankOutput:
    """Orders of B requests.

    Attributes:
        order: (B, n) int64; place k holds the number of the incoming candidate that comes k-th, -1 pads.
        unknown, repeated, missing: (B,) int64, how many labels were dropped because they name no candidate or one named before,
            and how many candidates were not named. All zero under a constraint.
        scores: (B,) float32 log-probability of the order, renormalised over legal labels; None where not known (greedy,
            unconstrained). For the single-forward mode (B, n): the label logits, by incoming candidate.
    """

    order: Tensor
    unknown: Tensor
    repeated: Tensor
    missing: Tensor
    scores: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """(B,) bool: nothing had to be repaired."""
        return (self.unknown + self.repeated + self.missing) == 0


def permutation_losses(logits: Tensor, targets: Tensor, label_token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each label of an order among the labels not placed before it.

        loss(k) = −log exp z(y_k) / sum_{j >= k} exp z_k(y_j)          y the target order, z_k the label logits at place k

    The likelihood of constrained decoding; with logits that do not depend on k, the Plackett-Luce model. The end token is the
    only one legal behind the last label, so it has no loss. Our choice; the paper trains over the whole vocabulary.

    Args:
        logits: (B, P, V) that predict `targets`. targets: (B, P) token ids; what is no label is passed over.
        label_token_ids: (L,) ids of the labels.

    Returns:
        (B, P) losses, 0 where there is no label; and (B, P) bool, where there is one.
    """
    ids = torch.as_tensor(list(label_token_ids), device=logits.device)
    named = targets[..., None] == ids
    left = named.flip(1).cumsum(1).flip(1) > 0
    scores = logits[..., ids].float()
    label = named.any(dim=-1)
    total = scores.masked_fill(~left, float("-inf")).masked_fill(~label[..., None], 0.0).logsumexp(dim=-1)
    losses = torch.where(label, total - (scores * named).sum(dim=-1), 0.0)
    return losses, label


class PermutationLogitsProcessor(LogitsProcessor):
    """Allows labels not used so far, then the end token.

    Args:
        label_token_ids: (L,) ids of the labels.
        counts: (B,) candidates of each request, at most L.
        end_token_id: allowed when all labels of a request are used, and only then.
        prompt_length: columns of `input_ids` before the generated ones; 0 where the prompt went in as `inputs_embeds`.
        renormalize: return log-probabilities over the allowed tokens, so that beam scores are those of orders.

    Beams of a request must be neighbours, as `generate` lays them.

    Raises:
        ConfigError: more candidates than labels.
    """

    def __init__(
        self,
        label_token_ids: Sequence[int],
        counts: Tensor,
        end_token_id: int,
        *,
        prompt_length: int = 0,
        renormalize: bool = False,
    ) -> None:
        self.labels = torch.as_tensor(label_token_ids, dtype=torch.long)
        self.counts = torch.as_tensor(counts, dtype=torch.long)
        check_counts(self.counts, len(self.labels))
        self.end_token_id, self.prompt_length, self.renormalize = end_token_id, prompt_length, renormalize

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        labels, counts = self.labels.to(scores.device), self.counts.to(scores.device)
        counts = counts.repeat_interleave(len(scores) // len(counts))[:, None]
        new = input_ids[:, self.prompt_length :]
        used = (new[:, :, None] == labels).any(dim=1)
        open_ = ~used & (torch.arange(len(labels), device=scores.device) < counts)
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[:, labels] = open_
        allowed[:, self.end_token_id] = ~open_.any(dim=1)
        kept = scores.masked_fill(~allowed, -torch.inf)
        return kept.log_softmax(dim=-1) if self.renormalize else kept


def check_counts(counts: Tensor, most: int) -> None:
    """Raises ConfigError unless every request has 1 ... `most` candidates."""
    if len(counts) and (int(counts.min()) < 1 or int(counts.max()) > most):
        raise ConfigError(
            f"A prompt can rank 1 to {most} candidates, got {int(counts.min())} to {int(counts.max())}; rank longer lists in "
            "windows."
        )


def single_forward_order(logits: Tensor, label_token_ids: Sequence[int], counts: Tensor) -> RankOutput:
    """Candidates sorted by the logit of their label as first answer token; equal logits keep the incoming order.

    Args:
        logits: (B, V) at the last prompt position.
        label_token_ids: (L,). counts: (B,) candidates, at most L.
    """
    counts = torch.as_tensor(counts, device=logits.device)
    check_counts(counts, len(label_token_ids))
    width = int(counts.max())
    found = logits[:, torch.as_tensor(label_token_ids[:width], device=logits.device)].float()
    pads = torch.arange(width, device=logits.device) >= counts[:, None]
    scores = found.masked_fill(pads, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True).masked_fill(pads, -1)
    zero = torch.zeros(len(order), dtype=torch.long, device=order.device)
    return RankOutput(order, zero, zero, zero, scores)


def parse_orders(tokens: Tensor, label_token_ids: Sequence[int], counts: Tensor, end_token_id: int) -> RankOutput:
    """Orders from generated tokens, repaired.

    Args:
        tokens: (B, T) generated tokens; everything from the first end token on is ignored.
        label_token_ids: (L,). counts: (B,) candidates, at most L.

    >>> found = parse_orders(torch.tensor([[12, 12, 10, 0]]), [10, 11, 12], torch.tensor([3]), end_token_id=0)
    >>> found.order.tolist(), found.repeated.tolist(), found.missing.tolist()
    ([[2, 0, 1]], [1], [1])
    """
    counts = torch.as_tensor(counts, device=tokens.device)
    labels = torch.as_tensor(label_token_ids, device=tokens.device)
    check_counts(counts, len(labels))
    width, length = int(counts.max()), tokens.shape[1]
    real = torch.arange(width, device=tokens.device) < counts[:, None]
    said = (tokens == end_token_id).cumsum(dim=1) == 0
    hits = (tokens[:, :, None] == labels[:width]) & said[:, :, None] & real[:, None]
    place = torch.arange(length, device=tokens.device)[None, :, None]
    first = torch.where(hits, place, length).amin(dim=1) if length else torch.full_like(real, length, dtype=torch.long)
    # Candidates that were not named have the place behind the last token, so the stable sort puts them there in incoming order.
    order = first.masked_fill(~real, length + 1).argsort(dim=1, stable=True).masked_fill(~real, -1)
    named, distinct = hits.sum(dim=(1, 2)), (first < length).sum(dim=1)
    return RankOutput(order, said.sum(dim=1) - named, named - distinct, counts - distinct)


def window_starts(count: int, size: int, stride: int) -> list[int]:
    """Where windows begin, from the back; the last one begins at 0.

    Raises:
        ConfigError: size below 2, or a stride below 1 or above size.
    """
    if size < 2 or not 1 <= stride <= size:
        raise ConfigError(f"A window needs a size of at least 2 and a stride of 1 to size, got {size} and {stride}.")
    starts = list(range(max(count - size, 0), 0, -stride))
    return [*starts, 0]


def rank_in_windows(
    counts: Sequence[int],
    rank: Callable[[list[int], list[np.ndarray]], list[np.ndarray]],
    *,
    size: int = 20,
    stride: int = 10,
) -> list[np.ndarray]:
    """Orders of lists of any length by a ranker of short ones.

    Args:
        counts: candidates of each request.
        rank: gets request numbers and, for each, the incoming numbers (m,) of the candidates in its window, m <= size; returns for
            each the permutation (m,) of them, best first. Called once per window place, for all requests that have one.
        size, stride: of the window. An item moves up by stride at most per window, hence best-first from the back.

    Returns:
        For each request the incoming numbers, best first.
    """
    orders = [np.arange(count) for count in counts]
    starts = [window_starts(count, size, stride) for count in counts]
    for step in range(max(map(len, starts), default=0)):
        rows = [row for row, places in enumerate(starts) if step < len(places)]
        spans = [slice(starts[row][step], starts[row][step] + size) for row in rows]
        found = rank(rows, [orders[row][span] for row, span in zip(rows, spans, strict=True)])
        for row, span, permutation in zip(rows, spans, found, strict=True):
            window = orders[row][span]
            if len(permutation) != len(window) or set(np.asarray(permutation).tolist()) != set(window.tolist()):
                raise DataError(
                    f"A window of request {row} came back as {list(permutation)}, which is no permutation of it."
                )
            orders[row] = np.concatenate(
                [orders[row][: span.start], permutation, orders[row][span.start + len(window) :]]
            )
    return orders


def borda(orders: Any) -> np.ndarray:
    """The order by mean place over m orders (m, n) of the same list; equal means keep the incoming order.

    >>> borda([[2, 0, 1], [2, 1, 0], [0, 2, 1]]).tolist()
    [2, 0, 1]
    """
    orders = np.asarray(orders)
    places = np.argsort(orders, axis=1, kind="stable")
    return np.argsort(places.sum(axis=0), kind="stable")
