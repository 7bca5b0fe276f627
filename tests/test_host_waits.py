"""No hot loop makes a GPU wait for the host, or mixes devices: under a made-up CUDA
(made_up_cuda.py, hot_loops.py), in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adversa.training.device import CPU, Numbers, to_device

HERE = Path(__file__).parent
# Waits of the host a unit of work, by the first word of a loop's name. They only ever fall.
BUDGET = {"denoiser": 0, "classifier": 0, "codec": 0, "score": 0, "sampler": 0}

PLANTED = """
import sys
sys.path.insert(0, {root!r})
from tests import made_up_cuda
counts = made_up_cuda.install()
import json, torch
a, here, event = torch.ones(3, device="cuda"), torch.ones(3), torch.cuda.Event()
out = torch.empty(3).pin_memory()
planted = dict(
    item=lambda: a.sum().item(),
    tolist=lambda: a.tolist(),
    bool=lambda: bool(a.sum() > 1),
    float=lambda: float(a.sum()),
    numpy=lambda: a.cpu().numpy(),
    nonzero=lambda: a.nonzero(),
    mask=lambda: a[a > 0],
    synchronize=lambda: torch.cuda.synchronize(),
    event=lambda: event.synchronize(),
    unpinned=lambda: here.to("cuda", non_blocking=True),
    blocking=lambda: here.pin_memory().to("cuda"),
    index=lambda: a[torch.tensor([0, 1])],
    back=lambda: out.copy_(a),
    pinned=lambda: here.pin_memory().to("cuda", non_blocking=True),
    later=lambda: out.copy_(a, non_blocking=True),
    computed=lambda: (a + 1).sum(),
    mixed=lambda: a + here,
)
found = dict()
for name, do in planted.items():
    counts.clear()
    do()
    found[name] = [sum(counts.waits.values()), sum(counts.mixed.values())]
print(json.dumps(found))
"""


def run(*command: str) -> dict:
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_every_kind_of_wait_is_seen() -> None:
    found = run("-c", PLANTED.format(root=str(HERE.parent)))
    free = {k for k, (waits, _) in found.items() if not waits}
    assert free == {"pinned", "later", "computed", "mixed"}
    assert {k for k, (_, mixed) in found.items() if mixed} == {"mixed"}


@pytest.mark.slow
def test_hot_loops_keep_their_budget_of_waits_and_mix_no_devices() -> None:
    found = run(str(HERE / "hot_loops.py"))
    assert {name.split(",")[0] for name in found} == set(BUDGET)
    assert {n: f["mixed"] for n, f in found.items() if f["mixed"]} == {}
    above = {n: f for n, f in found.items() if f["waits"] > BUDGET[n.split(",")[0]]}
    assert above == {}


def test_on_a_cpu_nothing_is_copied_and_numbers_are_there_at_once() -> None:
    import torch

    x = torch.tensor([1.5, float("inf")])
    assert to_device(x, CPU) is x
    numbers = Numbers(x[0], x[1])
    assert numbers.ready() and numbers.read() == [1.5, float("inf")]
