"""Which trials a sweep consists of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from adversa.config.base import Section, one_fault


class Search(Section):
    """`adversa sweep` as an ordinary search of Ray Tune: one cell, one arm, trials drawn from a
    space.
    """

    space: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="dotted key of classifier or generate, or ratio: {choice: [..]}, {loguniform: "
        "[a, b]}, ...: ray.tune's names",
    )
    samples: int = Field(20, ge=1, description="trials")
    searcher: str = Field(
        "random", description="a searcher of Ray Tune by name; most need a package of their own"
    )
    searcher_args: dict[str, Any] = Field(
        {}, description="arguments of the searcher, as Ray Tune names them"
    )
    scheduler: str = Field(
        "fifo", description="a scheduler of Ray Tune by name: fifo, asha, median_stopping_rule, ..."
    )
    scheduler_args: dict[str, Any] = Field(
        {}, description="arguments of the scheduler, as Ray Tune names them"
    )


def _one_or_many(value: Any) -> Any:
    return (
        [value] if isinstance(value, str | int | float) and not isinstance(value, bool) else value
    )


def _is_count(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return value >= 1
    return value == "all"


Count = Annotated[
    int | Literal["all"], one_fault(_is_count, "give a whole number of at least 1, or all")
]
Ratio = Annotated[float, Field(ge=0)]


class Sweep(Section):
    """`adversa sweep`: how much synthetic data helps, by the number of real images, the ratio and
    the arm.
    """

    real: Annotated[list[Count], BeforeValidator(_one_or_many), Field(min_length=1)] = Field(
        [1, 8, 16, 32, 64, 128, "all"],
        description="real images of train a class; each smaller set is part of the larger ones",
    )
    scarce: Literal["fail", "all"] = Field(
        "fail", description="a class with fewer images than asked: stop, or take all it has"
    )
    ratios: Annotated[list[Ratio], BeforeValidator(_one_or_many), Field(min_length=1)] = Field(
        [0, 1, 2.5, 5, 10, 20, 50],
        description="synthetic images (or repeats) a real one, in each class; 0 is the arm real",
    )
    arms: Annotated[
        list[Literal["replay", "unguided", "guided"]],
        BeforeValidator(_one_or_many),
        Field(min_length=1),
    ] = Field(
        ["replay", "unguided", "guided"], description="arms that are compared with real alone"
    )
    strategies: Annotated[
        list[Literal["sample", "img2img", "inpaint", "outpaint", "inout", "interpolate"]] | None,
        BeforeValidator(_one_or_many),
    ] = Field(
        None, description="of the guided arm, each an arm of its own; null: generate.strategy"
    )
    denoiser_sees: Annotated[
        list[Literal["subset", "all"]], BeforeValidator(_one_or_many), Field(min_length=1)
    ] = Field(
        ["subset"],
        description="real images a cell's denoiser is trained on: the cell's own, all of train "
        "(Sagers et al. 2023), or both",
    )
    seeds: int = Field(
        3, ge=1, le=100, description="classifiers a point of the grid, paired by seed"
    )
    subset_seed: int = Field(0, ge=0, description="which real images a cell has")
    overdraw: float = Field(
        1.5,
        ge=1,
        le=100,
        description="images generated for each one wanted: the filter turns some down",
    )
    metric: Literal["balanced_accuracy", "accuracy", "auroc_macro", "worst_class"] = Field(
        "balanced_accuracy", description="what the dose-response curves show"
    )
    bootstrap: int = Field(
        2000, ge=200, description="resamples of seeds and lesions for bands and intervals"
    )
    max_trials: int = Field(1000, ge=1, description="a larger grid is refused")
    keep_models: bool = Field(
        False, description="keep every trial's classifier; false: its predictions alone"
    )
    search: Search | None = Field(None, description="null: the grid")

    @model_validator(mode="after")
    def _grid(self) -> Sweep:
        for name in ("real", "ratios", "arms", "strategies", "denoiser_sees"):
            values = getattr(self, name)
            if values is not None and len(set(values)) != len(values):
                raise ValueError(f"{name} {values} names a value twice")
        if self.strategies is not None and "guided" not in self.arms:
            raise ValueError(
                f"strategies {self.strategies} are of the arm guided, which is not in arms "
                f"{self.arms}; add it"
            )
        return self
