"""Workers of one training: who this process is among them, and its share of each batch.
torch.distributed alone, no Ray.

Without a process group there is one worker, and every function here does nothing. Draws, noise,
augmentation and mixing of a step are drawn for the whole batch on every worker and then cut to its
rows, and BatchNorm sees the whole batch (`synchronise`). So the number of workers changes the order
of summation and no more: in float32 the loss curves of one and two workers agree within 2e-4
(classifier) and 1e-4 (denoiser), which tests/classify/test_workers.py and
tests/diffuse/test_workers.py hold them to.

Except for a model with dropout or stochastic depth (`model_args: {drop_rate: ...}`): its layers
draw their masks themselves, each worker from a seed of its own. With another number of workers the
masks are others of the same distribution, and the curve is another one of the same training, as
with another seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def lead() -> bool:
    """Whether this worker writes files."""
    return rank() == 0


def rows(size: int) -> slice:
    """This worker's rows of a batch of `size` (types.share_of)."""
    return share_of(size, rank(), world())


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module to call in a training step.

    Its gradients are averaged over the workers (DistributedDataParallel), its BatchNorm layers are
    synchronised.
    """
    if world() == 1:
        return module
    synchronise(module)
    ids = (
        [torch.cuda.current_device() if device.index is None else device.index]
        if device.type == "cuda"
        else None
    )
    return nn.parallel.DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def share(losses: Tensor, size: int) -> Tensor:
    """losses [this worker's rows] -> a scalar whose mean over the workers is the mean over all
    `size` rows, for backward.
    """
    return losses.sum() * (world() / size)


def mean(value: Tensor) -> float:
    """Mean over the workers of a detached scalar."""
    value = value.detach().clone()
    if world() > 1:
        dist.all_reduce(value)
    return value.item() / world()


def agree(tensors: Iterable[Tensor]) -> None:
    """In place: each floating-point tensor becomes its mean over the workers."""
    if world() > 1:
        for tensor in tensors:
            if tensor.is_floating_point():
                dist.all_reduce(tensor)
                tensor /= world()


def gather(array: np.ndarray) -> np.ndarray:
    """Every worker's rows, concatenated in the order of the workers; on each of them."""
    return array if world() == 1 else np.concatenate(everyones(array))


def everyones(value: T) -> list[T]:
    """Every worker's value, in the order of the workers; on each of them."""
    found: list[Any] = [value] * world()
    if world() > 1:
        dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    if world() > 1:
        dist.barrier()


# ---- BatchNorm -----------------------------------------------------------------------------------


def synchronise(module: nn.Module) -> None:
    """Make every BatchNorm within `module` (timm's BatchNormAct2d is one) take its statistics from
    all workers' rows.

    Only with several workers, and only while a layer is in training mode: parameters, buffers and
    state dict stay as they are, and the running statistics become those of one worker that sees the
    whole batch. nn.SyncBatchNorm is for GPUs only, and would replace the layers. Doing it twice
    changes nothing.
    """
    if world() == 1:
        return
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.forward = partial(_forward, layer, type(layer).forward)  # type: ignore[method-assign]


def _forward(layer: _BatchNorm, alone: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor:
    """What nn.BatchNorm2d.forward does, and what timm's BatchNormAct2d does after it."""
    if not layer.training:
        return alone(layer, x)
    y, mu, var, total = _Normalise.apply(x, layer.weight, layer.bias, layer.eps)
    if layer.track_running_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        factor = (
            layer.momentum if layer.momentum is not None else 1.0 / float(layer.num_batches_tracked)
        )
        with torch.no_grad():
            layer.running_mean.lerp_(mu.to(layer.running_mean.dtype), factor)
            layer.running_var.lerp_(
                (var * (total / (total - 1))).to(layer.running_var.dtype), factor
            )
    for name in ("drop", "act"):
        if isinstance(getattr(layer, name, None), nn.Module):
            y = getattr(layer, name)(y)
    return y


class _Normalise(torch.autograd.Function):
    """Batch normalisation over the rows of all workers, in float32 or wider: (y, mean [C], biased
    variance [C], values a channel).

    Ioffe and Szegedy 2015. The workers' means and squared deviations are merged as in Chan et al.
    1983, which loses no digits where a mean is large. Backward: dx = w / s (dy - sum(dy) / N - xhat
    sum(dy xhat) / N), both sums over the workers.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        assert x.numel(), "a worker without rows"
        wide, dims = _wide(x), [0, *range(2, x.ndim)]
        count = x.numel() // x.shape[1]
        var, mu = torch.var_mean(wide, dims, correction=0)
        mine = torch.cat([mu, var * count, mu.new_tensor([count])])
        found = [torch.empty_like(mine) for _ in range(world())]
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
        )  # a parameter's gradient is this worker's: DistributedDataParallel adds up the others'
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
