"""How work is spread over machines."""

from __future__ import annotations

from pydantic import (
    Field,
    model_validator,
)

from adversa.config.base import Section


class Cluster(Section):
    """How work is spread. No part of a run's recipe: it may change between attempts.

    The ids, the noise and what is asked do not depend on it. The number of threads changes the last
    bits of a training, so it is recorded in the model's manifest; keep it for a result that is the
    same to the bit.
    """

    cpus: int | None = Field(
        None, ge=1, description="of the embedded Ray; null: all of this machine"
    )
    object_store_mb: int = Field(
        512, ge=100, description="object store of the embedded Ray, megabytes"
    )
    training_threads: int | None = Field(
        None, ge=1, description="torch threads of a training worker; null: all CPUs it may use"
    )
    samplers: int | None = Field(
        None,
        ge=1,
        description="sampler actors; null: as many as the GPUs, or the CPUs, have room for",
    )
    gpus_per_sampler: float = Field(
        1.0, gt=0, description="where there are GPUs: 0.5 puts two sampler actors on each"
    )
    training_workers: int = Field(
        1, ge=1, description="workers of a training; each batch is shared among them"
    )
    training_workers_min: int | None = Field(
        None, ge=1, description="go on with as few when workers are lost; null: wait for all"
    )
    training_attempts: int = Field(
        3, ge=1, description="starts of a training whose workers die before the run fails"
    )
    sampler_threads: int = Field(1, ge=1, description="torch threads of a sampler on CPUs")
    trials: int | None = Field(
        None,
        ge=1,
        description="trials of a sweep at a time; null: as many as the GPUs, or CPUs, allow",
    )
    gpus_per_trial: float = Field(
        1.0, gt=0, le=1, description="where there are GPUs: 0.5 puts two trials on each"
    )
    pin_samplers: bool = Field(
        False,
        description="keep each sampler on cores of its own (Linux); where nothing else runs there",
    )
    attempts: int = Field(
        3,
        ge=1,
        description="times a part of generation may kill its sampler before its requests are tried "
        "by themselves",
    )

    @model_validator(mode="after")
    def _workers(self) -> Cluster:
        if self.gpus_per_sampler > 1 and not self.gpus_per_sampler.is_integer():
            raise ValueError(
                f"gpus_per_sampler {self.gpus_per_sampler:g} must be a whole number, or at most 1"
            )
        if (self.training_workers_min or 1) > self.training_workers:
            raise ValueError(
                f"training_workers_min {self.training_workers_min} is above "
                f"training_workers {self.training_workers}"
            )
        return self
