from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from adversa import config as cfg
from adversa.diffuse import edm
from adversa.storage import weights
from adversa.types import UserError

TINY = cfg.Denoiser(architecture="unet", channels=[16, 16], patch=2, attention=True, weights=None)
TOKENS = cfg.Denoiser(architecture="transformer", width=32, depth=2, patch=4, weights=None)
CLASSES = ["a", "b", "c"]


def test_input_and_target_have_unit_variance_at_every_noise_level() -> None:
    # For data of variance s^2: c_in (y + n) and the target (y - c_skip (y + n)) / c_out have
    # variance 1 (Karras et al. 2022, B.6).
    s = 0.37
    g = torch.Generator().manual_seed(0)
    for sigma in (0.01, 0.3, 1.0, 20.0):
        y, n = torch.randn(2, 200_000, generator=g, dtype=torch.float64) * torch.tensor(
            [[s], [sigma]]
        )
        c = edm.coefficients(torch.tensor(sigma, dtype=torch.float64), s)
        assert float((c.inp * (y + n)).var()) == pytest.approx(1, rel=0.02)
        assert float(((y - c.skip * (y + n)) / c.out).var()) == pytest.approx(1, rel=0.02)
        weighted = edm.loss_weight(torch.tensor(sigma, dtype=torch.float64), s) * c.out**2
        assert float(weighted) == pytest.approx(1)


def test_c_skip_minimises_c_out() -> None:
    # Equation 127: c_skip is chosen so that the network's errors are amplified least.
    sigma, s = 0.8, 0.5
    c = edm.coefficients(torch.tensor(sigma), s)

    def amplification(skip: float) -> float:
        return (1 - skip) ** 2 * s**2 + skip**2 * sigma**2

    assert amplification(float(c.skip)) == pytest.approx(float(c.out) ** 2, rel=1e-5)
    assert all(
        amplification(float(c.skip) + d) > amplification(float(c.skip)) for d in (-0.05, 0.05)
    )


@pytest.mark.parametrize(("config", "channels"), [(TINY, 3), (TOKENS, 3), (TINY, 4), (TOKENS, 4)])
def test_fresh_denoiser_is_the_linear_one_and_answers_each_row_for_itself(
    config: cfg.Denoiser, channels: int
) -> None:
    torch.manual_seed(0)
    denoiser = edm.build(config, 3, 16, channels).eval()
    x, sigma, label = (
        torch.randn(4, channels, 16, 16),
        torch.tensor([0.1, 1.0, 5.0, 40.0]),
        torch.tensor([0, 1, 2, 3]),
    )
    with torch.no_grad():
        fresh = denoiser(x, sigma, label)
        torch.testing.assert_close(fresh, edm.coefficients(sigma, 0.5).skip.view(-1, 1, 1, 1) * x)
        for p in denoiser.parameters():
            p.add_(0.05 * torch.randn_like(p))
        out = denoiser(x, sigma, label)
        other = x.clone()
        other[1:] = 0
        assert torch.equal(denoiser(other, sigma, label)[0], out[0])
        changed = denoiser(x, sigma, torch.tensor([1, 1, 2, 3]))
    assert (
        out.dtype == torch.float32
        and not torch.equal(changed[0], out[0])
        and torch.equal(changed[1:], out[1:])
    )


def test_patch_is_undone_exactly() -> None:
    class Echo(torch.nn.Module):
        def forward(
            self, h: torch.Tensor, t: torch.Tensor, label: torch.Tensor, return_dict: bool
        ) -> tuple[torch.Tensor]:
            assert h.shape[1:] == (12, 4, 4)
            return (h,)

    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    c = edm.coefficients(sigma, 0.5)
    expected = (c.skip + c.out * c.inp).view(-1, 1, 1, 1) * x
    torch.testing.assert_close(
        edm.EDMDenoiser(Echo(), 0.5, 3, 2)(x, sigma, torch.tensor([0, 3])), expected
    )


def test_images_survive_the_round_trip() -> None:
    images = np.arange(2 * 16 * 8 * 3, dtype=np.uint64).reshape(2, 16, 8, 3).astype(np.uint8)
    x = edm.to_tensor(images)
    assert x.shape == (2, 3, 16, 8) and float(x.min()) >= -1 and float(x.max()) <= 1
    assert np.array_equal(edm.to_images(x), images)
    assert edm.to_images(torch.full((1, 3, 2, 2), 7.0)).max() == 255


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"channels": [12, 16]}, "multiples of 8"),
        ({"patch": 3}, "multiple of 6"),
        ({"architecture": "transformer", "patch": 3}, "multiple of 3"),
    ],
)
def test_an_impossible_architecture_is_refused(change: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        edm.build(TINY.model_copy(update=change), 3, 16)


@pytest.mark.parametrize(("config", "channels"), [(TINY, 3), (TOKENS, 4)])
def test_load_gives_back_what_was_saved(
    tmp_path: Path, config: cfg.Denoiser, channels: int
) -> None:
    torch.manual_seed(1)
    denoiser = edm.build(config, 3, 16, channels)
    fingerprint = weights.save_model(
        tmp_path, denoiser.state_dict(), edm.describe(config, CLASSES, 16, channels, init="scratch")
    )
    before = torch.get_rng_state()
    loaded, meta, same = edm.load(tmp_path)
    assert torch.equal(before, torch.get_rng_state()) and meta["channels"] == channels
    assert (
        same == fingerprint
        and meta["classes"] == CLASSES
        and meta["init"] == "scratch"
        and not loaded.training
    )
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in denoiser.state_dict().items())
    weights.save_model(tmp_path, {}, {"kind": "classifier"})
    with pytest.raises(UserError, match="not a denoiser"):
        edm.load(tmp_path)


def test_weights_that_do_not_fit_the_run_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    denoiser = edm.build(TINY, 3, 16)
    weights.save_model(
        tmp_path,
        {k: v.half() for k, v in denoiser.state_dict().items()},
        edm.describe(TINY, CLASSES, 16),
    )
    config = TINY.model_copy(update={"weights": str(tmp_path)})
    fresh = edm.build(TINY, 3, 16)
    assert edm.start_from(fresh, config, CLASSES, 16) == str(tmp_path)
    torch.testing.assert_close(fresh.state_dict(), denoiser.state_dict(), atol=1e-3, rtol=1e-3)
    assert edm.start_from(fresh, TINY, CLASSES, 16) == "scratch"
    other = {"width": 512, "loss": "min_snr"}  # nothing that a UNet's weights hang on
    assert edm.start_from(fresh, config.model_copy(update=other), CLASSES, 16) == str(tmp_path)
    for classes, resolution, update, word in [
        (["a", "c", "b"], 16, {}, "classes"),
        (CLASSES, 32, {}, "resolution 16, this run 32"),
        (CLASSES, 16, {"channels": [16, 32]}, "denoiser.channels"),
        (CLASSES, 16, {"sigma_data": 0.4}, "denoiser.sigma_data"),
    ]:
        with pytest.raises(UserError, match=word):
            edm.start_from(fresh, config.model_copy(update=update), classes, resolution)
    with pytest.raises(UserError, match="channels 3, this run 4"):
        edm.start_from(fresh, config, CLASSES, 16, 4)
    with pytest.raises(UserError, match="codec pixels, this run abc"):
        edm.start_from(fresh, config, CLASSES, 16, 3, {"fingerprint": "abc"})
    with pytest.raises(UserError, match="denoiser.architecture unet, this run transformer"):
        edm.start_from(
            fresh, config.model_copy(update={"architecture": "transformer"}), CLASSES, 16
        )
    with pytest.raises(UserError, match="holds no model"):
        edm.start_from(
            fresh, config.model_copy(update={"weights": str(tmp_path / "none")}), CLASSES, 16
        )


def test_a_config_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    meta = edm.describe(TINY, CLASSES, 16)
    meta["denoiser"]["levels_of_a_later_version"] = 3
    weights.save_model(tmp_path, {}, meta)
    with pytest.raises(UserError, match="levels_of_a_later_version.*train it anew") as caught:
        edm.load(tmp_path)
    assert "\n" not in str(caught.value)
