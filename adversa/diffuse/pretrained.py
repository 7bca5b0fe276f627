"""Models of diffusers by local folder or hub id: read from safetensors alone, complete or not at
all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adversa.storage import hub
from adversa.types import UserError

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

INDEX = "diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # what diffusers calls a model's weights


def load(where: str, key: str, allowed: Sequence[str], local: bool) -> ModelMixin:
    """The model of a diffusers folder (local) or a hub id, in float32 and eval mode. key: of the
    configuration, for messages.

    UserError where there is none, its class is not one of `allowed`, or its weights are not all
    there.
    """
    import diffusers
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is raised below
    try:
        with hub.quiet():
            name = _class_name(where, local)
            if (
                local and (Path(where) / INDEX).exists()
            ):  # its parts could be of any format, lie anywhere, and are in no fingerprint
                raise UserError(
                    f"{key} {where} is in several parts ({INDEX}); save it again as one {WEIGHTS}"
                )
            if name not in allowed:
                raise UserError(
                    f"{key} {where} is of class {name}; it must be {' or '.join(allowed)}"
                )
            model, info = getattr(diffusers, name).from_pretrained(
                where,
                use_safetensors=True,
                output_loading_info=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                local_files_only=local,
            )
    except UserError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        if local:
            raise UserError(
                f"{key} {where} cannot be read ({reason}); give a diffusers folder with {WEIGHTS}"
            ) from None
        off = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
        why = f"it cannot be had from the hub{' (HF_HUB_OFFLINE is set)' if off else ''}: {reason}"
        if not off and hub.unreachable(e):
            why = "the hub cannot be reached from here, nor has it been downloaded before"
        raise UserError(
            f"{key} {where}: no such folder, and {why}; give a local diffusers folder"
        ) from None
    finally:
        logging.set_verbosity(before)
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise UserError(
            f"{key} {where}: its weights lack or misfit {len(wrong)} tensors of its "
            f"config.json, {wrong[0]} first"
        )
    found: ModelMixin = model.eval().requires_grad_(False)
    return found


def _class_name(where: str, local: bool) -> str:
    """The class that a model's config.json names; any model's class can read it."""
    from diffusers import AutoencoderKL

    config = AutoencoderKL.load_config(where, local_files_only=local)
    if not isinstance(config, dict):
        raise ValueError(f"its config.json holds a {type(config).__name__}, not an object")
    if config.get("quantization_config") is not None:
        raise ValueError("it is quantized: other formats than safetensors, read by other libraries")
    return str(config.get("_class_name"))


def hashed(paths: Sequence[Path]) -> str:
    """One hash over the contents of files, in order."""
    whole = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            whole.update(hashlib.file_digest(f, "sha256").digest())
    return whole.hexdigest()[:32]
