"""The method on simulated studies: how often it calls nothing an effect, and how often it finds one
that is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from adversa.evaluate.bootstrap import Comparison, compare, intervals
from adversa.evaluate.inference import word

LESIONS = (320, 160, 80, 40)  # of each class
SENSITIVITY = np.array([0.85, 0.75, 0.65, 0.55])
# Parts of the standard deviation of how clearly an image is answered right: lesion, image (shared
# by all classifiers), classifier and lesion, classifier and image.
SD = {"lesion": 1.0, "image": 0.5, "own_lesion": 0.6, "own_image": 0.4}
RESAMPLES = 200


@dataclass(frozen=True)
class World:
    """seed: sd of a classifier's skill, over all classes and for each, in units of SD; shift: what
    arm a has over arm b.
    """

    seeds: int
    seed: tuple[float, float] = (0.05, 0.07)
    shift: float = 0.0

    @property
    def total(self) -> float:
        return float(np.sqrt(sum(s**2 for s in SD.values()) + sum(s**2 for s in self.seed)))

    @property
    def skill(self) -> np.ndarray:
        return norm.ppf(SENSITIVITY) * self.total

    def effect(self) -> float:
        """The difference in balanced accuracy over all lesions and all seeds."""
        return float(np.mean(norm.cdf((self.skill + self.shift) / self.total) - SENSITIVITY))

    def study(
        self, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(logits of a [S, N, K], of b, labels [N], lesions [N]), 1 to 3 images a lesion."""
        k = len(LESIONS)
        lesion_label = np.repeat(np.arange(k), LESIONS)
        lesion = np.repeat(
            np.arange(len(lesion_label)),
            rng.choice([1, 2, 3], len(lesion_label), p=[0.6, 0.25, 0.15]),
        )
        labels, n, s = lesion_label[lesion], len(lesion), self.seeds
        shared = SD["lesion"] * rng.normal(size=len(lesion_label))[lesion] + SD[
            "image"
        ] * rng.normal(size=n)
        own = SD["own_lesion"] * rng.normal(size=(2, s, len(lesion_label)))[..., lesion] + SD[
            "own_image"
        ] * rng.normal(size=(2, s, n))
        luck = self.seed[0] * rng.normal(size=(2, s, 1)) + self.seed[1] * rng.normal(size=(2, s, k))
        margin = self.skill[labels] + shared + own + luck[..., labels]
        margin[0] += self.shift
        answer = np.where(margin > 0, labels, (labels + 1 + rng.integers(0, k - 1, n)) % k)
        logits = np.eye(k)[answer]
        return logits[0], logits[1], labels, lesion


def run(world: World, studies: int, seed: int) -> list[Comparison]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(studies):
        a, b, labels, lesion = world.study(rng)
        found.append(compare(a, b, labels, lesion, RESAMPLES, i))
    return found


def share(found: list[Comparison], *words: str) -> float:
    return float(np.mean([word(c.low, c.high) in words for c in found]))


# One seed: the two classifiers are equally good on all lesions, since its interval holds nothing
# else (see below).
@pytest.mark.slow
@pytest.mark.parametrize(
    "world", [World(1, (0.0, 0.0)), World(3), World(5), World(3, (0.15, 0.15))], ids=str
)
def test_no_effect_is_called_one_in_at_most_6_percent_of_studies(world: World) -> None:
    assert share(run(world, 1000, world.seeds), "better", "worse") <= 0.06


@pytest.mark.slow
def test_one_seed_takes_the_luck_of_training_for_an_effect_and_says_so() -> None:
    found = run(World(1), 300, 0)
    assert share(found, "better", "worse") > 0.08 and all(
        "not the luck of training" in c.note for c in found
    )


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_twice_the_detectable_effect_is_found(seeds: int) -> None:
    detectable = float(np.median([c.detectable for c in run(World(seeds), 50, 7)]))
    shift = brentq(lambda x: World(seeds, shift=x).effect() - 2 * detectable, 0, 5)
    assert share(run(World(seeds, shift=shift), 200, 8), "better") >= 0.95


@pytest.mark.slow
def test_the_interval_of_several_seeds_holds_what_other_seeds_and_lesions_would_give() -> None:
    rng, held, classes = np.random.default_rng(3), 0, ["a", "b", "c", "d"]
    world = World(3)
    for i in range(100):
        logits, _, labels, lesion = world.study(rng)
        low, high = intervals(logits, labels, lesion, classes, 100, i)["balanced_accuracy"]
        held += low <= SENSITIVITY.mean() <= high
    assert held >= 91
