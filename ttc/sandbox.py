"""The parent's end of a child process that reads text written by models, with a time limit that really holds.

Symbolic algebra on ``9^{9^{9^9}}`` does not end, and reasoning-gym's scorers ``eval`` what a model wrote. So
both run in a child (``ttc.verify_worker``) that speaks JSON lines, owns no secrets, has bounded memory, and
is killed and started anew when a call outlives its limit. The child never imports the caller's main module.
This contains accidents; it is no jail for an attacker.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from ttc.errors import InputError, VerifierError

START_LIMIT_S = 120.0
"""The longest wait for the child's imports; a cold disk is slow, a hung import must not be for ever."""

PATIENCE = 4.0
"""A call may take this many times its CPU limit by the wall clock: a busy machine must not turn right answers
into failures, and a call that sleeps must end too."""

_KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
_BOOT = "import sys; sys.path[:] = sys.argv[2:]; from ttc.verify_worker import main; main(sys.argv[1])"
"""Gives the child the parent's module path, in the parent's order and as late: before that, as with
PYTHONPATH, a file named types.py beside a user's script would stop the interpreter from starting."""


class Sandbox:
    """A child with ``library`` ("math" or "rg") loaded: started at the first call, or by ``start``, and again after a kill."""

    def __init__(self, library: str) -> None:
        self.library = library
        self._process: subprocess.Popen[bytes] | None = None
        self._greeted = False
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def call(self, op: str, limit_s: float, **arguments: Any) -> Any:
        """What ``op`` returns. VerifierError: it failed, crashed the child or used more than ``limit_s`` of CPU
        time; InputError: it refused."""
        settings = {"op": op, "cpu_s": limit_s, "wall_s": PATIENCE * limit_s}
        request = json.dumps({**settings, **arguments}).encode() + b"\n"
        with self._lock:
            reply = self._exchange(request, limit_s)
        if "error" not in reply:
            return reply["value"]
        raise (InputError if reply.get("input") else VerifierError)(reply["error"])

    def start(self) -> None:
        """Start the child, if there is none, and don't wait for its imports: the first call does."""
        with self._lock:
            self._mine()
            if self._process is None:
                self._spawn()

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is no child."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """Kill the child and reap it; a later call starts another."""
        with self._lock:
            self._kill()

    def _exchange(self, request: bytes, limit_s: float) -> Mapping[str, Any]:
        self._mine()
        if self._process is not None and self._process.poll() is not None:  # it died while idle
            self._kill()
        for attempt in (1, 2):
            process = self._process or self._spawn()
            assert process.stdin is not None
            if not self._greeted:
                self._greet()
            try:
                process.stdin.write(request)
                break
            except OSError as error:  # it dies just now: one new child is tried
                self._kill()
                if attempt == 2:
                    raise VerifierError(f"the {self.library} worker does not stay up: {error}") from None
        return self._read(PATIENCE * limit_s, f"no verdict within {limit_s:g} s")

    def _mine(self) -> None:
        if self._owner != os.getpid():  # forked: the pipe belongs to the other process
            self._process, self._finalizer, self._owner = None, None, os.getpid()

    def _spawn(self) -> subprocess.Popen[bytes]:
        path = (entry or os.getcwd() for entry in sys.path)
        command = [sys.executable, "-P", "-c", _BOOT, self.library, *path]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env=_environment(), start_new_session=True,
        )  # fmt: skip
        self._process, self._greeted = process, False
        self._finalizer = weakref.finalize(self, _reap, process, self._owner)
        return process

    def _greet(self) -> None:
        """Wait for the child's imports."""
        hello = self._read(START_LIMIT_S, f"the {self.library} worker took over {START_LIMIT_S:g} s to start")
        if "error" in hello:
            self._kill()
            raise InputError(hello["error"])
        self._greeted = True

    def _read(self, limit_s: float, late: str) -> Mapping[str, Any]:
        """The next line of the child; kills it when the line does not come in time or the child is gone."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        deadline = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        line = bytearray()
        try:
            while not line.endswith(b"\n"):
                left_ms = (deadline - time.monotonic()) * 1e3
                if left_ms <= 0 or not poll.poll(left_ms):
                    raise VerifierError(late)
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    status = _status(process)
                    spent = status == signal.SIGPROF.name
                    raise VerifierError(late if spent else f"the {self.library} worker died ({status})")
                line += piece
            reply: Mapping[str, Any] = json.loads(line)
        except BaseException:  # Ctrl-C too: a half-read reply would be taken for the next call's
            self._kill()
            raise
        if reply.get("last"):
            self._kill()
        return reply

    def _kill(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process, self._finalizer = None, None


_SPARE: dict[str, Sandbox] = {}


def take(library: str) -> Sandbox:
    """A sandbox to be used by one owner: the one that was left last, with its child running, or a new one."""
    return _SPARE.pop(library, None) or Sandbox(library)


def leave(sandbox: Sandbox) -> None:
    """Give a sandbox back: its child, whose imports took a second, waits for the next to ``take`` it, or for the end of this
    process. One of each library waits; others are closed."""
    if sandbox.pid is None or _SPARE.setdefault(sandbox.library, sandbox) is not sandbox:
        sandbox.close()


def _environment() -> dict[str, str]:
    """The child's environment: the parent's locale, no tokens; fixed string hashes, one thread."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    return kept | one_thread | {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8"}


def _reap(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork inherited this finaliser; the child is not its own
        return
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _status(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "its pipe is closed"
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
