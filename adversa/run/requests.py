"""`adversa pause | resume | stop`: requests written into a run's folder, and whether somebody heard
them. No Ray, no torch.
"""

from __future__ import annotations

import shlex
import time

from adversa.config import Config, load
from adversa.run import control
from adversa.run.create import is_sweep
from adversa.run.differences import flatten
from adversa.run.folder import RunDir
from adversa.run.status import state_of
from adversa.types import UserError

HEARD_SECONDS = 60.0  # for a stop; a pause may wait for a training
WAIT_SECONDS = 0.2


def pause(run: RunDir) -> str:
    _working(run, "pause")
    control.request(run, control.PAUSE)
    return (
        f"{run.root} pauses after the parts in flight (a training goes on to its end); go on "
        f"with: adversa resume {_quoted(run)}"
    )


def resume(run: RunDir, overrides: list[str]) -> str:
    """overrides: KEY=VALUE of control.CHANGEABLE, for rounds that have not begun."""
    settings = _settings(run, overrides)
    said = ""
    if settings:
        first = next(
            (n for n in range(1, load(run.config).rounds + 1) if not run.round(n).exists()), None
        )
        if first is None:
            raise UserError(
                f"--set {overrides[0]}: every round of {run.root} has begun; give a new "
                "run another --run-dir"
            )
        control.request(run, None, settings)
        said = f"from round {first} on: {', '.join(f'{k} {v}' for k, v in settings.items())}; "
        if state_of(run)[0] not in ("running", "paused"):
            return f"{said}nobody works on {run.root} now, go on with: {_again(run)}"
    _working(run, "resume")
    control.request(run, control.GO)
    return f"{said}{run.root} goes on"


def stop(run: RunDir) -> str:
    _working(run, "stop")
    control.request(run, control.STOP)
    until = time.monotonic() + HEARD_SECONDS
    while state_of(run)[0] in ("running", "paused"):
        if time.monotonic() > until:
            raise UserError(
                f"{run.root} has not stopped after {HEARD_SECONDS:.0f} s; it will when it "
                f"looks: adversa status {_quoted(run)}"
            )
        time.sleep(WAIT_SECONDS)
    if state_of(run)[0] == "finished":
        return f"{run.root} has finished meanwhile"
    return f"{run.root} is stopped; everything finished is kept. Resume with: {_again(run)}"


def _settings(run: RunDir, overrides: list[str]) -> dict[str, object]:
    if overrides and is_sweep(run):
        raise UserError(
            f"--set {overrides[0]}: a sweep has no rounds to change settings for; leave it out"
        )
    names = [o.partition("=")[0] for o in overrides]
    if wrong := [n for n in names if n not in control.CHANGEABLE]:
        raise UserError(
            f"--set {wrong[0]}: only {' and '.join(control.CHANGEABLE)} may change in a "
            "run, for rounds that have not begun; "
            "give another --run-dir"
        )
    checked: Config = load(run.config, overrides)
    flat = flatten(checked.model_dump(mode="json"))
    return {n: flat[n] for n in names}


def _working(run: RunDir, what: str) -> None:
    state = state_of(run)[0]
    if state not in ("running", "paused"):
        further = "" if state == "finished" else f"; go on with: {_again(run)}"
        raise UserError(f"{run.root} is {state}: there is nothing to {what}{further}")


def _again(run: RunDir) -> str:
    command = "sweep" if is_sweep(run) else "loop"
    return shlex.join(["adversa", command, str(run.config), "--run-dir", str(run.root)])


def _quoted(run: RunDir) -> str:
    return shlex.quote(str(run.root))
