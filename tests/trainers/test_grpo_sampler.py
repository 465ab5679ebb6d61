"""Epochs of the GRPO sampler, and rows regrouped without being torn."""

from __future__ import annotations

import torch

from sidtune.trainers.grpo.sampler import RepeatedEpochs, regrouped


def test_an_epoch_is_a_function_of_seed_and_epoch():
    sampler = RepeatedEpochs(range(8), mini_repeat_count=2, batch_size=4, repeat_count=1, shuffle=True, seed=3)
    epochs = []
    for epoch in (0, 1, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[3] != epochs[1] == epochs[2]
    assert sorted(epochs[0]) == sorted([*range(8), *range(8)])


def test_regrouping_keeps_rows_whole():
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(12, generator=random)
    whole = {"group_ids": order // 3, "row_ids": order, "x": order * 10, "names": order.tolist(), "n": torch.tensor(7)}
    batches = [{k: v[i : i + 4] if k != "n" else v for k, v in whole.items()} for i in (0, 4, 8)]
    found = regrouped(batches + [])
    rows = torch.cat([batch["row_ids"] for batch in found])
    assert sorted(rows.tolist()) == list(range(12))
    groups = (rows // 3).tolist()
    assert [g for n, g in enumerate(groups) if n == 0 or groups[n - 1] != g] == list(dict.fromkeys(groups))
    assert list(dict.fromkeys(groups)) == list(dict.fromkeys((order // 3).tolist()))
    for batch in found:
        assert torch.equal(batch["x"], batch["row_ids"] * 10) and batch["names"] == batch["row_ids"].tolist()
        assert len(batch["x"]) == 4 and batch["n"] == 7
