"""What tests wait for is a condition, never a time: a test says the same on a machine of any speed.

Only what will never come ends a wait, after LIMIT_S: far longer than the slowest machine takes for what does come.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

LIMIT_S = 900.0


def pause() -> None:
    time.sleep(0.01)


def until(condition: Callable[[], bool], step: Callable[[], object] = pause, what: str = "") -> None:
    """Take steps until ``condition`` is true."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, f"it never came to that: {what}"
        step()


class Port:
    """A port of this machine that nothing else gets while this object lives, and on which nothing listens yet: connections are
    refused until a server that sets SO_REUSEADDR, as all do, listens there."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number = int(self._socket.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.number}"

    def __enter__(self) -> Port:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
