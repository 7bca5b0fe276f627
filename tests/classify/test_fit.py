from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adversa.classify.fit import balanced_accuracy, fit, update_average
from adversa.classify.model import build
from adversa.classify.score import forward, make_scorer, score_batches
from adversa.config import Augment, Classifier, check
from adversa.storage.weights import load_checkpoint, read_model
from adversa.training.loop import Batch, resume_step
from adversa.types import UserError, seed_of

TINY = {"model": "test_resnet", "model_args": {"drop_rate": 0.1}, "batch_size": 8}
RECIPE = Classifier(**TINY, steps=12, evaluations=4, checkpoint_steps=5, lr=1e-3)


def batch(seed: int, n: int = 8) -> Batch:
    """Three classes told apart by their colour."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 120, (n, 32, 32, 3))
    images[np.arange(n), :, :, labels] += 90
    return {
        "id": [f"{seed}/{i}" for i in range(n)],
        "image": images.astype(np.uint8),
        "label": labels.astype(np.int64),
    }


def stream(start: int = 0, stop_at: int | None = None) -> Iterator[Batch]:
    for step in range(start + 1, 10_000):
        if step == stop_at:
            raise KeyboardInterrupt
        yield batch(step)


def run(
    out: Path, batches: Iterator[Batch], config: Classifier = RECIPE, seed: int = 0, **more: Any
) -> dict[str, float]:
    select = [batch(10**6, 30)]
    return fit(
        batches,
        config=config,
        num_classes=3,
        resolution=32,
        out=out,
        seed=seed,
        select=lambda: select,
        **more,
    )


def trunk(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if k.startswith("trunk.")}


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("changes", "sides"),
    [({}, {32}), ({"input_size": 48}, {48}), ({"input_size": 48, "first_size": 32}, {32, 48})],
)
def test_what_the_network_sees_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], sides: set[int]
) -> None:
    seen: dict[bool, set[int]] = {True: set(), False: set()}

    def built(*args: Any) -> torch.nn.Module:
        network = build(*args)
        network.trunk.register_forward_pre_hook(lambda m, x: seen[m.training].add(x[0].shape[-1]))
        return network

    monkeypatch.setattr("adversa.classify.fit.build", built)
    run(tmp_path, stream(), RECIPE.model_copy(update=changes))
    assert seen == {True: sides, False: {max(sides)}}


EVERYTHING = {
    "head_steps": 7,
    "layer_decay": 0.8,
    "freeze_norm": True,
    "mixup": 0.2,
    "cutmix": 1.0,
    "loss": "logit_adjusted",
    "augment": Augment(rotate=180, erase=0.5),
    "patience": 3,
    "views": 2,
}


@pytest.mark.parametrize(
    ("stop_at", "changes"), [(7, {}), (12, {}), (7, EVERYTHING), (12, EVERYTHING)]
)
def test_killed_and_resumed_is_bit_identical(
    tmp_path: Path, stop_at: int, changes: dict[str, Any]
) -> None:
    config, more = (
        RECIPE.model_copy(update=changes),
        {"counts": [5, 2, 1], "priors": [0.5, 0.3, 0.2]},
    )
    whole = run(tmp_path / "whole", stream(), config, **more)
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        run(out, stream(stop_at=stop_at), config, **more)
    assert resume_step(out) == (stop_at - 1) // 5 * 5
    torch.manual_seed(123)  # another process, another global state
    assert run(out, stream(resume_step(out)), config, **more) == whole
    (a, config_a, print_a), (b, config_b, print_b) = read_model(tmp_path / "whole"), read_model(out)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert config_a == config_b and print_a == print_b
    assert (out / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()
    assert [x["step"] for x in lines(out)] == [3, 6, 9, 12]
    assert (
        resume_step(out) == 10
    )  # whoever marks the model complete lets go of the training state: not fit


def test_the_best_so_far_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.9, 0.2, 0.1] * 2)
    monkeypatch.setattr("adversa.classify.fit.balanced_accuracy", lambda *_: next(scores))
    whole = run(tmp_path / "whole", stream())
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path / "killed", stream(stop_at=12)
        )  # after the best (step 6) and the checkpoint (step 10)
    assert run(tmp_path / "killed", stream(10)) == whole and whole["best_step"] == 6
    a, b = (read_model(tmp_path / x)[0] for x in ("whole", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_seed_decides_and_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = RECIPE.model_copy(update={"steps": 2, "evaluations": 1})
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, stream(), config, seed)
        torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (read_model(tmp_path / x)[0] for x in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a if a[k].ndim == 4)


def test_every_step_is_augmented_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def watch(
        pixels: torch.Tensor, _: Augment, generator: torch.Generator, *rows: object
    ) -> torch.Tensor:
        seeds.append(generator.initial_seed())
        return pixels

    monkeypatch.setattr("adversa.classify.fit.augment", watch)
    config = RECIPE.model_copy(update={"steps": 3, "evaluations": 1})
    run(tmp_path / "a", stream(), config)
    run(tmp_path / "b", stream(), config, seed=1)
    assert len(set(seeds)) == 6


def test_it_learns_and_the_folder_scores_alike(tmp_path: Path) -> None:
    config = Classifier(**TINY, steps=60, evaluations=3, lr=3e-3, ema=0.9, augment=None)
    found = run(tmp_path, stream(), config)
    assert found["select_balanced_accuracy"] > 0.95 and found["steps"] == 60
    unseen = batch(77, 30)
    logits, _ = make_scorer(tmp_path)(unseen["image"])
    assert balanced_accuracy(logits, unseen["label"]) > 0.9


def test_the_best_checkpoint_is_kept_and_of_equals_the_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.9, 0.9, 0.2])
    monkeypatch.setattr("adversa.classify.fit.balanced_accuracy", lambda *_: next(scores))
    found = run(tmp_path / "best", stream())
    assert found["best_step"] == 9 and found["select_balanced_accuracy"] == 0.9
    scores = iter([0.5, 0.9, 0.1, 0.2])
    assert run(tmp_path / "other", stream())["best_step"] == 6
    a, b = (read_model(tmp_path / x)[0] for x in ("best", "other"))
    assert not all(torch.equal(a[k], b[k]) for k in a)


def test_a_loss_that_is_not_finite_names_step_and_images(tmp_path: Path) -> None:
    config = RECIPE.model_copy(update={"lr": 1e30, "clip": 1e30, "amp": False, "warmup": 0.0})
    with pytest.raises(UserError, match=r"step \d+: loss (nan|inf).*classifier.lr.*\d+/0") as e:
        run(tmp_path, stream(), config)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_images_whose_loss_is_not_finite_are_the_ones_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = torch.zeros(8)
    poison[[2, 5]] = float("nan")
    monkeypatch.setattr(
        "adversa.classify.fit.make_loss", lambda *_: lambda logits, _: logits.sum(1) + poison
    )
    with pytest.raises(UserError, match=r"step 1: loss nan.*images: 1/2, 1/5$"):
        run(tmp_path, stream())


@pytest.mark.parametrize("where", ["model", "average"])
def test_a_weight_that_is_not_finite_never_becomes_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def poisoned(average: torch.nn.Module, model: torch.nn.Module, decay: float, step: int) -> None:
        update_average(average, model, decay, step)
        if step == 5:  # a statistic that the losses of training never show
            next(
                b
                for n, b in {"model": model, "average": average}[where].named_buffers()
                if n.endswith("running_var")
            )[0] = torch.inf

    monkeypatch.setattr("adversa.classify.fit.update_average", poisoned)
    config = RECIPE.model_copy(update={"evaluations": 1})
    with pytest.raises(UserError, match=r"step 5: a weight that is not finite.*5/0") as e:
        run(tmp_path, stream(), config)
    assert (
        "\n" not in str(e.value)
        and resume_step(tmp_path) == 0
        and not (tmp_path / "model.safetensors").exists()
    )


def test_a_frozen_trunk_stays_as_it_was_to_the_bit_and_then_learns(tmp_path: Path) -> None:
    config = RECIPE.model_copy(
        update={
            "steps": 6,
            "evaluations": 1,
            "checkpoint_steps": 3,
            "head_steps": 6,
            "weight_decay": 0.5,
        }
    )
    run(tmp_path / "frozen", stream(), config)
    torch.manual_seed(seed_of("classifier", 0))
    start = build(config, 3, 32).state_dict()
    state = read_model(tmp_path / "frozen")[0]
    assert all(torch.equal(v, start[k]) for k, v in trunk(state).items()) and len(trunk(state)) > 20
    assert not torch.equal(state["head.weight"], start["head.weight"])
    thawed = config.model_copy(update={"head_steps": 3, "ema": 0.0})
    run(tmp_path / "thawed", stream(), thawed)
    packed = load_checkpoint(tmp_path / "thawed")
    assert packed is not None and packed["step"] == 3
    assert all(torch.equal(v, start[k]) for k, v in trunk(packed["model"]).items())
    after = trunk(read_model(tmp_path / "thawed")[0])
    assert not any(torch.equal(v, start[k]) for k, v in after.items() if v.ndim == 4)
    assert not any(torch.equal(v, start[k]) for k, v in after.items() if k.endswith("running_mean"))


def test_frozen_norms_keep_their_statistics_and_learn_their_scale(tmp_path: Path) -> None:
    config = RECIPE.model_copy(update={"freeze_norm": True})
    run(tmp_path, stream(), config)
    torch.manual_seed(seed_of("classifier", 0))
    start = build(config, 3, 32).state_dict()
    state = read_model(tmp_path)[0]
    statistics = [k for k in state if "running" in k or "tracked" in k]
    assert len(statistics) > 10 and all(torch.equal(state[k], start[k]) for k in statistics)
    scales = [k.replace("running_mean", "weight") for k in statistics if k.endswith("running_mean")]
    assert not any(torch.equal(state[k], start[k]) for k in scales)


def test_patience_ends_the_training_and_the_metrics_say_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [0.5, 0.9, 0.9, 0.2, 0.95, 0.1]
    for patience, steps, best in ((2, 8, 6), (3, 12, 10), (None, 12, 10)):
        left = iter(scores)
        monkeypatch.setattr(
            "adversa.classify.fit.balanced_accuracy", lambda *_, left=left: next(left)
        )
        config = RECIPE.model_copy(update={"evaluations": 6, "patience": patience})
        out, taken = tmp_path / str(patience), []
        found = run(out, (taken.append(b) or b for b in stream()), config)
        assert (found["steps"], found["best_step"]) == (steps, best) and len(
            taken
        ) == steps  # an equal one is kept, but no better
        assert lines(out)[-1]["step"] == steps and read_model(out)[1]["steps"] == steps


def test_patience_and_matched_arms_exclude_each_other() -> None:
    with pytest.raises(
        UserError,
        match=r"classifier.patience 2 would stop the arms \['real', .* take null, or one arm",
    ) as e:
        check({"classifier": {"patience": 2}}, "x.yaml")
    assert "\n" not in str(e.value)
    assert (
        check(
            {"classifier": {"patience": 2}, "mix": {"arms": ["real"]}}, "x.yaml"
        ).classifier.patience
        == 2
    )


def test_each_commit_is_told_and_on_disk_by_then(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    run(tmp_path, stream(), committed=lambda step: told.append((step, resume_step(tmp_path))))
    assert told == [(5, 5), (10, 10)]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "logit_adjusted"},
        {"loss": "effective_number"},
        {"mixup": 0.4},
        {"cutmix": 1.0},
        {"layer_decay": 0.5},
    ],
)
def test_each_option_changes_what_is_learnt_and_it_still_learns(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = Classifier(**TINY, steps=40, evaluations=1, lr=3e-3, ema=0.9, augment=None)
    more = {"counts": [50, 20, 10], "priors": [0.5, 0.3, 0.2]}
    found = run(tmp_path / "with", stream(), config.model_copy(update=changes), **more)
    assert found["select_balanced_accuracy"] > 0.8
    short = config.model_copy(update={"steps": 2})
    run(tmp_path / "a", stream(), short, **more)
    run(tmp_path / "b", stream(), short.model_copy(update=changes), **more)
    a, b = (read_model(tmp_path / x)[0] for x in "ab")
    assert not any(torch.equal(a[k], b[k]) for k in a if a[k].ndim == 4)


def test_batches_of_any_size_score_alike() -> None:
    config = Classifier(**TINY)
    network = build(config, 3, 32).eval()
    torch.nn.init.normal_(network.head.weight)
    whole = batch(1, 150)
    parts = [
        {k: v[a:b] for k, v in whole.items()}
        for a, b in ((0, 50), (50, 120), (120, 120), (120, 150))
    ]
    logits, labels = score_batches(network, parts, True, 1)
    assert (logits == forward(network, whole["image"], True)[0]).all() and (
        labels == whole["label"]
    ).all()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stream(stop_at=7))
    with pytest.raises(UserError, match="other settings"):
        run(tmp_path, stream(5), seed=1)


def test_too_few_batches_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="step 4 of 12"):
        run(tmp_path, iter([batch(i) for i in range(4)]))


def test_average_follows_weights_and_statistics_by_the_closed_form() -> None:
    model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    for value in (model.weight, model.running_mean):
        torch.nn.init.constant_(value, 1.0)
    torch.nn.init.zeros_(average.weight)
    for step in range(1000, 1010):  # so late that the decay is the one asked for
        model.num_batches_tracked += 1
        update_average(average, model, 0.9, step)
    assert average.weight.tolist() == pytest.approx([1 - 0.9**10] * 2)
    assert average.running_mean.tolist() == pytest.approx([1 - 0.9**10] * 2)
    assert average.num_batches_tracked == 10
    update_average(average, model, 0.0, 5)
    assert torch.equal(average.weight, model.weight)


def test_balanced_accuracy_ignores_absent_classes() -> None:
    logits = np.eye(4)[[0, 0, 0, 1, 0]]
    assert balanced_accuracy(logits, np.array([0, 0, 0, 1, 1])) == pytest.approx(0.75)
