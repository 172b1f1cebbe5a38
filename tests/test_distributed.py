"""Rewritten models trained by two processes: the losses are those of one process with the whole batch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zoo
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import HALF_GRID

import monarch_fx as mfx

PROCESSES, STEPS, SWITCH = 2, 6, 3

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def sparse_model() -> nn.Module:
    torch.manual_seed(0)
    return mfx.monarchify(zoo.mlp(), config=HALF_GRID, init="random")


def trained(how: str, rank: int = 0, processes: int = 1) -> list[float]:
    """Losses of every step; this process has its share of every batch."""
    model = sparse_model()
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, 8, 64, generator=generator)
    mine = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    if how == "sharded":
        for layer in model.children():
            fully_shard(layer)
        fully_shard(model)
    wrapped = DistributedDataParallel(model) if how == "replicated" else model
    optimizer = torch.optim.AdamW(mfx.parameter_groups(model, lr=1e-2, weight_decay=0.1))
    losses = []
    for step in range(STEPS):
        if step == SWITCH and how != "sharded":
            mfx.densify(model, optimizer)
            wrapped = DistributedDataParallel(model) if how == "replicated" else model
        loss = nn.functional.mse_loss(wrapped(x[mine]), target[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / processes)
    return losses


def process(rank: int, how: str, folder: str) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    store = dist.FileStore(f"{folder}/store", PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    try:
        losses = trained(how, rank, PROCESSES)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(losses))
    os._exit(0)  # interpreters that end with threads of gloo alive abort once in a while


@pytest.mark.parametrize(("how", "steps"), [("replicated", STEPS), ("sharded", SWITCH)])
def test_two_processes_train_as_one(tmp_path: Path, how: str, steps: int) -> None:
    """DDP, through the switch to dense weights, after which it is wrapped anew; FSDP2, which stays sparse."""
    expected = trained("alone")[:steps]
    assert expected[-1] < 0.9 * expected[0]
    torch.multiprocessing.spawn(process, (how, str(tmp_path)), nprocs=PROCESSES)
    for rank in range(PROCESSES):
        losses = json.loads((tmp_path / f"{rank}.json").read_text())
        # float32: two half sums for one, then Adam's division, which is what grows small differences
        assert losses[:steps] == pytest.approx(expected, rel=1e-5)
