"""The child's end: ``main("math")`` or ``main("rg")`` answers JSON lines on its pipe until the pipe closes.

Run by ``ttc.sandbox``, which kills it by the wall clock. Here are the bounds that only the process itself can
set: CPU time, memory, no files written, no processes, no network; and an alarm should the parent be gone. Owns
math-verify; reasoning-gym is in ``ttc.rg_tasks``.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ttc.errors import InputError

MEMORY_BYTES = 1 << 30
"""What one call may use on top of the loaded libraries."""

_LIBRARIES = {"math": "math_verify", "rg": "reasoning_gym"}
_REFUSED = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate",
    "shutil.", "ctypes.dlopen", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> Any:
    from math_verify import parse

    return parse(f"${text}$", parsing_timeout=None) or parse(text, parsing_timeout=None)


def math_verdict(gold: str, answer: str) -> bool:
    """True if math-verify finds ``answer`` equal to ``gold``, which sets the form that is asked for."""
    from math_verify import verify

    return bool(verify(_parsed(gold), _parsed(answer), timeout_seconds=None))


def math_equal(a: str, b: str) -> bool:
    """True if each of the two would be right were the other the gold answer."""
    return math_verdict(a, b) and math_verdict(b, a)


def _operations(library: str) -> Mapping[str, Callable[..., Any]]:
    if library == "math":
        math_equal("\\frac{1}{2}+x", "x+0.5")  # loads what the first call would load
        return {"verdict": math_verdict, "equal": math_equal}
    from ttc import rg_tasks

    return {"draw": rg_tasks.draw, "score": rg_tasks.score, "equal": rg_tasks.equal}


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: what a scorer that evals text has no business doing."""
    if event.startswith(_REFUSED):
        raise PermissionError(f"{event} is refused in the verifier's process")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
        raise PermissionError("writing files is refused in the verifier's process")


def _confine() -> None:
    sys.dont_write_bytecode = True
    with open("/proc/self/statm") as statm:
        used_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    for limit, amount in (
        (resource.RLIMIT_AS, used_bytes + MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (amount, amount))
    sys.addaudithook(_refuse)


def _answer(operations: Mapping[str, Callable[..., Any]], line: bytes) -> dict[str, Any]:
    """The reply to one request; a failure is a reply too, ``last`` if the process is not to be used again."""
    try:
        request = json.loads(line)
        # SIGPROF and SIGALRM end this process, whatever it is at; the latter should the parent be gone
        limit_s = request.pop("limit_s")
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        signal.setitimer(signal.ITIMER_REAL, limit_s + 2.0)
        return {"value": operations[request.pop("op")](**request)}
    except InputError as error:
        return {"error": str(error), "input": True}
    except MemoryError:
        return {"error": "out of memory", "last": True}
    except BaseException as error:  # SystemExit from an eval'ed exit() as well
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)


def main(library: str) -> None:
    """Serve requests; nothing that the libraries print or read can touch the pipe."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for standard in (0, 1):
        os.dup2(os.open(os.devnull, os.O_RDWR), standard)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    hello: dict[str, Any] = {"value": "ready"}
    operations: Mapping[str, Callable[..., Any]] = {}
    try:
        importlib.import_module(_LIBRARIES[library])
        operations = _operations(library)
    except ImportError as error:
        hello = {"error": f"{_LIBRARIES[library]} cannot be loaded ({error}): pip install 'ttc[tasks]'"}
    _confine()
    reply = hello
    while True:
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
        line = requests.readline()
        if not line or reply.get("last"):
            return
        reply = _answer(operations, line)
