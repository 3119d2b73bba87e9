"""vLLM's own server as a child of the test: ``vllm serve`` by its module, since the command itself fails with the CPU wheel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.waiting import LIMIT_S, Port, until

GRACE_S = 10.0
"""What a server has to end by itself; one that is slower is killed, and that is no fault."""


@contextmanager
def serving(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[Callable[[], str]]:
    """Starts a server; what it yields waits until it is up and returns its address. It is ended with all its children."""
    with Port() as port:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, "--enforce-eager"]
        command += ["--host", "127.0.0.1", "--port", str(port.number)]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=out, stderr=out, start_new_session=True
            )

        def up() -> bool:
            if process.poll() is not None:
                pytest.fail(f"the server did not start:\n{log.read_text()[-2000:]}")
            try:
                return httpx.get(f"{port.url}/health", trust_env=False, timeout=60.0).status_code == 200
            except httpx.TransportError:
                return False

        def ready() -> str:
            until(up, lambda: time.sleep(0.25), "the server is up")
            return port.url

        try:
            yield ready
        finally:
            for word in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, word)
                    process.wait(timeout=GRACE_S if word is signal.SIGTERM else LIMIT_S)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
