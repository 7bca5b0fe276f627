"""Which generated images are kept."""

from __future__ import annotations

from pydantic import (
    Field,
)

from adversa.config.base import Section
from adversa.config.classifier import Classifier


class Curate(Section):
    """Which generated images are kept."""

    min_agreement: float = Field(
        0.2,
        ge=0,
        le=1,
        description="least probability an independent verifier gives the asked label",
    )
    trivial_quantile: float | None = Field(
        0.99,
        gt=0.5,
        le=1,
        description="trivial: the verifier is surer of the asked label than it is of this share of "
        "held-out real images; null: off",
    )
    near_copy_quantile: float = Field(
        0.993,
        gt=0.5,
        le=1,
        description="closer to a real image than this share of different lesions are to each "
        "other: a near copy",
    )
    realism_quantile: float | None = Field(
        0.98,
        gt=0.5,
        le=1,
        description="farther from the manifold of real images than this share of held-out real "
        "ones: unlike them; null: off",
    )
    min_contrast: float | None = Field(
        2.0, ge=0, description="least standard deviation of brightness, grey levels; null: off"
    )
    max_clipped: float | None = Field(
        0.5, ge=0, le=1, description="largest share of values that are 0 or 255; null: off"
    )
    twins: bool = Field(
        True,
        description="of near copies among the synthetic images of an arm the first by id is kept",
    )
    quota: int | None = Field(
        None, ge=1, description="images kept of one hard case, an arm and round; null: all"
    )
    folds: int = Field(
        2,
        ge=2,
        le=10,
        description="verifiers, each trained without one fold of the lesions of train",
    )
    judge: Classifier | None = Field(
        None,
        description="the verifiers' own classifier section; null: as the classifier, from scratch, "
        "of another architecture",
    )
