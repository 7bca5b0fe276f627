"""The precision of matrix products: bfloat16 where the hardware multiplies it, float32 elsewhere.

`pipeline/precision.py` keeps what a run has chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adversa.config.base import Amp

# Names of torch.cpu.get_capabilities(). AVX512 alone has no bfloat16 products: there oneDNN widens
# every operand, 1.5 to 4.4 times slower than float32 (benchmarks/LOG.md, 2026-11-30).
CPU_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "ARM BF16", "sve_bf16": "SVE"}
COMPUTE_CAPABILITY = (8, 0)  # of the first GPUs of NVIDIA with bfloat16 products (A100)


@dataclass(frozen=True)
class Hardware:
    """What model steps run on. units: what multiplies bfloat16 there; "" where nothing does."""

    device: str
    name: str
    units: str

    @property
    def amp(self) -> bool:
        """What `amp: auto` comes to: autocast to bfloat16 or float32."""
        return bool(self.units)

    def __str__(self) -> str:
        return f"{self.name} ({self.units or 'no bfloat16 units'})"


def of_cpu(capabilities: Mapping[str, object]) -> Hardware:
    """capabilities: as torch.cpu.get_capabilities() gives them."""
    units = next((name for flag, name in CPU_UNITS.items() if capabilities.get(flag)), "")
    return Hardware("cpu", str(capabilities.get("cpu_name") or "CPU"), units)


def of_gpu(name: str, compute_capability: tuple[int, int]) -> Hardware:
    """Older GPUs say that they support bfloat16 and emulate it; they get float32."""
    version = ".".join(map(str, compute_capability))
    fast = compute_capability >= COMPUTE_CAPABILITY
    return Hardware("cuda", name, f"compute capability {version}" if fast else "")


@functools.cache
def hardware(device: str | None = None) -> Hardware:
    """Of this process. device: "cpu" or "cuda"; None: the GPU where there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        return of_gpu(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    return of_cpu(torch.cpu.get_capabilities())


def enabled(amp: Amp, device: str | None = None) -> bool:
    """Whether this comes to bfloat16. auto: as the hardware of this process has it; device: as of
    `hardware`.
    """
    return amp if isinstance(amp, bool) else hardware(device).amp


def autocast(device: torch.device | str, amp: Amp) -> torch.autocast:
    """Autocast to bfloat16, or none."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=enabled(amp, kind))
