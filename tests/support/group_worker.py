"""What `test_group_logps_distributed.py` runs in two processes: one step by each way to the same log-probabilities.

torchrun --nproc_per_node 2 tests/support/group_worker.py WRAPPER,WRAPPER OUTPUT

The first process holds rows with SIDs and the second rows of free text, so that their heads do different work.
"""

from __future__ import annotations

import gc
import os
import sys

import lm_stand_ins
import numpy as np
import torch
from group_oracles import random_rows
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trl.trainer.utils import add_fused_lm_head

from sidtune.core.processes import end_processes
from sidtune.decoding.trie import SidTrie
from sidtune.tokenizers.vocabulary.token_matrices import gathered
from sidtune.tokenizers.vocabulary.trainable_tokens import set_trainable
from sidtune.trainers.common.hooks import accept_whole_heads
from sidtune.trainers.grpo.logps.group_logps import group_logps

# Way to the log-probabilities and, for ours, the most tokens of a pass: the processes then need different numbers of them.
WAYS = {"trl": None, "shared, whole vocabulary": None, "alone": None, "shared": None, "shared, passes": 12}
RANK = int(os.environ["RANK"])


def wrapped(model: nn.Module, wrapper: str) -> tuple[nn.Module, object, object]:
    """The model as the trainer would have it, its optimizer, and what must stay alive beside it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    if wrapper.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters=wrapper == "ddp-find-unused"), optimizer, None
    if wrapper == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), None
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": int(wrapper[-1]), "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    alive = HfDeepSpeedConfig(config) if wrapper == "zero3" else None
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, engine, alive


def log_probs(model: nn.Module, way: str, rows) -> torch.Tensor:
    batch = rows.padded()
    if way == "trl":
        ids, mask = torch.cat([batch[0], batch[2]], dim=1), torch.cat([batch[1], batch[3]], dim=1)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : batch[0].shape[1]] = -100
        found = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        return found.log_probs[:, -batch[2].shape[1] :]
    options = {}
    if "whole vocabulary" not in way:
        options = {"trie": SidTrie.from_codes(rows.codes, rows.sizes), "sid_token_ids": rows.token_ids}
        options |= {"sid_start": torch.tensor(rows.starts), "compute_log_z": True}
    out = group_logps(model, *batch, **options, max_tokens=WAYS[way], share_prompts=way != "alone")
    assert out.packed == (way != "alone")
    return out.log_probs


def step(wrapper: str, train: str, way: str) -> dict[str, torch.Tensor]:
    gc.collect()
    os.environ["ACCELERATE_USE_FSDP"] = str(
        wrapper == "fsdp2"
    ).lower()  # as accelerate tells a process before it shards
    model, _, vocabulary = lm_stand_ins.extended("qwen3", tied=train == "all")
    model = set_trainable(model, vocabulary, train)
    add_fused_lm_head(model)
    sids = np.asarray(vocabulary.sid_token_ids)
    rows = random_rows(1, lm_stand_ins.tiny_sids().codes, sids, lm_stand_ins.LEVEL_SIZES)
    rows = rows.permuted([n for n, start in enumerate(rows.starts) if (start >= 0) == (RANK == 0)])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    outer, optimizer, alive = wrapped(model.train(), wrapper)
    values = log_probs(outer, way, rows)
    loss = (values * torch.linspace(-1, 1, values.numel()).view(values.shape)).sum() / 10
    (outer if wrapper.startswith("zero") else loss).backward(*([loss] if wrapper.startswith("zero") else []))
    optimizer.step()
    moved = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered(parameter) as whole:
                moved[name] = whole.detach().clone() - before[name]
    del alive
    return moved


def main(wrappers: str, output: str) -> None:
    if "zero" in wrappers:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        torch.distributed.init_process_group("gloo")
    accept_whole_heads()
    cases = [(wrapper, train) for wrapper in wrappers.split(",") for train in ("all", "rows")]
    moved = {case: {way: step(*case, way) for way in WAYS} for case in cases}
    if RANK == 0:
        torch.save(moved, output)
    end_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
