r"""Whether `amp: auto` takes the faster precision on this machine: bfloat16 against float32.

    python benchmarks/precision.py
    python benchmarks/precision.py --quick

A matrix product, and training steps of the default networks on noise. The two precisions take
turns, each step is timed by the CPU seconds of this process over its one thread (on a GPU by the
clock, after a synchronisation), and the medians are compared: a figure above 1 says that bfloat16
is so many times as fast.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from common import Result, parser, publish
from torch import nn

from adversa import config as cfg
from adversa.classify import model
from adversa.diffuse import edm
from adversa.training import precision

SIDE, CLASSES = 32, 7
Step = Callable[[bool], None]


def product(device: torch.device) -> Step:
    a, b = torch.randn(512, 1024, device=device), torch.randn(1024, 512, device=device)

    def step(amp: bool) -> None:
        with precision.autocast(device, amp):
            a @ b

    return step


def training(network: nn.Module, *inputs: torch.Tensor) -> Step:
    """A forward and a backward pass."""

    def step(amp: bool) -> None:
        with precision.autocast(inputs[0].device, amp):
            answer = network(*inputs)
        first = answer[0] if isinstance(answer, tuple) else answer
        first.float().square().mean().backward()
        network.zero_grad(set_to_none=True)

    return step


def steps(device: torch.device, rows: int) -> dict[str, Step]:
    pixels = torch.rand(rows, 3, SIDE, SIDE, device=device)
    label = torch.arange(rows, device=device) % CLASSES
    denoiser = edm.build(cfg.Denoiser(weights=None), CLASSES, SIDE).to(device).train()
    classifier = model.build(cfg.Classifier(), CLASSES, SIDE).to(device).train()
    return {
        "matrix product 512 x 1024 x 512": product(device),
        "denoiser step": training(denoiser, pixels, torch.ones(rows, device=device), label),
        "classifier step": training(classifier, pixels),
    }


def seconds(step: Step, amp: bool, device: torch.device) -> float:
    now = time.perf_counter if device.type == "cuda" else time.process_time
    started = now()
    step(amp)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return now() - started


def main() -> None:
    args = parser(__doc__).parse_args()
    rows, times = (8, 3) if args.quick else (64, 15)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    here, found = precision.hardware(device.type), []
    for name, step in steps(device, rows).items():
        taken: dict[bool, list[float]] = {False: [], True: []}
        for i in range(times + 1):
            for amp in (False, True):
                took = seconds(step, amp, device)
                if i:  # the first is a warm-up
                    taken[amp].append(took)
        plain, half = (1e3 * statistics.median(taken[amp]) for amp in (False, True))
        ratio = plain / half if here.amp else half / plain
        found += [
            Result(f"{name}, float32", plain, "ms"),
            Result(f"{name}, bfloat16", half, "ms"),
            Result(f"{name}, auto's against the other", ratio, "x", ">= 0.95", ratio >= 0.95),
        ]
    print(f"{here}: amp auto is {str(here.amp).lower()}")
    publish(found, args.json)


if __name__ == "__main__":
    main()
