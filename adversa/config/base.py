"""What every section is built on."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
)

WeightPath = Annotated[str | None, AfterValidator(lambda v: os.path.expanduser(v) if v else v)]
AUTO = "auto"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
