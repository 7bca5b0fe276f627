"""What a user would write with diffusers to sample the same denoiser: the loops that
benchmarks/generation.py compares with.

A denoiser of EDM kind is shown to diffusers as an epsilon-prediction model of a variance-preserving
process: x = x_vp sqrt(1 + sigma^2), epsilon = (x - D(x; sigma)) / sigma, sigma = sqrt((1 - abar) /
abar) (Karras et al. 2022, Table 1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adversa.diffuse.edm import EDMDenoiser, to_images, to_tensor


class Epsilon(nn.Module):
    """epsilon(x_vp [B, 3, side, side], sigma: a number, label int64 [B])."""

    def __init__(self, denoiser: EDMDenoiser, side: int) -> None:
        super().__init__()
        self.denoiser, self.side = denoiser, side

    def forward(self, x_vp: Tensor, sigma: float, label: Tensor) -> Tensor:
        x = x_vp * (1 + sigma**2) ** 0.5
        return (x - self.denoiser(x.float(), torch.full((len(x),), sigma), label)) / sigma


def scheduler(kind: str, steps: int) -> Any:
    """diffusers' DDIM as it comes, or its DPMSolverMultistep with Karras' noise levels; ready for
    `steps` steps.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    made: Any
    if kind == "ddim":
        made = DDIMScheduler(
            num_train_timesteps=1000, clip_sample=False, timestep_spacing="trailing"
        )
    else:
        made = DPMSolverMultistepScheduler(
            num_train_timesteps=1000,
            algorithm_type="dpmsolver++",
            use_karras_sigmas=True,
            final_sigmas_type="zero",
        )
    made.set_timesteps(steps)
    return made


@torch.no_grad()
def loop(
    model: Epsilon,
    kind: str,
    labels: np.ndarray,
    seeds: list[int],
    steps: int,
    guidance: float,
    amp: bool,
    start: tuple[np.ndarray, float] | None = None,
) -> np.ndarray:
    """One batch as a diffusers pipeline does it: conditional and null class in one doubled pass at
    every step.

    labels int64 [B]; one seed an image; start: (images uint8 [B, R, R, 3], sigma) of
    image-to-image, from the first noise level at most sigma on. uint8 [B, R, R, 3].
    """
    plan, label = scheduler(kind, steps), torch.from_numpy(labels)
    null = torch.full_like(label, model.denoiser.num_classes)
    noise = torch.stack(
        [
            torch.randn(3, model.side, model.side, generator=torch.Generator().manual_seed(s))
            for s in seeds
        ]
    )
    abar = plan.alphas_cumprod
    levels = (
        plan.sigmas[:-1] if kind != "ddim" else ((1 - abar) / abar).sqrt()[plan.timesteps.long()]
    )
    first = 0
    if start is None:
        x = noise * plan.init_noise_sigma
    else:
        first = int((levels > start[1]).sum())
        sigma = float(levels[first])
        x = (to_tensor(start[0]) + sigma * noise) / (1 + sigma**2) ** 0.5
        if hasattr(plan, "set_begin_index"):
            plan.set_begin_index(first)
    for t, sigma in zip(plan.timesteps[first:], levels[first:], strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            if guidance == 1:
                epsilon = model(x, float(sigma), label)
            else:
                conditional, unconditional = model(
                    torch.cat([x, x]), float(sigma), torch.cat([label, null])
                ).chunk(2)
                epsilon = unconditional + guidance * (conditional - unconditional)
        x = plan.step(epsilon, t, x).prev_sample
    return to_images(x)
