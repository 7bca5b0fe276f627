"""Which folders a run has, by its configuration: arm by arm, round by round. No torch, no ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adversa.config import AUTO, Config
from adversa.run import control
from adversa.run.folder import RunDir
from adversa.storage.path import StoragePath
from adversa.types import BEFORE, digest


def last_round(config: Config) -> int:
    """0 where there is none: a run of the arm `real` alone."""
    return config.rounds if config.mix.mines else 0


def home(config: Config, arm: str, number: int) -> int:
    """The round whose folder holds an arm's classifiers as they stand in round `number`: `real`
    changes only by folded images.
    """
    return 0 if arm == "real" and config.mix.fold_mined == "none" else number


def has_codec(config: Config) -> bool:
    """Whether the run diffuses latents."""
    return config.mix.generates and config.codec.kind != "pixels"


@dataclass(frozen=True)
class QualityFolders:
    """Of one evaluation of the denoiser, below `quality/` of the run: other settings have other
    folders, and need no other run.
    """

    requests: StoragePath
    samples: StoragePath
    features: StoragePath
    result: StoragePath


def quality_folders(config: Config, run: RunDir) -> QualityFolders:
    q, root = config.quality, run.root / "quality"
    drawn = digest(q.images, q.guidance, size=4)
    space = digest(drawn, q.features, q.weights, size=4)
    result = digest(space, q.neighbours, q.subsets, q.subset_size, size=4)
    names = (f"requests-{drawn}", f"samples-{drawn}", f"features-{space}", f"result-{result}")
    return QualityFolders(*(root / name for name in names))


def needs_classifier(config: Config) -> bool:
    """Whether the denoiser is judged by features of the run's own classifier."""
    return config.quality.features is None and config.classifier.weights is None


def trained(config: Config, run: RunDir, number: int) -> list[StoragePath]:
    """Classifier folders of a round, arm by arm, seed by seed. Round 0 is the arm `real`."""
    arms = retrained(config) if number else ["real"]
    return [
        run.arm(number, arm, seed) / "classifier"
        for arm in arms
        for seed in range(config.evaluate.seeds)
    ]


def verifiers(config: Config, run: RunDir) -> list[StoragePath]:
    """What each verifier is trained on, and the verifiers."""
    folds = range(config.curate.folds)
    return [*(run.judge / f"mix-{k}" for k in folds), *(run.judge / f"fold-{k}" for k in folds)]


def models_of(config: Config, run: RunDir, number: int) -> list[tuple[str, int, int, StoragePath]]:
    """(arm, seed, round, folder) of every arm's classifiers as they stand in a round, and of those
    `before` the first.
    """
    places: list[tuple[str, int, str]] = [
        (arm, home(config, arm, number), arm) for arm in config.mix.arms
    ]
    if number and ("real", 0, "real") not in places:
        places = [(BEFORE, 0, "real"), *places]
    return [
        (name, s, at, run.arm(at, arm, s) / "classifier")
        for name, at, arm in places
        for s in range(config.evaluate.seeds)
    ]


def retrained(config: Config) -> list[str]:
    """The arms that every round trains anew."""
    return [a for a in config.mix.arms if home(config, a, 1) == 1]


def swept(config: Config, run: RunDir, numbers: Sequence[int] | None = None) -> list[int]:
    """The rounds (among `numbers`) whose ratio is chosen by a sweep: all where mix.synthetic_ratio
    is auto, but for what was set by hand.
    """
    numbers = range(1, last_round(config) + 1) if numbers is None else numbers
    own = config.mix.synthetic_ratio
    ratios = control.setting(run, "mix.synthetic_ratio", own, numbers)
    return [n for n, ratio in zip(numbers, ratios, strict=True) if ratio == AUTO]


def ratio_folders(run: RunDir, number: int) -> tuple[StoragePath, StoragePath]:
    """Of a round's sweep: the step that trains and scores the trials (each in a folder beside it),
    and the choice among them.
    """
    return run.round(number, "ratio") / "search", run.round(number, "ratio") / "choice"


def attacked_in(config: Config, run: RunDir, number: int) -> StoragePath:
    """The classifier under attack in a round: the one before it."""
    arm, trained = _attacked(config, number)
    return run.arm(trained, arm, 0) / "classifier"


def trained_in(config: Config, number: int) -> int:
    """The round in which that classifier was trained."""
    return _attacked(config, number)[1]


def _attacked(config: Config, number: int) -> tuple[str, int]:
    arm = "guided" if number > 1 and "guided" in config.mix.arms else "real"
    return arm, home(config, arm, number - 1)
