"""Fit the classifier: AdamW, warm-up and cosine, averaged weights, the checkpoint chosen on
`select`, exact resume.

On one worker or on several (adversa.workers): each sees its rows of every batch, all draws are made
for the whole batch but the masks of dropout and stochastic depth, which each worker draws for its
rows.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from adversa.classify.augment import augment
from adversa.classify.losses import Loss, make_loss
from adversa.classify.mixing import mix
from adversa.classify.model import Network, build, to_pixels
from adversa.classify.schedule import (
    evaluation_steps,
    learning_rate,
    parameter_groups,
    set_rates,
    training_side,
)
from adversa.classify.score import score_batches
from adversa.config import Classifier
from adversa.storage.path import append
from adversa.storage.weights import load_checkpoint, replace_bytes, save_checkpoint, save_model
from adversa.training import process_group
from adversa.types import UserError, digest, seed_of

# "id": list[str], "image": uint8 [B, H, W, 3], "label": int64 [B], and "size": int where these are
# a worker's rows of a larger one
Batch = dict[str, Any]
METRICS = "metrics.jsonl"


@dataclass
class State:
    """All that a step reads and changes. From `step` on, and of the first three: what `_pack`
    commits, `_unpack` brings back.
    """

    model: Network
    average: Network
    optimizer: torch.optim.Optimizer
    trained: list[nn.Parameter]  # those of the trunk that its model does not fix
    parallel: (
        nn.Module
    )  # what a step calls: the model, or its wrapper that averages gradients over the workers
    device: torch.device
    seed: int
    step: int = 0
    best_score: float = -1.0
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
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
    counts: Sequence[float] | None = None,
    priors: Sequence[float] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
    committed: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> dict[str, float]:
    """Train for `config.steps` steps, one batch a step, and write the model folder `out`;
    metrics["steps"] were done.

    batches: from step resume_step(out) on (that many are already done), drawn and balanced by the
    caller. select: yields the select role's batches, each time anew; scored `config.evaluations`
    times, evenly spaced, the last step included. The averaged weights with the highest balanced
    accuracy are kept; of equals, the later. With config.patience, training ends once so many
    evaluations in a row were no better than the best. counts, priors [K]: weight of each class in
    the training set, and its share of the draws; see losses.make_loss. committed: called on every
    worker, with the step, once a checkpoint is on disk. Killed and called again with the same
    arguments, it ends with bit-identical weights: the initial weights depend on `seed` alone,
    augmentation and mixing on (seed, step) alone, dropout and stochastic depth on (seed, step,
    worker). torch's global generator is left as it was. UserError: a loss, gradient or weight that
    is not finite (step and ids), a checkpoint of other settings.
    """
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    recipe = digest(
        config.model_dump_json(exclude={"checkpoint_steps"}),
        num_classes,
        resolution,
        seed,
        counts,
        priors,
    )
    criterion = make_loss(config, counts, priors, device)
    with _threads(threads), _own_generator(device):
        state = _start(config, num_classes, resolution, seed, device)
        _unpack(state, load_checkpoint(out), recipe, out)
        _phase(state, config)
        if process_group.lead():
            _truncate_metrics(out, state.step)
        due = evaluation_steps(config.steps, config.evaluations)
        told, evaluating = time.monotonic(), 0.0
        for batch in itertools.islice(batches, config.steps - state.step):
            state.losses.append(_step(state, batch, config, criterion))
            line = {"loss": state.losses[-1]}
            commits = state.step % config.checkpoint_steps == 0 and state.step < config.steps
            if commits or state.step in due:
                _check_weights(state, batch, config)
            if state.step in due:
                started = time.monotonic()
                line = _evaluate(state, select(), config, out)
                evaluating += time.monotonic() - started
            if process_group.lead() and (state.step in due or time.monotonic() - told >= 1):
                told = time.monotonic()
                report(
                    {
                        "done": state.step,
                        "total": config.steps,
                        "unit": "step",
                        "evaluation_seconds": evaluating,
                        **line,
                    }
                )
            if _out_of_patience(state, config):
                break
            if commits:
                if process_group.lead():
                    save_checkpoint(out, _pack(state, recipe))
                process_group.barrier()
                committed(state.step)
        ended = state.step == config.steps or _out_of_patience(state, config)
        assert ended, f"batches ended at step {state.step} of {config.steps}"
    metrics = {
        "steps": state.step,
        "best_step": state.best_step,
        "select_balanced_accuracy": state.best_score,
    }
    meta = {
        "kind": "classifier",
        "config": config.model_dump(mode="json"),
        "num_classes": num_classes,
    }
    if process_group.lead():
        save_model(out, state.best, {**meta, "resolution": resolution, "seed": seed, **metrics})
    process_group.barrier()
    return {**metrics, "parameters": sum(p.numel() for p in state.model.parameters())}


def resume_step(out: Path) -> int:
    """Steps finished in the checkpoint of an interrupted fit; 0 where there is none."""
    state = load_checkpoint(out)
    return 0 if state is None else int(state["step"])


def balanced_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of the sensitivities of the classes that occur; in [0, 1]."""
    right = logits.argmax(1) == labels
    return float(np.mean([right[labels == k].mean() for k in np.unique(labels)]))


def clip_gradient(parameters: Iterable[nn.Parameter], most: float) -> float:
    """The norm of all gradients together; scaled to `most` where it is above.

    The very numbers of nn.utils.clip_grad_norm_, without its multiplication by 1 below: a third of
    its time (benchmarks/LOG.md).
    """
    given = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in given])
    value = norm.item()
    if not value <= most:
        nn.utils.clip_grads_with_norm_(given, most, norm)
    return value


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """average <- d average + (1 - d) model, weights and BatchNorm statistics alike; counters are
    copied.

    d = min(decay, (1 + step) / (10 + step)), so that the random initial weights are soon forgotten.
    decay = 0 copies.
    """
    d = min(decay, (1 + step) / (10 + step)) if decay else 0.0
    new, old = model.state_dict(), average.state_dict()
    real = [k for k, v in new.items() if v.is_floating_point()]
    get_ema_multi_avg_fn(d)([old[k] for k in real], [new[k] for k in real], 0)
    for k in new.keys() - set(real):
        old[k].copy_(new[k])


def _start(
    config: Classifier, num_classes: int, resolution: int, seed: int, device: torch.device
) -> State:
    torch.manual_seed(seed_of("classifier", seed))
    model = build(config, num_classes, resolution).to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    trained = [p for p in model.trunk.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, fused=True)
    return State(model, average, optimizer, trained, model, device, seed)


def _phase(state: State, config: Classifier) -> None:
    """Freeze the trunk for the first head_steps, let it go after them. Frozen: no gradient, so
    AdamW neither moves nor decays it; eval mode, so BatchNorm's statistics stay. The wrapper is
    made anew: it takes no other set of parameters later.
    """
    frozen = state.step < config.head_steps
    state.model.train()
    for module in state.model.modules():
        if isinstance(module, _BatchNorm) and config.freeze_norm:
            module.eval()
    if frozen:
        state.model.trunk.eval()
    for p in state.trained:
        p.requires_grad_(not frozen)
    state.parallel = state.model  # the old wrapper goes, and its hooks, before the new one comes
    state.parallel = process_group.parallel(state.model, state.device)


def _step(state: State, batch: Batch, config: Classifier, criterion: Loss) -> float:
    step, seed, device = state.step + 1, state.seed, state.device
    _seed(seed_of("dropout", seed, step, process_group.rank()), device)
    size = int(batch.get("size", len(batch["id"])))
    rows = process_group.rows(size)
    generator = torch.Generator().manual_seed(seed_of("augment", seed, step))
    pixels = to_pixels(batch["image"], device)
    targets = F.one_hot(
        torch.as_tensor(batch["label"]).to(device), state.model.head.out_features
    ).float()
    if config.augment is not None:
        side = training_side(step, config, pixels.shape[-1])
        pixels = augment(pixels, config.augment, generator, size, rows, side)
    pixels, targets = mix(pixels, targets, config.mixup, config.cutmix, generator, size, rows)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.amp):
        logits, _ = state.parallel(pixels, resize=config.first_size is None)
    losses = criterion(logits, targets)
    loss = process_group.share(losses, size)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = clip_gradient(state.model.parameters(), config.clip)
    value = process_group.mean(loss)
    if not (
        math.isfinite(value) and math.isfinite(norm)
    ):  # the same on every worker, so all of them end here
        guilty = [
            i
            for i, finite in zip(batch["id"], torch.isfinite(losses).tolist(), strict=True)
            if not finite
        ]
        raise _diverged(
            f"loss {value:g}, gradient norm {norm:g}", step, guilty or batch["id"], config
        )
    set_rates(state.optimizer, step, config)
    state.optimizer.step()
    update_average(state.average, state.model, config.ema, step)
    state.step = step
    if step == config.head_steps:
        _phase(state, config)
    return value


def _seed(seed: int, device: torch.device) -> None:
    """torch.manual_seed of the devices that are used: it notes a stack trace for each kind of
    device that is not, at every call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _check_weights(state: State, batch: Batch, config: Classifier) -> None:
    """Before weights are scored or kept: nothing in them that is not finite, BatchNorm's statistics
    included.
    """
    kept = [
        v
        for m in (state.model, state.average)
        for v in m.state_dict().values()
        if v.is_floating_point() and v.numel()
    ]
    largest = torch.stack(torch._foreach_norm(kept, math.inf)).sum()
    if not math.isfinite(process_group.mean(largest)):
        raise _diverged("a weight that is not finite", state.step, batch["id"], config)


def _diverged(what: str, step: int, ids: list[str], config: Classifier) -> UserError:
    shown = ", ".join(ids[:8]) + (", ..." if len(ids) > 8 else "")
    return UserError(
        f"training diverged at step {step}: {what}; lower classifier.lr ({config.lr:g}), "
        f"or look at the batch's images: {shown}"
    )


def _evaluate(
    state: State, batches: Iterable[Batch], config: Classifier, out: Path
) -> dict[str, float]:
    """Score `select` with the averaged weights, keep them when they are the best so far; the line
    added to metrics.jsonl.
    """
    logits, labels = score_batches(state.average, batches, config.amp, config.views)
    assert len(labels), "the select role is empty"
    score = balanced_accuracy(logits, labels)
    state.stale = 0 if score > state.best_score else state.stale + 1
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
    if process_group.lead():
        _append_metrics(out, line)
    return line


def _out_of_patience(state: State, config: Classifier) -> bool:
    return config.patience is not None and state.stale >= config.patience


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
        "stale": state.stale,
        "losses": state.losses,
    }


def _unpack(state: State, packed: dict[str, Any] | None, recipe: str, out: Path) -> None:
    if packed is None:
        return
    if packed["recipe"] != recipe:
        raise UserError(
            f"{out} holds an unfinished training with other settings; delete that folder "
            "to start it anew"
        )
    state.model.load_state_dict(packed["model"])
    state.average.load_state_dict(packed["average"])
    state.optimizer.load_state_dict(packed["optimizer"])
    state.step, state.best_step, state.best_score = (
        packed["step"],
        packed["best_step"],
        packed["best_score"],
    )
    state.best, state.stale, state.losses = packed["best"], packed["stale"], packed["losses"]


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
    append(out / METRICS, json.dumps(line) + "\n")


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
    """Give torch's global generators back as they were: dropout and initialisation know no
    other.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
