"""A model is a folder: `model.safetensors` beside the `config.json` that rebuilds it. Training
state is `checkpoint.pt`.

Weights are read from safetensors, or with `weights_only=True`: nothing in a run folder can execute
code. torch is imported inside the functions, so that `adversa status` never pays for it.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adversa.storage import once
from adversa.storage.files import replace_bytes
from adversa.storage.path import StoragePath, StoreError
from adversa.types import Json, UserError

if TYPE_CHECKING:
    from torch import Tensor

MODEL, CONFIG, CHECKPOINT = "model.safetensors", "config.json", "checkpoint.pt"
# the step of checkpoint.pt, for those who do not want to load torch and all weights for a number
COMMITTED = "checkpoint.json"


def save_model(folder: StoragePath, state: dict[str, Tensor], config: Json) -> str:
    """Write a state dict (name -> tensor) and its config; returns the fingerprint (sha256 of the
    weights and the config).
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    data = save({k: v.detach().cpu().contiguous() for k, v in state.items()})
    text = json.dumps(config, indent=2, sort_keys=True)
    replace_bytes(folder / CONFIG, text.encode())
    replace_bytes(folder / MODEL, data)
    return hashlib.sha256(data + text.encode()).hexdigest()[:32]


def read_model(folder: StoragePath) -> tuple[dict[str, Tensor], Json, str]:
    """(state dict, config, fingerprint) of a model folder; UserError where it is not one."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data, text = (folder / MODEL).read_bytes(), once.read_bytes(folder / CONFIG)
    except StoreError:
        raise
    except OSError as e:
        raise UserError(
            f"{folder} holds no model ({e.strerror}: {e.filename}); give a folder with "
            f"{MODEL} and {CONFIG}"
        ) from None
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} is no object")
        return load(data), config, hashlib.sha256(data + text).hexdigest()[:32]
    except (SafetensorError, ValueError, RecursionError) as e:
        raise UserError(
            f"{folder} holds a damaged model ({e}); delete the folder and run the command again"
        ) from None


def save_checkpoint(folder: StoragePath, state: dict[str, Any]) -> None:
    """Commit the training state (nested dicts and lists of tensors and numbers; key `step`: steps
    finished).
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    buffer = (
        io.BytesIO()
    )  # torch.save hides the errno of a full disk behind a RuntimeError of its own
    torch.save(state, buffer)
    replace_bytes(folder / CHECKPOINT, buffer.getbuffer())
    replace_bytes(folder / COMMITTED, json.dumps({"step": int(state["step"])}).encode())


def load_checkpoint(folder: StoragePath) -> dict[str, Any] | None:
    """The last committed training state, on the CPU, or None. UserError where the file is none that
    adversa wrote.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    import torch

    source = path if isinstance(path, Path) else io.BytesIO(path.read_bytes())
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except (
        MemoryError,
        OSError,
    ):  # of the machine, not of the file: what is there may be days of work
        raise
    except (
        Exception
    ) as e:  # whatever torch's readers raise of a torn file, or of one that would run code
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
        raise UserError(
            f"{path} is no training state ({why}); delete it: the training then begins anew"
        ) from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise UserError(
            f"{path} is no training state of adversa; delete it: the training then begins anew"
        )
    return state


def committed_step(folder: StoragePath) -> int:
    """Steps in the last committed training state, 0 without one. Killed between its two files, it
    is an earlier one's: too few steps do no harm, so that 0 stands for a number that cannot be read
    as well.
    """
    if not (folder / CHECKPOINT).exists():
        return 0
    try:
        return int(json.loads((folder / COMMITTED).read_text())["step"])
    except (FileNotFoundError, KeyError, RecursionError, TypeError, ValueError):
        return 0


def drop_checkpoint(folder: StoragePath) -> None:
    """Remove the training state of a finished model: the model's folder keeps only what rebuilds
    it.
    """
    (folder / COMMITTED).unlink(missing_ok=True)
    (folder / CHECKPOINT).unlink(missing_ok=True)
