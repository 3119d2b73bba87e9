"""``python -m ttc.bench.split``: where the processor time of a run goes, for each token, beside bare vLLM's.

One engine in one process does the same job in turns: ttc; ttc where vLLM draws, by a generator for each request; the bare engine
loop, without seeds and with them. The bare loop writes the lengths that ttc wrote last. Processor time holds better than seconds do
on a machine where others work; ``inside`` is its share in vLLM's own step.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ttc import nano
from ttc.api import Run, Settings, start_engine
from ttc.problems import from_task


def main(
    model: Annotated[str, typer.Option("--model", "-m", help="An embedded reasoner.")] = "nano-xs",
    count: Annotated[int, typer.Option("--problems", min=1, help="Problems.")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="Samples for each.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions after a first that is not counted.")] = 3,
) -> None:
    """Print one JSON object: for each arm, microseconds of processor time a token (median, least, most), and the share inside."""
    known = {m.name: m for m in nano.catalog()}
    if model not in known:
        raise typer.BadParameter(f"{model!r} is no embedded reasoner; use one of {', '.join(known)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    problems = from_task(known[model].tasks[0], count, 0)
    cap = 8 * (known[model].typical_thinking_tokens or 64)
    engine: Any = start_engine(model, "vllm", concurrency=64)
    vllm, llm, draws = engine._vllm, engine._llm, engine._draws
    lengths: list[list[int]] = []
    inside, step = [0.0], llm.step

    def timed() -> Any:
        began = time.process_time()
        outputs = step()
        inside[0] += time.process_time() - began
        return outputs

    llm.step = timed

    def ours(drawn: bool) -> int:
        engine._draws = drawn
        settings = Settings(
            policy=f"self-consistency?n={samples}", budget="1G tokens", max_thinking_tokens=cap
        )
        run = Run(problems, engine, settings)
        written = {r.problem_id: [b.completion.output_tokens for b in r.branches] for r in run.results()}
        lengths[:] = [written[p.id] for p in problems]
        return run.status.charge.tokens

    def bare(seeded: bool) -> int:
        kind = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        name = 0
        for problem, row in zip(problems, lengths, strict=True):
            prompt = {"prompt_token_ids": engine.spelling.prompt(problem, None)}
            for length in row:
                name += 1
                params = vllm.SamplingParams(
                    max_tokens=length, ignore_eos=True, seed=name if seeded else None, output_kind=kind
                )
                llm.add_request(f"bare-{name}", prompt, params)
        while llm.has_unfinished_requests():
            llm.step()
        return sum(map(sum, lengths))

    arms: dict[str, Callable[[], int]] = {"ttc": lambda: ours(draws), "bare": lambda: bare(False)}
    arms |= {"ttc, vllm draws": lambda: ours(False), "bare, seeds": lambda: bare(True)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in list(arms) if number % 2 == 0 else [*list(arms)[2:], *list(arms)[:2]]:
            inside[0], began = 0.0, time.process_time()
            tokens = arms[name]()
            spent = time.process_time() - began
            if number:
                found[name].append((spent / tokens * 1e6, inside[0] / spent))
    report = {}
    for name, turns in found.items():
        each = [turn[0] for turn in turns]
        report[name] = {
            "us_per_token": statistics.median(each), "low": min(each), "high": max(each),
            "inside": statistics.median(turn[1] for turn in turns),
        }  # fmt: skip
    print(
        json.dumps({"model": model, "problems": count, "samples": samples, "rounds": rounds, "arms": report})
    )
    engine.close()


if __name__ == "__main__":
    typer.run(main)
