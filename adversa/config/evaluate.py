"""How classifiers are compared."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    Field,
)

from adversa.config.base import Section


class Evaluate(Section):
    """How classifiers are compared."""

    seeds: int = Field(
        1, ge=1, le=100, description="classifiers an arm, paired by seed across arms"
    )
    bootstrap: int = Field(1000, ge=100, description="resamples of the lesions for intervals")
    groups: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        {},
        description="name: classes of a group, told from the rest at fixed specificities, e.g. "
        "malignant: [mel, bcc]",
    )
    specificities: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.8, 0.9, 0.95], description="of groups: thresholds are set on select"
    )
    floor: float = Field(
        0.8, ge=0, lt=1, description="of groups: partial AUC above this sensitivity (ISIC 2024)"
    )
    subgroups: list[str] = Field(
        ["age", "sex", "localization", "site", "fitzpatrick", "mode"],
        description="attributes to give figures by, where known",
    )
