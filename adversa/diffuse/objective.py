"""What a denoiser is trained to lower: random draws of a step, weights of the noise levels, and the
loss on held-out images.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adversa import config as cfg
from adversa.diffuse import edm
from adversa.training.device import to_device
from adversa.training.precision import autocast
from adversa.types import seed_of

FEATURES = 128  # Fourier features of the noise level that the learned weight is linear in
LEVELS = 8  # noise levels of the validation loss
CHUNK = 64  # images of the validation loss in one pass; its noise is drawn chunk by chunk


class Draws(NamedTuple):
    """sigma [B]; noise [B, C, h, w] of unit variance; dropped bool [B]: the label becomes the null
    class; symmetry int64 [B]: as `common.symmetry` numbers them.
    """

    sigma: Tensor
    noise: Tensor
    dropped: Tensor
    symmetry: Tensor


def draw(
    shape: tuple[int, ...],
    config: cfg.Denoiser,
    seed: int,
    device: torch.device,
    rows: slice = slice(None),
) -> Draws:
    """All the randomness of a step for its whole batch [B, C, h, w], cut to `rows`: the same
    whatever the number of workers.

    ln sigma ~ N(p_mean, p_std^2) (Karras et al. 2022, Table 1). On a GPU the noise alone is drawn
    there: drawn on a CPU, it would keep the GPU waiting.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    sigma = (config.p_mean + config.p_std * torch.randn(shape[0], generator=generator)).exp()
    dropped = torch.rand(shape[0], generator=generator) < config.null_probability
    upset, mirrored, transposed = (torch.rand(3, shape[0], generator=generator) < 0.5).long()
    symmetry = mirrored + 2 * upset + 4 * transposed
    source = generator if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
    noise = torch.randn(shape, generator=source, device=device)[rows]
    sigma, dropped, symmetry = (to_device(t[rows], device) for t in (sigma, dropped, symmetry))
    return Draws(sigma, noise, dropped, symmetry)


def min_snr_weight(sigma: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma), the weight of |x0_hat - x0|^2 in Hang et al. 2023, "Efficient Diffusion
    Training via Min-SNR Weighting".

    There x_t = alpha x0 + s n with SNR = alpha^2 / s^2 (section 3.4), x0 scaled to [-1, 1]; our x0
    + sigma n is x_t / alpha, so SNR = 1 / sigma^2. It weighs the error of the denoiser's answer D =
    c_skip x + c_out F; in terms of the network's own output F the weight is  c_out^2 min(1 /
    sigma^2, gamma): about gamma sigma^2 far below sigma_data and (sigma_data / sigma)^2 far above,
    largest in between, where EDM's is 1 everywhere. With gamma = 1 / sigma_data^2 it is 1 /
    (sigma^2 + sigma_data^2) with a corner. Pixels in [-1, 1] and latents (scaled to it) both have a
    standard deviation of sigma_data, about 0.5, so the same gamma puts the corner at the same share
    of noise in both.
    """
    return sigma.square().reciprocal().clamp(max=gamma)


class Uncertainty(nn.Module):
    """u(sigma): linear in random Fourier features of c_noise = ln(sigma) / 4, zero at first (Karras
    et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", equation 15).

    Minimising  loss / e^u + u  makes u the log of the expected loss at its noise level, so that
    every level ends with the same weighted loss, 1. Trained along with the denoiser, needed by
    nothing else.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(FEATURES))
        self.register_buffer("phases", 2 * math.pi * torch.rand(FEATURES))
        self.weight = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, sigma: Tensor) -> Tensor:
        """[B] to [B]. Not a matrix product, so float32 under autocast too."""
        angles = (sigma.log() / 4)[:, None] * self.frequencies + self.phases
        return (2**0.5 * angles.cos() * self.weight).sum(1)


class Objective(nn.Module):
    """All that is trained, in one module: what DistributedDataParallel must see. forward gives two
    numbers for each row:

    the loss to minimise, by config.loss, and EDM's weighted error  |D - x|^2 / (c_out^2 pixels)
    (equation 8), which is 1 at every noise level for the best linear denoiser of white data; it is
    what is reported, so that curves of all weightings compare.
    """

    def __init__(self, denoiser: nn.Module, config: cfg.Denoiser) -> None:
        super().__init__()
        self.denoiser, self.config = denoiser, config
        self.uncertainty = Uncertainty() if config.loss == "uncertainty" else None

    def forward(
        self, x: Tensor, sigma: Tensor, noise: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x, noise [B, C, h, w], sigma, label [B] to ([B], [B])."""
        x0 = self.denoiser(x + sigma.view(-1, 1, 1, 1) * noise, sigma, label)
        error = (x0 - x).square().flatten(1).mean(1)
        loss = weighted = edm.loss_weight(sigma, self.config.sigma_data) * error
        if self.config.loss == "min_snr":
            loss = min_snr_weight(sigma, self.config.min_snr) * error
        elif self.uncertainty is not None:
            u = self.uncertainty(sigma)
            loss = weighted / u.exp() + u
        return loss, weighted.detach()


def levels(config: cfg.Denoiser) -> list[float]:
    """LEVELS noise levels: the middles of as many equally probable ranges of training's sigma,
    rising.
    """
    normal = NormalDist(config.p_mean, config.p_std)
    return [math.exp(normal.inv_cdf((i + 0.5) / LEVELS)) for i in range(LEVELS)]


def validation_losses(
    denoiser: edm.DenoiserFn,
    images: Tensor,
    labels: Tensor,
    config: cfg.Denoiser,
    seed: int,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """EDM's weighted error of held-out images at each of `levels`: float64 [LEVELS].

    images [N, C, h, w] in the diffused space, labels int64 [N] their own (none dropped). Noise is
    fixed by seed, level and place, so that denoisers and steps compare without its variance. The
    denoiser is asked as it is: give it in eval mode.
    """
    assert len(images) == len(labels) > 0, (images.shape, labels.shape)
    device, found = torch.device(device), np.zeros(LEVELS)
    for i, sigma in enumerate(levels(config)):
        for first in range(0, len(images), CHUNK):
            x, label = images[first : first + CHUNK], labels[first : first + CHUNK].to(device)
            generator = torch.Generator("cpu").manual_seed(seed_of("validation", seed, i, first))
            noisy = (x + sigma * torch.randn(x.shape, generator=generator)).to(device)
            level = torch.full((len(x),), sigma, device=device)
            with torch.no_grad(), autocast(device, config.amp):
                error = (denoiser(noisy, level, label) - x.to(device)).square().flatten(1).mean(1)
            found[i] += float((edm.loss_weight(level, config.sigma_data) * error).double().sum())
    return found / len(images)


def validation_loss(
    denoiser: edm.DenoiserFn,
    images: Tensor,
    labels: Tensor,
    config: cfg.Denoiser,
    seed: int,
    device: torch.device | str = "cpu",
) -> float:
    """Mean of `validation_losses`: an estimate of the training loss (equation 8) on images that
    were not trained on.
    """
    return float(validation_losses(denoiser, images, labels, config, seed, device).mean())
