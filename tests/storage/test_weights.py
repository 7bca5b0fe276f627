"""Training states that are cut off."""

from __future__ import annotations

import pytest
import torch

from adversa.storage import weights


def test_killed_between_its_two_files_a_training_state_is_not_said_to_be_further(
    tmp_path, monkeypatch
):
    weights.save_checkpoint(tmp_path, {"step": 3, "weight": torch.zeros(2)})
    put, written = weights.replace_bytes, []

    def killed(path, data):
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        put(path, data)

    with monkeypatch.context() as cut:
        cut.setattr(weights, "replace_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            weights.save_checkpoint(tmp_path, {"step": 6, "weight": torch.ones(2)})
    saved = weights.load_checkpoint(tmp_path)
    assert written and saved is not None
    assert weights.committed_step(tmp_path) <= saved["step"]
