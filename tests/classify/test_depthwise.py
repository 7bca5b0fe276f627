"""Depthwise convolutions: the fast backward pass gives the gradients of the plain one."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

from adversa.classify.depthwise import Depthwise, fast_depthwise


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("same", [False, True])
def test_gradients_are_the_plain_convolutions(kernel: int, stride: int, same: bool) -> None:
    torch.manual_seed(kernel * stride)
    conv = (Conv2dSame if same else nn.Conv2d)(
        6, 6, kernel, stride, 0 if same else kernel // 2, groups=6, bias=False
    )
    fast = Depthwise(copy.deepcopy(conv), same).bfloat16()
    x = (
        torch.randn(3, 6, 15, 18).bfloat16().float()
    )  # odd and even sides; what bf16 holds, so that only the arithmetic differs
    conv.weight.data = fast.weight.data.float()
    a, b = x.clone().requires_grad_(), x.bfloat16().requires_grad_()
    out, quick = conv(a), fast(b)
    assert quick.dtype == torch.bfloat16 and out.shape == quick.shape
    grad = torch.randn_like(out).bfloat16()
    out.backward(grad.float())
    quick.backward(grad)
    for plain, other in ((out, quick), (a.grad, b.grad), (conv.weight.grad, fast.weight.grad)):
        assert torch.allclose(plain, other.float(), rtol=0.02, atol=0.02 * plain.abs().max().item())


def test_float32_is_untouched_to_the_bit() -> None:
    conv = nn.Conv2d(4, 4, 5, 2, 2, groups=4, bias=False)
    fast, x = Depthwise(copy.deepcopy(conv), False), torch.randn(2, 4, 16, 16)
    conv(x).square().sum().backward()
    fast(x).square().sum().backward()
    assert torch.equal(conv.weight.grad, fast.weight.grad)


def test_a_network_keeps_its_names_and_its_answer() -> None:
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    fast = copy.deepcopy(plain)
    fast_depthwise(fast)
    assert sum(isinstance(m, Depthwise) for m in fast.modules()) == 16
    assert plain.state_dict().keys() == fast.state_dict().keys()
    x = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = plain(x), fast(x)
    assert torch.equal(a, b)
    a.float().square().mean().backward()
    b.float().square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=0.05, atol=0.05 * p.grad.abs().max().item()), (
            name
        )


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, groups=4, bias=False),  # two outputs an input
        nn.Conv2d(4, 4, 3, groups=4),  # a bias
        nn.Conv2d(4, 4, 3, groups=4, dilation=2, bias=False),
        nn.Conv2d(4, 4, (3, 5), groups=4, bias=False),
        nn.Conv2d(4, 4, 3, bias=False),
    ],
)
def test_other_convolutions_stay(conv: nn.Conv2d) -> None:
    module = nn.Sequential(conv)
    fast_depthwise(module)
    assert module[0] is conv
