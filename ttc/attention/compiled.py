"""Builds, loads and calls the C++ page selector; built once for each machine, without torch headers, so it takes about two seconds.

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

import torch
from torch import Tensor

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
def selector() -> ctypes.CDLL | None:
    """The functions of select.cpp, built if need be; None if they can't be built or loaded."""
    path = library_path()
    try:
        if not path.exists():
            _build(path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("pages are chosen in torch, which is slower: the C++ selector can't be built (%s)", error)
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.ttc_select.argtypes = [pointer, pointer, size, number, pointer, pointer, number, pointer]
    library.ttc_select.restype = None
    return library


class Selection:
    """The compiled selector, told once what the layers of a step share. Shapes as in ``choose.select``, ids (H, 1)."""

    def __init__(
        self, library: ctypes.CDLL, tables: Tensor, counts: Tensor, keep: Tensor, rules: Tensor, width: int,
        heads: int, group: int, channels: int,
    ) -> None:  # fmt: skip
        assert tables.stride(1) == 1
        assert keep.is_contiguous()
        self.function, self.tensors = library.ttc_select, (tables, counts, keep, rules)
        self.call = _Call(
            tables.data_ptr(), counts.data_ptr(), keep.data_ptr(), rules.data_ptr(), tables.stride(0), len(rules), heads, group,
            channels, width, torch.get_num_threads(),
        )  # fmt: skip
        self.told = ctypes.addressof(self.call)
        self.within = (group * channels, channels, 1)  # a query's strides

    def __call__(self, out: Tensor, query: Tensor, mean: Tensor | None, bounds: Tensor | None) -> None:
        """Fill ``out`` [b * H, W] for queries [b, H, G, D]."""
        if query.dtype not in (torch.bfloat16, torch.float32) or query.stride()[1:] != self.within:
            query = query.to(torch.float32).contiguous()
        some = mean if mean is not None else bounds
        assert some is not None
        self.function(
            self.told, query.data_ptr(), query.stride(0), query.dtype == torch.float32,
            None if mean is None else mean.data_ptr(), None if bounds is None else bounds.data_ptr(),
            some.dtype == torch.float32, out.data_ptr(),
        )  # fmt: skip


class _Call(ctypes.Structure):
    """``Call`` of select.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tables", "counts", "keep", "rules")),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("rows", "heads", "group", "channels", "width", "threads")),
    )


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
