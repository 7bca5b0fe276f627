"""The grid of a sweep: which trials, what is refused before anything runs."""

from __future__ import annotations

import pytest

from adversa.config import Curate, check
from adversa.sweep import grid
from adversa.sweep.grid import DataRegime, Variant
from adversa.types import UserError


def config(**sweep):
    return check({"sweep": {"real": [4, "all"], "ratios": [0, 1, 5], "seeds": 2} | sweep}, "test")


def test_every_point_once_and_ratio_0_is_the_arm_real():
    points = grid.points(config())
    # of each of two cells: 2 seeds x (real + 2 ratios x 3 arms)
    assert len(points) == len({p.name for p in points}) == 2 * 2 * (1 + 2 * 3)
    assert {p.variant.arm for p in points if p.ratio == 0} == {"real"}
    assert {p.variant.arm for p in points if p.ratio} == {"replay", "unguided", "guided"}
    assert [c.name for c in grid.cells(config().sweep)] == [
        "all",
        "0004",
    ]  # the longest trainings first


def test_strategies_and_what_the_denoiser_sees_are_arms_of_their_own():
    both = config(strategies=["img2img", "inpaint"], denoiser_sees=["subset", "all"])
    names = [v.name for v in grid.variants(both, DataRegime(4))]
    assert names == [
        "replay",
        "unguided",
        "unguided-all",
        "guided-img2img",
        "guided-inpaint",
        "guided-img2img-all",
        "guided-inpaint-all",
    ]
    assert [v.name for v in grid.variants(both, DataRegime(None))] == [
        "replay",
        "unguided",
        "guided-img2img",
        "guided-inpaint",
    ]
    assert config().generate.strategy == "img2img" and Variant(
        "guided", "img2img", "subset"
    ) in grid.variants(config(), DataRegime(4))


def test_all_of_train_is_a_source_where_a_denoiser_is_to_see_it():
    alone = config(real=[4], denoiser_sees=["all"])
    assert [c.name for c in grid.sources(alone.sweep)] == ["all", "0004"] and [
        c.name for c in grid.cells(alone.sweep)
    ] == ["0004"]
    assert grid.sources(config(real=[4]).sweep) == [DataRegime(4)]
    assert grid.sources(config(real=[4], denoiser_sees=["all"], arms=["replay"]).sweep) == [
        DataRegime(4)
    ]


def test_counts_are_the_ratio_of_each_class():
    assert grid.wanted([10, 3, 0], 2.5) == [25, 8, 0] and grid.wanted([10, 3], 0) == [0, 0]
    assert grid.wanted([10, 3, 0], 2.5, 1.5) == [38, 12, 0]


def test_few_lesions_have_no_verifiers():
    whole = Curate()
    assert grid.filter_of(whole, [grid.VERIFIABLE, 50, 0]) is whole
    small = grid.filter_of(whole, [grid.VERIFIABLE - 1, 50])
    assert (small.folds, small.trivial_quantile, small.realism_quantile) == (0, None, None)
    assert small.near_copy_quantile == whole.near_copy_quantile and small.twins


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (
            {"ratios": [0]},
            r"sweep.ratios \[0.0\] leaves the arms replay, unguided, guided without "
            r"images; add a ratio above 0",
        ),
        ({"max_trials": 27}, r"sweep.max_trials 27: this grid has 28 trials"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(sweep, said):
    with pytest.raises(UserError, match=said):
        grid.check(config(**sweep))


def test_what_no_trial_of_a_sweep_can_be():
    grid.check(config())
    with pytest.raises(
        UserError, match="generate.adaptive true: a sweep's small cells have no verifiers"
    ):
        grid.check(check({"generate": {"adaptive": True}}, "test"))
    with pytest.raises(
        UserError,
        match="classifier.patience 3 would stop trials, which are compared, at different steps",
    ):
        grid.check(check({"classifier": {"patience": 3}, "mix": {"arms": ["real"]}}, "test"))


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"ratios": [-1, 2]}, r"sweep.ratios.0 = -1: Input should be greater than or equal to 0"),
        ({"ratios": [float("nan")]}, r"sweep.ratios.0 = nan"),
        ({"ratios": [1, float("inf")]}, r"sweep.ratios.1 = inf"),
        ({"ratios": [1, 1.0]}, r"ratios \[1.0, 1.0\] names a value twice"),
        ({"ratios": []}, r"sweep.ratios"),
        ({"real": [0]}, r"sweep.real"),
        ({"real": [2.5]}, r"sweep.real"),
        ({"real": ["some"]}, r"sweep.real"),
        ({"arms": ["real"]}, r"sweep.arms.0 = 'real'"),
        (
            {"arms": ["replay"], "strategies": ["img2img"]},
            r"strategies \['img2img'\] are of the arm guided, which is not in arms",
        ),
        ({"ratioes": [1]}, r"unknown key sweep.ratioes; did you mean sweep.ratios\?"),
    ],
)
def test_bad_values_are_one_line(sweep, said):
    with pytest.raises(UserError, match=said) as told:
        config(**sweep)
    assert "\n" not in str(told.value)


def test_one_value_may_stand_for_a_list():
    s = config(real="all", ratios=2, arms="guided", denoiser_sees="all").sweep
    assert (s.real, s.ratios, s.arms, s.denoiser_sees) == (["all"], [2.0], ["guided"], ["all"])


def test_a_class_with_too_few_images_is_named():
    c = config(real=[4, 16, 64, "all"])
    grid.check_counts(c, {"a": 64, "b": 100}, exact=True)
    with pytest.raises(
        UserError,
        match=r"sweep.real 64: train has fewer images of some classes \(b 63\); leave 64 out",
    ):
        grid.check_counts(c, {"a": 64, "b": 63}, exact=True)
    grid.check_counts(config(real=[64], scarce="all"), {"a": 3}, exact=True)
    # of a source that is not split yet, only what is clear is refused: 0.55 of it goes to train,
    # about
    grid.check_counts(c, {"a": 200, "b": 100}, exact=False)
    with pytest.raises(UserError, match=r"\(b about 27\)"):
        grid.check_counts(c, {"a": 200, "b": 50}, exact=False)
