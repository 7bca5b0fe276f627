"""Which trackers are told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
)

Tracker = Literal["tensorboard", "mlflow", "wandb"]
Trackers = Annotated[list[Tracker], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
