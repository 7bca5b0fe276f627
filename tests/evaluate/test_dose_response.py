"""Dose-response curves: closed forms, and on simulated sweeps how often the intervals hold the
truth and the words are right.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter

import numpy as np
import pytest
from scipy.optimize import brentq, isotonic_regression

from adversa.evaluate.dose_response import SATURATION_SHARE, Curve, Response, fit, response
from adversa.evaluate.equivalent import EquivalentImages, equivalent_images, real_curve
from adversa.evaluate.replicates import seed_draws

RATIOS = np.array([0, 1, 2.5, 5, 10, 20, 50])
COUNTS = np.array([250, 500, 1000, 2000, 4000])
SWEEPS = 200
RESAMPLES = 200
ALIKE = 0.012  # sd of the luck of a seed that moves all its scores


def saturating(gain: float, scale: float, ratios: np.ndarray = RATIOS) -> Curve:
    return Curve(0.7, gain, scale, float(ratios[0]), float(ratios[-1]), 0.0)


def line(rise: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: 0.7 + rise * np.asarray(x) / RATIOS[-1]


def trials(
    rng: np.random.Generator,
    truth: Callable,
    seeds: int,
    sd: float,
    ratios: np.ndarray = RATIOS,
    lesions: float = 0.0,
) -> np.ndarray:
    """[D, S]: truth, the seed's luck, the rest; lesions: sd of the luck of lesions at each ratio,
    on 2.5 times that at all.
    """
    shared = lesions * (2.5 * rng.normal() + rng.normal(size=len(ratios)))
    luck = ALIKE * rng.normal(size=seeds) + sd * rng.normal(size=(len(ratios), seeds))
    return (
        truth(ratios)[:, None] + shared[..., None] + luck
        if lesions
        else truth(ratios)[:, None] + luck
    )


def sweeps(
    truth: Callable, seeds: int, sd: float, ratios: np.ndarray = RATIOS, seed: int = 0
) -> list[Response]:
    rng = np.random.default_rng(seed)
    return [
        response(
            ratios,
            trials(rng, truth, seeds, sd, ratios),
            seed=i,
            resamples=RESAMPLES,
            grid=[0, 3, 30 * ratios[-1] / 50],
        )
        for i in range(SWEEPS)
    ]


def kinds(found: list[Response]) -> Counter:
    return Counter(r.kind for r in found)


def share_held(found: list[Response], saturation: float) -> float:
    """Of the sweeps that tell a saturation point, the share whose interval holds the true one; a
    refusal is no interval and is not counted.
    """
    told = [r for r in found if r.saturation_point is not None]
    return float(np.mean([r.saturation_low <= saturation <= r.saturation_high for r in told]))


# Closed forms


@pytest.mark.parametrize("gain", [0.08, -0.05])
@pytest.mark.parametrize("scale", [0.6, 1.5, 4.0, 8.0, 30.0])
@pytest.mark.parametrize("low", [0.0, 2.0])
def test_scores_without_noise_give_the_curve_back(gain: float, scale: float, low: float) -> None:
    ratios = RATIOS + low
    found = fit(ratios, saturating(gain, scale, ratios).at(ratios))
    assert found.base == pytest.approx(0.7, abs=1e-9)
    assert found.gain == pytest.approx(gain, rel=1e-6)
    assert found.scale == pytest.approx(scale, rel=1e-6)
    assert (found.low, found.high) == (low, 50 + low) and found.rmse < 1e-9


def test_the_fit_is_the_least_squares_one() -> None:
    rng = np.random.default_rng(1)
    scores = trials(rng, saturating(0.06, 4.0).at, 3, 0.01)
    weights = rng.uniform(0.5, 2, len(RATIOS))
    found = fit(RATIOS, scores, weights)

    def loss(base: float, gain: float, scale: float) -> float:
        return float(weights @ (scores.mean(1) - base - gain * (1 - np.exp(-RATIOS / scale))) ** 2)

    best = np.array([found.base, found.gain, found.scale])
    assert loss(*best) == pytest.approx(found.rmse**2 * weights.sum())
    for step in rng.normal(size=(200, 3)) * [1e-3, 1e-3, 0.1]:
        assert loss(*(best + step)) > loss(*best)
    assert found != fit(RATIOS, scores) and found == fit(RATIOS[::-1], scores[::-1], weights[::-1])


@pytest.mark.parametrize("share", [0.5, SATURATION_SHARE, 0.99])
@pytest.mark.parametrize("low", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.5, 4.0, 40.0, 4e6])
def test_the_saturation_point_is_where_root_finding_puts_it(
    scale: float, low: float, share: float
) -> None:
    curve = Curve(0.7, -0.4, scale, low, 50.0, 0.0)
    root = brentq(
        lambda x: curve.at(x) - curve.base - share * (curve.at(50.0) - curve.base),
        low,
        50.0,
        xtol=1e-12,
    )
    assert curve.saturation_point(share) == pytest.approx(root, abs=1e-4)
    assert curve.rise == pytest.approx(curve.at(50.0) - curve.at(low))
    if scale > 1e6:
        assert curve.saturation_point(share) == pytest.approx(
            low + share * (50 - low), rel=1e-4
        )  # a straight line


def test_the_order_of_ratios_and_a_row_of_single_scores_make_no_difference() -> None:
    rng = np.random.default_rng(2)
    scores, order = trials(rng, saturating(0.08, 4.0).at, 3, 0.01), rng.permutation(len(RATIOS))
    draws = scores.mean(1) + 0.01 * rng.normal(size=(200, len(RATIOS)))
    assert response(RATIOS, scores, draws) == response(
        RATIOS[order], scores[order], draws[:, order]
    )
    assert list(asdict(fit(RATIOS, scores)).values()) == pytest.approx(
        list(asdict(fit(RATIOS, scores.mean(1))).values()), rel=1e-6
    )


def test_outside_the_ratios_there_is_no_curve() -> None:
    curve = saturating(0.08, 4.0)
    assert curve.at(np.array([0.0, 50.0])).shape == (2,) and isinstance(curve.at(3), float)
    for wrong in (50.1, -0.1, float("nan"), np.array([1.0, 60.0])):
        with pytest.raises(
            ValueError,
            match=r"^ratio (50\.1|-0\.1|nan|60) lies outside the measured ratios 0 to 50; .*$",
        ):
            curve.at(wrong)
    with pytest.raises(ValueError, match="ratio 51 lies outside"):
        response(RATIOS, trials(np.random.default_rng(0), curve.at, 3, 0.01), grid=[0, 51])


# Missing trials and the luck of seeds


def test_a_missing_trial_of_a_lucky_seed_does_not_lower_its_dose() -> None:
    curve, luck = saturating(0.08, 4.0), np.array([0.1, 0.0, -0.1])
    scores = curve.at(RATIOS)[:, None] + luck
    scores[2, 0] = scores[4, 2] = np.nan
    assert fit(RATIOS, scores).scale == pytest.approx(4.0, rel=1e-6)
    assert fit(RATIOS, np.nanmean(scores, 1)).scale != pytest.approx(4.0, rel=0.1)
    assert fit(RATIOS, np.hstack([scores, np.full((7, 1), np.nan)])) == fit(
        RATIOS, scores
    )  # a seed without a trial


def test_replicates_spread_as_the_seeds_do_and_are_wider_for_few() -> None:
    rng = np.random.default_rng(3)
    scores = 0.1 * rng.normal(size=40) + 0.02 * rng.normal(size=(7, 40))
    drawn = seed_draws(scores, 4000, rng)
    assert drawn.mean(0) == pytest.approx(scores.mean(1), abs=0.002)
    assert (drawn.std(0) * np.sqrt(40)).mean() == pytest.approx(
        scores.std(1, ddof=1).mean(), rel=0.1
    )
    assert (drawn[:, 6] - drawn[:, 0]).std() == pytest.approx(
        0.02 * np.sqrt(2 / 40), rel=0.15
    )  # the seeds' luck is in both
    few = seed_draws(scores[:, :2], 4000, rng)
    plain = scores[:, :2][:, rng.integers(0, 2, (4000, 2))].mean(2).T
    width, narrow = (np.subtract(*np.percentile(d[:, 0], [97.5, 2.5])) for d in (few, plain))
    assert width > 3 * narrow
    lesions = 0.3 * rng.normal(size=(4000, 1)) + np.zeros(7)
    assert seed_draws(scores, 0, rng, lesions).std(0) == pytest.approx(
        np.full(7, np.hypot(0.3, drawn[:, 0].std())), rel=0.05
    )


def test_seeds_of_their_own_at_each_ratios_are_not_taken_for_pairs() -> None:
    rng, scores = np.random.default_rng(4), np.full((7, 21), np.nan)
    for d in range(7):
        scores[d, 3 * d : 3 * d + 3] = saturating(0.08, 4.0).at(RATIOS[d]) + 0.01 * rng.normal(
            size=3
        )
    drawn = seed_draws(scores, 4000, rng)
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 6])[0, 1]) < 0.1
    assert drawn.mean(0) == pytest.approx(np.nanmean(scores, 1), abs=1e-3)
    assert response(RATIOS, scores).kind == "saturates"


# Simulated sweeps. Counts are of 200; a share of 0.95 lies above 0.92 in 96% of such tests, and the
# seeds are fixed.


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("scale", [1.5, 4.0, 8.0])
def test_the_interval_holds_the_saturation_point_and_refusals_are_rare(
    scale: float, seeds: int
) -> None:
    truth = saturating(0.08, scale)
    found = sweeps(truth.at, seeds, 0.01)
    assert share_held(found, truth.saturation_point()) >= 0.92
    assert kinds(found)["saturates"] >= 0.97 * SWEEPS
    # counted against it: sweeps without a saturation point are not held either
    assert (
        sum(
            r.saturation_point is not None
            and r.saturation_low <= truth.saturation_point() <= r.saturation_high
            for r in found
        )
        >= 0.9 * SWEEPS
    )
    assert np.mean([r.gain_low <= truth.rise <= r.gain_high for r in found]) >= 0.9
    assert np.mean([r.measured_low <= truth.rise <= r.measured_high for r in found]) >= 0.92
    for k, x in enumerate(found[0].grid):
        assert np.mean([r.low[k] <= truth.at(x) <= r.high[k] for r in found]) >= 0.9
    assert (
        np.median(
            [r.saturation_high - r.saturation_low for r in found if r.saturation_point is not None]
        )
        < 0.4 * RATIOS[-1]
    )


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("scale", [1.5, 8.0])
def test_small_gains_and_noisy_seeds_give_wide_intervals_or_none_but_not_wrong_ones(
    scale: float, seeds: int
) -> None:
    truth = saturating(0.05, scale)
    found = sweeps(truth.at, seeds, 0.015)
    assert share_held(found, truth.saturation_point()) >= 0.91
    assert (
        kinds(found)["saturates"] >= (0.95 if scale < 2 else 0.75 if seeds < 5 else 0.95) * SWEEPS
    )
    bounded = [
        r for r in found if r.saturation_low is not None
    ]  # the unclear and the rising too, whose intervals have no upper end
    assert all(
        (r.saturation_point is None)
        == (r.saturation_high is None)
        == (r.kind in ("unclear", "rising"))
        for r in bounded
    )
    assert (
        np.mean(
            [
                r.saturation_low <= truth.saturation_point() <= (r.saturation_high or np.inf)
                for r in bounded
            ]
        )
        >= 0.92
    )


@pytest.mark.parametrize("ratios", [np.array([0, 5.0, 20]), np.array([0, 2.5, 10, 50])], ids=len)
def test_three_and_four_ratios_do(ratios: np.ndarray) -> None:
    truth = saturating(0.08, 4.0, ratios)
    found = sweeps(truth.at, 5, 0.01, ratios)
    assert (
        share_held(found, truth.saturation_point()) >= 0.92
        and kinds(found)["saturates"] >= 0.95 * SWEEPS
    )
    assert all((r.misfit is None) == (len(ratios) == 3) for r in found)


def test_the_luck_of_lesions_is_in_the_intervals_that_are_given_it() -> None:
    rng, truth, found = np.random.default_rng(5), saturating(0.08, 4.0), {True: [], False: []}
    for _ in range(SWEEPS):
        scores = trials(rng, truth.at, 5, 0.005, lesions=0.008)
        luck = 0.008 * (2.5 * rng.normal(size=(RESAMPLES, 1)) + rng.normal(size=(RESAMPLES, 7)))
        for given in found:
            draws = seed_draws(scores, RESAMPLES, rng, scores.mean(1) + luck if given else None)
            found[given].append(response(RATIOS, scores, draws, grid=3))
    assert (
        share_held(found[True], truth.saturation_point()) >= 0.92
        and kinds(found[True])["saturates"] >= 0.9 * SWEEPS
    )
    assert share_held(found[False], truth.saturation_point()) < 0.8  # so the test could have failed


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_flat_scores_have_no_knee(seeds: int) -> None:
    found = sweeps(line(0.0), seeds, 0.012)
    none = [
        r
        for r in found
        if r.reason
        in ("no saturation point: no gain shown", "no saturation point: the score falls")
    ]
    assert len(none) >= 0.95 * SWEEPS and all(
        r.saturation_point is r.saturation_low is r.saturation_high is None for r in none
    )
    assert kinds(found)["no gain"] >= 0.93 * SWEEPS and kinds(found)["saturates"] <= 0.03 * SWEEPS
    assert any(
        0.0 in (r.gain_low, r.gain_high) for r in found
    )  # intervals that the test against a flat row has drawn out to 0
    assert all((r.gain_low > 0) == (r.kind not in ("no gain", "falls")) for r in found)


@pytest.mark.parametrize(
    "truth", [saturating(-0.06, 4.0).at, line(-0.06)], ids=["soon", "steadily"]
)
def test_falling_scores_have_none_and_are_said_to_fall(truth: Callable) -> None:
    found = sweeps(truth, 3, 0.012)
    assert not any(r.saturation_point for r in found) and kinds(found)["falls"] >= 0.95 * SWEEPS
    assert all(
        r.reason == "no saturation point: the score falls" and r.gain_high < 0
        for r in found
        if r.kind == "falls"
    )


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_steady_rise_puts_the_saturation_point_beyond_the_data(seeds: int) -> None:
    found = sweeps(line(0.08), seeds, 0.01)
    assert kinds(found)["rising"] >= 0.92 * SWEEPS
    assert all(
        r.saturation_point is None and r.saturation_low >= 20 and "beyond the data" in r.reason
        for r in found
        if r.kind == "rising"
    )
    told = [
        r for r in found if r.saturation_point is not None
    ]  # wrongly, as one in 20 intervals may be
    assert len(told) <= 0.05 * SWEEPS and all(
        r.saturation_high > 40 and r.saturation_high - r.saturation_low > 3 for r in told
    )


def test_where_the_saturation_point_may_be_anywhere_it_is_said_so() -> None:
    """A gain that is shown by two ratios, of which the third says nothing."""
    rng = np.random.default_rng(6)
    draws = np.array([0.7, 0.75, 0.8]) + rng.normal(size=(400, 3)) * [0.005, 0.05, 0.005]
    found = response([0, 10, 20], [0.7, 0.75, 0.8], draws)
    assert (
        found.kind == "unclear"
        and found.gain_low > 0
        and found.saturation_point is None
        and found.saturation_low < 10
    )
    assert (
        found.reason == f"no saturation point told: it may lie anywhere from ratio "
        f"{found.saturation_low:.3g} to beyond the data"
    )


def test_a_rise_and_fall_is_no_saturating_curve() -> None:
    found = sweeps(lambda x: 0.7 + 0.08 * (1 - np.exp(-x / 2)) - 0.0012 * x, 5, 0.01)
    assert kinds(found)["misfit"] >= 0.95 * SWEEPS and all(
        "do not follow" in r.reason for r in found if r.kind == "misfit"
    )
    assert kinds(sweeps(saturating(0.08, 4.0).at, 5, 0.01, seed=1))["misfit"] <= 0.03 * SWEEPS


def test_a_response_is_json_and_the_same_for_the_same_seed() -> None:
    scores = trials(np.random.default_rng(7), saturating(0.08, 4.0).at, 3, 0.01)
    found = response(RATIOS, scores, seed=1)
    text = json.dumps(asdict(found), allow_nan=False)
    assert json.loads(text)["curve"]["scale"] == found.curve.scale
    assert found == response(RATIOS, scores, seed=1) != response(RATIOS, scores, seed=2)
    assert (
        found.saturation_point == found.curve.saturation_point()
        and found.reason == ""
        and found.gain == found.curve.rise
    )
    assert (
        f"90% of it by ratio {found.saturation_point:.3g} (95%, if the curve is exponential: "
        f"{found.saturation_low:.3g} to" in found.words
    )
    wide = response(RATIOS, scores, seed=1, level=0.99)
    assert (
        wide.saturation_low < found.saturation_low
        and wide.saturation_high > found.saturation_high
        and wide.gain_low < found.gain_low
    )


def test_two_thousand_replicates_take_well_below_a_second() -> None:
    scores = trials(np.random.default_rng(8), saturating(0.08, 4.0).at, 3, 0.01)
    start = perf_counter()
    response(RATIOS, scores, resamples=2000)
    assert perf_counter() - start < 0.8


# How many real images a synthetic one is worth


def log_line(n: np.ndarray) -> np.ndarray:
    return 0.6 + 0.05 * np.log2(np.asarray(n) / 250)


def power(n: np.ndarray) -> np.ndarray:
    return 0.9 - 0.3 * (np.asarray(n) / 250) ** -0.4


@pytest.mark.parametrize("equivalent", [250, 600, 1000, 1500, 4000])
def test_worth_is_exact_without_noise(equivalent: float) -> None:
    order = np.random.default_rng(9).permutation(5)
    found = equivalent_images(
        COUNTS[order],
        np.tile(log_line(COUNTS), (2, 1)).T[order],
        500,
        2000,
        np.full(2, log_line(equivalent)),
    )
    assert (
        found.equivalent == pytest.approx(equivalent) and found.side == "" and found.bound is None
    )
    for value in (found.per_image, found.low, found.high):
        assert value == pytest.approx(
            (equivalent - 500) / 2000
        )  # below 0 where synthetic images hurt
    assert found.above == found.below == 0 and "beyond" not in found.words


@pytest.mark.parametrize(
    "score, side, bound, words",
    [(0.9, "at least", 1.75, "beyond the data: "), (0.5, "at most", -0.125, "below the data: ")],
)
def test_worth_outside_the_real_scores_is_a_bound(
    score: float, side: str, bound: float, words: str
) -> None:
    found = equivalent_images(
        COUNTS, np.tile(log_line(COUNTS), (2, 1)).T, 500, 2000, [score, score]
    )
    assert (
        found.per_image is None
        and found.equivalent is None
        and (found.side, found.bound) == (side, bound)
    )
    assert found.words.startswith(f"{words}one synthetic image is worth {side} {bound:.3g} real")
    assert (found.low, found.high) == ((bound, None) if side == "at least" else (None, bound))
    assert (found.above, found.below) == ((1, 0) if side == "at least" else (0, 1))
    json.dumps(asdict(found), allow_nan=False)


def test_an_interval_that_leaves_the_real_scores_has_no_such_end() -> None:
    noise = 0.01 * np.random.default_rng(10).normal(size=1000)
    draws = np.tile(log_line(COUNTS), (1000, 1))
    high, low = (
        equivalent_images(COUNTS, log_line(COUNTS), 500, 2000, s, draws, s + noise)
        for s in (float(log_line(3900)), float(log_line(260)))
    )
    assert (
        high.per_image is not None
        and high.high is None
        and high.low > 0.5
        and high.above > 0.025
        and "at least" in high.words
    )
    assert (
        low.per_image is not None
        and low.low is None
        and low.high < 0
        and low.below > 0.025
        and "at most" in low.words
    )
    both = equivalent_images(COUNTS, log_line(COUNTS), 500, 2000, 0.7, draws, 0.7 + 20 * noise)
    assert both.low is both.high is None and "not bounded by these data" in both.words


def test_the_real_curve_is_the_isotonic_regression() -> None:
    means = np.random.default_rng(11).normal(size=(200, 6))
    assert real_curve(means) == pytest.approx(np.array([isotonic_regression(m).x for m in means]))
    dip = equivalent_images(
        [100, 200, 400, 800],
        [0.5, 0.7, 0.6, 0.8],
        100,
        100,
        0.7,
        np.full((50, 4), 0.5),
        np.full(50, 0.5),
    )
    assert dip.equivalent == pytest.approx(
        400 * 2**0.3333333
    )  # 0.65 at 200 and at 400, then up to 0.8


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    "truth, equivalent", [(log_line, 1414.0), (power, 1500.0), (power, 300.0), (power, 3500.0)]
)
def test_the_interval_holds_the_worth(truth: Callable, equivalent: float, seeds: int) -> None:
    """An end that is not bounded holds all on its side; away from the ends of the data there are
    both in nearly all studies.
    """
    found, rng = [], np.random.default_rng(12)
    for i in range(SWEEPS):
        scores = trials(rng, truth, seeds, 0.01, np.append(COUNTS, equivalent))
        found.append(
            equivalent_images(
                COUNTS, scores[:-1], 500, 2500, scores[-1], seed=i, resamples=RESAMPLES
            )
        )
    true = (equivalent - 500) / 2500
    assert (
        np.mean(
            [(w.low is None or w.low <= true) and (w.high is None or true <= w.high) for w in found]
        )
        >= 0.9
    )
    if 1000 < equivalent < 2000:
        assert np.mean([w.low is not None and w.high is not None for w in found]) >= 0.95
        assert (
            np.median([w.high - w.low for w in found if w.low is not None and w.high is not None])
            < 0.6
        )
    if equivalent == 300 and seeds == 5:
        assert np.mean([w.high is not None and w.high < 0 for w in found]) >= 0.9  # harm is seen


def test_pairing_narrows_the_worth() -> None:
    """The luck of lesions is in all scores alike: read as paired it cancels."""
    rng = np.random.default_rng(13)
    luck = 0.03 * rng.normal(size=(1000, 1))
    real, cell = log_line(COUNTS) + luck, 0.7 + luck[:, 0]
    paired, loose = (
        equivalent_images(COUNTS, log_line(COUNTS), 500, 2000, 0.7, real, c)
        for c in (cell, rng.permutation(cell))
    )
    assert paired.high - paired.low < 1e-6 and (loose.high is None or loose.high - loose.low > 0.5)


# Bad input

ROW = np.linspace(0.7, 0.8, 7)
PAIR = np.stack([ROW, ROW + 0.01 * np.sin(np.arange(7))], 1)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: fit([0, 1], [0.1, 0.2]), "at least 3"),
        (lambda: fit([[0, 1, 2]], ROW), "at least 3"),
        (lambda: fit([0, 1, np.inf], ROW[:3]), "ratio inf; each must be finite"),
        (lambda: fit([0, np.nan, 2], ROW[:3]), "ratio nan; each must be finite"),
        (lambda: fit([-1, 1, 2], ROW[:3]), "ratio -1; each must be finite and not negative"),
        (lambda: fit([0, 1, 1], ROW[:3]), "ratios 0, 1, 1 are not distinct"),
        (lambda: fit(RATIOS, ROW[:6]), r"scores of shape \(6,\) for 7 ratios"),
        (lambda: fit(RATIOS, PAIR.T), r"scores of shape \(2, 7\) for 7 ratios"),
        (lambda: fit([0, 1, 2], [0.1, np.inf, 0.2]), "a score is infinite"),
        (lambda: fit([0, 1, 2], [0.1, np.nan, 0.2]), "ratio 1 has no score"),
        (lambda: fit(RATIOS, ROW, ROW[:6]), "one above 0 for each of the 7 ratios"),
        (lambda: fit(RATIOS, ROW, ROW * 0), "one above 0 for each of the 7 ratios"),
        (lambda: response(RATIOS, ROW), "train a second seed"),
        (lambda: seed_draws(ROW, 9, np.random.default_rng(0)), r"give \[ratios, seeds\]"),
        (
            lambda: response(RATIOS, PAIR, np.zeros((500, 6))),
            r"draws of shape \(500, 6\); give \[replicates, 7\]",
        ),
        (
            lambda: response(RATIOS, PAIR, np.full((500, 7), np.nan)),
            "0 replicates; an interval at 0.95 needs at least 40",
        ),
        (lambda: response(RATIOS, PAIR, resamples=39), "39 replicates"),
        (lambda: response(RATIOS, PAIR, level=95), "level 95; it lies between 0 and 1"),
        (lambda: equivalent_images([100], [0.5], 100, 100, 0.5), "at least 2"),
        (lambda: equivalent_images([0, 100], [0.5, 0.6], 100, 100, 0.5), "each must be above 0"),
        (lambda: equivalent_images([50, 100], [0.5, 0.6], 100, 0, 0.5), "each must be above 0"),
        (
            lambda: equivalent_images([50, 50], [0.5, 0.6], 100, 9, 0.5),
            "real counts 50, 50 are not distinct",
        ),
        (
            lambda: equivalent_images(RATIOS + 1, PAIR, 100, 9, 0.5),
            "1 scores for 2 seeds; give the same seeds",
        ),
        (
            lambda: equivalent_images(RATIOS + 1, PAIR, 100, 9, [np.nan, np.nan]),
            "give the cell's score",
        ),
        (
            lambda: equivalent_images(RATIOS + 1, PAIR, 100, 9, [0.7, 0.7], np.zeros((50, 7))),
            "which are paired",
        ),
        (
            lambda: equivalent_images(
                RATIOS + 1, PAIR, 100, 9, 0.7, np.zeros((50, 7)), np.zeros(49)
            ),
            r"give \[B, 7\] and \[B\]",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    call: Callable[[], Curve | Response | EquivalentImages], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
