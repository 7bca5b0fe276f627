"""The training loop of the classifier, the denoiser and the codec.

Killed at any step and run again with the same arguments, a training ends with the weights of an
undisturbed one, to the bit (same machine, same threads), provided that whatever a step draws
depends on seeds and the step alone. In several processes (process_group.py) each has its rows of
every batch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adversa import config as cfg
from adversa.storage import files, weights
from adversa.storage.path import StoragePath, append
from adversa.training import process_group
from adversa.training.device import Numbers
from adversa.types import UserError

# "id": list[str], "image" or "latent", "label", and "size": int where these are a process's rows of
# a larger batch.
Batch = dict[str, Any]
Section = cfg.Classifier | cfg.Denoiser | cfg.Codec
METRICS = "metrics.jsonl"
SHOWN = 8  # ids in a message
REPORT_SECONDS = 1.0
AHEAD = 4  # steps that may be on their way to a GPU before the host waits for the oldest


@dataclass(frozen=True)
class Training:
    """One training, as the loop sees it. Steps are counted from 1.

    Attributes:
        section: Name of `config` in the configuration, for messages.
        config: Its settings.
        recipe: Digest of all that makes the weights; a checkpoint of another one is refused.
        modules: What a checkpoint holds, by name; nothing in them may stop being finite.
        optimizer: Of all that is ever trained.
        clipped: Parameters whose gradients' norm is at most config.clip.
        forward: (batch, step) to two losses of each row: to minimise, and to report. Where the one
            is not finite, nor may the other be.
        set_rates: Sets the learning rates of a step, and returns the one to log.
        log_steps: Steps after which metrics.jsonl has the mean loss since the last such line.
        evaluation_steps: Steps after which it has what `evaluate` returns.
        update: Called after each step of the optimizer: moving averages, changes of phase.
        evaluate: A step to metrics by name; called in every process.
        extra: What else a checkpoint holds under "extra": numbers, texts and tensors.
        stop: Whether to end before config.steps; asked after each step.
        commit_last: Whether the last step's state is kept too: where much is done after it.
    """

    section: str
    config: Section
    recipe: str
    modules: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    clipped: Sequence[Tensor]
    forward: Callable[[Batch, int], tuple[Tensor, Tensor]]
    set_rates: Callable[[int], float]
    log_steps: set[int]
    evaluation_steps: set[int] = field(default_factory=set)
    update: Callable[[int], None] = lambda _: None
    evaluate: Callable[[int], dict[str, float]] = lambda _: {}
    extra: Callable[[], dict[str, Any]] = dict
    stop: Callable[[], bool] = lambda: False
    commit_last: bool = True


class PendingStep(NamedTuple):
    """Of a step that is on its way: its loss and its gradient's norm, the loss of each row."""

    step: int
    ids: list[str]
    numbers: Numbers
    losses: Tensor


@dataclass
class TrainingRecord:
    """How far a training is.

    Attributes:
        step: Steps done.
        loss: Of the last step looked at.
        losses: Of the steps since the last mean in metrics.jsonl.
        mean_loss: That mean.
        lr: Of the last step.
        pending: The steps not looked at yet, the oldest first.
    """

    step: int = 0
    loss: float = math.nan
    losses: list[float] = field(default_factory=list)
    mean_loss: float | None = None
    lr: float = math.nan
    pending: deque[PendingStep] = field(default_factory=deque)


def resume_step(out: StoragePath) -> int:
    """Steps finished in the checkpoint of an interrupted training; 0 where there is none."""
    saved = weights.load_checkpoint(out)
    return 0 if saved is None else int(saved["step"])


def load(out: StoragePath, recipe: str) -> dict[str, Any] | None:
    """The checkpoint in `out`, or None; UserError where it is one of another recipe."""
    saved = weights.load_checkpoint(out)
    if saved is not None and saved.get("recipe") != recipe:
        raise UserError(
            f"{out} holds an unfinished training with other settings; "
            "delete that folder to start it anew"
        )
    return saved


@contextlib.contextmanager
def session(threads: int | None) -> Iterator[torch.device]:
    """The device to train on. torch's threads and its global generators are given back after it."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[device] if cuda else []):
            yield device
    finally:
        torch.set_num_threads(before)


def run(
    training: Training,
    batches: Iterable[Batch],
    saved: dict[str, Any] | None,
    out: StoragePath,
    report: Callable[[dict[str, Any]], None],
    committed: Callable[[int], None],
) -> TrainingRecord:
    """Train until config.steps, or until `stop`.

    Args:
        training: What is trained, and how.
        batches: From the step after the checkpoint's on, one a step; no more than needed are taken.
        saved: What `load` returned: the training goes on from there.
        out: The folder of its checkpoints and metrics.jsonl.
        report: Told of the progress, in the main process alone.
        committed: Called in every process, with the step, once a checkpoint is on disk.

    Returns:
        How that ended.

    Raises:
        UserError: A loss, a gradient or a weight is not finite (step and ids), in all processes.
    """
    config, record, told = training.config, _resume(training, saved), -math.inf
    if process_group.is_main_process():
        _truncate_metrics(out, record.step)
    for batch in itertools.islice(batches, config.steps - record.step):
        _step(training, record, batch)
        step, last = record.step, record.step == config.steps
        logs, evaluates = step in training.log_steps, step in training.evaluation_steps
        commits = training.commit_last if last else step % config.checkpoint_steps == 0
        if logs or evaluates or commits:
            _look(training, record)
        if evaluates or commits:
            _check_weights(training, step, batch["id"])
        row = _mean(record) if logs else {}
        if evaluates:
            row |= training.evaluate(step)
        if process_group.is_main_process() and math.isfinite(record.loss):
            if row:
                append(out / METRICS, json.dumps({"step": step, **row}) + "\n")
            if row or time.monotonic() - told >= REPORT_SECONDS:
                told, done = time.monotonic(), {"done": step, "total": config.steps, "unit": "step"}
                report({**done, "loss": record.loss, **row})
        if training.stop():
            return record
        if commits:
            _commit(training, record, out)
            committed(step)
    ended = f"the batches ended at step {record.step} of {config.steps}"
    assert record.step == config.steps, ended
    return record


def clip_gradients(parameters: Iterable[Tensor], most: float) -> Tensor:
    """The norm of all gradients together; they are scaled to `most` where it is above.

    The numbers of nn.utils.clip_grad_norm_. On a CPU without its multiplication by 1 below, a third
    of its time (benchmarks/LOG.md); on a GPU with it, for to ask is to wait.
    """
    given = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in given if p.grad is not None])
    if norm.device.type != "cpu" or not norm.item() <= most:
        nn.utils.clip_grads_with_norm_(given, most, norm)
    return norm


def _resume(training: Training, saved: dict[str, Any] | None) -> TrainingRecord:
    if saved is None:
        return TrainingRecord()
    for name, module in training.modules.items():
        module.load_state_dict(saved[name])
    training.optimizer.load_state_dict(saved["optimizer"])
    return TrainingRecord(saved["step"], losses=saved["losses"], mean_loss=saved["mean_loss"])


def _commit(training: Training, record: TrainingRecord, out: StoragePath) -> None:
    """Everything to go on from, on disk, when any process returns."""
    if process_group.is_main_process():
        state = {
            "recipe": training.recipe,
            "step": record.step,
            "losses": record.losses,
            "mean_loss": record.mean_loss,
            "optimizer": training.optimizer.state_dict(),
            "extra": training.extra(),
        }
        modules = {name: module.state_dict() for name, module in training.modules.items()}
        weights.save_checkpoint(out, state | modules)
    process_group.barrier()


def _step(training: Training, record: TrainingRecord, batch: Batch) -> None:
    """One step, looked at when later ones are on their way: a GPU need not wait for the CPU."""
    step, size = record.step + 1, int(batch.get("size", len(batch["id"])))
    losses, reported = training.forward(batch, step)
    training.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(process_group.scale_loss(losses, size))
    norm = clip_gradients(training.clipped, training.config.clip)
    record.lr = training.set_rates(step)
    training.optimizer.step()
    training.update(step)
    _look(training, record, AHEAD)
    loss = process_group.all_reduce_mean(process_group.scale_loss(reported.detach(), size))
    numbers = Numbers(loss, norm)
    record.pending.append(PendingStep(step, batch["id"], numbers, losses.detach()))
    record.step = step


def _look(training: Training, record: TrainingRecord, ahead: int = 0) -> None:
    """Note the losses of pending steps, of all but the last `ahead` whether they have come or not;
    UserError where one or its gradient is not finite.

    Of several processes each looks at the same steps, come or not: those that know of a divergence
    talk to one another, and none of them may be in another collective meanwhile.
    """
    alone = process_group.world_size() == 1
    while record.pending and (
        len(record.pending) > ahead or (alone and record.pending[0].numbers.ready())
    ):
        step, ids, numbers, losses = record.pending.popleft()
        record.loss, gradient = numbers.read()
        if not (math.isfinite(record.loss) and math.isfinite(gradient)):  # in every process alike
            each = zip(ids, losses.isfinite().tolist(), strict=True)
            guilty = _all_ids([i for i, finite in each if not finite]) or _all_ids(ids)
            what = f"loss {record.loss:g}, gradient norm {gradient:g}"
            raise _diverged(training, step, what, guilty)
        record.losses.append(record.loss)


def _mean(record: TrainingRecord) -> dict[str, float]:
    record.mean_loss, record.losses = float(np.mean(record.losses)), []
    return {"loss": record.mean_loss, "lr": record.lr}


def _check_weights(training: Training, step: int, ids: list[str]) -> None:
    """Before weights are scored or kept: all are finite, BatchNorm's statistics among them."""
    tensors = [v for m in training.modules.values() for v in m.state_dict().values()]
    kept = [v for v in tensors if v.is_floating_point() and v.numel()]
    largest = torch.stack(torch._foreach_norm(kept, math.inf)).sum()
    if not math.isfinite(process_group.all_reduce_mean(largest).item()):
        raise _diverged(training, step, "a weight that is not finite", _all_ids(ids))


def _all_ids(ids: list[str]) -> list[str]:
    return list(itertools.chain(*process_group.all_gather_object(ids)))


def _diverged(training: Training, step: int, what: str, ids: list[str]) -> UserError:
    shown = ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
    return UserError(
        f"training diverged at step {step}: {what}; lower {training.section}.lr "
        f"({training.config.lr:g}), or look at the batch's images: {shown}"
    )


def _truncate_metrics(out: StoragePath, step: int) -> None:
    """Drop the lines of steps that will be done again, and a last line cut short by a kill."""
    path, kept = out / METRICS, []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # only a torn last line is not JSON
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    out.mkdir(parents=True, exist_ok=True)
    files.replace_bytes(path, "".join(kept).encode())
