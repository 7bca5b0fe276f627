"""How generated images join the training set."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
)

from adversa.config.base import AUTO, Section
from adversa.types import GENERATED, Json


def _ratio(value: Any) -> float | str:
    """One fault in words, where pydantic would tell what each side of the union has against a
    value.
    """
    try:
        number = (
            None if isinstance(value, bool | bytes) else float(value)
        )  # YAML reads 1e-3 as text
    except (TypeError, ValueError, OverflowError):
        number = None
    if value == AUTO:
        return AUTO
    if number is None or not math.isfinite(number) or number < 0:
        raise ValueError("must be a finite number of at least 0, or auto")
    return number


def _ratios(values: list[float]) -> list[float]:
    if len(set(values)) != len(values):
        raise ValueError("names a ratio twice")
    if 0 not in values or len(values) < 2:
        raise ValueError(
            "must hold 0, which asks whether images help at all, and at least one other ratio"
        )
    return sorted(abs(v) for v in values)  # -0 is 0


Ratios = Annotated[list[Annotated[float, Field(ge=0)]], AfterValidator(_ratios)]


class Mix(Section):
    """What generated images, and how many of them, join the training set."""

    arms: list[Literal["real", "resample", "replay", "unguided", "guided"]] = Field(
        ["real", "replay", "unguided", "guided"],
        min_length=1,
        description="what classifiers are trained on, and compared",
    )
    synthetic_ratio: Annotated[float | Literal["auto"], BeforeValidator(_ratio)] = Field(
        0.5,
        description="at most so many synthetic images (or repeats) a real training image; auto: "
        "chosen on select in every round",
    )
    ratios: Ratios = Field([0.0, 0.5, 1.0, 2.5, 5.0], description="auto: the ratios that are tried")
    patience: int | None = Field(
        2,
        ge=1,
        description="auto: a class gets no more images after so many rounds in a row in which they "
        "did not help it; null: never "
        "stops",
    )
    fold_mined: Literal["all", "none"] = Field(
        "all", description="the mined real images enter training in every arm, or in none"
    )

    @property
    def generates(self) -> bool:
        """Whether any arm has synthetic images."""
        return any(arm in GENERATED for arm in self.arms)

    @property
    def mines(self) -> bool:
        """Whether there is a round: more than the classifiers of the arm `real`."""
        return any(arm != "real" for arm in self.arms)

    @property
    def sweeps(self) -> bool:
        """Whether every round chooses its ratio by a sweep."""
        return self.synthetic_ratio == AUTO

    def recipe(self) -> Json:
        """For a run's recipe: without what only auto reads where the ratio is a number, as before
        there was auto.
        """
        unread = set() if self.sweeps else {"ratios", "patience"}
        return self.model_dump(mode="json", exclude=unread)
