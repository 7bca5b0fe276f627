from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from adversa import config as cfg
from adversa.diffuse import edm, strategy
from adversa.diffuse.generator import ImageGenerator
from adversa.diffuse.pipeline import GeneratedImage, GenerationPipeline, Steering, generate
from adversa.diffuse.strategy import Sources, composed, generator_of, row, schedule
from adversa.types import STRATEGIES, GenerationRequest, UserError

META = {"resolution": 16, "classes": ["a", "b", "c"]}
CONFIG = cfg.Generate(batch_size=4, steps=8)
SHAPE = (3, 16, 16)


def disc() -> np.ndarray:
    y, x = np.mgrid[:16, :16] - 7.5
    return np.clip(6 - np.hypot(x, y), 0, 1).astype(np.float32)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


SOURCES = Sources(
    images={"case": picture(1), "other": picture(2)},
    inside={"case": disc(), "other": disc()},
    outside={"case": 1 - disc(), "other": 1 - disc()},
)


def request(i: int, strategy: str = "sample", **change: object) -> GenerationRequest:
    start = 40.0 if strategy in ("sample", "inpaint", "outpaint", "inout") else 2.0
    r = GenerationRequest(
        f"r{i}",
        0,
        "guided",
        strategy,
        i % 3,
        None if strategy == "sample" else "case",
        start,
        2.0,
        1000 + i,
        "other",
    )
    return replace(r, **change)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def denoiser() -> edm.EDMDenoiser:
    torch.manual_seed(0)
    model = (
        edm.build(
            cfg.Denoiser(architecture="unet", channels=[16, 16], patch=2, attention=True), 3, 16
        )
        .eval()
        .requires_grad_(False)
    )
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return model


def images(found: list[GeneratedImage]) -> dict[str, np.ndarray]:
    return {p.request.request_id: p.image for p in found}


@pytest.mark.parametrize("amp", [True, False])
def test_same_image_alone_in_a_batch_and_in_another_order(
    denoiser: edm.EDMDenoiser, amp: bool
) -> None:
    config = CONFIG.model_copy(update={"amp": amp})
    asked = [request(i, s) for i, s in enumerate(STRATEGIES)]
    whole = images(generate(denoiser, asked, SOURCES, config, META))
    backwards = images(generate(denoiser, asked[::-1], SOURCES, config, META))
    assert len({p.tobytes() for p in whole.values()}) == 6
    for r in asked:
        alone = images(generate(denoiser, [r], SOURCES, config, META))[r.request_id]
        assert np.array_equal(alone, whole[r.request_id]) and np.array_equal(
            alone, backwards[r.request_id]
        )


@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_steered_images_do_not_hang_on_their_neighbours(
    denoiser: edm.EDMDenoiser, kind: str
) -> None:
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(196, 3)
    )
    from adversa.diffuse.guidance import classifier_gradient

    def pixels(z: Tensor) -> Tensor:
        return (z + 1) / 2

    steering = Steering(
        classifier_gradient(net, pixels, "margin"), net if kind == "features" else None, pixels
    )
    config = CONFIG.model_copy(
        update={"reference_guidance_space": kind, "classifier_guidance_every": 2}
    )
    asked = [
        request(i, "img2img", classifier_guidance=0.5 * (i % 2), reference_guidance=0.3 * (i % 3))
        for i in range(5)
    ]
    whole = images(generate(denoiser, asked, SOURCES, config, META, steering=steering))
    for r in asked:
        alone = images(generate(denoiser, [r], SOURCES, config, META, steering=steering))[
            r.request_id
        ]
        assert np.array_equal(alone, whole[r.request_id])
    unsteered = images(
        generate(
            denoiser,
            [replace(r, classifier_guidance=0.0, reference_guidance=0.0) for r in asked],
            SOURCES,
            config,
            META,
        )
    )
    assert np.array_equal(unsteered["r0"], whole["r0"])  # strength 0 is unguided, to the bit
    assert all(not np.array_equal(unsteered[f"r{i}"], whole[f"r{i}"]) for i in range(1, 5))


@pytest.mark.slow
def test_a_compiled_denoiser_generates_the_same_in_any_order() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as e:
        pytest.skip(f"torch.compile needs a C++ compiler ({e})")
    torch.manual_seed(0)
    denoiser = (
        edm.build(cfg.Denoiser(width=32, depth=1, patch=4), 3, 16).eval().requires_grad_(False)
    )
    for p in denoiser.parameters():
        p.add_(0.05 * torch.randn_like(p))
    loaded = ImageGenerator(denoiser, None, META, "f", torch.device("cpu"))
    asked = [request(i, strategy=STRATEGIES[i % 3]) for i in range(7)]
    slow, fast = (CONFIG.model_copy(update={"compile": c, "amp": False}) for c in (False, True))
    eager, compiled, turned = (
        images(loaded.generate(r, SOURCES, c))
        for r, c in ((asked, slow), (asked, fast), (asked[::-1], fast))
    )
    assert (
        loaded.compiled(CONFIG.batch_size, False)
        is loaded.compiled(CONFIG.batch_size, False)
        is not denoiser
    )
    for name, image in compiled.items():
        assert np.array_equal(image, turned[name])
        assert np.abs(image.astype(int) - eager[name]).max() <= 1


def test_where_nothing_compiles_that_is_one_line(
    denoiser: edm.EDMDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def failing(*args: object, **kwargs: object) -> object:
        def run(*_: object) -> Tensor:
            raise BackendCompilerFailed(
                None, RuntimeError("No working C++ compiler found\nand more"), None
            )  # type: ignore[arg-type]

        return run

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(
        UserError, match="generate.compile: .*set generate.compile=false, or install a C"
    ) as told:
        ImageGenerator(denoiser, None, META, "f", torch.device("cpu")).pipeline(
            CONFIG.model_copy(update={"compile": True})
        )
    assert "\n" not in str(told.value)


def test_order_and_shape_of_the_answer(denoiser: edm.EDMDenoiser) -> None:
    found = generate(denoiser, [request(2), request(0)], Sources(), CONFIG, META)
    assert [p.request.request_id for p in found] == ["r2", "r0"] and all(p.finite for p in found)
    assert all(p.image.shape == (16, 16, 3) and p.image.dtype == np.uint8 for p in found)
    assert generate(denoiser, [], Sources(), CONFIG, META) == []


def test_noise_is_a_function_of_the_seed_alone() -> None:
    def noise(r: GenerationRequest) -> Tensor:
        return row(0, r, Sources(), strategy.DiffusedSpace(SHAPE), CONFIG).start

    a = noise(request(1))
    torch.manual_seed(5)
    assert torch.equal(a, noise(request(2, seed=1001))) and not torch.equal(a, noise(request(2)))
    assert noise(request(1, seed=2**63 - 1)).isfinite().all()


def test_rows_start_where_their_strategies_say() -> None:
    places = {n: edm.to_tensor(p[None])[0] for n, p in SOURCES.images.items()}
    space = strategy.DiffusedSpace(SHAPE, places)

    def made(name: str, **change: object) -> tuple[GenerationRequest, object, Tensor]:
        r = request(1, name, **change)
        return r, row(7, r, SOURCES, space, CONFIG), torch.randn(SHAPE, generator=generator_of(r))

    _, sample, n = made("sample")
    torch.testing.assert_close(sample.start, 40 * n)
    _, img2img, n = made("img2img", sigma_start=0.5)
    torch.testing.assert_close(img2img.start, places["case"] + 0.5 * n)
    assert (
        img2img.schedule.table.sigma[0] == 0.5
        and len(img2img.schedule.table) < len(sample.schedule.table) == 8
        and img2img.source is None
    )
    _, filled, n = made("inpaint")
    torch.testing.assert_close(filled.start, places["case"] + 40 * n)
    assert torch.equal(filled.source, places["case"]) and torch.equal(
        filled.mask[0], torch.from_numpy(disc())
    )
    _, outer, _ = made("outpaint")
    assert torch.equal(outer.mask[0], torch.from_numpy(1 - disc()))
    _, mixed, n = made("interpolate")
    share = (mixed.start - 2 * n - places["case"]) / (places["other"] - places["case"])
    _, both, n = made("inout")
    then = both.then(places["other"])  # whatever the new lesion is, new skin comes around it
    assert torch.equal(then.source, places["other"]) and torch.equal(then.mask, outer.mask)
    assert ((then.start - then.source) / 40 - n).abs().mean() > 0.5  # of noise of its own
    assert 0.3 <= share.nanmedian() <= 0.7 and (share - share.nanmedian()).abs().nanmedian() < 1e-4


def test_inpainting_keeps_the_skin_and_outpainting_the_lesion_exactly(
    denoiser: edm.EDMDenoiser,
) -> None:
    asked = [request(0, "inpaint"), request(1, "outpaint"), request(2, "inout")]
    new, skin, both = (p.image for p in generate(denoiser, asked, SOURCES, CONFIG, META))
    case, inside = SOURCES.images["case"], disc()
    assert np.array_equal(new[inside == 0], case[inside == 0]) and not np.array_equal(
        new[inside == 1], case[inside == 1]
    )
    assert np.array_equal(skin[inside == 1], case[inside == 1]) and not np.array_equal(
        skin[inside == 0], case[inside == 0]
    )
    differs = (both != case).any(2)
    assert differs[inside == 0].mean() > 0.9 and differs[inside == 1].mean() > 0.9


def test_the_seam_is_blended() -> None:
    case, r = SOURCES.images["case"], request(0, "inpaint")
    generated = np.full((16, 16, 3), 200, np.uint8)
    seam = composed(generated, r, SOURCES)
    mask = disc()[..., None]
    np.testing.assert_allclose(seam, case + mask * (200.0 - case), atol=0.51)
    assert ((disc() > 0) & (disc() < 1)).sum() > 20  # there is a seam
    assert composed(generated, request(0, "img2img"), SOURCES) is generated


def test_a_little_noise_and_a_perfect_denoiser_give_the_case_back() -> None:
    perfect = edm.to_tensor(SOURCES.images["case"][None])
    (found,) = generate(
        lambda x, s, y: perfect.expand_as(x), [request(1, "img2img")], SOURCES, CONFIG, META
    )
    assert np.array_equal(found.image, SOURCES.images["case"])


def test_a_row_that_is_not_finite_is_marked_and_spoils_no_other(denoiser: edm.EDMDenoiser) -> None:
    def broken(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        x0 = denoiser(x, sigma, label)
        x0[label == 1] = float("nan")
        return x0

    asked = [request(i, guidance=1.0) for i in range(3)]
    found = generate(broken, asked, Sources(), CONFIG, META)
    assert [p.finite for p in found] == [True, False, True] and not found[1].image.any()
    good = generate(denoiser, asked, Sources(), CONFIG, META)
    assert np.array_equal(found[0].image, good[0].image) and np.array_equal(
        found[2].image, good[2].image
    )


def test_courses_ask_for_guidance_in_its_interval_alone() -> None:
    config = cfg.Generate(
        steps=16,
        guidance_low=0.3,
        guidance_high=5.0,
        classifier_guidance_low=0.3,
        classifier_guidance_high=2.0,
        classifier_guidance_every=3,
    )
    c = schedule(request(0, guidance=3.0), 40.0, config)
    inside = (c.table.sigma > 0.3) & (c.table.sigma <= 5)
    assert inside.any() and not inside.all()
    assert np.array_equal(c.scale, np.where(inside, 3.0, 1.0)) and np.array_equal(c.second, inside)
    c = schedule(request(0, guidance=1.0), 40.0, config)
    assert c.evaluations == 16
    c = schedule(request(0, guidance=1.0, classifier_guidance=0.7), 40.0, config)
    due = np.flatnonzero(c.classifier_guidance)
    steers = np.flatnonzero((c.table.sigma > 0.3) & (c.table.sigma <= 2.0))
    assert np.array_equal(due, steers[::3]) and set(c.classifier_guidance[due]) == {0.7}
    assert np.array_equal(
        np.flatnonzero(c.second), due
    )  # its size is measured in classifier-free corrections
    assert not schedule(request(0, classifier_guidance=0.0), 40.0, config).classifier_guidance.any()


def test_evaluations_are_counted(denoiser: edm.EDMDenoiser) -> None:
    asked = [request(0, guidance=1.0), request(1), request(2, "inout", guidance=1.0)]
    found = generate(denoiser, asked, SOURCES, CONFIG, META)
    assert found[0].evaluations == 8 and found[1].evaluations > 8 and found[2].evaluations == 16


def test_a_stream_answers_before_it_has_asked_for_everything(denoiser: edm.EDMDenoiser) -> None:
    asked = []

    def source():
        for i in range(100):
            asked.append(i)
            yield request(i, guidance=1.0)

    pipeline = GenerationPipeline(denoiser, META, cfg.Generate(batch_size=4, steps=2))
    stream = pipeline.stream(source(), Sources())
    next(stream)
    assert len(asked) < 40
