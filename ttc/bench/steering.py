"""``ttc bench steering``: what steering inside the engine costs, beside stop-and-resubmit and beside no steering at all.

One engine, the arms turn by turn in one run: 32 branches of one fixed length, three triggers each, end marks off (min_tokens), so
that every arm writes the same number of tokens. ``in-engine`` forces the triggers in the step loop; ``resubmit`` ends the request
at each checkpoint, appends the trigger and submits the whole again (prefix caching on: what peers do, at their best, without
HTTP); ``bare`` has no instructions at all. And the processor alone: seconds a step at 1, 64 and 256 rows; and how long the
controller's word takes to a running branch (``ttc.bench.words``).
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import dataclass
from typing import Any

from ttc.bench import words
from ttc.errors import InputError

TRIGGER = "Wait! Maybe I made some mistakes! I need to rethink from scratch."
ARMS = ("bare", "in-engine", "resubmit")
KINDS = ("no instructions", "thinking", "forcing 1 in 16", "guarding the end", "guarding, top-p")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of an arm; ``prefilled`` are prompt tokens computed (handed over less found in the cache), ``cpu`` the process's own
    seconds, which other work on the machine stretches less than ``seconds``."""

    seconds: float
    cpu: float
    output: int
    prompt: int
    prefilled: int

    @property
    def rate(self) -> float:
        return self.output / self.seconds


class Bench:
    """The three arms over one in-process engine."""

    def __init__(self, model: str, branches: int, tokens: int, triggers: int) -> None:
        from ttc.engine.vllm import VLLMEngine

        self.engine = VLLMEngine(model, concurrency=branches)
        self.llm: Any = self.engine._llm
        self.branches, self.tokens = branches, tokens
        self.trigger = self.engine.spelling.ids(TRIGGER)
        self.at = [tokens * (k + 1) // (triggers + 1) for k in range(triggers)]
        if not self.at or self.at[0] <= len(self.trigger):
            raise InputError(f"bench: {tokens} tokens hold no {triggers} triggers; give more --tokens")
        self.name = 0

    def prompts(self, turn: int) -> list[list[int]]:
        """Prompts that no turn has in common, so that none is found in the cache (but by its own resubmission)."""
        return [
            self.engine.spelling.ids(f"{turn} {i} ") + self.engine.spelling.ids("12 + 34 - 5 + ") * 4
            for i in range(self.branches)
        ]

    def add(self, ids: list[int], tokens: int, instructions: dict[str, Any] | None) -> str:
        self.name += 1
        vllm = self.engine._vllm
        params = vllm.SamplingParams(
            temperature=1.0, seed=self.name, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False,
            extra_args={"ttc": instructions} if instructions else None,
            output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        self.llm.add_request(str(self.name), {"prompt_token_ids": ids}, params)
        return str(self.name)

    def drain(self) -> dict[str, list[int]]:
        written: dict[str, list[int]] = {}
        while self.llm.has_unfinished_requests():
            for output in self.llm.step():
                written[output.request_id] = list(output.outputs[0].token_ids)
        return written

    def turn(self, arm: str, number: int) -> Turn:
        prompts = self.prompts(number * len(ARMS) + ARMS.index(arm))
        before, start, cpu = self.engine.counters(), time.perf_counter(), time.process_time()
        output = (
            self.resubmitted(prompts) if arm == "resubmit" else self.straight(prompts, arm == "in-engine")
        )
        seconds, cpu, after = time.perf_counter() - start, time.process_time() - cpu, self.engine.counters()
        prompt = after.prompt_tokens - before.prompt_tokens
        return Turn(seconds, cpu, output, prompt, prompt - (after.cached_tokens - before.cached_tokens))

    def straight(self, prompts: list[list[int]], steered: bool) -> int:
        never = [
            self.engine.spelling.tokenizer.pad_token_id or 0
        ]  # no model samples it: a thought that never closes
        told = (
            {"triggers": [self.trigger], "at": self.at, "think_close": never, "close": never}
            if steered
            else None
        )
        for ids in prompts:
            self.add(ids, self.tokens, told)
        written = self.drain()
        if steered:
            for ids in written.values():
                missed = [at for at in self.at if ids[at : at + len(self.trigger)] != self.trigger]
                if missed:
                    raise InputError(
                        f"bench: the trigger at {missed[0]} was not forced; is the plugin installed?"
                    )
        return sum(map(len, written.values()))

    def resubmitted(self, prompts: list[list[int]]) -> int:
        """Each branch goes on as soon as its own part is done, as a client with one coroutine a branch would."""
        so_far = {self.add(ids, self.at[0], None): (ids, 0, 0) for ids in prompts}
        total = 0
        while self.llm.has_unfinished_requests():
            for output in self.llm.step():
                ids, part, length = so_far.pop(output.request_id)
                new = list(output.outputs[0].token_ids)
                total, length = total + len(new), length + len(new)
                if part < len(self.at):
                    ids, length, total = (
                        ids + new + self.trigger,
                        length + len(self.trigger),
                        total + len(self.trigger),
                    )
                    until = self.at[part + 1] if part + 1 < len(self.at) else self.tokens
                    so_far[self.add(ids, until - length, None)] = (ids, part + 1, length)
        return total


def processor_seconds(rows: int, vocab: int, *, steps: int = 60) -> dict[str, float]:
    """Median seconds of one step of the processor with ``rows`` rows (update and apply, on the CPU): without instructions, with all
    thinking and nothing due, with one row in sixteen forcing a token at each step, and with the end of every thought to be replaced
    (budget forcing: whether it comes is drawn at each step), without and with top-p."""
    import torch
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from ttc.engine.control import ControlProcessor

    found = {}
    for kind in KINDS:
        processor = ControlProcessor(None, torch.device("cpu"), False)
        outputs: list[list[int]] = [[] for _ in range(rows)]
        added = []
        for row, output in enumerate(outputs):
            told: dict[str, Any] = {"think_close": [vocab - 1], "close": [vocab - 1], "due": 10**6}
            if kind.startswith("forcing") and row % 16 == 0:
                told |= {"triggers": [[7] * 10**5], "at": [1]}
            if kind.startswith("guarding"):
                told |= {"triggers": [[7]], "at_end": 1, "seed": row}
            extra = None if kind == "no instructions" else {"ttc": told}
            top_p = 0.95 if kind.endswith("top-p") else 1.0
            params = SamplingParams(extra_args=extra, stop_token_ids=[vocab - 2], top_p=top_p)
            added.append((row, params, None, output))
        drawn = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 3
        logits = drawn.clone()
        times = []
        for step in range(steps):
            update = BatchUpdate(rows, (), tuple(added), ()) if step == 0 else None
            start = time.perf_counter()
            processor.update_state(update)
            processor.apply(logits)
            times.append(time.perf_counter() - start)
            logits.copy_(drawn)
            for output in outputs:
                output.append(5)
        found[kind] = statistics.median(times[5:])
    return found


def main(*, model: str, branches: int, tokens: int, triggers: int, rounds: int, as_json: bool) -> None:
    """Measure, print a table (or one JSON object)."""
    import json

    bench = Bench(model, branches, tokens, triggers)
    try:
        turns: dict[str, list[Turn]] = {arm: [] for arm in ARMS}
        for number in range(rounds + 1):
            for arm in ARMS if number % 2 else reversed(ARMS):
                measured = bench.turn(arm, number)
                if number:  # the first turn warms up
                    turns[arm].append(measured)
        block = int(bench.llm.vllm_config.cache_config.block_size)
    finally:
        bench.engine.close()
    ratios = {
        arm: sorted(a.rate / b.rate for a, b in zip(turns[arm], turns["bare"], strict=True)) for arm in ARMS
    }
    by_cpu = {
        arm: sorted(b.cpu / a.cpu for a, b in zip(turns[arm], turns["bare"], strict=True)) for arm in ARMS
    }
    arms = {
        arm: {
            "tokens_per_s": statistics.median(t.rate for t in each),
            "over_bare": statistics.median(ratios[arm]),
            "over_bare_spread": [ratios[arm][0], ratios[arm][-1]],
            "over_bare_cpu": statistics.median(by_cpu[arm]),
            "over_bare_cpu_spread": [by_cpu[arm][0], by_cpu[arm][-1]],
            "output_tokens": each[0].output,
            "prompt_tokens": each[0].prompt,
            "prefilled_tokens": each[0].prefilled,
        }
        for arm, each in turns.items()
    }
    vocab = bench.engine.info.shape.vocab if bench.engine.info.shape else 128
    report = {
        "model": bench.engine.info.model,
        "branches": branches, "tokens": tokens, "triggers": triggers, "trigger_tokens": len(bench.trigger), "block": block,
        "rounds": rounds, "arms": arms,
        "processor_us": {
            f"{rows} rows, vocabulary {size}": {k: v * 1e6 for k, v in processor_seconds(rows, size).items()}
            for size in (vocab, 151_936)
            for rows in (1, 64, 256)
        },
        "word": words.measure(model, branches),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]},
    }  # fmt: skip
    if as_json:
        print(json.dumps(report))
        return
    _print(report)


def _print(report: dict[str, Any]) -> None:
    from rich.table import Table

    from ttc.cli.render import stdout

    title = f"{report['branches']} branches of {report['tokens']} tokens, {report['triggers']} triggers each, {report['model']}"
    table = Table(title=title, title_justify="left")
    for heading in (
        "arm",
        "tokens/s",
        "over bare (spread)",
        "the same, by CPU time",
        "prompt tokens",
        "prefilled",
    ):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm, found in report["arms"].items():
        over = [
            f"{found[key]:.3f} ({found[key + '_spread'][0]:.3f} to {found[key + '_spread'][1]:.3f})"
            for key in ("over_bare", "over_bare_cpu")
        ]
        table.add_row(
            arm, f"{found['tokens_per_s']:,.0f}", *over,
            f"{found['prompt_tokens']:,}", f"{found['prefilled_tokens']:,}",
        )  # fmt: skip
    stdout.print(table)
    steps = Table(title="The processor alone, microseconds a step", title_justify="left")
    for heading in ("rows", *KINDS):
        steps.add_column(heading, justify="left" if heading == "rows" else "right")
    for rows, found in report["processor_us"].items():
        steps.add_row(rows, *(f"{value:,.0f}" for value in found.values()))
    stdout.print(steps)
    said = Table(title="The controller's word", title_justify="left")
    for heading in ("where", "obeyed", "tokens until then, median", "most", "microseconds to say it"):
        said.add_column(heading, justify="left" if heading == "where" else "right")
    for where, found in report["word"].items():
        said.add_row(
            where, f"{found['obeyed']:.0f} of {found['said']:.0f}", f"{found['lag']:.0f}", f"{found['most_lag']:.0f}",
            f"{found['us']:,.0f}",
        )  # fmt: skip
    stdout.print(said)
