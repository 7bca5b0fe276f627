"""The processes of one training: which one this is, and its rows of each batch. No Ray.

Without a torch.distributed process group there is one process, and every function here does
nothing. All that a step draws (noise, augmentation, mixing) is drawn for the whole batch in every
process and then cut to its rows, and BatchNorm sees the whole batch. So the number of processes
changes the order of summation and no more: in float32 the loss curves of one and two agree within
2e-4 (classifier) and 1e-4 (denoiser); tests/classify/test_workers.py and
tests/diffuse/test_workers.py hold them to it.

Except for a model with dropout or stochastic depth (`model_args: {drop_rate: ...}`): its layers
draw their masks themselves, in each process from a seed of its own. With another number of
processes the curve is another one of the same training, as with another seed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from adversa.types import share_of

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this process writes files."""
    return rank() == 0


def rows(size: int) -> slice:
    """This process's rows of a batch of `size` (types.share_of)."""
    return share_of(size, rank(), world_size())


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module to call in a step: its gradients and BatchNorm are those of the whole batch."""
    if world_size() == 1:
        return module
    convert_sync_batchnorm(module)
    index = torch.cuda.current_device() if device.type == "cuda" else None
    ids = None if index is None else [index if device.index is None else device.index]
    return nn.parallel.DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def scale_loss(losses: Tensor, size: int) -> Tensor:
    """A scalar whose mean over the processes is the mean of all `size` rows' losses, for backward.

    losses: [this process's rows].
    """
    return losses.sum() * (world_size() / size)


def all_reduce_mean(value: Tensor) -> Tensor:
    """Mean over the processes of a scalar, detached, on its device."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value / world_size()


def all_gather_rows(array: np.ndarray) -> np.ndarray:
    """Every process's rows, concatenated in the order of their ranks; in each of them."""
    return array if world_size() == 1 else np.concatenate(all_gather_object(array))


def all_gather_object(value: T) -> list[T]:
    """Every process's value, in the order of their ranks; in each of them."""
    found: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def convert_sync_batchnorm(module: nn.Module) -> None:
    """Make every BatchNorm within `module` take its statistics from all processes' rows.

    timm's BatchNormAct2d is one too. Only with several processes, and only while a layer is in
    training mode: parameters, buffers and state dict stay as they are, and the running statistics
    become those of one process that sees the whole batch. nn.SyncBatchNorm is for GPUs only, and
    would replace the layers. Doing it twice changes nothing.
    """
    if world_size() == 1:
        return
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.forward = partial(_forward, layer, type(layer).forward)  # type: ignore[method-assign]  # patched


def _forward(layer: _BatchNorm, alone: Callable[[_BatchNorm, Tensor], Tensor], x: Tensor) -> Tensor:
    """What nn.BatchNorm2d.forward does, and what timm's BatchNormAct2d does after it."""
    if not layer.training:
        return alone(layer, x)
    y: Tensor
    y, mu, var, total = _Normalise.apply(x, layer.weight, layer.bias, layer.eps)
    if layer.track_running_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        factor, mean, variance = layer.momentum, layer.running_mean, layer.running_var
        assert mean is not None and variance is not None
        if factor is None:
            factor = 1.0 / float(layer.num_batches_tracked)
        with torch.no_grad():
            mean.lerp_(mu.to(mean.dtype), factor)
            variance.lerp_((var * (total / (total - 1))).to(variance.dtype), factor)
    for name in ("drop", "act"):
        if isinstance(getattr(layer, name, None), nn.Module):
            y = getattr(layer, name)(y)
    return y


class _Normalise(torch.autograd.Function):
    """Batch normalisation over the rows of all processes, in float32 or wider.

    Gives (y, mean [C], biased variance [C], values a channel). Ioffe and Szegedy 2015; means and
    squared deviations are merged as in Chan et al. 1983, which loses no digits where a mean is
    large. Backward: dx = w / s (dy - sum(dy) / N - xhat sum(dy xhat) / N), sums over all rows.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        assert x.numel(), "a process without rows"
        wide, dims = _wide(x), [0, *range(2, x.ndim)]
        count = x.numel() // x.shape[1]
        var, mu = torch.var_mean(wide, dims, correction=0)
        mine = torch.cat([mu, var * count, mu.new_tensor([count])])
        found = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(found, mine)
        parts = torch.stack(found)
        means, squares, counts = parts[:, : len(mu)], parts[:, len(mu) : -1], parts[:, -1:]
        total = counts.sum()
        mu = (counts * means).sum(0) / total
        var = (squares + counts * (means - mu).square()).sum(0) / total
        ctx.save_for_backward(x, weight, mu, (var + eps).rsqrt(), total)
        ctx.mark_non_differentiable(mu, var, total)
        return F.batch_norm(x, mu, var, weight, bias, False, 0.0, eps), mu, var, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mu, scale, total = ctx.saved_tensors
        shape, dims = [1, -1] + [1] * (x.ndim - 2), [0, *range(2, x.ndim)]
        wide = _wide(dy)
        xhat = (_wide(x) - mu.view(shape)) * scale.view(shape)
        sums = torch.stack([wide.sum(dims), (wide * xhat).sum(dims)])
        ours = (
            sums.clone()
        )  # of this process alone: DistributedDataParallel adds up the parameters' gradients
        dist.all_reduce(sums)
        along, across = (sums / total).view(2, *shape)
        dx = (wide - along - xhat * across) * (scale if weight is None else scale * weight).view(
            shape
        )
        learned = (
            (None, None) if weight is None else (ours[1].to(weight.dtype), ours[0].to(weight.dtype))
        )
        return dx.to(x.dtype), *learned, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
