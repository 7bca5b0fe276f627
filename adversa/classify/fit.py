"""Fit the classifier: AdamW, warm-up and cosine, averaged weights, the checkpoint chosen on `select`, exact resume."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversa.classify.augment import augment
from adversa.classify.model import Network, build, to_pixels
from adversa.classify.score import forward
from adversa.config import Classifier
from adversa.types import UserError, digest, seed_of
from adversa.weights import load_checkpoint, replace_bytes, save_checkpoint, save_model

Batch = dict[str, Any]  # "id": list[str], "image": uint8 [B, H, W, 3], "label": int64 [B]
METRICS = "metrics.jsonl"


@dataclass
class State:
    """All that a step reads and changes; what `_pack` commits and `_unpack` brings back."""

    model: Network
    average: Network
    optimizer: torch.optim.Optimizer
    step: int = 0
    best_score: float = -1.0
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # since the last line of metrics.jsonl


def fit(
    batches: Iterable[Batch],
    *,
    config: Classifier,
    num_classes: int,
    resolution: int,
    select: Callable[[], Iterable[Batch]],
    out: Path,
    seed: int,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
    threads: int | None = None,
) -> dict[str, float]:
    """Train for `config.steps` steps, one batch a step, and write the model folder `out`.

    batches: from step resume_step(out) on (that many are already done), drawn and balanced by the caller.
    select: yields the select role's batches, each time anew; scored `config.evaluations` times, evenly spaced, the last
    step included. The averaged weights with the highest balanced accuracy are kept; of equals, the later.
    Killed and called again with the same arguments, it ends with bit-identical weights: the initial weights depend on
    `seed` alone, augmentation and dropout on (seed, step) alone. torch's global generator is left as it was.
    UserError: a loss or gradient that is not finite (step and ids of the batch), a checkpoint of other settings.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = digest(config.model_dump_json(exclude={"checkpoint_steps"}), num_classes, resolution, seed)
    with _threads(threads), _own_generator(device):
        state = _start(config, num_classes, resolution, seed, device)
        _unpack(state, load_checkpoint(out), recipe, out)
        _truncate_metrics(out, state.step)
        due = evaluation_steps(config.steps, config.evaluations)
        told = time.monotonic()
        for batch in itertools.islice(batches, config.steps - state.step):
            state.losses.append(_step(state, batch, config, seed, device))
            if state.step in due:
                line = _evaluate(state, select(), config)
                _append_metrics(out, line)
                report({"done": state.step, "total": config.steps, "unit": "step", **line})
            elif time.monotonic() - told >= 1:
                told = time.monotonic()
                report({"done": state.step, "total": config.steps, "unit": "step", "loss": state.losses[-1]})
            if state.step % config.checkpoint_steps == 0 and state.step < config.steps:
                save_checkpoint(out, _pack(state, recipe))
        assert state.step == config.steps, f"batches ended at step {state.step} of {config.steps}"
    metrics = {"steps": state.step, "best_step": state.best_step, "select_balanced_accuracy": state.best_score}
    meta = {"kind": "classifier", "config": config.model_dump(mode="json"), "num_classes": num_classes}
    save_model(out, state.best, {**meta, "resolution": resolution, "seed": seed, **metrics})
    return {**metrics, "parameters": sum(p.numel() for p in state.model.parameters())}


def resume_step(out: Path) -> int:
    """Steps finished in the checkpoint of an interrupted fit; 0 where there is none."""
    state = load_checkpoint(out)
    return 0 if state is None else int(state["step"])


def learning_rate(step: int, config: Classifier) -> float:
    """Of step 1 ... config.steps: linear to config.lr over the warm-up, then half a cosine to a hundredth of it."""
    rise = config.warmup * config.steps
    if step <= rise:
        return config.lr * step / rise
    share = (step - rise) / max(1.0, config.steps - rise)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """The steps after which `select` is scored: evenly spaced, the last always."""
    return {max(1, round(i * steps / evaluations)) for i in range(1, evaluations + 1)}


def balanced_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of the sensitivities of the classes that occur; in [0, 1]."""
    right = logits.argmax(1) == labels
    return float(np.mean([right[labels == k].mean() for k in np.unique(labels)]))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """average <- d average + (1 - d) model, weights and BatchNorm statistics alike; counters are copied.

    d = min(decay, (1 + step) / (10 + step)), so that the random initial weights are soon forgotten. decay = 0 copies.
    """
    d = min(decay, (1 + step) / (10 + step)) if decay else 0.0
    new, old = model.state_dict(), average.state_dict()
    real = [k for k, v in new.items() if v.is_floating_point()]
    torch._foreach_lerp_([old[k] for k in real], [new[k] for k in real], 1 - d)
    for k in new.keys() - set(real):
        old[k].copy_(new[k])


def _start(config: Classifier, num_classes: int, resolution: int, seed: int, device: torch.device) -> State:
    torch.manual_seed(seed_of("classifier", seed))
    model = build(config, num_classes, resolution).to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    # Decay belongs to matrices and kernels; on biases, norms and layer scales it only fights the fit.
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return State(model.train(), average, torch.optim.AdamW(groups, lr=config.lr, fused=True))


def _step(state: State, batch: Batch, config: Classifier, seed: int, device: torch.device) -> float:
    step = state.step + 1
    torch.manual_seed(seed_of("dropout", seed, step))
    pixels, labels = to_pixels(batch["image"], device), torch.as_tensor(batch["label"]).to(device)
    if config.augment:
        pixels = augment(pixels, torch.Generator().manual_seed(seed_of("augment", seed, step)))
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.amp):
        logits, _ = state.model(pixels)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    value = loss.item()
    if not (math.isfinite(value) and math.isfinite(norm.item())):
        ids = ", ".join(batch["id"][:8]) + (", ..." if len(batch["id"]) > 8 else "")
        raise UserError(
            f"training diverged at step {step}: loss {value:g}, gradient norm {norm.item():g}; "
            f"lower classifier.lr ({config.lr:g}), or look at the batch's images: {ids}"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    state.optimizer.step()
    update_average(state.average, state.model, config.ema, step)
    state.step = step
    return value


def _evaluate(state: State, batches: Iterable[Batch], config: Classifier) -> dict[str, float]:
    """Score `select` with the averaged weights, keep them when they are the best so far; the line for metrics.jsonl."""
    logits, labels = [], []
    for batch in batches:
        logits.append(forward(state.average, batch["image"], config.amp)[0])
        labels.append(np.asarray(batch["label"]))
    assert logits, "the select role is empty"
    score = balanced_accuracy(np.concatenate(logits), np.concatenate(labels))
    if score >= state.best_score:
        state.best_score, state.best_step = score, state.step
        state.best = {k: v.detach().clone() for k, v in state.average.state_dict().items()}
    line = {
        "step": state.step,
        "loss": float(np.mean(state.losses)),
        "lr": learning_rate(state.step, config),
        "select_balanced_accuracy": score,
    }
    state.losses = []
    return line


def _pack(state: State, recipe: str) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "step": state.step,
        "model": state.model.state_dict(),
        "average": state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "best": state.best,
        "best_score": state.best_score,
        "best_step": state.best_step,
        "losses": state.losses,
    }


def _unpack(state: State, packed: dict[str, Any] | None, recipe: str, out: Path) -> None:
    if packed is None:
        return
    if packed["recipe"] != recipe:
        raise UserError(f"{out} holds an unfinished training with other settings; delete that folder to start it anew")
    state.model.load_state_dict(packed["model"])
    state.average.load_state_dict(packed["average"])
    state.optimizer.load_state_dict(packed["optimizer"])
    state.step, state.best_step, state.best_score = packed["step"], packed["best_step"], packed["best_score"]
    state.best, state.losses = packed["best"], packed["losses"]


def _truncate_metrics(out: Path, step: int) -> None:
    """Drop the lines of steps that will be done again (and a last line cut short by a kill)."""
    path = out / METRICS
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # only a torn last line is not JSON
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    replace_bytes(path, "".join(kept).encode())


def _append_metrics(out: Path, line: dict[str, float]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / METRICS, "a") as f:
        f.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _own_generator(device: torch.device) -> Iterator[None]:
    """Give torch's global generators back as they were: dropout and initialisation know no other."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
