"""Train a classifier, in one process or several (adversa/training).

Everything that a step draws is drawn for its whole batch, but the masks of dropout and stochastic
depth: those are a process's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

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
from adversa.classify.schedule import parameter_groups, set_rates, training_side
from adversa.classify.score import score_batches
from adversa.config import Classifier
from adversa.storage.path import StoragePath
from adversa.storage.weights import save_model
from adversa.training import loop, process_group
from adversa.training.device import to_device
from adversa.training.loop import Batch
from adversa.training.precision import autocast
from adversa.training.schedule import evenly_spaced
from adversa.types import Json, digest, seed_of


@dataclass
class ClassifierFit:
    """All that a step reads and changes.

    Attributes:
        config: Its settings.
        model: The network.
        average: The moving average of its weights, which is scored and kept.
        trained: Parameters of the trunk that its model does not fix.
        parallel: What a step calls: the model, or its wrapper that averages the gradients.
        device: Where it runs.
        seed: Of all that is drawn.
    """

    config: Classifier
    model: Network
    average: Network
    trained: list[nn.Parameter]
    parallel: nn.Module
    device: torch.device
    seed: int


@dataclass
class Best:
    """The evaluation with the highest balanced accuracy so far, and its weights.

    stale: evaluations since the last one that was better than all before it.
    """

    score: float = -1.0
    step: int = 0
    stale: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)


def fit(
    batches: Iterable[Batch],
    *,
    config: Classifier,
    num_classes: int,
    resolution: int,
    select: Callable[[], Iterable[Batch]],
    out: StoragePath,
    seed: int,
    counts: Sequence[float] | None = None,
    priors: Sequence[float] | None = None,
    report: Callable[[Json], None] = lambda _: None,
    committed: Callable[[int], None] = lambda _: None,
    threads: int | None = None,
) -> dict[str, float]:
    """Train for at most `config.steps` steps, and write the model folder `out`.

    Killed and called again, it ends with the same weights to the bit: the initial ones depend on
    `seed` alone, augmentation and mixing on (seed, step), dropout on (seed, step, rank).

    Args:
        batches: From step resume_step(out) on, one a step, drawn and balanced by the caller:
            "image" uint8 [B, H, W, 3], "label" int64 [B].
        config: The network, its augmentation and its schedule.
        num_classes: K.
        resolution: R, of the images.
        select: Yields the select role's batches, each time anew; scored `config.evaluations` times,
            evenly spaced, the last step included. The averaged weights of the highest balanced
            accuracy are kept, of equals the later. config.patience ends the training early.
        out: The model's folder, which holds checkpoints and metrics.jsonl too.
        seed: Of all that is drawn.
        counts: [K] weight of each class in the training set; see losses.make_loss.
        priors: [K] its share of the draws.
        report: Told of the progress, in the main process alone.
        committed: Called in every process, with the step, once a checkpoint is on disk.
        threads: Of torch; None: all.

    Returns:
        "steps", "best_step", "select_balanced_accuracy" and "parameters".

    Raises:
        UserError: A loss, gradient or weight that is not finite, a checkpoint of other settings.
    """
    given = config.model_dump_json(exclude={"checkpoint_steps"})
    recipe = digest(given, num_classes, resolution, seed, counts, priors)
    with loop.session(threads) as device:
        saved = loop.load(out, recipe)
        best = Best(**saved["extra"]) if saved else Best()
        state = _start(config, num_classes, resolution, seed, device)
        criterion = make_loss(config, counts, priors, device)
        training = _describe(state, best, criterion, recipe, select)
        _set_phase(state, saved["step"] if saved else 0)
        record = loop.run(training, batches, saved, out, report, committed)
    metrics = {"steps": record.step, "best_step": best.step, "select_balanced_accuracy": best.score}
    if process_group.is_main_process():
        made = {"kind": "classifier", "config": config.model_dump(mode="json"), "seed": seed}
        sizes = {"num_classes": num_classes, "resolution": resolution}
        save_model(out, best.weights, {**made, **sizes, **metrics})
    process_group.barrier()
    return {**metrics, "parameters": sum(p.numel() for p in state.model.parameters())}


def balanced_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of the sensitivities of the classes that occur; in [0, 1]."""
    right = logits.argmax(1) == labels
    return float(np.mean([right[labels == k].mean() for k in np.unique(labels)]))


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
) -> ClassifierFit:
    torch.manual_seed(seed_of("classifier", seed))
    model = build(config, num_classes, resolution).to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    trained = [p for p in model.trunk.parameters() if p.requires_grad]
    return ClassifierFit(config, model, average, trained, model, device, seed)


def _describe(
    state: ClassifierFit,
    best: Best,
    criterion: Loss,
    recipe: str,
    select: Callable[[], Iterable[Batch]],
) -> loop.Training:
    """To be called before anything is frozen: the optimizer has all that will ever be trained."""
    config = state.config
    groups = parameter_groups(state.model, config)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    due = evenly_spaced(config.steps, config.evaluations)
    return loop.Training(
        section="classifier",
        config=config,
        recipe=recipe,
        modules={"model": state.model, "average": state.average},
        optimizer=optimizer,
        clipped=list(state.model.parameters()),
        forward=partial(_forward, state, criterion),
        set_rates=partial(set_rates, optimizer, config),
        update=partial(_update, state),
        log_steps=due,
        evaluation_steps=due,
        evaluate=lambda step: _evaluate(state, best, select(), step),
        extra=lambda: vars(best),
        stop=lambda: config.patience is not None and best.stale >= config.patience,
        commit_last=False,
    )


def _set_phase(state: ClassifierFit, step: int) -> None:
    """Freeze the trunk for the first head_steps, let it go after them.

    Frozen: no gradient, so AdamW neither moves nor decays it; eval mode, so BatchNorm's statistics
    stay. The wrapper is made anew: it takes no other set of parameters later.
    """
    frozen = step < state.config.head_steps
    state.model.train()
    for module in state.model.modules():
        if isinstance(module, _BatchNorm) and state.config.freeze_norm:
            module.eval()
    if frozen:
        state.model.trunk.eval()
    for p in state.trained:
        p.requires_grad_(not frozen)
    state.parallel = state.model  # the old wrapper's hooks go before the new one comes
    state.parallel = process_group.data_parallel(state.model, state.device)


def _forward(
    state: ClassifierFit, criterion: Loss, batch: Batch, step: int
) -> tuple[Tensor, Tensor]:
    """Losses [B] of a batch; they are what is reported too."""
    config, seed, device = state.config, state.seed, state.device
    _seed(seed_of("dropout", seed, step, process_group.rank()), device)
    size = int(batch.get("size", len(batch["id"])))
    rows = process_group.rows(size)
    generator = torch.Generator().manual_seed(seed_of("augment", seed, step))
    pixels = to_pixels(batch["image"], device)
    labels = to_device(torch.as_tensor(batch["label"]), device)
    targets = F.one_hot(labels, state.model.head.out_features).float()
    if config.augment is not None:
        side = training_side(step, config, pixels.shape[-1])
        pixels = augment(pixels, config.augment, generator, size, rows, side)
    pixels, targets = mix(pixels, targets, config.mixup, config.cutmix, generator, size, rows)
    with autocast(device, config.amp):
        logits, _ = state.parallel(pixels, resize=config.first_size is None)
    losses = criterion(logits, targets)
    return losses, losses


def _update(state: ClassifierFit, step: int) -> None:
    update_average(state.average, state.model, state.config.ema, step)
    if step == state.config.head_steps:
        _set_phase(state, step)


def _seed(seed: int, device: torch.device) -> None:
    """torch.manual_seed of the devices that are used.

    It notes a stack trace for each kind of device that is not, at every call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _evaluate(
    state: ClassifierFit, best: Best, batches: Iterable[Batch], step: int
) -> dict[str, float]:
    """Score `select` with the averaged weights; keep them where they are the best so far."""
    logits, labels = score_batches(state.average, batches, state.config.amp, state.config.views)
    assert len(labels), "the select role is empty"
    score = balanced_accuracy(logits, labels)
    best.stale = 0 if score > best.score else best.stale + 1
    if score >= best.score:
        best.score, best.step = score, step
        best.weights = {k: v.detach().clone() for k, v in state.average.state_dict().items()}
    return {"select_balanced_accuracy": score}
