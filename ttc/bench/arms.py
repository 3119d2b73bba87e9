"""The arms of ``ttc bench overhead``, each in a process of its own: ``python -m ttc.bench.arms KIND JSON``.

An arm prints a line when it is ready, then does the job once for each line on its standard input and prints what it took. All do
the same job: ``samples`` samples of each of ``problems`` problems with the embedded reasoner, ``concurrency`` in flight. The
lengths are those of ttc's last turn: bare vLLM and the plain client are told to write just as many tokens for each sample
(its_hub takes no such word), or a few long chains more or less would decide who is faster. ttc does all that ``ttc solve`` does:
votes, verdicts, prices, a hard budget; and with ``out`` a run directory.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ttc.types import Problem


@dataclass(frozen=True, slots=True)
class Job:
    """What every arm has to do; ``url`` is the server of the arms that need one; ``out``: ttc writes a run directory."""

    model: str
    task: str
    problems: int
    samples: int
    concurrency: int
    thinking_tokens: int
    url: str = ""
    out: bool = False

    def load(self) -> list[Problem]:
        from ttc.problems import from_task

        return from_task(self.task, self.problems, 0)


Lengths = list[list[int]]
"""Output tokens of each sample (columns) of each problem (rows)."""

Work = Callable[[Lengths], tuple[int, Lengths]]
"""(lengths to write) -> output tokens (-1 where only the server can count them), lengths written."""


def ours(job: Job) -> Work:
    """Self-consistency through ttc: in process, or through the server if the job has one."""
    from ttc.api import Run, Settings, start_engine

    options: dict[str, Any] = {"concurrency": job.concurrency}
    if job.url:
        options["stream_interval"] = 32
    engine = start_engine(job.model, f"openai:{job.url}" if job.url else "vllm", **options)
    problems = job.load()

    def work(lengths: Lengths) -> tuple[int, Lengths]:
        settings = Settings(
            policy=f"self-consistency?n={job.samples}", budget="1G tokens", max_thinking_tokens=job.thinking_tokens
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            run = Run(problems, engine, settings, out=folder if job.out else None)
            written = {
                r.problem_id: [b.completion.output_tokens for b in sorted(r.branches, key=lambda b: b.index)]
                for r in run.results()
            }
        return run.status.charge.tokens, [written[p.id] for p in problems]

    return work


def bare(job: Job, *, serial: bool = False) -> Work:
    """``vllm.LLM.generate``: all samples of all problems in one call, or (``serial``) one problem at a time."""
    from ttc.engine.model import load_model_files
    from ttc.engine.vllm_start import import_vllm

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_PLUGINS"] = ""  # bare: without ttc's attention backend
    vllm = import_vllm()
    files = load_model_files(job.model)
    llm = vllm.LLM(
        files.path, max_num_seqs=job.concurrency, enable_prefix_caching=True, enforce_eager=True, max_model_len=files.context,
        generation_config="vllm", enable_chunked_prefill=False, max_num_batched_tokens=max(files.context, 8192),
        use_tqdm_on_load=False,
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()

    def rendered(problem: Problem) -> list[int]:
        messages = [dict(message) for message in problem.messages]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    prompts = [{"prompt_token_ids": rendered(problem)} for problem in job.load()]
    sampling = {"temperature": files.sampling.temperature, "top_p": files.sampling.top_p, "ignore_eos": True}

    def work(lengths: Lengths) -> tuple[int, Lengths]:
        asked = [
            [(prompt, vllm.SamplingParams(max_tokens=length, **sampling)) for length in row]
            for prompt, row in zip(prompts, lengths, strict=True)
        ]
        for call in asked if serial else [[one for row in asked for one in row]]:
            llm.generate([prompt for prompt, _ in call], [params for _, params in call], use_tqdm=False)
        return sum(map(sum, lengths)), lengths

    return work


def client(job: Job) -> Work:
    """A plain aiohttp client of the server: one chat request a sample, ``concurrency`` at once over connections that stay open, no
    streaming."""
    import aiohttp

    problems = job.load()

    async def one(http: aiohttp.ClientSession, problem: Problem, length: int) -> int:
        body = {
            "model": job.model, "messages": [dict(m) for m in problem.messages], "temperature": 1.0, "max_tokens": length,
            "ignore_eos": True,
        }  # fmt: skip
        async with http.post(f"{job.url}/v1/chat/completions", json=body) as reply:
            reply.raise_for_status()
            return int((await reply.json())["usage"]["completion_tokens"])

    async def everything(lengths: Lengths) -> int:
        connector = aiohttp.TCPConnector(limit=job.concurrency)
        async with aiohttp.ClientSession(connector=connector) as http:
            pieces = [one(http, p, n) for p, row in zip(problems, lengths, strict=True) for n in row]
            return sum(await asyncio.gather(*pieces))

    return lambda lengths: (asyncio.run(everything(lengths)), lengths)


def its_hub(job: Job) -> Work:
    """its_hub's SelfConsistency, as its documentation uses it: problem after problem."""
    from its_hub import SelfConsistency
    from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel

    model = OpenAICompatibleLanguageModel(
        endpoint=f"{job.url}/v1",
        api_key="none",
        model_name=job.model,
        temperature=1.0,
        max_tokens=job.thinking_tokens + 32,
    )
    algorithm = SelfConsistency(lambda text: text.split("</think>")[-1].strip())
    problems = job.load()

    def work(lengths: Lengths) -> tuple[int, Lengths]:
        for problem in problems:
            algorithm.infer(model, problem.text, budget=job.samples)
        return -1, lengths

    return work


ARMS: dict[str, Callable[[Job], Work]] = {
    "ttc": ours,
    "ttc-out": ours,
    "ttc-wide": ours,
    "bare": bare,
    "bare-serial": lambda job: bare(job, serial=True),
    "client": client,
    "its_hub": its_hub,
}


def main(arguments: Sequence[str]) -> None:
    kind, config = arguments
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not reach the parent's protocol
    work = ARMS[kind](Job(**json.loads(config)))
    print(json.dumps({"ready": kind}), file=out, flush=True)
    for line in sys.stdin:
        lengths = json.loads(line)
        start = time.perf_counter()
        tokens, lengths = work(lengths)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told = {"tokens": tokens, "seconds": seconds, "peak_bytes": peak, "lengths": lengths}
        print(json.dumps(told), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
