"""The Hugging Face hub, seen from outside its client: quiet while it is asked, and whether a
failure means there is no network.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import warnings
from collections.abc import Iterator

UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log line or warning of huggingface_hub: it tells of each of its tries, and the caller of
    what came of them.
    """
    from huggingface_hub.utils import logging as told

    before = told.get_verbosity()
    told.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="huggingface_hub")
            yield
    finally:
        told.set_verbosity(before)


def unreachable(e: BaseException | None) -> bool:
    """Whether a connection that failed is among what led to `e`.

    The clients on the way (httpx, huggingface_hub, diffusers, timm) have errors of their own each,
    and some texts that mislead ("does not appear to have a file named config.json"); but at the
    beginning of the chain is the system's error.
    """
    while e is not None:
        if isinstance(e, (ConnectionError, TimeoutError, socket.gaierror)) or (
            isinstance(e, OSError) and e.errno in UNREACHABLE
        ):
            return True
        e = e.__cause__ or e.__context__
    return False
