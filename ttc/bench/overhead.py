"""``ttc bench overhead``: tokens a second of ttc over those of bare vLLM, of plain clients and of its_hub, side by side.

The arms take turns in one run, each alone on the machine while it works. Those that are held to a goal near 1 do the same job by
slices of a quarter of a second: all but one stand still (SIGSTOP), servers included, so a machine whose speed goes up and down by a
third favours none. The first round warms up and is not counted; medians of the others are reported, and the ratios of the same
rounds with their interval (``Ratio``): of tokens a second of the time that an arm had, and of tokens a second of processor time,
which waiting does not count in. Other arms (one problem at a time, its_hub, many in flight) take part in the first few rounds, each
in one piece.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ttc import nano
from ttc.api import DEFAULT_MODEL
from ttc.bench.arms import Job
from ttc.errors import EngineError, InputError

GOAL = 0.95
"""Of ttc over bare vLLM, and over a plain client."""
PAIRS = {"ttc", "ttc-out", "bare", "client"}
"""The arms of every round, by slices of ``SLICE_S`` seconds; the others take part in ``FEW``."""
SLICE_S = 0.25
FEW = 3
ONE_BY_ONE = {"bare-serial", "its_hub"}
"""Arms that take problem after problem, so that their rate does not depend on how many there are: they do a quarter of the job."""
AT_ONCE = 64
"""Branches in flight of ttc, bare vLLM and the plain client."""
WIDE = 256
"""Branches in flight of ttc where it is held to its_hub, which keeps a problem's samples in flight, and no more."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One arm: output tokens a second and seconds for its job of ``problems`` (medians), the spread of the rate, peak memory,
    microseconds of processor time a token (with its children's and the server's), and of each round both rates: tokens by second,
    and by second of processor time."""

    tokens_per_s: float
    seconds: float
    low: float
    high: float
    peak_bytes: int
    problems: int
    processor_us: float
    rates: tuple[float, ...]
    processor_rates: tuple[float, ...]


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

    def reaches(self, goal: float) -> str:
        """Whether an interval of 95 % confidence lies on one side of the goal, in a word."""
        sure = self.confidence >= 0.95
        return (
            "reached"
            if sure and self.low >= goal
            else "missed"
            if sure and self.high < goal
            else "not decided"
        )


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Compare the rates of two arms in the rounds that both took part in: at 95 % confidence, or what so few rounds allow."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=False))
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
    """A child process that does the job when told to, with the process of the server that works for it alone (None: none)."""

    def __init__(self, kind: str, job: Job, server: int | None) -> None:
        self.kind = kind
        self.job = replace(
            job,
            concurrency=WIDE if kind == "ttc-wide" else job.concurrency,
            problems=max(1, job.problems // 4) if kind in ONE_BY_ONE else job.problems,
            out=kind == "ttc-out",
        )
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the child
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ttc.bench.arms", kind, json.dumps(asdict(self.job))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, start_new_session=True,
        )  # fmt: skip
        self._at_work = [self._process.pid, *([] if server is None else [server])]
        self.turns: list[dict[str, Any]] = []
        self._seconds = self._tokens = self._processor = 0.0
        try:
            self._read()
        except BaseException:  # a Ctrl-C reaches this process alone
            self.close()
            raise

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._stderr.seek(0)
            said = self._stderr.read().strip() or "no word"
            raise EngineError(f"bench: the {self.kind} arm died: {said.splitlines()[-1]}")
        return dict(json.loads(line))

    def begin(self, lengths: list[list[int]]) -> None:
        """Give it the job; it stands still until it is let ``go``."""
        assert self._process.stdin is not None
        self._seconds = 0.0
        self._tokens = generated_by(self.job.url) if self.job.url else 0
        self._processor = sum(map(processor_seconds, self._at_work))
        self._signal(signal.SIGSTOP)
        self._process.stdin.write(json.dumps(lengths[: self.job.problems]) + "\n")
        self._process.stdin.flush()

    def go(self, seconds: float | None) -> bool:
        """Let it work for so long, or to the end (None); True if it is done."""
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        begun = time.perf_counter()
        done = bool(select.select([self._process.stdout], [], [], seconds)[0])
        if not done:
            self._signal(signal.SIGSTOP)
        self._seconds += time.perf_counter() - begun
        return done

    def end(self, *, counted: bool) -> list[list[int]]:
        """What the turn brought; returns the lengths written."""
        measured = self._read()
        measured["seconds"] = self._seconds
        measured["processor_s"] = sum(map(processor_seconds, self._at_work)) - self._processor
        if self.job.url:  # the server's own count, the same for every client
            measured["tokens"] = generated_by(self.job.url) - self._tokens
        if counted:
            self.turns.append(measured)
        return list(measured["lengths"])

    def _signal(self, number: int) -> None:
        for group in self._at_work:
            with contextlib.suppress(ProcessLookupError):  # it died; what reads its pipe says so
                os.killpg(group, number)

    def result(self) -> Measured:
        rates = [t["tokens"] / t["seconds"] for t in self.turns]
        by_processor = [t["tokens"] / t["processor_s"] for t in self.turns]
        return Measured(
            tokens_per_s=statistics.median(rates),
            seconds=statistics.median(t["seconds"] for t in self.turns),
            low=min(rates),
            high=max(rates),
            peak_bytes=int(self.turns[-1]["peak_bytes"]),
            problems=self.job.problems,
            processor_us=1e6 / statistics.median(by_processor),
            rates=tuple(rates),
            processor_rates=tuple(by_processor),
        )

    def close(self) -> None:
        with self._process:  # closes its pipes, and waits
            self._process.kill()
        self._stderr.close()


def processor_seconds(pid: int) -> float:
    """Processor time of a process so far, all threads, with its children's, ended ones included."""
    import psutil

    try:
        process = psutil.Process(pid)
        return sum(sum(each.cpu_times()[:4]) for each in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:  # it ended while we looked; what reads its pipe says so
        return 0.0


def generated_by(url: str) -> float:
    """vLLM's own count of generated tokens."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:generation_tokens_total")
    )


@contextlib.contextmanager
def server(job: Job) -> Iterator[tuple[str, int]]:
    """vLLM's own OpenAI server on loopback: its address and its process."""
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
        yield url, process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            os.killpg(process.pid, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def compare(
    kinds: Sequence[str], job: Job, rounds: int, say: Any, servers: Mapping[str, tuple[str, int]] = {}
) -> dict[str, Measured]:
    """Run the arms round by round. In the first, which is not counted, ttc goes first and gives the lengths; after it, who begins
    changes. ``servers``: the address and the process of each arm's server."""
    arms: list[Arm] = []
    lengths: list[list[int]] = []
    try:
        for kind in kinds:
            say(f"starting {kind}{' (through a server)' if servers else ''}")
            url, process = servers.get(kind, ("", None))
            arms.append(Arm(kind, replace(job, url=url), process))
        pairs, others = [a for a in arms if a.kind in PAIRS], [a for a in arms if a.kind not in PAIRS]
        for number in range(rounds + 1):
            shift = number % len(pairs)
            turns = [[arm] for arm in others] if number <= FEW else []
            turns += [[arm] for arm in pairs] if number == 0 else [pairs[shift:] + pairs[:shift]]
            for taking in sorted(turns, key=lambda turn: number == 0 and turn[0].kind != "ttc"):
                for arm, written in _in_slices(taking, lengths, counted=number > 0):
                    lengths = written if arm.kind == "ttc" else lengths
            say(f"round {number} of {rounds} done")
        return {arm.kind: arm.result() for arm in arms}
    finally:
        for arm in arms:
            arm.close()


def _in_slices(
    arms: Sequence[Arm], lengths: list[list[int]], *, counted: bool
) -> list[tuple[Arm, list[list[int]]]]:
    """Have the arms do the job side by side, one at a time; what each wrote."""
    for arm in arms:
        arm.begin(lengths)
    waiting, done = deque(arms), []
    while waiting:
        arm = waiting.popleft()
        if arm.go(SLICE_S if len(arms) > 1 else None):
            done.append((arm, arm.end(counted=counted)))
        else:
            waiting.append(arm)
    return done


def quickness(repeats: int = 9) -> dict[str, float]:
    """Median seconds of two commands that everyone types, and of a Python that does nothing, in turns; their first runs, for which
    modules may have had to be compiled, are not counted."""
    commands = {"python -c pass": ["-c", "pass"]}
    commands |= {f"ttc {word}": ["-m", "ttc.cli.main", word] for word in ("--help", "models")}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(repeats + 1):
        for name, words in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def main(*, model: str | None, problems: int, samples: int, rounds: int, http: bool, as_json: bool) -> None:
    """Measure, in process or (``http``) through a server, and print a table (or one JSON object)."""
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
    report: dict[str, Any] = {"job": asdict(job), "rounds": rounds}
    if http:
        inside = compare(("ttc", "ttc-wide"), job, min(rounds, FEW), say)
        with server(job) as ours, server(job) as theirs:
            servers = {"ttc": ours, "client": theirs, "ttc-wide": ours, "its_hub": theirs}
            served = compare(tuple(servers), job, rounds, say, servers)
        report |= _over("server", served["ttc"], served["client"])
        report["server"] = {kind: asdict(measured) for kind, measured in served.items()}
        report["over_its_hub_server"] = served["ttc-wide"].tokens_per_s / served["its_hub"].tokens_per_s
        report["over_its_hub_in_process"] = inside["ttc-wide"].tokens_per_s / served["its_hub"].tokens_per_s
    else:
        inside = compare(("ttc", "ttc-out", "bare", "bare-serial"), job, rounds, say)
        report |= _over("", inside["ttc"], inside["bare"])
        report |= _over("out", inside["ttc-out"], inside["bare"])
        report["ratio_over_serial"] = paired(inside["ttc"].rates, inside["bare-serial"].rates).median
        report["seconds"] = quickness()
    report["in_process"] = {kind: asdict(measured) for kind, measured in inside.items()}
    report["machine"] = {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    if as_json:
        print(json.dumps(report))
        return
    _print(report)


def _over(place: str, ours: Measured, theirs: Measured) -> dict[str, Any]:
    """One arm over the other, by the clock and by processor time, under the names that the report has for a place."""
    clock = paired(ours.rates, theirs.rates)
    processor = paired(ours.processor_rates, theirs.processor_rates)
    found = {"ratio": clock.median, "paired": asdict(clock), "paired_processor": asdict(processor)}
    return {f"{place}_{key}" if place else key: value for key, value in found.items()}


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    from ttc.cli.render import stdout

    job = report["job"]
    title = f"{job['problems']} problems × {job['samples']} samples of {job['model']}, {job['concurrency']} in flight"
    table = Table(title=title, title_justify="left")
    for heading in (
        "arm",
        "rounds",
        "tokens/s",
        "spread",
        "problems",
        "seconds",
        "processor µs/token",
        "peak memory",
    ):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    words = {
        "ttc": "ttc",
        "ttc-out": "ttc, with a run directory",
        "bare": "bare vLLM, all problems",
        "bare-serial": "bare vLLM, one at a time",
    }
    words |= {
        "client": "plain asyncio client",
        "its_hub": "its_hub 1.2.0",
        "ttc-wide": f"ttc, {WIDE} in flight",
    }
    for place in ("in_process", "server"):
        for kind, m in report.get(place, {}).items():
            table.add_row(
                words[kind] + (", through the server" if place == "server" else ""),
                str(len(m["rates"])),
                f"{m['tokens_per_s']:,.0f}",
                f"{m['low']:,.0f} to {m['high']:,.0f}",
                str(m["problems"]),
                f"{m['seconds']:.1f}",
                f"{m['processor_us']:.1f}",
                f"{m['peak_bytes'] / 2**20:,.0f} MiB",
            )
    stdout.print(table)
    titles = {
        "": "ttc over bare vLLM",
        "out_": "with a run directory",
        "server_": "through the server, ttc over a plain client",
    }
    for place, title in titles.items():
        if f"{place}paired" in report:
            clock, processor = (Ratio(**report[place + key]) for key in ("paired", "paired_processor"))
            stdout.print(f"{title}, tokens a second: {clock}; goal ≥ {GOAL}: {clock.reaches(GOAL)}")
            whose = "server and client together" if place == "server_" else "all threads and children"
            stdout.print(f"  the same by processor time ({whose}): {processor}")
    if "server" in report:
        stdout.print(
            f"with {WIDE} in flight over its_hub: {report['over_its_hub_server']:.1f}× through the server (goal ≥ 5),"
            f" {report['over_its_hub_in_process']:.1f}× in process (goal ≥ 7)"
        )
    else:
        stdout.print(f"ttc over bare vLLM, one problem at a time: {report['ratio_over_serial']:.1f}×")
    for command, seconds in report.get("seconds", {}).items():
        goal = " (goal ≤ 0.3)" if command.startswith("ttc") else ""
        stdout.print(f"{command}: {seconds:.2f} s{goal}")
