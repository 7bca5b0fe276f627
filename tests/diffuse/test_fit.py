from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adversa import config as cfg
from adversa.diffuse import average, edm
from adversa.diffuse.fit import VALIDATED, VALIDATIONS, _held_out, fit, sample_grid
from adversa.diffuse.objective import validation_loss
from adversa.storage import tables, weights
from adversa.training.loop import resume_step
from adversa.training.schedule import evenly_spaced
from adversa.types import UserError, seed_of

CONFIG = cfg.Denoiser(
    architecture="unet",
    channels=[16, 16],
    patch=2,
    weights=None,
    steps=7,
    batch_size=4,
    lr=2e-3,
    checkpoint_steps=2,
)
TOKENS = {"architecture": "transformer", "width": 32, "depth": 2, "patch": 4}
CLASSES = ["a", "b"]


def batches(first: int, steps: int = CONFIG.steps) -> Iterator[dict[str, Any]]:
    for step in range(first, steps):
        rng = np.random.default_rng(step)
        label = rng.integers(0, 2, 4)
        image = (
            40 + 150 * label[:, None, None, None] + rng.integers(0, 20, (4, 16, 16, 3))
        ).astype(np.uint8)
        yield {"id": [f"img{step}-{i}" for i in range(4)], "image": image, "label": label}


def run(
    out: Path,
    source: Iterator[dict[str, Any]],
    config: cfg.Denoiser = CONFIG,
    said: list[Any] | None = None,
    seed: int = 3,
    **more: Any,
) -> dict[str, Any]:
    report = [] if said is None else said
    space = {"num_classes": 2, "resolution": 16, "classes": CLASSES} | more
    return fit(source, config=config, out=out, seed=seed, report=report.append, **space)


class Killed(BaseException):
    pass


def dying(source: Iterator[dict[str, Any]], after: int) -> Iterator[dict[str, Any]]:
    for i, batch in enumerate(source):
        if i == after:
            raise Killed
        yield batch


@pytest.mark.parametrize(
    "update",
    [
        {},
        {"loss": "uncertainty", "ema_width": 0.1, "sample_steps": 3},
        {"loss": "min_snr"} | TOKENS,
    ],
    ids=["default", "uncertainty and power average", "transformer"],
)
def test_killed_and_resumed_training_ends_bit_identical(
    tmp_path: Path, update: dict[str, Any]
) -> None:
    config = CONFIG.model_copy(update=update)
    told: list[int] = []
    more: dict[str, Any] = {"select": lambda: batches(100, 102), "committed": told.append}
    undisturbed = run(tmp_path / "whole", batches(0), config, **more)
    assert told == [2, 4, 6, 7]
    out = tmp_path / "broken"
    for deaths, (after, finished) in enumerate([(5, 4), (1, 4), (2, 6)]):
        with pytest.raises(Killed):
            run(out, dying(batches(resume_step(out)), after), config, **more)
        assert resume_step(out) == finished, deaths
        torch.manual_seed(deaths)  # the global generator plays no part
    resumed = run(out, batches(resume_step(out)), config, **more)
    assert resumed == undisturbed
    names = {p.name for p in (tmp_path / "whole").iterdir() if not p.name.startswith("checkpoint")}
    grids = {"samples-000003.png", "samples-000006.png"} if config.sample_steps else set()
    assert names == {"model.safetensors", "config.json", "metrics.jsonl", "samples.png"} | grids
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert (
        resume_step(out) == 7
    )  # whoever marks the model complete lets go of the training state: not fit


def test_grids_on_the_way_and_validation_change_nothing_else(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    plain = run(tmp_path / "plain", batches(0))
    watched = run(
        tmp_path / "watched",
        batches(0),
        CONFIG.model_copy(update={"sample_steps": 2}),
        select=lambda: batches(100, 101),
    )
    a, b = (weights.read_model(tmp_path / name)[0] for name in ("plain", "watched"))
    assert all(torch.equal(a[k], b[k]) for k in a) and plain["loss"] == watched["loss"]
    assert torch.equal(state, torch.get_rng_state())
    assert (tmp_path / "watched/samples-000006.png").read_bytes() != (
        tmp_path / "watched/samples-000002.png"
    ).read_bytes()


def test_validation_rows_hold_the_validation_loss_of_the_average(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    run(tmp_path, batches(0), said=said, select=lambda: batches(100, 150))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert (
        set(found) == evenly_spaced(7, VALIDATIONS) == {1, 3, 4, 6, 7} and len(found) == VALIDATIONS
    )
    assert [s["validation_loss"] for s in said if "validation_loss" in s] == list(found.values())
    denoiser, _, _ = edm.load(tmp_path)
    rows = [
        row for b in batches(100, 150) for row in zip(b["id"], b["image"], b["label"], strict=True)
    ]
    rows = sorted(rows, key=lambda row: seed_of("validated", row[0]))[:VALIDATED]
    x, label = (
        edm.to_tensor(np.stack([r[1] for r in rows])),
        torch.tensor([int(r[2]) for r in rows]),
    )
    assert validation_loss(denoiser, x, label, CONFIG, 3) == pytest.approx(found[7], rel=1e-6)


def test_the_validated_images_are_of_every_class_and_in_no_order_of_the_data() -> None:
    ids, labels = (
        [str(i) for i in range(600)],
        np.repeat([0, 1, 2], 200),
    )  # one class after the other
    image = np.arange(600)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3) % 256

    def held(order: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        cuts = [order[i : i + 7] for i in range(0, 600, 7)]
        return _held_out(
            {"id": [ids[i] for i in c], "image": image[c].astype(np.uint8), "label": labels[c]}
            for c in cuts
        )

    x, label = held(np.arange(600))
    assert len(x) == len(label) == VALIDATED and torch.bincount(label).min() > VALIDATED // 5
    again = held(np.random.default_rng(0).permutation(600))
    assert torch.equal(x, again[0]) and torch.equal(label, again[1])


def test_latents_are_trained_on_as_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = [
        {
            "id": list("abcd"),
            "latent": rng.normal(0, 0.5, (4, 5, 8, 8)).astype(np.float32),
            "label": np.array([0, 1, 0, 1]),
        }
        for _ in range(7)
    ]
    asked: list[tuple[int, ...]] = []

    def decode(x: torch.Tensor) -> np.ndarray:
        asked.append(tuple(x.shape))
        return np.full((len(x), 24, 24, 3), 7, np.uint8)

    codec = {"fingerprint": "abc"}
    run(tmp_path, iter(source), resolution=8, channels=5, codec=codec, decode=decode)
    denoiser, meta, _ = edm.load(tmp_path)
    assert (meta["resolution"], meta["channels"], meta["codec"]) == (8, 5, codec)
    assert set(asked) == {(2 * 8, 5, 8, 8)}  # samples of two classes
    assert tables.decode_png((tmp_path / "samples.png").read_bytes()).shape == (2 * 24, 8 * 24, 3)
    assert denoiser(
        torch.zeros(1, 5, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long)
    ).shape == (1, 5, 8, 8)
    config = CONFIG.model_copy(update={"flips": False})
    run(
        tmp_path / "still",
        iter(source),
        config,
        resolution=8,
        channels=5,
        codec=codec,
        decode=decode,
    )
    a, b = (weights.read_model(tmp_path / name)[0] for name in ("", "still"))
    assert all(torch.equal(a[k], b[k]) for k in a)  # latents are not turned


@pytest.mark.slow
def test_compiled_training_keeps_names_and_numbers(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update=TOKENS | {"depth": 1, "steps": 3, "amp": False})
    run(tmp_path / "eager", batches(0), config)
    run(tmp_path / "compiled", batches(0), config.model_copy(update={"compile": True}))
    a, b = (weights.read_model(tmp_path / name)[0] for name in ("eager", "compiled"))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    a, b = (weights.load_checkpoint(tmp_path / name) for name in ("eager", "compiled"))
    assert a is not None and b is not None and a["model"].keys() == b["model"].keys()


def test_what_is_written_and_reported(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    result = run(tmp_path, batches(0), said=said)
    assert (
        said[-1]["done"] == said[-1]["total"] == 7
        and said[-1]["unit"] == "step"
        and said[-1]["loss"] > 0
    )
    denoiser, meta, fingerprint = edm.load(tmp_path)
    assert (
        result["fingerprint"] == fingerprint
        and result["init"] == meta["init"] == "scratch"
        and result["steps"] == 7
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 7 and rows[-1]["loss"] == result["loss"]
    assert result["parameters"] == sum(p.numel() for p in denoiser.parameters())


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    a, b = (run(tmp_path / str(seed), batches(0), seed=seed) for seed in (0, 1))
    assert a["fingerprint"] != b["fingerprint"]


def test_training_lowers_the_loss_towards_the_data(tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={"steps": 150, "lr": 5e-3, "checkpoint_steps": 1000, "ema": 0.9}
    )
    run(tmp_path, batches(0, 150), config)
    rows = [
        json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1] < 0.8 * rows[0], rows
    denoiser, _, _ = edm.load(tmp_path)
    bright = denoiser(
        torch.randn(8, 3, 16, 16) * 40, torch.full((8,), 40.0), torch.ones(8, dtype=torch.long)
    ).mean()
    dark = denoiser(
        torch.randn(8, 3, 16, 16) * 40, torch.full((8,), 40.0), torch.zeros(8, dtype=torch.long)
    ).mean()
    assert float(bright - dark) > 0.5  # the classes differ by 150 / 127.5 = 1.18


def test_starting_from_a_folder(tmp_path: Path) -> None:
    first = run(tmp_path / "first", batches(0))
    config = CONFIG.model_copy(update={"weights": str(tmp_path / "first"), "steps": 0})
    copied = run(tmp_path / "copy", batches(0), config)
    assert (
        copied["init"] == str(tmp_path / "first")
        and first["init"] == "scratch"
        and copied["steps"] == 0
    )
    a, _, _ = weights.read_model(tmp_path / "first")
    b, meta, _ = weights.read_model(tmp_path / "copy")
    assert all(torch.equal(a[k], b[k]) for k in a) and meta["init"] == str(tmp_path / "first")
    with pytest.raises(UserError, match="denoiser.patch"):
        run(tmp_path / "no", batches(0), config.model_copy(update={"patch": 1}))


@pytest.mark.parametrize("loss", ["edm", "uncertainty"])
def test_a_loss_that_is_not_finite_stops_naming_step_and_images(tmp_path: Path, loss: str) -> None:
    with pytest.raises(UserError, match=r"at step [2-7]: .*images: img[1-6]-\d, img") as caught:
        run(
            tmp_path,
            batches(0),
            CONFIG.model_copy(update={"lr": 1e30, "warmup": 0.0, "loss": loss}),
        )
    assert "\n" not in str(caught.value) and not (tmp_path / weights.MODEL).exists()


def test_the_images_whose_loss_is_not_finite_are_named(tmp_path: Path) -> None:
    def poisoned() -> Iterator[dict[str, Any]]:
        for step, batch in enumerate(batches(0)):
            latent = edm.to_tensor(batch["image"]).numpy()
            if step == 2:
                latent[1, 0, 3, 3] = np.nan
            yield {"id": batch["id"], "latent": latent, "label": batch["label"]}

    with pytest.raises(
        UserError, match=r"at step 3: loss nan, .*; lower denoiser.lr .* images: img2-1$"
    ):
        run(tmp_path, poisoned(), CONFIG.model_copy(update={"checkpoint_steps": 10}))
    assert not (tmp_path / weights.CHECKPOINT).exists()


def test_a_weight_that_is_not_finite_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = average.update

    def update(means: list[torch.Tensor], trained: list[torch.Tensor], beta: float) -> None:
        real(means, trained, beta)
        if beta == average.decay(CONFIG, 4, True):
            means[3][0] = float("inf")

    monkeypatch.setattr(average, "update", update)
    with pytest.raises(
        UserError, match=r"step 4: a weight that is not finite; .* img3-0, img3-1, img3-2, img3-3$"
    ):
        run(tmp_path, batches(0))
    assert resume_step(tmp_path) == 2 and not (tmp_path / weights.MODEL).exists()


@pytest.mark.parametrize(
    ("update", "more"),
    [
        ({"lr": 1e-3}, {}),
        ({"loss": "min_snr"}, {}),
        ({"channels": [16, 32]}, {}),
        ({}, {"seed": 4}),
        ({}, {"classes": ["a", "c"]}),
        ({}, {"codec": {"fingerprint": "abc"}}),
    ],
    ids=str,
)
def test_a_checkpoint_of_other_settings_is_refused(
    tmp_path: Path, update: dict[str, Any], more: dict[str, Any]
) -> None:
    with pytest.raises(Killed):
        run(tmp_path, dying(batches(0), 3))
    with pytest.raises(
        UserError, match=f"^{tmp_path} holds an unfinished training with other settings; delete"
    ) as caught:
        run(tmp_path, batches(2), CONFIG.model_copy(update=update), **more)
    assert "\n" not in str(caught.value) and resume_step(tmp_path) == 2


def test_a_training_goes_on_where_only_saving_and_showing_differ(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, dying(batches(0), 3))
    result = run(
        tmp_path, batches(2), CONFIG.model_copy(update={"checkpoint_steps": 5, "sample_steps": 4})
    )
    assert result["steps"] == 7 and (tmp_path / "samples-000004.png").exists()


@pytest.mark.parametrize(("amp", "null_probability"), [(True, 0.15), (False, 0.15), (True, 0.0)])
def test_a_grid_is_sampled_as_the_denoiser_was_trained(amp: bool, null_probability: float) -> None:
    asked, precise = set(), set()

    def denoiser(x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        asked.update(label.tolist())
        precise.add(torch.is_autocast_enabled("cpu"))
        return torch.zeros_like(x)

    meta = edm.describe(
        CONFIG.model_copy(update={"amp": amp, "null_probability": null_probability}), CLASSES, 16
    )
    assert sample_grid(denoiser, meta, 0, columns=2).shape == (2 * 16, 2 * 16, 3)
    assert precise == {amp} and asked == (
        {0, 1, 2} if null_probability else {0, 1}
    )  # 2 is the null class
