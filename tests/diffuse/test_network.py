from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adversa import config as cfg
from adversa.diffuse import network
from adversa.diffuse.network import attend, build_network

TOKENS = cfg.Denoiser(architecture="transformer", width=48, depth=3, patch=2)


def shaken(config: cfg.Denoiser = TOKENS) -> nn.Module:
    """With no weight at zero any more."""
    torch.manual_seed(0)
    made = build_network(config, 3, 16, 5)
    for p in made.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return made.eval()


def test_explicit_attention_is_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 2, 4, 24, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))
    explicit = attend(q, k, v)
    monkeypatch.setattr(network, "MOST_EXPLICIT", 23)
    torch.testing.assert_close(attend(q, k, v), explicit)


def test_a_fresh_block_is_the_identity_and_its_gates_learn() -> None:
    torch.manual_seed(0)
    block, x, condition = (
        build_network(TOKENS, 3, 16, 5).blocks[1],
        torch.randn(2, 9, 48),
        torch.randn(2, 48),
    )
    out = block(x, condition)
    assert torch.equal(out, x)
    out.square().sum().backward()
    gates = block.modulation.weight.grad.view(6, 48, 48)
    assert (
        float(gates[2].abs().sum()) > 0 and float(gates[5].abs().sum()) > 0
    )  # the rest waits for them
    assert float(gates[[0, 1, 3, 4]].abs().sum()) == 0


def test_tokens_know_their_place_and_see_each_other() -> None:
    made = shaken()
    h, t, label = torch.randn(1, 12, 8, 8), torch.tensor([30.0]), torch.tensor([1])
    with torch.no_grad():
        out = made(h, t, label, return_dict=False)[0]
        assert out.shape == h.shape
        moved = made(h.roll(1, 3), t, label)[0]
        assert not torch.allclose(
            moved, out.roll(1, 3), atol=1e-3
        )  # without places it would be the same
        other = h.clone()
        other[:, :, 0, 0] += 1
        assert float((made(other, t, label)[0] - out)[:, :, 7, 7].abs().max()) > 1e-6
        assert not torch.allclose(made(h, t + 50, label)[0], out) and not torch.allclose(
            made(h, t, label + 1)[0], out
        )


def test_gradients_reach_every_weight_but_the_labels_not_seen() -> None:
    made = shaken().train()
    made(torch.randn(2, 12, 8, 8), torch.tensor([30.0, -80.0]), torch.tensor([0, 5]))[
        0
    ].square().mean().backward()
    silent = [
        name
        for name, p in made.named_parameters()
        if p.grad is None or float(p.grad.abs().sum()) == 0
    ]
    assert silent == []
    assert torch.equal(
        made.label.weight.grad.abs().sum(1) > 0,
        torch.tensor([True, False, False, False, False, True]),
    )


def test_bf16_autocast_stays_close_to_float32() -> None:
    for config in (TOKENS, cfg.Denoiser(architecture="unet", channels=[16, 32], patch=2)):
        made = shaken(config)
        h, t, label = torch.randn(4, 12, 8, 8), torch.linspace(-100, 100, 4), torch.arange(4)
        with torch.no_grad():
            exact = made(h, t, label, return_dict=False)[0]
            with torch.autocast("cpu", torch.bfloat16):
                rough = made(h, t, label, return_dict=False)[0]
        assert rough.dtype == torch.bfloat16  # nothing on the way lifts it to float32
        assert float((rough.float() - exact).norm() / exact.norm()) < 0.03


def test_the_unet_is_diffusers_own() -> None:
    """Same names, same answer, on either side of the 64 rows where diffusers leaves channels-last
    memory.
    """
    from diffusers import UNet2DModel

    ours = shaken(cfg.Denoiser(architecture="unet", channels=[16, 16, 32], patch=2, attention=True))
    theirs = UNet2DModel.from_config(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    for rows in (3, 64):
        h, t, label = (
            torch.randn(rows, 12, 8, 8),
            torch.linspace(-100, 100, rows),
            torch.arange(rows) % 6,
        )
        with torch.no_grad():
            out = ours(h.to(memory_format=torch.channels_last), t, label, return_dict=False)[0]
            torch.testing.assert_close(out, theirs(h, t, label, return_dict=False)[0])
    assert out.is_contiguous(memory_format=torch.channels_last)
