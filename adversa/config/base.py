"""What every section is built on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    model_validator,
)

from adversa.common.sanitize import is_signed

WeightPath = Annotated[str | None, AfterValidator(lambda v: os.path.expanduser(v) if v else v)]
AUTO = "auto"


def one_fault(fits: Callable[[object], bool], words: str) -> BeforeValidator:
    """Of a union: one fault in words, where pydantic would tell what each side has against a
    value.
    """

    def checked(value: object) -> object:
        if fits(value):
            return value
        raise ValueError(words)

    return BeforeValidator(checked)


def _is_amp(value: object) -> bool:
    return isinstance(value, bool) or value == AUTO


Amp = Annotated[bool | Literal["auto"], one_fault(_is_amp, "give auto, true or false")]
AMP = "bfloat16 autocast; auto: where the hardware multiplies bfloat16, float32 elsewhere"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _carries_no_credentials(cls, tree: object) -> object:
        """Settings are written into the run, its tables and its report, and sent to clusters."""
        if name := next(_signed(tree), None):
            raise ValueError(f"{name} {SIGNED}")
        return tree


SIGNED = (
    "carries credentials; take them out of the address, and put them where the tools that use it "
    "look for them (a store's: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, a role; the "
    "hub's: HF_TOKEN; a cluster's: RAY_AUTH_TOKEN or ~/.ray/auth_token)"
)


def _signed(value: object, name: str = "") -> Iterator[str]:
    """The dotted names of the texts in a tree that carry credentials."""
    if isinstance(value, dict):
        for key, inside in value.items():
            if is_signed(str(key)):
                yield f"a key of {name or 'the whole'}"
            else:
                yield from _signed(inside, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from _signed(inside, name)
    elif isinstance(value, str | os.PathLike) and is_signed(str(value)):
        yield name
