"""The parent's end of a child process that reads text written by models, with a time limit that really holds.

Symbolic algebra on ``9^{9^{9^9}}`` does not end, and reasoning-gym's scorers ``eval`` what a model wrote. So
both run in a child (``ttc.verify_worker``) that speaks JSON lines, owns no secrets, has bounded memory, and
is killed by the clock when a call outlives its limit; what takes its place is started before it is needed.
The child never imports the caller's main module. This contains accidents; it is no jail for an attacker.
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

_KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
_BOOT = "import sys; sys.path[:] = sys.argv[2:]; from ttc.verify_worker import main; main(sys.argv[1])"
"""Gives the child the parent's module path, in the parent's order and as late: before that, as with
PYTHONPATH, a file named types.py beside a user's script would stop the interpreter from starting."""


class Sandbox:
    """A child with ``library`` ("math" or "rg") loaded: started at the first call, or by ``start``.

    A child that was killed, or died, is replaced at once, without waiting; from then on another stands by with its imports done,
    so that a second hostile text costs its limit and no more.
    """

    def __init__(self, library: str) -> None:
        self.library = library
        self._child: _Child | None = None
        self._next: _Child | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def call(self, op: str, limit_s: float, **arguments: Any) -> Any:
        """What ``op`` returns. VerifierError: it failed, crashed the child or was not done in ``limit_s`` seconds by the clock (the
        wait for a child's imports apart); InputError: it refused."""
        request = json.dumps({"op": op, "limit_s": limit_s, **arguments}).encode() + b"\n"
        with self._lock:
            reply = self._exchange(request, limit_s)
        if "error" not in reply:
            return reply["value"]
        raise (InputError if reply.get("input") else VerifierError)(reply["error"])

    def start(self, *, ready: bool = False) -> None:
        """Start the child, if there is none, and don't wait for its imports: the first call does. ``ready``: wait for them, and
        have another stand by, so that no call has to. Raises InputError if they fail."""
        with self._lock:
            self._mine()
            self._child = self._child or _Child(self.library)
            if ready:
                self._next = self._next or _Child(self.library)
                self._child.greet()
                self._next.greet()

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is no child."""
        return self._child.process.pid if self._child else None

    def close(self) -> None:
        """Kill the child and reap it; a later call starts another."""
        with self._lock:
            for child in (self._child, self._next):
                if child is not None:
                    child.kill()
            self._child = self._next = None

    def _exchange(self, request: bytes, limit_s: float) -> Mapping[str, Any]:
        self._mine()
        if self._child is not None and self._child.process.poll() is not None:  # it died while idle
            self._replace()
        self._child = self._child or _Child(self.library)
        try:
            self._child.greet()
        except InputError:
            self._child = None
            raise
        try:
            try:
                self._child.write(request)
            except OSError:  # it dies just now: one new child is tried
                self._replace()
                self._child.greet()
                self._child.write(request)
            reply = self._child.read(limit_s, f"no verdict within {limit_s:g} s")
        except OSError as error:
            self._replace()
            raise VerifierError(f"the {self.library} worker does not stay up: {error}") from None
        except BaseException:  # Ctrl-C too: a half-read reply would be taken for the next call's
            self._replace()
            raise
        if reply.get("last"):
            self._replace()
        return reply

    def _replace(self) -> None:
        """The child is no good any more: the next takes its place, and another is started to stand by."""
        assert self._child is not None
        self._child.kill()
        self._child = self._next or _Child(self.library)
        self._next = _Child(self.library)

    def _mine(self) -> None:
        if self._owner != os.getpid():  # forked: the pipes belong to the other process
            self._child, self._next, self._owner = None, None, os.getpid()


class _Child:
    """A running child process and its pipe."""

    def __init__(self, library: str) -> None:
        self._library, self._greeted = library, False
        path = (entry or os.getcwd() for entry in sys.path)
        command = [sys.executable, "-P", "-c", _BOOT, library, *path]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env=_environment(), start_new_session=True,
        )  # fmt: skip
        self.kill = weakref.finalize(self, _reap, self.process, os.getpid())

    def greet(self) -> None:
        """Wait for the child's imports, once. Raises InputError, and kills the child, if they fail."""
        if self._greeted:
            return
        hello = self.read(START_LIMIT_S, f"the {self._library} worker took over {START_LIMIT_S:g} s to start")
        if "error" in hello:
            self.kill()
            raise InputError(hello["error"])
        self._greeted = True

    def write(self, request: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(request)

    def read(self, limit_s: float, late: str) -> Mapping[str, Any]:
        """The next line of the child. Raises VerifierError when it does not come in time, or the child is gone."""
        stdout = self.process.stdout
        assert stdout is not None
        deadline = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(stdout, select.POLLIN)
        line = bytearray()
        while not line.endswith(b"\n"):
            left_ms = (deadline - time.monotonic()) * 1e3
            if left_ms <= 0 or not poll.poll(left_ms):
                raise VerifierError(late)
            piece = os.read(stdout.fileno(), 1 << 16)
            if not piece:
                status = _status(self.process)
                spent = status == signal.SIGPROF.name
                raise VerifierError(late if spent else f"the {self._library} worker died ({status})")
            line += piece
        reply: Mapping[str, Any] = json.loads(line)
        return reply


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
