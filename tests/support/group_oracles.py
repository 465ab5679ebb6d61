"""Slow truths for `group_logps`: one unpadded row at a time, plain Python over the legal sets; and TRL's own method."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from decoding_oracles import prefix_dictionary
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head


@dataclass
class Rows:
    """A batch of completions that share prompts, and the catalogue their SIDs are from.

    Attributes:
        prompts, completions: lists of token lists.
        starts: column where the SID of each completion begins, -1 for none.
        codes: (items, depth) catalogue.
        token_ids: (sum of level sizes,) token of each code.
        sizes: codes per level.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    starts: list[int]
    codes: np.ndarray
    token_ids: np.ndarray
    sizes: tuple[int, ...]

    def padded(self, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prompts padded left, completions right, with their masks; as TRL hands them over."""
        width, length = max(map(len, self.prompts)), max(map(len, self.completions))
        left = [([pad] * (width - len(p)) + p, [0] * (width - len(p)) + [1] * len(p)) for p in self.prompts]
        right = [(c + [pad] * (length - len(c)), [1] * len(c) + [0] * (length - len(c))) for c in self.completions]
        return tuple(torch.tensor(part) for part in (*zip(*left, strict=True), *zip(*right, strict=True)))

    def permuted(self, order: list[int]) -> Rows:
        return Rows(
            [self.prompts[n] for n in order],
            [self.completions[n] for n in order],
            [self.starts[n] for n in order],
            self.codes,
            self.token_ids,
            self.sizes,
        )


def random_rows(
    seed: int,
    codes: np.ndarray,
    token_ids: np.ndarray,
    sizes: tuple[int, ...],
    text: tuple[int, int] = (3, 10),
    prompt_lengths: tuple[int, ...] = (7, 3, 5),
) -> Rows:
    """Twelve shuffled rows: SID only, text then SID, a SID cut off, text only, nothing; the third prompt has one row."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(*text, n).tolist() for n in prompt_lengths]
    offsets = np.cumsum([0, *sizes])[:-1]
    made = []
    for prompt, kind in [(0, k) for k in range(5)] + [(1, k) for k in (0, 0, 1, 3, 4, 2)] + [(2, 1)]:
        sid = (token_ids[offsets + codes[random.integers(len(codes))]]).tolist()
        words = random.integers(*text, random.integers(1, 5)).tolist()
        completion, start = [
            (sid, 0),
            (words + sid + words[:1], len(words)),
            (words + sid[:-1], len(words)),
            (words + sid, -1),
            ([], -1),
        ][kind]
        made.append((prompts[prompt], completion, start))
    made = [made[n] for n in random.permutation(len(made))]
    return Rows(*(list(part) for part in zip(*made, strict=True)), codes, token_ids, sizes)


def oracle(model, rows: Rows, temperature: float = 1.0, renormalize: bool = True):
    """(B, C) log-probabilities (with gradient), entropies and log Z by the definition, row by row."""
    legal = prefix_dictionary(rows.codes)
    offsets = np.cumsum([0, *rows.sizes])
    width = max(map(len, rows.completions))
    tables = [[], [], []]
    for prompt, completion, start in zip(rows.prompts, rows.completions, rows.starts, strict=True):
        values = [torch.zeros(width), torch.zeros(width), torch.zeros(width)]
        if completion:
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].float()
        for column, token in enumerate(completion):
            scores = logits[len(prompt) - 1 + column] / temperature
            level = column - start
            mass = torch.zeros(())
            if renormalize and start >= 0 and 0 <= level < len(rows.sizes):
                before = completion[start:column]
                prefix = tuple(int(np.flatnonzero(rows.token_ids == t)[0]) - offsets[n] for n, t in enumerate(before))
                allowed = [int(rows.token_ids[offsets[level] + code]) for code in legal[prefix]]
                mass = scores.log_softmax(-1)[allowed].logsumexp(-1)
                scores = torch.full_like(scores, float("-inf")).index_put((torch.tensor(allowed),), scores[allowed])
            log_probs = scores.log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs.isinf(), 0)).sum()
            for n, value in enumerate((log_probs[token], entropy, mass)):
                values[n] = values[n].index_put((torch.tensor(column),), value)
        for table, row in zip(tables, values, strict=True):
            table.append(row)
    return tuple(torch.stack(table) for table in tables)


def trl_logps(model, rows: Rows, temperature: float = 1.0):
    """(B, C) log-probabilities and entropies by TRL's own method on ordinary padded rows; adds its fused head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.forward
    add_fused_lm_head(base, temperature=temperature, outputs=("log_probs", "entropy"))
    prompt, prompt_mask, completion, mask = rows.padded()
    trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=contextlib.nullcontext, is_main_process=True))
    try:
        log_probs, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer,
            model,
            torch.cat([prompt, completion], dim=1),
            torch.cat([prompt_mask, mask], dim=1),
            completion.shape[1],
            compute_entropy=True,
        )
    finally:
        base.forward = own
    return log_probs * mask, entropies * mask


def gradients(model, values: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of the weighted sum for every trainable parameter that gets one."""
    model.zero_grad(set_to_none=True)
    (values * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative_error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Largest error of a gradient relative to the largest entry of that parameter's true gradient."""
    assert set(found) == set(truth), set(found) ^ set(truth)
    scale = max(float(value.abs().max()) for value in truth.values())
    return max(
        float((found[name] - true).abs().max()) / max(float(true.abs().max()), 1e-3 * scale)
        for name, true in truth.items()
    )
