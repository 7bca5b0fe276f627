"""Which images count as hard cases."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from adversa.config.base import Section


class Mine(Section):
    """Which images of the mining pool count as hard cases."""

    budget: int = Field(
        64, ge=1, description="hard cases a round, shared among classes by their error"
    )
    near_margin: float = Field(
        0.1,
        ge=0,
        le=1,
        description="right, but p[label] leads by less than this: nearly misclassified",
    )
    candidates: int = Field(
        4,
        ge=1,
        description="farthest-first picks among so many times the class's budget, hardest first",
    )
    scorer: Literal["loss", "margin", "entropy", "bald", "forgetting"] = Field(
        "loss",
        description="what hardest means; bald: over the seeds' classifiers; forgetting: right in "
        "one round, wrong in the next",
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="budget of a class: softmax of its error over this; null: in proportion to its "
        "error",
    )
    ratio_cap: float | None = Field(
        None, ge=1, description="largest over smallest class's share of the budget, at most"
    )
    modes: int = Field(8, ge=1, description="failure modes of a class, at most")
    alpha: float = Field(
        0.05, gt=0, lt=1, description="probability that any attribute is named by chance"
    )
