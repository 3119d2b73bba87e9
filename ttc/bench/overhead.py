"""``ttc bench overhead``: tokens a second of ttc over those of bare vLLM, of plain clients and of its_hub, side by side.

The arms take turns in one run, each alone on the machine while it works, so their ratios hold on a noisy machine where their
times do not. The first turn of each warms it up and is not counted; medians of the others are reported, and the ratios of the same
rounds with their interval (``Ratio``).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ttc import nano
from ttc.api import DEFAULT_MODEL
from ttc.bench.arms import Job
from ttc.errors import EngineError, InputError

AT_ONCE = 64
"""Branches in flight of ttc, bare vLLM and the plain client."""
WIDE = 256
"""Branches in flight of ttc where it is held to its_hub, which keeps a problem's samples in flight, and no more."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One arm: output tokens a second and seconds for the whole job (medians), the spread of the rate, peak memory, the rate of
    each round."""

    tokens_per_s: float
    seconds: float
    low: float
    high: float
    peak_bytes: int
    rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """One arm's rate over another's in the same rounds: the median of the rounds' ratios, and the sign interval of that median,
    which supposes nothing of how the noise is distributed: the ratios at two ranks, with the ``confidence`` that the median lies
    between. ``best``: the fastest round of the one over the fastest of the other, which a machine that is shared disturbs least."""

    median: float
    low: float
    high: float
    confidence: float
    best: float

    def __str__(self) -> str:
        return (
            f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f} with {self.confidence:.0%} confidence; fastest rounds:"
            f" {self.best:.3f})"
        )


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Compare the rates of two arms round by round: at 95 % confidence, or what so few rounds allow."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    rounds = len(ratios)
    cut, outside = 0, 2.0 ** (1 - rounds)
    while 2 * (cut + 1) < rounds - 1:
        more = outside + math.comb(rounds, cut + 1) * 2.0 ** (1 - rounds)
        if more > 0.05:
            break
        cut, outside = cut + 1, more
    middle = statistics.median(ratios)
    return Ratio(middle, ratios[cut], ratios[-1 - cut], max(1 - outside, 0.0), max(ours) / max(theirs))


class Arm:
    """A child process that does the job when told to."""

    def __init__(self, kind: str, job: Job) -> None:
        self.kind, self.job = kind, job if kind != "ttc-wide" else replace(job, concurrency=WIDE)
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the child
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ttc.bench.arms", kind, json.dumps(asdict(self.job))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True,
        )  # fmt: skip
        self._read()
        self.turns: list[dict[str, Any]] = []

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._stderr.seek(0)
            said = self._stderr.read().strip() or "no word"
            raise EngineError(f"bench: the {self.kind} arm died: {said.splitlines()[-1]}")
        return dict(json.loads(line))

    def turn(self, lengths: list[list[int]], *, counted: bool) -> list[list[int]]:
        """Do the job once; returns the lengths written."""
        assert self._process.stdin is not None
        before = generated_by(self.job.url) if self.job.url else 0
        self._process.stdin.write(json.dumps(lengths) + "\n")
        self._process.stdin.flush()
        measured = self._read()
        if self.job.url:  # the server's own count, the same for every client
            measured["tokens"] = generated_by(self.job.url) - before
        if counted:
            self.turns.append(measured)
        return list(measured["lengths"])

    def result(self) -> Measured:
        rates = [t["tokens"] / t["seconds"] for t in self.turns]
        return Measured(
            statistics.median(rates), statistics.median(t["seconds"] for t in self.turns), min(rates), max(rates),
            int(self.turns[-1]["peak_bytes"]), tuple(rates),
        )  # fmt: skip

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()


def generated_by(url: str) -> float:
    """vLLM's own count of generated tokens."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:generation_tokens_total")
    )


@contextlib.contextmanager
def server(job: Job) -> Iterator[str]:
    """vLLM's own OpenAI server on loopback, at the address yielded."""
    from ttc.engine.model import load_model_files

    files = load_model_files(job.model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", files.path, "--served-model-name", job.model,
        "--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", str(WIDE), "--enforce-eager",
        "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(files.context, 8192)), "--generation-config", "vllm",
    ]  # fmt: skip
    # Else vLLM's CPU build gives the model a process of its own and spins on a whole core while it waits for it.
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    # An idle connection is dropped after 5 s otherwise, in the face of a client that is about to use it.
    env = alone | quiet | {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600"} | dict(os.environ)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, start_new_session=True
    )
    try:
        for _ in range(1200):
            if process.poll() is not None:
                raise EngineError(
                    "bench: vLLM's server did not start; try its command line by hand: " + " ".join(command)
                )
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            time.sleep(0.25)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)


def compare(kinds: Sequence[str], job: Job, rounds: int, say: Any) -> dict[str, Measured]:
    """Run the arms turn by turn, ttc first in the first, which is not counted and gives the lengths; the order is reversed every
    other round, so that drift favours none."""
    arms: list[Arm] = []
    lengths: list[list[int]] = []
    try:
        for kind in kinds:
            say(f"starting {kind}{' (through the server)' if job.url else ''}")
            arms.append(Arm(kind, job))
        for number in range(rounds + 1):
            for arm in reversed(arms) if number % 2 else arms:
                written = arm.turn(lengths, counted=number > 0)
                lengths = written if arm.kind == "ttc" else lengths
            say(f"round {number} of {rounds} done")
        return {arm.kind: arm.result() for arm in arms}
    finally:
        for arm in arms:
            arm.close()


def quickness(repeats: int = 7) -> dict[str, float]:
    """Median seconds of two commands that everyone types."""
    found = {}
    for words in (("--help",), ("models",)):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "ttc.cli.main", *words], stdout=subprocess.DEVNULL, check=True
            )
            times.append(time.perf_counter() - start)
        found["ttc " + " ".join(words)] = statistics.median(times)
    return found


def main(*, model: str | None, problems: int, samples: int, rounds: int, http: bool, as_json: bool) -> None:
    """Measure, print a table (or one JSON object)."""
    from rich.console import Console

    known = {m.name: m for m in nano.catalog()}
    name = model or DEFAULT_MODEL
    if name not in known:
        raise InputError(
            f"model: the benchmark runs on an embedded reasoner, not {name!r}; use one of {', '.join(known)}"
        )
    say = Console(stderr=True, highlight=False).print
    cap = 8 * (known[name].typical_thinking_tokens or 64)
    job = Job(name, known[name].tasks[0], problems, samples, AT_ONCE, cap)
    quick = quickness()
    inside = compare(("ttc", "bare", "bare-serial", *(("ttc-wide",) if http else ())), job, rounds, say)
    over_bare = paired(inside["ttc"].rates, inside["bare"].rates)
    report: dict[str, Any] = {
        "ttc_tokens_per_s": inside["ttc"].tokens_per_s,
        "bare_tokens_per_s": inside["bare"].tokens_per_s,
        "ratio": over_bare.median,
        "paired": asdict(over_bare),
        "ratio_over_serial": inside["ttc"].tokens_per_s / inside["bare-serial"].tokens_per_s,
        "in_process": {kind: asdict(measured) for kind, measured in inside.items()},
        "seconds": quick,
        "job": asdict(job),
        "rounds": rounds,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]},
    }
    if http:
        with server(job) as url:
            served = compare(("ttc", "client", "ttc-wide", "its_hub"), replace(job, url=url), rounds, say)
        report["server"] = {kind: asdict(measured) for kind, measured in served.items()}
        over_client = paired(served["ttc"].rates, served["client"].rates)
        report["server_ratio"], report["server_paired"] = over_client.median, asdict(over_client)
        report["over_its_hub_server"] = served["ttc-wide"].tokens_per_s / served["its_hub"].tokens_per_s
        report["over_its_hub_in_process"] = inside["ttc-wide"].tokens_per_s / served["its_hub"].tokens_per_s
    if as_json:
        print(json.dumps(report))
        return
    _print(report)


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    from ttc.cli.render import stdout

    job = report["job"]
    title = f"{job['problems']} problems × {job['samples']} samples of {job['model']}, {job['concurrency']} in flight"
    table = Table(title=title, title_justify="left")
    for heading in ("arm", "tokens/s", "spread", "whole job", "peak memory"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    words = {"ttc": "ttc", "bare": "bare vLLM, all problems", "bare-serial": "bare vLLM, one at a time"}
    words |= {
        "client": "plain asyncio client",
        "its_hub": "its_hub 1.2.0",
        "ttc-wide": f"ttc, {WIDE} in flight",
    }
    for place in ("in_process", "server"):
        for kind, m in report.get(place, {}).items():
            where = ", through the server" if place == "server" else ""
            spread = f"{m['low']:,.0f} to {m['high']:,.0f}"
            peak = f"{m['peak_bytes'] / 2**20:,.0f} MiB"
            table.add_row(
                words[kind] + where, f"{m['tokens_per_s']:,.0f}", spread, f"{m['seconds']:.1f} s", peak
            )
    stdout.print(table)
    stdout.print(
        f"ttc over bare vLLM: {Ratio(**report['paired'])}, goal ≥ 0.95;"
        f" over one problem at a time: {report['ratio_over_serial']:.1f}×"
    )
    if "server" in report:
        stdout.print(
            f"through the server, ttc over a plain client: {Ratio(**report['server_paired'])}, goal ≥ 0.95"
        )
        stdout.print(
            f"with {WIDE} in flight over its_hub: {report['over_its_hub_server']:.1f}× through the server (goal ≥ 5),"
            f" {report['over_its_hub_in_process']:.1f}× in process (goal ≥ 7)"
        )
    for command, seconds in report["seconds"].items():
        stdout.print(f"{command}: {seconds:.2f} s (goal ≤ 0.3)")
