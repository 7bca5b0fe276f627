"""`sweep.html`: what a sweep found, in one file as report.html is (page.py): nothing fetched, no
script, everything escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adversa.config import Config
from adversa.report import evidence, page, plots, words
from adversa.run.folder import RunDir
from adversa.storage.files import replace_bytes, writing
from adversa.storage.path import StoragePath
from adversa.sweep import plots as sweep_plots
from adversa.sweep import results, trials, wording

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

FEW = 24  # rows of a table that is open without being asked


def write(config: Config, run: RunDir) -> StoragePath:
    """Write sweep.json, sweep.parquet, figures/ and sweep.html into the sweep's folder, finished or
    not; the path of the page.
    """
    known = results.write(config, run)
    chosen, metric = sweep_plots.panels(known), known["what"]["metric"]
    whole = {
        "dose": sweep_plots.ratio_figure(chosen, metric),
        "learning": sweep_plots.learning_figure(known),
    }
    panels = [(p, plots.uri(sweep_plots.ratio_figure([p], metric)), caption(p)) for p in chosen]
    rows = trials.table(config, run).drop_columns(["metrics", "added_by_class"]).to_pylist()
    figures = {"panels": panels, "learning": plots.uri(whole["learning"]), "trials": rows}
    html = environment().get_template("sweep.html.j2").render(view(known) | figures)
    path = run.root / "sweep.html"
    with writing(run.root):
        _figures(run.root / "figures", whole)
        replace_bytes(path, html.encode())  # last: the report is done where it is there
    return path


def _figures(folder: StoragePath, whole: dict[str, Figure]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in whole.items():
        replace_bytes(folder / f"{name}.png", plots.png(figure))
        replace_bytes(folder / f"{name}.svg", plots.svg(figure))


def environment() -> Environment:
    found = page.environment()
    found.globals |= {"title": wording.title}
    return found


def view(known: dict[str, Any]) -> dict[str, Any]:
    """The names that the template uses, but for the figures."""
    what, compared = known["what"], evidence.comparisons(known["contrasts"])
    rows = list(zip(known["contrasts"], compared, strict=True))
    return {
        "known": known,
        "what": what,
        "metric": wording.NAMES[what["metric"]],
        "few": FEW,
        "tones": page.TONES | {"mixed": "unclear"},
        "notes": [words.sentence(note) for note in known["notes"]],
        "questions": [
            (requested, text, of, evidence.reach([c for _, c in of]), tally([c for c, _ in of]))
            for requested, text in known["questions"].items()
            if (of := [(c, row) for c, row in rows if c["question"] == requested])
        ],
        "equivalents": {
            name: of
            for name in what["variants"]
            if (of := [w for w in known["equivalent_images"] if w["variant"] == name])
        },
        "cost": known["what"]["cost"],
    }


def tally(rows: Sequence[dict[str, Any]]) -> str:
    """2 better, 0 worse, 16 not shown."""
    counts = Counter(r["word"] for r in rows)
    return ", ".join(f"{counts[w]} {w}" for w in page.TONES)


def caption(panel: sweep_plots.Panel) -> list[tuple[str, str]]:
    """(arm, what its curve says) of a panel."""
    return [
        (c["variant"], c["response"]["words"] if c["response"] else f"no curve: {c['why']}")
        for c in panel.curves
    ]
