"""Which steps do what, and the learning rate of each. Steps are counted from 1."""

from __future__ import annotations

import math

import torch

from adversa import config as cfg

LOG_STEPS = 50


def log_steps(steps: int) -> set[int]:
    """Every LOG_STEPS-th step, and the last."""
    return {*range(LOG_STEPS, steps, LOG_STEPS), steps}


def evenly_spaced(steps: int, count: int) -> set[int]:
    """`count` of the steps, the last always; fewer where there are not so many."""
    return {max(1, round(i * steps / count)) for i in range(1, count + 1)}


def learning_rate(step: int, config: cfg.Denoiser | cfg.Codec) -> float:
    """Linear warm-up over config.warmup of the steps, then a half cosine to 0."""
    done, warm = step - 1, config.warmup * config.steps
    if done < warm:
        return config.lr * step / (warm + 1)
    share = math.pi * (done - warm) / max(1.0, config.steps - warm)
    return config.lr * 0.5 * (1 + math.cos(share))


def set_rates(
    optimizer: torch.optim.Optimizer, config: cfg.Denoiser | cfg.Codec, step: int
) -> float:
    """The learning rate of this step, given to every group of the optimizer."""
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
