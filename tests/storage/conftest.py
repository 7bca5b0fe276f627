"""An S3 server, and a folder on it for each test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("s3", Path(__file__).parents[1] / "s3.py")
s3 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(s3)


@pytest.fixture(scope="module")
def proxy():
    """A proxy before an S3 server, and the credentials in the environment."""
    with pytest.MonkeyPatch.context() as patch, s3.server() as upstream:
        for name, value in s3.ENVIRONMENT.items():
            patch.setenv(name, value)
        found = s3.Proxy(upstream)
        yield found
        found.close()


@pytest.fixture
def store(proxy, request):
    """A folder of its own on the store; no fault stays after the test."""
    yield s3.address(proxy, request.node.name)
    proxy.fault = s3._none
