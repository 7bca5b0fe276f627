"""Two processes of one training over gloo: BatchNorm sees all rows, losses and means add up."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d
from torch import nn

from adversa.training import process_group
from adversa.types import share_of

ROWS, CHANNELS = 7, 5  # shared as 4 and 3


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {
        "plain": nn.BatchNorm2d(CHANNELS),
        "with activation": BatchNormAct2d(CHANNELS, act_layer=nn.SiLU),
        "cumulative, no affine": nn.BatchNorm2d(CHANNELS, momentum=None, affine=False),
        "no running statistics": nn.BatchNorm2d(CHANNELS, track_running_stats=False),
        "one dimension": nn.BatchNorm1d(CHANNELS),
        "in a net": nn.Sequential(
            nn.Conv2d(CHANNELS, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
            BatchNormAct2d(4),
        ),
    }
    for layer in found.values():
        for p in layer.parameters():
            nn.init.normal_(p, 1.0, 0.5)
    return found


def inputs(name: str) -> torch.Tensor:
    # A mean a thousand times the deviation: E[x^2] - E[x]^2 in float32 would leave no digit of the
    # variance.
    shape = (ROWS, CHANNELS) if name == "one dimension" else (ROWS, CHANNELS, 6, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2 + (
        1000 if name == "plain" else 1
    )


def outcome(name: str, layer: nn.Module, rows: slice) -> dict[str, object]:
    """Two training steps' outputs, gradients and buffers, of `rows` of the batch."""
    x = inputs(name)[rows].requires_grad_()
    for _ in range(2):
        called = (
            process_group.data_parallel(layer, torch.device("cpu"))
            if list(layer.parameters())
            else layer
        )
        if called is layer:
            process_group.convert_sync_batchnorm(layer)
        layer.zero_grad()
        x.grad = None
        y = called(x)
        weights = torch.linspace(-1, 1, ROWS * y[0].numel()).view(ROWS, *y.shape[1:])[rows]
        process_group.scale_loss((y.square() * weights).flatten(1).sum(1), ROWS).backward()
    scored = (
        copy.deepcopy(layer).eval()(inputs(name))
        if name != "no running statistics"
        else torch.zeros(1)
    )
    # A row's gradient is that of the sum over workers of their losses: the mean over them is the
    # whole batch's.
    return {
        "y": y.detach(),
        "dx": x.grad / process_group.world_size(),
        "scored": scored.detach(),
        "buffers": dict(layer.named_buffers()),
        "gradients": {k: p.grad for k, p in layer.named_parameters()},
    }


def worker(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    found: dict[str, object] = {
        k: outcome(k, layer, process_group.rows(ROWS)) for k, layer in layers().items()
    }
    half = nn.BatchNorm2d(CHANNELS)
    process_group.convert_sync_batchnorm(half)
    found["bf16"] = half(
        inputs("")
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)[process_group.rows(ROWS)]
    ).detach()
    found["mean"] = process_group.all_reduce_mean(torch.tensor(float(rank))).item()
    found["gathered"] = process_group.all_gather_rows(np.arange(ROWS)[process_group.rows(ROWS)])
    found["objects"] = process_group.all_gather_object(f"worker {rank}")
    found["main"] = process_group.is_main_process()
    torch.save(found, root / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    root = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (root,), nprocs=2)
    return [torch.load(root / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=2e-4, atol=2e-4 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", list(layers()))
def test_batch_norm_over_two_workers_is_batch_norm_over_the_whole_batch(two, name):
    whole = outcome(name, layers()[name], slice(None))
    for part in ("y", "dx"):
        assert close(torch.cat([w[name][part] for w in two]), whole[part]), part
    for w in two:
        assert close(w[name]["scored"], whole["scored"])
        assert w[name]["buffers"].keys() == whole["buffers"].keys()
        assert all(
            close(v.float(), whole["buffers"][k].float()) for k, v in w[name]["buffers"].items()
        )
        assert all(close(v, whole["gradients"][k]) for k, v in w[name]["gradients"].items())


def test_what_comes_in_as_bf16_goes_out_as_bf16_in_the_same_memory_format(two):
    whole = nn.BatchNorm2d(CHANNELS)(inputs("").bfloat16())
    joined = torch.cat([w["bf16"] for w in two])
    assert joined.dtype == torch.bfloat16 and two[0]["bf16"].is_contiguous(
        memory_format=torch.channels_last
    )
    assert torch.allclose(joined.float(), whole.float(), atol=0.02)


def test_what_processes_tell_each_other(two):
    for rank, w in enumerate(two):
        assert (
            w["mean"] == 0.5
            and w["gathered"].tolist() == list(range(ROWS))
            and w["main"] == (rank == 0)
        )
        assert w["objects"] == ["worker 0", "worker 1"]


def test_alone_nothing_happens():
    layer = nn.BatchNorm2d(2)
    assert process_group.data_parallel(
        layer, torch.device("cpu")
    ) is layer and "forward" not in vars(layer)
    assert (
        process_group.rows(7) == slice(0, 7)
        and process_group.all_gather_object(3) == [3]
        and process_group.is_main_process()
    )
    process_group.barrier()


@pytest.mark.parametrize("world", range(1, 10))
def test_shares_are_the_whole_batch_and_nearly_equal(world):
    largest = 0
    for size in range(70):
        parts = [range(size)[share_of(size, rank, world)] for rank in range(world)]
        lengths = [len(p) for p in parts]
        assert [i for p in parts for i in p] == list(range(size))
        assert max(lengths) - min(lengths) <= 2 and (min(lengths) > 0) == (size >= world), size
        assert max(lengths) >= largest, "a padded share must hold that of a shorter batch"
        largest = max(lengths)


@pytest.mark.parametrize("world", range(1, 10))
@pytest.mark.parametrize("size", [18, 30, 64, 33])
def test_partners_lie_on_one_worker(size, world):
    for rank in range(world):
        rows = share_of(size, rank, world)
        assert rows.start % 2 == 0 and (rows.stop % 2 == 0 or rows.stop == size)
