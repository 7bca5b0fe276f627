"""The networks F inside a denoiser: a convolutional UNet (diffusers), or a transformer over tokens.

Both have diffusers' signature  network(h [B, C, s, s], t [B], label int64 [B], return_dict=False)
-> (like h,)  and begin with zero output. `t` is a noise level in the hundreds, label num_classes
the null class. What was measured is in benchmarks/LOG.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversa import config as cfg
from adversa.types import UserError

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

TIME_WIDTH = 256  # sinusoids of the noise level
# Attention over at most so many tokens is written out on the CPU, where torch's fused kernel takes
# four times as long to train in bf16; beyond, the matrix of all pairs is not worth its memory.
MOST_EXPLICIT = 512


def build_network(config: cfg.Denoiser, channels: int, side: int, num_classes: int) -> nn.Module:
    """F for a space of `channels` x `side` x `side`, folded by config.patch; weights of torch's
    global generator.

    UserError where the side does not divide by the patch and the levels.
    """
    unet = config.architecture == "unet"
    factor = config.patch * 2 ** (len(config.channels) - 1 if unet else 0)
    if side % factor:
        levels = " * 2^(levels - 1)" if unet else ""
        raise UserError(
            f"data.resolution: the diffused side {side} must be a multiple of {factor} = "
            f"denoiser.patch{levels}"
        )
    make: Callable[[cfg.Denoiser, int, int, int], nn.Module] = unet2d if unet else Transformer
    return make(config, channels * config.patch**2, side // config.patch, num_classes).to(
        memory_format=torch.channels_last
    )


def unet2d(config: cfg.Denoiser, channels: int, side: int, num_classes: int) -> UNet2DModel:
    """diffusers' UNet2DModel with class and noise level as scale and shift of its norms."""
    from diffusers.models.attention_processor import Attention, AttnProcessor
    from diffusers.models.unets.unet_2d import UNet2DModel

    levels, common = len(config.channels), math.gcd(*config.channels)
    if common % 8:
        raise UserError(f"denoiser.channels {config.channels} must all be multiples of 8")
    # At least 16 channels a group: below that torch's channels-last kernel loses its vector width
    # and is ten times slower in bf16.
    groups = max(
        d
        for d in range(1, 33)
        if common % d == 0 and min(config.channels) // d >= min(16, min(config.channels))
    )
    head = max(d for d in (8, 16, 32) if config.channels[-1] % d == 0)
    down, up = ["DownBlock2D"] * levels, ["UpBlock2D"] * levels
    if config.attention:
        down[-1], up[0] = "AttnDownBlock2D", "AttnUpBlock2D"
    unet: UNet2DModel = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        add_attention=config.attention,
        attention_head_dim=head,
        norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=2 * config.channels[0],
        num_class_embeds=num_classes + 1,
    )
    for block in unet.up_blocks:
        if isinstance(block.upsamplers, nn.ModuleList):
            block.upsamplers = nn.ModuleList(
                Double(m.get_submodule("conv")) for m in block.upsamplers
            )
    if (side >> (levels - 1)) ** 2 <= MOST_EXPLICIT and not torch.cuda.is_available():
        for m in unet.modules():
            if isinstance(m, Attention):
                m.set_processor(AttnProcessor())
    _zero_outputs(unet)
    return unet


class Double(nn.Module):
    """diffusers' Upsample2D, without its step out of channels-last memory from 64 rows on: a tenth
    of a training step.
    """

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, h: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        found: Tensor = self.conv(
            F.interpolate(h, scale_factor=2.0 if size is None else None, size=size, mode="nearest")
        )
        return found


def _zero_outputs(unet: UNet2DModel) -> None:
    """Residual branches and the last layer begin at zero: D starts as c_skip x, the best linear
    guess for white data.
    """
    from diffusers.models.resnet import ResnetBlock2D

    branches = (m.conv2 for m in unet.modules() if isinstance(m, ResnetBlock2D))
    for layer in (*branches, unet.conv_out):
        _zero(layer)


class Transformer(nn.Module):
    """A transformer whose tokens are the pixels of h, conditioned by adaLN-zero (Peebles & Xie
    2023, "Scalable Diffusion Models with Transformers", section 3.2).

    Own code, for diffusers' DiTTransformer2DModel drops labels by itself, in each block anew and
    from torch's global generator, and trains at half the speed on a CPU, where its fused attention
    and its tanh-GELU take half of the time.
    """

    def __init__(self, config: cfg.Denoiser, channels: int, side: int, num_classes: int) -> None:
        from diffusers.models.embeddings import (
            TimestepEmbedding,
            Timesteps,
            get_2d_sincos_pos_embed,
        )

        super().__init__()
        width = config.width
        self.read = nn.Linear(channels, width)
        places = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
        self.register_buffer("places", places.float().view(1, side**2, width), persistent=False)
        self.waves = Timesteps(TIME_WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time, self.label = (
            TimestepEmbedding(TIME_WIDTH, width),
            nn.Embedding(num_classes + 1, width),
        )
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.depth))
        self.norm, self.modulation = _norm(width), nn.Linear(width, 2 * width)
        self.write = nn.Linear(width, channels)
        self._initialise()

    def _initialise(self) -> None:
        """As the paper's code does: Xavier for matrices, 0.02 for embeddings, and zero for what
        makes each block the identity.
        """
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for weight in (self.label.weight, self.time.linear_1.weight, self.time.linear_2.weight):
            nn.init.normal_(weight, std=0.02)
        gates = (m.modulation for m in self.modules() if isinstance(m, Block))
        for layer in (self.modulation, self.write, *gates):
            _zero(layer)

    def forward(
        self, h: Tensor, t: Tensor, label: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        assert not return_dict
        x = self.read(h.flatten(2).transpose(1, 2))
        x = x + self.places.to(
            x.dtype
        )  # tokens stay in the ambient autocast dtype: half of a step is passes over memory
        condition = F.silu(self.time(self.waves(t)) + self.label(label))
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).to(x.dtype)[:, None].chunk(2, 2)
        out = self.write(torch.addcmul(shift, self.norm(x), 1 + scale))
        return (out.transpose(1, 2).reshape(h.shape),)


class Block(nn.Module):
    """x + gate attention(norm(x)), then x + gate mlp(norm(x)): shift, scale and gate of each are
    linear in the condition.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // max(d for d in (16, 32, 64) if width % d == 0)
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1, self.qkv, self.mixed = (
            _norm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.norm2, self.up, self.down = (
            _norm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, T, width], condition [B, width]."""
        rows, tokens, width = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(condition).to(x.dtype)[:, None].chunk(6, 2)
        )
        h = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        q, k, v = (
            self.qkv(h)
            .view(rows, tokens, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        h = self.mixed(attend(q, k, v).transpose(1, 2).reshape(rows, tokens, width))
        x = torch.addcmul(x, gate1, h)
        h = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        return torch.addcmul(x, gate2, self.down(F.gelu(self.up(h))))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v of [B, heads, T, d]."""
    if q.device.type != "cpu" or q.shape[2] > MOST_EXPLICIT:
        return F.scaled_dot_product_attention(q, k, v)
    found: Tensor = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    return found


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    assert layer.bias is not None
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
