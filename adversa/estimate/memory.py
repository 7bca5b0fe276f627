"""Memory and disk that a run needs, and what is refused for want of them before it begins."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adversa.config import Config, verifier_of
from adversa.engine import resources
from adversa.engine.resources import Node
from adversa.estimate.measure import Measured
from adversa.estimate.plan import generated, roles
from adversa.run.folder import RunDir
from adversa.storage.path import StoragePath

PNG_BYTES = 2.0  # of a pixel in a run's images: 1.75 generated phantoms, 1.85 real ones with masks
CONTEXT = 600 << 20  # bytes that a process takes of a GPU before its first tensor
COPIES = 5  # of the float32 weights: themselves, gradient, two of AdamW, the average
SECTIONS = {"verifier": "curate.judge", "generate": "generate"}  # where not named as the kind


def size(number: float) -> str:
    """Bytes for a person."""
    power = min(4, int(math.log2(max(1, number)) // 10))
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{number / 1024**power:.{0 if power < 3 else 1}f} {unit}"


def needs(measured: Mapping[Any, Measured], nodes: Sequence[Node]) -> dict[str, int]:
    """Bytes by kind that each training, and a sampler, takes: the most that was measured."""
    found, context = dict[str, int](), CONTEXT if resources.on_gpus(nodes) else 0
    for kind, takes in ((k, n) for m in measured.values() for k, n in m.memory.items()):
        found[kind] = max(found.get(kind, 0), takes + context)
    return found


def disk_bytes(config: Config, role: Mapping[str, int]) -> int:
    """What a run's images take, about: real ones twice while they are prepared."""
    drawn = generated(config, role["mine"]) * config.rounds if config.mix.generates else 0
    return int((2 * sum(role.values()) + drawn) * config.data.resolution**2 * PNG_BYTES)


def disk_faults(config: Config, root: StoragePath, role: Mapping[str, int]) -> list[str]:
    """Too little room for the images; what `root` holds is part of them. Object stores have it."""
    if not isinstance(root, Path):
        return []
    place = next(p for p in (root.absolute(), *root.absolute().parents) if p.is_dir())
    needed, free = disk_bytes(config, role), shutil.disk_usage(place).free
    here = sum(os.path.getsize(Path(at) / f) for at, _, files in os.walk(root) for f in files)
    if needed - here <= free:
        return []
    room = f"the disk has {size(free)} free, the run's images take about {size(needed - here)}"
    return [f"--run-dir {root}: {room}; free some, or take another"]


def faults(
    needs: Mapping[str, int], config: Config, nodes: Sequence[Node], least: bool = False
) -> list[str]:
    """needs: bytes of a GPU by kind (measure.KINDS). least: by the weights alone."""
    known = [n.gpu_memory for n in nodes if n.gpus >= 1 and n.gpu_memory]
    beside = max(1, int(1 / config.cluster.gpus_per_sampler + 1e-6))
    found = []
    for name, each in needs.items():
        many, section = beside if name == "generate" else 1, SECTIONS.get(name, name)
        if not known or many * each <= min(known):
            continue
        what = f"{many} samplers a GPU" if name == "generate" else f"a training of the {name}"
        fix = f"take a smaller network ({section})" if least else f"lower {section}.batch_size"
        fix += " or raise cluster.gpus_per_sampler" if many > 1 else ""
        takes = f"{'at least' if least else 'about'} {size(many * each)} of memory"
        found.append(f"{what}: {takes}, a GPU has {size(min(known))}; {fix}, or a larger GPU")
    return found


def least(config: Config, classes: int = 7) -> dict[str, int]:
    """Bytes of a GPU by kind that weights alone take: the networks are built without memory."""
    import torch

    from adversa.classify import model
    from adversa.diffuse import edm

    def weights(network: torch.nn.Module) -> int:
        found: int = 4 * sum(p.numel() for p in network.parameters())
        return found

    c, found = config.codec, {}
    with torch.device("meta"):
        sections = {"classifier": config.classifier}
        sections |= {"verifier": verifier_of(config)} if config.mix.generates else {}
        for name, section in sections.items():
            fresh = section.model_copy(update={"weights": None})
            found[name] = COPIES * weights(model.build(fresh, classes, config.data.resolution))
        pixels = c.kind == "pixels"
        if config.mix.generates and not config.denoiser.external and (pixels or c.is_fitted):
            space = (config.data.resolution, 3)
            if not pixels:
                space = (config.data.resolution >> c.halvings, c.latent_channels)
            one = weights(edm.build(config.denoiser, classes, *space))
            found |= {"denoiser": COPIES * one, "generate": one}
    return {name: takes + CONTEXT for name, takes in found.items()}


def check(config: Config, run: RunDir, nodes: Sequence[Node]) -> None:
    """UserError where a run cannot begin, beside what its engine refuses (sizes.faults).

    nodes: this machine, where it has GPUs whose memory is known and the run works on it.
    """
    found = disk_faults(config, run.root, roles(config, run, look=False))
    if any(n.gpu_memory for n in nodes):
        found += faults(least(config), config, nodes, least=True)
    resources.refuse(found)
