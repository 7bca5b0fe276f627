from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from adversa import config as cfg
from adversa.diffuse import edm
from adversa.diffuse.paint import noise, paint
from adversa.types import GenerationRequest

META = {"resolution": 16, "classes": ["a", "b", "c"]}
CONFIG = cfg.Generate(batch_size=4, steps=4)
START = {"case": np.full((16, 16, 3), 200, np.uint8)}


def request(i: int, strategy: str = "sample", **change: object) -> GenerationRequest:
    r = GenerationRequest(f"r{i}", 0, "guided", strategy, i % 3, "case" if strategy == "vary" else None, 2.0, 2.0, 1000 + i)
    return replace(r, **change)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def denoiser() -> edm.Denoiser:
    torch.manual_seed(0)
    model = (
        edm.build(cfg.Denoiser(architecture="unet", channels=[16, 16], patch=2, attention=True), 3, 16).eval().requires_grad_(False)
    )
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return model


def images(found: list[tuple[str, np.ndarray, bool]]) -> dict[str, np.ndarray]:
    return {name: picture for name, picture, _ in found}


@pytest.mark.parametrize("amp", [True, False])
def test_same_image_alone_in_a_batch_and_in_another_order(denoiser: edm.Denoiser, amp: bool) -> None:
    config = CONFIG.model_copy(update={"amp": amp})
    asked = [request(i, "vary" if i % 2 else "sample") for i in range(6)]
    whole = images(paint(denoiser, asked, START, config, META))
    backwards = images(paint(denoiser, asked[::-1], START, config, META))
    assert len({p.tobytes() for p in whole.values()}) == 6
    for r in asked:
        alone = images(paint(denoiser, [r], START, config, META))[r.request_id]
        assert np.array_equal(alone, whole[r.request_id]) and np.array_equal(alone, backwards[r.request_id])


def test_order_and_shape_of_the_answer(denoiser: edm.Denoiser) -> None:
    found = paint(denoiser, [request(2), request(0)], {}, CONFIG, META)
    assert [name for name, _, _ in found] == ["r2", "r0"] and all(ok for _, _, ok in found)
    assert all(p.shape == (16, 16, 3) and p.dtype == np.uint8 for _, p, _ in found)
    assert paint(denoiser, [], {}, CONFIG, META) == []


def test_noise_is_a_function_of_the_seed_alone() -> None:
    a = noise(request(1), (3, 16, 16))
    torch.manual_seed(5)
    assert torch.equal(a, noise(request(2, seed=1001), (3, 16, 16))) and not torch.equal(a, noise(request(2), (3, 16, 16)))
    assert noise(request(1, seed=2**63 - 1), (3, 4, 4)).isfinite().all()


def test_the_solver_starts_where_the_strategy_says() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        seen.append((x.clone(), sigma.clone()))
        return torch.zeros_like(x)

    rows = [request(0), request(1, "vary", sigma_start=0.5)]
    paint(spy, rows, START, CONFIG, META)
    x, sigma = seen[0]
    assert sigma.tolist() == [40.0, 0.5, 40.0, 40.0]
    torch.testing.assert_close(x[0], 40 * noise(rows[0], (3, 16, 16)))
    torch.testing.assert_close(x[1], edm.to_tensor(START["case"][None])[0] + 0.5 * noise(rows[1], (3, 16, 16)))


def test_a_little_noise_and_a_perfect_denoiser_give_the_case_back() -> None:
    found = paint(lambda x, s, y: edm.to_tensor(START["case"][None]).expand_as(x), [request(1, "vary")], START, CONFIG, META)
    assert np.array_equal(found[0][1], START["case"])


def test_a_row_that_is_not_finite_is_marked_and_spoils_no_other(denoiser: edm.Denoiser) -> None:
    def broken(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        x0 = denoiser(x, sigma, label)
        x0[label == 1] = float("nan")
        return x0

    asked = [request(i, guidance=1.0) for i in range(3)]
    found = paint(broken, asked, {}, CONFIG, META)
    assert [ok for _, _, ok in found] == [True, False, True] and not found[1][1].any()
    good = paint(denoiser, asked, {}, CONFIG, META)
    assert np.array_equal(found[0][1], good[0][1]) and np.array_equal(found[2][1], good[2][1])
