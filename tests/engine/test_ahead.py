"""vLLM scheduling ahead, as it does by default on GPUs, with everything that ttc does inside its step.

Its CPU backend turns that off, but its CPU runner is its GPU runner, and bears it once the streams and events that a CPU has not
are stood in for. A process of its own runs the same work in turn and ahead. (On a GPU the other engine tests run ahead.)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import LIMIT_S

pytestmark = [pytest.mark.engine]

SCRIPT = '''
import contextlib, json, sys
import ttc.engine.vllm_start as vllm_start
vllm_start.import_vllm()
import torch
from vllm.platforms.cpu import CpuPlatform

class Nothing:
    """An event or a stream of a device that has none."""
    def __init__(self, *args, **options): ...
    def __getattr__(self, name): return lambda *args: None

def ahead():
    plain = CpuPlatform.check_and_update_config.__func__
    def told(cls, config):
        plain(cls, config)
        config.scheduler_config.async_scheduling = True
    CpuPlatform.check_and_update_config = classmethod(told)
    torch.Event = torch.cuda.Event = torch.cuda.Stream = Nothing
    torch.cuda.current_stream = lambda *args: Nothing()
    torch.cuda.stream = lambda *args: contextlib.nullcontext()
    vllm_start._ahead = lambda *args: True

import ttc
from ttc.engine.vllm import VLLMEngine
from ttc.problems import from_task
from ttc.types import Control, Request, Sampling

problems = from_task("rg:chain_sum?min_terms=3&max_terms=6&min_digits=2&max_digits=2", 3, 0)
WORK = {
    "caps": {"policy": "self-consistency?n=4", "max_thinking_tokens": 20},
    "confidence": {"policy": "best-of-n?n=4&score=mean-logprob"},
    "triggers": {"policy": "iterative-deepening"},
    "ends replaced": {"policy": "budget-forcing"},
    "forks": {"policy": "adaptive?probe_every=16&max_samples=6&width=3"},
    "cancelled": {"policy": "parallel-probe?n=4&every=16"},
    "sparse": {"policy": "self-consistency?n=2", "kv_budget": 64},
    "steps": {"policy": "beam", "reward": "nano-s-process"},
}

def tell(branch):
    c = branch.completion
    told = [list(c.token_ids), c.finish, c.forced_tokens, c.triggers, c.closed, c.probe_tokens, c.partial]
    return [*told, c.mean_logprob, c.self_certainty, c.kv_skipped, c.kv_scored]

def words(engine):
    """A text put into running branches, and a thought ended on the controller's word, at what the branch has then."""
    seen = []
    for ticket, word in ((1, "insert"), (2, "close"), (3, "abort"), (4, None)):
        asked = Request(problems[0], ticket, seed=7, sampling=Sampling(1.0), thinking_tokens=200)
        engine.submit(ticket, asked)
        done = {}
        while ticket not in done:
            report = engine.step()
            done |= dict(report.finished)
            place = report.progress.get(ticket)
            if place is not None and place.tokens >= 9 and word:
                engine.insert(ticket, " Wait") if word == "insert" else None
                engine.steer(ticket, "close") if word == "close" else None
                engine.abort([ticket]) if word == "abort" else None
                word = None
        made = done[ticket]
        seen.append([made.finish, made.output_tokens, made.forced_tokens, made.triggers, -1 in made.token_ids, len(made.token_ids)])
    return seen

def everything():
    engine = VLLMEngine("nano-xs", concurrency=16, kv_page=32, kv_when="always")
    told = {"ahead": bool(engine._llm.vllm_config.scheduler_config.async_scheduling)}
    for name, options in WORK.items():
        before = engine.counters()
        results = list(ttc.run(problems, engine=engine, budget="2k tokens", **options))
        after = engine.counters()
        branches = [b for r in results for b in sorted(r.branches, key=lambda b: b.index)]
        told[name] = {
            "branches": [tell(b) for b in branches], "answers": [r.answer for r in results], "errors": [r.error for r in results],
            "written": sum(b.completion.output_tokens + b.completion.probe_tokens for b in branches),
            "counted": after.output_tokens - before.output_tokens,
        }
    before = engine.counters()
    told["words"] = words(engine)
    told["words counted"] = engine.counters().output_tokens - before.output_tokens
    engine.close()
    return told

first = everything()
ahead()
json.dump([first, everything()], open(sys.argv[1], "w"))
'''


def test_scheduling_ahead_changes_no_token_and_no_count(tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "told.json"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(out)], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    turn, ahead = json.loads(out.read_text())
    assert (turn.pop("ahead"), ahead.pop("ahead")) == (False, True)
    words, counted = ahead.pop("words"), ahead.pop("words counted")
    turn.pop("words"), turn.pop("words counted")
    assert sum(length for _, length, *_ in words) == counted
    inserted, closed, aborted, alone = words
    assert inserted[3] == 1 and inserted[2] >= 1  # the text stands in the thought
    assert closed[2] >= 1 and closed[1] < 40  # closed by force, and answered
    assert aborted[0] == "abort" and 9 <= aborted[1] <= 11
    assert not any(hole for *_, hole, _ in words) and alone[0] == "stop"
    for name, told in ahead.items():
        assert not any(told["errors"]), name
        assert told["written"] == told["counted"], name
        assert all(-1 not in ids for ids, *_ in told["branches"]), name
        if name not in ("forks", "cancelled"):  # what those do hangs on when they learn of an answer
            assert _same(told, turn[name]), name


def _same(a: dict[str, list[list[object]]], b: dict[str, list[list[object]]]) -> bool:
    """Equal but for the rounding of sums."""
    return all(
        x == (pytest.approx(y, rel=1e-4) if isinstance(y, float) else y)
        for ours, theirs in zip(a["branches"], b["branches"], strict=True)
        for x, y in zip(ours, theirs, strict=True)
    ) and len(a["branches"]) == len(b["branches"])
