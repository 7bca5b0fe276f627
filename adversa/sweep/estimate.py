"""What a sweep amounts to before it begins, and what it will take: `adversa sweep --dry-run`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from adversa.config import Config, Mix, verifier_of
from adversa.data import sources
from adversa.estimate.measure import Measured
from adversa.estimate.plan import Work, evaluations, trainings
from adversa.run import step_folder
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.sweep import grid
from adversa.sweep.grid import DataRegime
from adversa.types import ROLES


@dataclass(frozen=True)
class Workload:
    """count times something, each of `amount`."""

    what: str
    count: int
    amount: str
    work: list[Work]

    def seconds(self, measured: Measured) -> float:
        """Of one device."""
        return sum(measured.seconds[w.kind] * w.amount for w in self.work)


@dataclass(frozen=True)
class Amounts:
    trials: int
    cells: int
    images: int
    lines: list[Workload]
    notes: list[str]


def amounts(config: Config, run: RunDir) -> Amounts:
    """By the sweep's own rules, less what the folder has finished."""
    c, s, generates = config, config.sweep, grid.generates(config.sweep)
    images, notes = _images(config, run)
    cells, points = grid.cells(s), grid.points(config)
    real = {a: [min(n, a.count or n) for n in images["train"]] for a in grid.sources(s)}
    selected, held_out = sum(images["select"]), sum(images["select"]) + sum(images["test"])
    done = sum(step_folder.is_finished(grid.result_dir(run, p)) for p in points)
    trials = len(points) - done
    if s.search is not None:
        trials, done = s.search.samples, 0
        if any(k.startswith("generate.") or k == "strategies" for k in s.search.space):
            notes.append("A search that varies generate.* generates anew for each setting.")
    if done:
        notes.append(f"{done} trials are finished already, and not counted.")
    targets = [
        a for a in cells if not step_folder.is_finished(grid.cell_dir(run, a).round(1, "hard"))
    ]
    mined = {a: sum(min(n, a.count or n) for n in images["mine"]) for a in targets}
    seen = sum(sum(real[a]) + mined[a] + held_out for a in targets) if generates else 0
    judged = [a for a in targets if min(filter(None, real[a]), default=0) >= grid.VERIFIABLE]
    verifiers = c.curate.folds * len(judged) if generates else 0
    arms = [(a, v) for a in cells for v in grid.variants(c, a) if v.generates]
    pools = [p for p in arms if not step_folder.is_finished(grid.pool_dir(run, *p) / "verdicts")]
    requested = {a: sum(grid.wanted(real[a], max(s.ratios), s.overdraw)) for a in cells}
    drawn = sum(requested[a] for a, _ in pools)
    rows = sum(requested[a] * evaluations(c, v.arm) for a, v in pools)
    sees = {DataRegime(None) if v.sees == grid.ALL else a for a, v in arms}
    fits = [a for a in sees if not step_folder.is_finished(grid.cell_dir(run, a).denoiser)]
    n = 0 if c.denoiser.external else len(fits)
    views = c.codec.views if c.denoiser.flips else 1
    latents = sum(sum(real[a]) * views + selected for a in fits) if c.codec.kind != "pixels" else 0
    codecs = [Work("encode", latents, "tasks")]
    if c.codec.is_fitted:
        codecs.append(Work("codec", n * c.codec.steps, "workers"))
    hard = trainings("classifier", len(targets), c.classifier, selected)
    hard += [Work("score", seen + len(targets) * selected, "tasks")]
    hard += [Work("compare", 2 * seen, "one")] if generates else []
    verifying = trainings("verifier", verifiers, verifier_of(c), 0)
    steps = [Work("denoiser", n * c.denoiser.steps, "workers")]
    compared = [Work("compare", drawn * (1 + c.curate.twins), "tasks")]
    tried = trainings("classifier", trials, c.classifier, selected, "trials")
    lines = [
        Workload("hard cases", len(targets), f"{c.classifier.steps} steps", hard),
        Workload("verifiers", verifiers, f"{verifier_of(c).steps} steps", verifying),
        Workload("autoencoders", n if latents else 0, f"{latents} latents", codecs),
        Workload("denoisers", n, f"{c.denoiser.steps} steps", steps),
        Workload(
            "generated images", len(pools), f"{drawn} images", [Work("generate", rows, "one")]
        ),
        Workload("verdicts", len(pools), f"{drawn} images", compared),
        Workload("trials", trials, f"{c.classifier.steps} steps", tried),
    ]
    return Amounts(trials, len(cells), drawn, [x for x in lines if x.count], notes)


def _images(config: Config, run: RunDir) -> tuple[dict[str, list[int]], list[str]]:
    """(role -> images of each class, what to know of these numbers)."""
    if step_folder.is_finished(run.data):
        split = files.read_json(run.data / "split.json") or {}
        return {r: list(split["images"][r].values()) for r in ROLES}, []
    listing = sources.list_records(config.data)
    counts = Counter(r.label for r in listing.records)
    shares = {r: getattr(config.data.split, r) for r in ROLES}
    found = {r: [round(counts[k] * share) for k in listing.classes] for r, share in shares.items()}
    return found, ["Images of each role by the shares of data.split: the source is not read yet."]


def measurable(config: Config) -> Config:
    """A configuration whose kinds of work are those of the sweep."""
    arms = ["real", "unguided", "guided"] if grid.generates(config.sweep) else ["real"]
    return config.model_copy(update={"mix": Mix(arms=arms)})
