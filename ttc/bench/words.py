"""How long the controller's word takes to reach a running branch: tokens that the branch writes before it is obeyed, and the time
that saying it takes, in one process and with vLLM's worker processes.

Part of ``ttc bench steering``. Each place is a process of its own: vLLM decides at its import.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from ttc.errors import TTCError

TEXT = "Wait"
PLACES = {"in process": "0", "worker processes": "1"}
TASK = "rg:chain_sum?min_terms=16&max_terms=24&min_digits=2&max_digits=2"
FIRST, APART = 8, 2
"""The k-th branch is told after ``FIRST + APART * k`` tokens (modulo ``branches`` / 2): two words in one step at most times."""


def measure(model: str, branches: int) -> dict[str, dict[str, float]]:
    """By place: ``said`` and ``obeyed`` words, median and most ``lag`` in tokens, median ``us`` (microseconds) of saying one step's
    words."""
    return {place: _in_place(model, branches, value) for place, value in PLACES.items()}


def _in_place(model: str, branches: int, multiprocessing: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "ttc.bench.words", model, str(branches)], capture_output=True, text=True, check=False,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing},
    )  # fmt: skip
    if done.returncode:
        raise TTCError(f"bench: words: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def tell(model: str, branches: int) -> dict[str, float]:
    """Each of ``branches`` branches is told ``TEXT`` once, at a length of its own; those that end before it do not count."""
    from ttc.engine.vllm import VLLMEngine
    from ttc.problems import from_task
    from ttc.types import Completion, Request

    engine = VLLMEngine(model, concurrency=branches)
    times: list[float] = []
    if not engine.info.steerable:
        words: Any = engine._words
        words.rpc = _timed(words.rpc, times)
    say = _timed(engine.insert, times) if engine.info.steerable else engine.insert
    ids = engine.spelling.ids(TEXT)
    told: dict[int, int] = {}
    done: dict[int, Completion] = {}
    for ticket, problem in enumerate(from_task(TASK, branches, 0)):
        engine.submit(ticket, Request(problem, ticket, ticket, thinking_tokens=400))
    while len(done) < branches:
        report = engine.step()
        done |= dict(report.finished)
        for ticket, progress in report.progress.items():
            if ticket not in told and progress.tokens >= FIRST + APART * (ticket % (branches // 2 or 1)):
                told[ticket] = progress.tokens
                say(ticket, TEXT)
    engine.close()
    lags = []
    for ticket, at in told.items():
        written = list(done[ticket].token_ids)
        if done[ticket].triggers:
            lags.append(next(i for i in range(at, len(written)) if written[i : i + len(ids)] == ids) - at)
    return {
        "said": len(told), "obeyed": len(lags), "lag": statistics.median(lags), "most_lag": max(lags),
        "us": 1e6 * statistics.median(times),
    }  # fmt: skip


def _timed(call: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - start)

    return timed


if __name__ == "__main__":
    print(json.dumps(tell(sys.argv[1], int(sys.argv[2]))))
