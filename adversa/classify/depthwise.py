"""Depthwise convolutions whose bf16 backward pass is fast on a CPU.

oneDNN 3.x has fast bf16 kernels for the forward pass of a depthwise convolution, for its gradients
at stride 1 and for a 3x3 kernel. The gradient of the input at stride 2 and that of a 5x5 kernel
fall to reference code, half of the training time of an EfficientNet (benchmarks/LOG.md). So a
strided convolution is differentiated as the unstrided one whose other outputs have no gradient, and
the gradient of a 5x5 kernel is taken in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn import functional as F

FAST_KERNEL = 3  # the largest with a fast bf16 weight gradient


class Depthwise(nn.Module):
    """A depthwise nn.Conv2d without bias (same: with TensorFlow's padding) under the same parameter
    name, for bf16 on a CPU.
    """

    def __init__(self, conv: nn.Conv2d, same: bool) -> None:
        super().__init__()
        self.weight, self.stride, self.padding, self.same = (
            conv.weight,
            conv.stride[0],
            int(conv.padding[0]),
            same,
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            kind = torch.get_autocast_dtype("cpu")
            x, weight = x.to(kind), weight.to(kind)
        if self.same:
            x = pad_same(x, [weight.shape[2]] * 2, [self.stride] * 2)
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return F.conv2d(x, weight, None, self.stride, self.padding, 1, len(weight))
        found: Tensor = _Convolve.apply(x, weight, self.stride, self.padding)
        return found


def fast_depthwise(module: nn.Module) -> None:
    """Replace in place every depthwise convolution with a square kernel of odd side, no bias and no
    dilation.
    """
    for parent in list(module.modules()):
        for name, conv in list(parent.named_children()):
            if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, Conv2dSame):
                continue
            if _is_plain_depthwise(conv):
                setattr(parent, name, Depthwise(conv, isinstance(conv, Conv2dSame)))


def _is_plain_depthwise(conv: nn.Conv2d) -> bool:
    square = all(
        len(set(v)) == 1
        for v in (conv.kernel_size, conv.stride, conv.padding)
        if not isinstance(v, str)
    )
    plain = (
        conv.bias is None
        and set(conv.dilation) == {1}
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )
    return (
        square
        and plain
        and conv.kernel_size[0] % 2 == 1
        and conv.groups == conv.in_channels == conv.out_channels > 1
    )


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        stride, dx, dw = ctx.stride, None, None
        grad = grad.contiguous(memory_format=torch.channels_last)
        full = grad if stride == 1 else _spread(grad, x, weight.shape[2], stride, ctx.padding)
        if ctx.needs_input_grad[0]:
            dx = _backward(full, x, weight, 1, ctx.padding, 0)
        if ctx.needs_input_grad[1]:
            if weight.shape[2] <= FAST_KERNEL:
                dw = _backward(full, x, weight, 1, ctx.padding, 1)
            else:
                dw = _backward(grad.float(), x.float(), weight.float(), stride, ctx.padding, 1).to(
                    weight.dtype
                )
        return dx, dw, None, None


def _spread(grad: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """The gradient of the unstrided convolution: zero at the outputs that the stride leaves out."""
    sides = [n + 2 * padding - kernel + 1 for n in x.shape[2:]]
    full = torch.empty(
        (*grad.shape[:2], *sides),
        dtype=grad.dtype,
        device=grad.device,
        memory_format=torch.channels_last,
    )
    full.zero_()
    full[:, :, ::stride, ::stride] = grad
    return full


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, which: int
) -> Tensor:
    mask = [which == 0, which == 1, False]
    sides = [stride, stride], [padding, padding], [1, 1]
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *sides, False, [0, 0], weight.shape[0], mask
    )[which]
    return found
