"""How a run fares, in numbers for a monitor: read from its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adversa.config import Config
from adversa.pipeline.folders import last_round
from adversa.pipeline.stages import of_loop, stages, step_folders
from adversa.run import control, step_folder
from adversa.run.folder import RunDir
from adversa.storage import files
from adversa.storage.path import StoragePath

# Name to what it says. Ray puts `ray_` before each; `run` is a label of all.
NAMES = {
    "adversa_images_per_second": "images that the step at work reads, generates or scores a "
    "second; 0 in a training",
    "adversa_accepted_share": "share of the images generated so far that the filter has kept",
    "adversa_queue_depth": "images (of a training: steps) that the step at work has not done yet",
    "adversa_stage": "number of the stage at work: "
    f"{', '.join(f'{i} {s.name}' for i, s in enumerate(of_loop(), 1))}; 0 none",
    "adversa_round": "the round at work; 0 outside of rounds",
    "adversa_paused": "1 while somebody wants the run to rest",
    "adversa_restarts": "deaths after which the work was taken up again",
    "adversa_device_seconds": "seconds of all devices that finished steps have taken",
}
NUMBERS = {s.name: i for i, s in enumerate(of_loop(), 1)}


@dataclass(frozen=True)
class Vitals:
    """Reads what changes each time, and what is finished once. No image is opened."""

    config: Config
    run: RunDir
    # finished folder: device-seconds, images kept, images judged
    known: dict[StoragePath, tuple[float, int, int]]

    def read(self) -> dict[str, float]:
        status = files.read_json(self.run.status) or {}
        works = status.get("state") in ("running", "paused")
        folders = [self.run.root / name for name in status.get("folders", [])] if works else []
        self._learn()
        kept, judged = (sum(v[i] for v in self.known.values()) for i in (1, 2))
        stage = str(status.get("stage", "")).rpartition(": ")[2]
        number = str(status.get("stage", "")).removeprefix("round ").partition(":")[0]
        progress = [
            p
            for f in folders
            if not step_folder.is_finished(f) and (p := files.read_json(f / step_folder.PROGRESS))
        ]
        images = [p for p in progress if p.get("unit") == "image"]
        return {
            "adversa_images_per_second": sum(
                float(p["images_per_second"] if "images_per_second" in p else p.get("rate", 0.0))
                for p in images
            ),
            "adversa_accepted_share": kept / judged if judged else 0.0,
            "adversa_queue_depth": sum(
                max(0.0, float(p.get("total", 0)) - float(p.get("done", 0))) for p in progress
            ),
            "adversa_stage": float(NUMBERS.get(stage, 0)) if works else 0.0,
            "adversa_round": float(number) if works and number.isdigit() else 0.0,
            "adversa_paused": float(status.get("state") == "paused"),
            "adversa_restarts": float(control.restarts(self.run)[0]),
            "adversa_device_seconds": sum(v[0] for v in self.known.values()),
        }

    def _learn(self) -> None:
        verdicts = {self.run.round(n, "verdicts") for n in range(1, last_round(self.config) + 1)}
        for folder in set(step_folders(stages(self.config, self.run))) - self.known.keys():
            manifest = files.read_json(folder / step_folder.MANIFEST)
            if manifest is not None:
                counts = (
                    (manifest.get("kept", 0), manifest.get("rows", 0))
                    if folder in verdicts
                    else (0, 0)
                )
                self.known[folder] = (float(manifest.get("device_seconds", 0.0)), *counts)


def run_metrics(config: Config, run: RunDir) -> Callable[[], dict[str, Any]]:
    """Reads the run's numbers, of NAMES."""
    return Vitals(config, run, {}).read
