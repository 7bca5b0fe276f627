"""What tests share: real data where it is, one Ray session, a tiny configuration of the whole loop."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def ham_zip() -> Path:
    """The complete HAM10000 at 200x150 (10,015 images, masks, metadata)."""
    path = SHARED / "data" / "ham10000_200x150.zip"
    if not path.exists():
        pytest.skip(f"no HAM10000 at {path}: it is not part of the project")
    return path


@pytest.fixture(scope="session")
def imagenet_weights() -> Path:
    path = SHARED / "weights" / "tf_efficientnet_lite0.safetensors"
    if not path.exists():
        pytest.skip(f"no ImageNet weights at {path}: they are not part of the project")
    return path
