"""Builds and loads the C++ page selector, once for each machine; no torch headers, so it takes about two seconds.

Compiled on first use with the machine's own C++ compiler (a wheel can't know the vector instructions) and kept in the user's cache
under the digest of source and processor. None where there is no compiler: the torch selector is used, with one warning.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from ttc.attention.worth import cache_folder

SOURCE = Path(__file__).with_name("select.cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-std=c++17",
)
log = logging.getLogger("ttc.attention")


def processor() -> str:
    """What this machine's vector instructions are, as the kernel lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def library_path() -> Path:
    """Where this machine's build is kept."""
    digest = hashlib.sha256((SOURCE.read_text() + " ".join(FLAGS) + processor()).encode()).hexdigest()[:16]
    return cache_folder() / f"select-{digest}.so"


@cache
def selector() -> Any | None:
    """``ttc_select`` of select.cpp, built if need be; None if it can't be built or loaded."""
    path = library_path()
    try:
        if not path.exists():
            _build(path)
        function = ctypes.CDLL(str(path)).ttc_select
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("pages are chosen in torch, which is slower: the C++ selector can't be built (%s)", error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [
        pointer, pointer, pointer, number, pointer, ctypes.c_int64, pointer, pointer, pointer, number, number, number, number,
        pointer, number, number,
    ]  # fmt: skip
    function.restype = None
    return function


def _build(path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(made)], check=True, capture_output=True, timeout=120
        )
        made.replace(path)  # atomic: two processes may build at once
