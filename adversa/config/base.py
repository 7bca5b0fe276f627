"""What every section is built on."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
)

WeightPath = Annotated[str | None, AfterValidator(lambda v: os.path.expanduser(v) if v else v)]
AUTO = "auto"
Amp = bool | Literal["auto"]
AMP = "bfloat16 autocast; auto: where the hardware multiplies bfloat16, float32 elsewhere"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
