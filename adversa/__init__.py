"""adversa: find a classifier's hard cases, generate more of them, retrain, and say honestly whether
it helped.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adversa.api import Run, UserError, generate, loop, predict

__version__ = "0.1.0"
__all__ = ["Run", "UserError", "generate", "loop", "predict"]


def __getattr__(name: str) -> object:
    """A name of the Python API, imported when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("adversa.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
