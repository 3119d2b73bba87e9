"""What ttc costs beside bare vLLM on a GPU: ``python -m ttc.bench.ahead --model Qwen3-8B [--json]``.

Arms take turns on the card, each in a process of its own: ``vllm.LLM.generate`` as if ttc were not installed (stock: vLLM's second
model runner), the same on the model runner that ttc needs (bare), ttc's self-consistency, and both of these without the scheduling
ahead that is vLLM's default there (a step is prepared while the one before runs). All write the same number of tokens from the same
prompts, with random weights of a published shape, 64 in flight. The first turn of each is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

TASK = "rg:chain_sum?min_terms=3&max_terms=6"
ARMS = ("stock", "bare", "ttc", "bare in turn", "ttc in turn")


def _arm(told: dict[str, Any]) -> None:
    """One arm: a line when it is ready, then the job once for each line of its standard input."""
    out, sys.stdout = sys.stdout, sys.stderr
    arguments = {
        "load_format": "dummy", "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": told["kv_gib"] << 30,
        "max_model_len": 2048, "max_num_seqs": told["at_once"],
        "async_scheduling": not told["arm"].endswith("in turn"), "enable_prefix_caching": True, "generation_config": "vllm",
        "kernel_config": {"enable_jit_warmup": False},
        "compilation_config": {
            "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 16, 32, 48, told["at_once"]],
        },
    }  # fmt: skip
    from ttc.problems import from_task

    # What random weights write is noise, which takes a parser of answers longer than an answer does.
    problems = [replace(problem, verifier="exact") for problem in from_task(TASK, told["problems"], 0)]
    if told["arm"].startswith("ttc"):
        from ttc.api import Run, Settings, start_engine

        engine = start_engine(told["folder"], "vllm", concurrency=told["at_once"], engine_args=arguments)

        def work() -> int:
            settings = Settings(
                policy=f"self-consistency?n={told['samples']}", budget="1G tokens", max_thinking_tokens=told["tokens"]
            )  # fmt: skip
            run = Run(problems, engine, settings)
            for _ in run.results():
                pass
            return int(run.status.charge.tokens)

    else:
        import importlib.metadata

        found: Any = importlib.metadata.entry_points
        if told["arm"] == "stock":

            def hidden(**group: Any) -> Any:
                return [e for e in found(**group) if not e.value.startswith("ttc.")] if group else found()

            importlib.metadata.entry_points = hidden
        import vllm

        llm = vllm.LLM(told["folder"], use_tqdm_on_load=False, **arguments)
        tokenizer = llm.get_tokenizer()
        rendered = [
            list(tokenizer.apply_chat_template([dict(m) for m in p.messages], add_generation_prompt=True, return_dict=False))
            for p in problems
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in rendered for _ in range(told["samples"])]
        sampling = vllm.SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=told["tokens"])

        def work() -> int:
            llm.generate(prompts, sampling, use_tqdm=False)
            return len(prompts) * int(told["tokens"])

    print(json.dumps({"ready": told["arm"]}), file=out, flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        tokens = work()
        print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - begun}), file=out, flush=True)


class Child:
    """An arm's process."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the child
        self.rates: list[float] = []
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"} | dict(os.environ)
        if told["arm"] != "stock":
            env.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ttc.bench.ahead", "--arm", json.dumps(told)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env,
        )  # fmt: skip

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # vLLM's own logger may write there, too
            if line.startswith('{"'):
                return dict(json.loads(line))
        self.log.seek(0)
        raise SystemExit("bench: an arm died: " + self.log.read()[-2000:])

    def turn(self, *, counted: bool) -> None:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        told = self.read()
        if counted:
            self.rates.append(told["tokens"] / told["seconds"])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m ttc.bench.ahead", description=__doc__)
    parser.add_argument(
        "--model", default="Qwen3-0.6B", help="a published shape, or a folder with a config.json"
    )
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of each sample")
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-gib", type=int, default=6, help="GiB of KV cache for each arm")
    parser.add_argument("--arms", default=",".join(ARMS), help="which, in this order")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    told = parser.parse_args(arguments)
    if told.arm:
        return _arm(json.loads(told.arm))

    from ttc.engine.model import hollow_model

    arms = [arm.strip() for arm in told.arms.split(",")]
    if wrong := set(arms) - set(ARMS):
        parser.error(f"--arms: no {', '.join(sorted(wrong))}; use {', '.join(ARMS)}")

    with tempfile.TemporaryDirectory() as place:
        folder = hollow_model(told.model, Path(place), 4096)
        job = {
            "folder": str(folder), "problems": told.problems, "samples": told.samples, "tokens": told.tokens,
            "at_once": told.at_once, "kv_gib": told.kv_gib,
        }  # fmt: skip
        children: dict[str, Child] = {}
        try:
            for arm in arms:
                children[arm] = Child(job | {"arm": arm})
            for child in children.values():
                child.read()
            for turn in range(told.rounds + 1):
                for arm in arms if turn % 2 else reversed(arms):
                    children[arm].turn(counted=turn > 0)
        finally:
            for child in children.values():
                child.process.kill()
                child.process.wait()
    import torch

    rates = {arm: child.rates for arm, child in children.items()}
    result: dict[str, Any] = {
        "model": told.model, "at_once": told.at_once, "rounds": told.rounds, "tokens": told.tokens,
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "tokens_per_s": rates,
        "ratios": {f"{a} / {b}": _ratio(rates[a], rates[b]) for b in arms for a in arms if a.startswith("ttc") and a != b},
    }  # fmt: skip
    if told.json:
        print(json.dumps(result))
        return
    for arm, values in rates.items():
        print(
            f"{arm:14} {statistics.median(values):10,.0f} tokens/s ({min(values):,.0f} to {max(values):,.0f})"
        )
    for pair, found in result["ratios"].items():
        print(f"{pair:30} {found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})")


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Of rates measured in the same round: median, least and greatest."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(pairs), "low": min(pairs), "high": max(pairs)}


if __name__ == "__main__":
    main(sys.argv[1:])
