"""What a run consists of, as names: the commands, and the step folders each of them fills. No
torch, no ray: `status` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adversa import config as cfg
from adversa.config import AUTO, Config
from adversa.run import control
from adversa.run.folder import RunDir
from adversa.run.step_folder import is_finished
from adversa.types import BEFORE, ROLES, digest

COMMANDS = ("prepare", "codec", "train", "mine", "generate", "curate", "evaluate", "test", "report")


@dataclass(frozen=True)
class Stage:
    """`command` fills `folders` (finished when each has its manifest; files when they exist); round
    0 is before the first round.

    progress: the folder whose progress.json tells of all of them, where there are too many to look
    into each.
    """

    command: str
    round: int
    folders: tuple[Path, ...]
    progress: Path | None = None

    @property
    def is_finished(self) -> bool:
        return all(is_finished(f) if f.suffix == "" else f.exists() for f in self.folders)

    @property
    def title(self) -> str:
        return f"round {self.round}: {self.command}" if self.round else self.command


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
    return config.mix.paints and config.codec.kind != "pixels"


@dataclass(frozen=True)
class QualityFolders:
    """Of one evaluation of the denoiser, below `quality/` of the run: other settings have other
    folders, and need no other run.
    """

    requests: Path
    samples: Path
    features: Path
    result: Path


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


def trained(config: Config, run: RunDir, number: int) -> list[Path]:
    """Classifier folders of a round, arm by arm, seed by seed. Round 0 is the arm `real`."""
    arms = retrained(config) if number else ["real"]
    return [
        run.arm(number, arm, seed) / "classifier"
        for arm in arms
        for seed in range(config.evaluate.seeds)
    ]


def judges(config: Config, run: RunDir) -> list[Path]:
    """What each judge is trained on, and the judges."""
    folds = range(config.curate.folds)
    return [*(run.judge / f"mix-{k}" for k in folds), *(run.judge / f"fold-{k}" for k in folds)]


def models_of(config: Config, run: RunDir, number: int) -> list[tuple[str, int, int, Path]]:
    """(arm, seed, round, folder) of every arm's classifiers as they stand in a round, and of those
    `before` the first.
    """
    places = [(arm, home(config, arm, number), arm) for arm in config.mix.arms]
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


def swept(config: Config, run: RunDir) -> list[int]:
    """The rounds whose ratio is chosen by a sweep: all where mix.synthetic_ratio is auto, but for
    what was set by hand.
    """
    ratios = control.setting(
        run, "mix.synthetic_ratio", config.mix.synthetic_ratio, last_round(config)
    )
    return [n for n, ratio in enumerate(ratios, 1) if ratio == AUTO]


def ratio_folders(run: RunDir, number: int) -> tuple[Path, Path]:
    """Of a round's sweep: the step that trains and scores the trials (each in a folder beside it),
    and the choice among them.
    """
    return run.round(number, "ratio") / "search", run.round(number, "ratio") / "choice"


def plan(config: Config, run: RunDir, command: str | None) -> list[Stage]:
    """The stages that a command may work on, in order: `quality` has its own end, all others have
    those of the whole run.
    """
    if command != "quality":
        return stages(config, run)
    before = [s for s in stages(config, run) if s.command in ("prepare", "codec")]
    own = (run.arm(0, "real", 0) / "classifier",) if needs_classifier(config) else ()
    at = quality_folders(config, run)
    return [
        *before,
        Stage("denoiser", 0, (run.arm(0, "real") / "mix", *own, run.denoiser)),
        Stage("quality", 0, (at.requests, at.samples, at.features, at.result)),
    ]


def stages(config: Config, run: RunDir) -> list[Stage]:
    """The stages of a run, in order."""
    first = trained(config, run, 0)
    if config.mix.paints:
        first = [*first, *judges(config, run), run.denoiser]
    found = [Stage("prepare", 0, (run.data,))]
    if has_codec(config):
        latents = () if config.denoiser.external else (run.latents("train"), run.latents("select"))
        found.append(Stage("codec", 0, (run.arm(0, "real") / "mix", run.codec, *latents)))
    found.append(Stage("train", 0, (run.arm(0, "real") / "mix", *first)))
    chosen = swept(config, run)
    for n in range(1, last_round(config) + 1):
        levels = (run.round(n, "levels"),) if config.generate.adaptive else ()
        mixes = tuple(run.arm(n, a) / "mix" for a in retrained(config))
        found.append(Stage("mine", n, (run.round(n, "scores"), run.round(n, "hard"))))
        if config.mix.paints:
            found.append(
                Stage("generate", n, (*levels, run.round(n, "requests"), run.round(n, "synthetic")))
            )
            measured = (*(run.features / role for role in ROLES), run.limits)
            twins = (run.round(n, "twins"),) if config.curate.twins else ()
            found.append(
                Stage(
                    "curate",
                    n,
                    (*measured, run.round(n, "inspected"), *twins, run.round(n, "verdicts")),
                )
            )
        ratio = ratio_folders(run, n) if n in chosen else ()
        found.append(
            Stage(
                "evaluate", n, (*ratio, *mixes, *trained(config, run, n), run.round(n, "evaluate"))
            )
        )
    if not config.mix.mines:
        found.append(Stage("evaluate", 0, (run.round(0, "evaluate"),)))
    opened = (run.select, run.test) if config.evaluate.groups else (run.test,)
    return [
        *found,
        Stage("test", 0, opened),
        Stage("report", 0, (run.summary, run.root / "report.html")),
    ]


def attacked_in(config: cfg.Config, run: RunDir, number: int) -> Path:
    """The classifier under attack in a round: the one before it."""
    arm, trained = _attacked(config, number)
    return run.arm(trained, arm, 0) / "classifier"


def trained_in(config: cfg.Config, number: int) -> int:
    """The round in which that classifier was trained."""
    return _attacked(config, number)[1]


def _attacked(config: cfg.Config, number: int) -> tuple[str, int]:
    arm = "guided" if number > 1 and "guided" in config.mix.arms else "real"
    return arm, home(config, arm, number - 1)
