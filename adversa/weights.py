"""A model is a folder: `model.safetensors` beside the `config.json` that rebuilds it. Training state is `checkpoint.pt`.

Weights are read from safetensors, or with `weights_only=True`: nothing in a run folder can execute code.
torch is imported inside the functions, so that `adversa status` never pays for it.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from adversa.places import Place, StoreError
from adversa.tables import replace_bytes
from adversa.types import UserError

MODEL, CONFIG, CHECKPOINT = "model.safetensors", "config.json", "checkpoint.pt"
COMMITTED = "checkpoint.json"  # the step of checkpoint.pt, for those who do not want to load torch and all weights for a number


def save_model(folder: Place, state: dict[str, Any], config: dict[str, Any]) -> str:
    """Write a state dict (name -> tensor) and its config; returns the fingerprint (sha256 of the weights and the config)."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    data = save({k: v.detach().cpu().contiguous() for k, v in state.items()})
    text = json.dumps(config, indent=2, sort_keys=True)
    replace_bytes(folder / CONFIG, text.encode())
    replace_bytes(folder / MODEL, data)
    return hashlib.sha256(data + text.encode()).hexdigest()[:32]


def read_model(folder: Place) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(state dict, config, fingerprint) of a model folder; UserError where it is not one."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data, text = (folder / MODEL).read_bytes(), (folder / CONFIG).read_bytes()
    except StoreError:
        raise
    except OSError as e:
        raise UserError(f"{folder} holds no model ({e.strerror}: {e.filename}); give a folder with {MODEL} and {CONFIG}") from None
    try:
        return load(data), json.loads(text), hashlib.sha256(data + text).hexdigest()[:32]
    except (SafetensorError, json.JSONDecodeError) as e:
        raise UserError(f"{folder} holds a damaged model ({e}); delete the folder and run the command again") from None


def save_checkpoint(folder: Place, state: dict[str, Any]) -> None:
    """Commit the training state (nested dicts and lists of tensors and numbers; key `step`: steps finished)."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch.save hides the errno of a full disk behind a RuntimeError of its own
    torch.save(state, buffer)
    replace_bytes(folder / CHECKPOINT, buffer.getbuffer())
    replace_bytes(folder / COMMITTED, json.dumps({"step": int(state["step"])}).encode())


def load_checkpoint(folder: Place) -> dict[str, Any] | None:
    """The last committed training state, on the CPU, or None."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    import torch

    source = path if isinstance(path, Path) else io.BytesIO(path.read_bytes())
    return torch.load(source, map_location="cpu", weights_only=True)


def committed_step(folder: Place) -> int:
    """Steps in the last committed training state, 0 without one. Killed between its two files, it is an earlier one's."""
    try:
        return int(json.loads((folder / COMMITTED).read_text())["step"]) if (folder / CHECKPOINT).exists() else 0
    except FileNotFoundError:
        return 0


def drop_checkpoint(folder: Place) -> None:
    """Remove the training state of a finished model: the model's folder keeps only what rebuilds it."""
    (folder / COMMITTED).unlink(missing_ok=True)
    (folder / CHECKPOINT).unlink(missing_ok=True)
