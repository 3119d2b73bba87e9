"""``ttc solve`` and ``ttc demo``: problems in, answers out, under a hard budget."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttc.errors import EngineError, InputError

if TYPE_CHECKING:
    from ttc.api import Run
    from ttc.jobs import Status
    from ttc.types import Result

SPARSE_PAGE = 32
"""Tokens of a KV page under --kv-budget: vLLM's own on CPU, 128, leaves a small budget no choice."""


def _panel(title: str) -> Callable[..., Any]:
    """Options that ``--help`` shows under a title."""
    return partial(typer.Option, rich_help_panel=title)


_problem, _model, _budget = _panel("Problems"), _panel("Model and engine"), _panel("Policy and budget")
_sampling, _sparse, _output = _panel("Sampling"), _panel("Sparse attention"), _panel("Output")

Model = Annotated[
    str | None,
    _model("--model", "-m", help="A nano name (see 'ttc models'), a folder or a hub id."),
]
Engine = Annotated[
    str,
    _model("--engine", help="'vllm' (in this process) or 'openai:URL' (a server; its key: OPENAI_API_KEY)."),
]
PolicyOption = Annotated[
    str,
    _budget(
        "--policy",
        "-p",
        help="self-consistency, best-of-n, … ('ttc policies' lists them); options as 'best-of-n?n=16'.",
    ),
]
BudgetOption = Annotated[
    str,
    _budget(
        "--budget", "-b", help="'20k tokens', '3e15 eflops', '40 TeFLOPs', '30 s' or '$0.05'; never exceeded."
    ),
]
Scope = Annotated[
    str,
    _budget("--budget-scope", help="'problem': each problem has the budget; 'run': all share it."),
]
Seed = Annotated[
    int,
    _sampling(
        "--seed", help="Every sample's seed is made from this, the problem's id and the sample's index."
    ),
]
Quiet = Annotated[bool, _output("--quiet", "-q", help="No progress, no line per problem.")]
AsJson = Annotated[bool, _output("--json", help="One JSON object on stdout, nothing else there.")]


def solve(
    text: Annotated[str | None, typer.Argument(help="A problem, as text.", show_default=False)] = None,
    input: Annotated[Path | None, _problem("--input", "-i", help="A JSONL file: id, prompt or messages, answer, ….")] = None,
    task: Annotated[str | None, _problem("--task", "-t", help="'rg:NAME?k=v&k=v' (reasoning-gym) or 'hf:ID[:SPLIT]'.")] = None,
    n: Annotated[int | None, _problem("--n", help="How many problems of the file or task (a task: 100 if not given).")] = None,
    model: Model = None,
    engine: Engine = "vllm",
    policy: PolicyOption = "self-consistency",
    budget: BudgetOption = "4k tokens",
    budget_scope: Scope = "problem",
    seed: Seed = 0,
    temperature: Annotated[float | None, _sampling(help="Sampling temperature (the model's own if not given).")] = None,
    top_p: Annotated[float | None, _sampling(help="Nucleus sampling mass.")] = None,
    top_k: Annotated[int | None, _sampling(help="Sample among the k likeliest tokens (0: all).")] = None,
    max_thinking: Annotated[int | None, _sampling(help="Tokens after which a thought is made to close.")] = None,
    effort: Annotated[float | None, _sampling(help="Relative effort in (0, 1], for models trained for it.")] = None,
    kv_budget: Annotated[int | None, _sparse(help="KV tokens that a decoded token reads (all if not given).")] = None,
    kv_method: Annotated[str | None, _sparse(help="block-topk, quest, streaming, power or oracle-topk.")] = None,
    kv_page: Annotated[int | None, _sparse(help="Tokens of a KV page: what is chosen or not (32 with --kv-budget).")] = None,
    kv_when: Annotated[str | None, _sparse(help="Read a part where that is faster (if not given), cheaper or always.")] = None,
    think_close: Annotated[str | None, _model(help="What ends a thought, if the model's files don't tell.")] = None,
    reward: Annotated[str | None, _model(help="Scores for a policy: nano-s-process, vllm:MODEL, http://HOST:PORT.")] = None,
    verifier: Annotated[str | None, _problem(help="exact, math, rg, or package.module:Class.")] = None,
    out: Annotated[Path | None, _output("--out", "-o", help="Run directory; the same command again resumes it.")] = None,
    concurrency: Annotated[int, _model(help="Branches in flight.")] = 64,
    engine_arg: Annotated[list[str] | None, _model("--engine-arg", help="vLLM's own, as NAME=VALUE; repeatable.")] = None,
    context: Annotated[int | None, _model(help="Longest sequence in tokens (the model's own if not given).")] = None,
    shape: Annotated[str | None, _model(help="Model (name or folder) whose shape prices a server's FLOPs.")] = None,
    intensity: Annotated[float | None, _budget(help="FLOP per byte in eFLOPs (562.5, the paper's, if not given).")] = None,
    price_input: Annotated[float | None, _budget(help="Dollars per million prompt tokens.")] = None,
    price_output: Annotated[float | None, _budget(help="Dollars per million output tokens.")] = None,
    skip_bad_rows: Annotated[bool, _problem("--skip-bad-rows", help="Run the rest where rows are bad.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Solve problems under a hard budget.

    The same command with the same --out resumes: nothing finished is sampled again.
    """
    from ttc.api import DEFAULT_MODEL, Settings
    from ttc.attention.settings import check_when
    from ttc.checks import check_reward
    from ttc.jobs import traits_of
    from ttc.problems import load
    from ttc.rewards import load_reward

    price = {
        k: v
        for k, v in {"usd_per_m_input": price_input, "usd_per_m_output": price_output}.items()
        if v is not None
    }
    settings = Settings(
        policy=policy, budget=budget, scope=budget_scope, seed=seed, temperature=temperature, top_p=top_p, top_k=top_k,
        max_thinking_tokens=max_thinking, effort=effort, kv_budget=kv_budget, kv_method=kv_method, intensity=intensity,
        price=price,
    )  # fmt: skip
    settings.check()
    rule, most = settings.resolved()
    if model is not None and not model.strip():
        raise InputError("model: the name is empty; give a nano name, a folder or a hub id, or leave it out")
    if text is not None and n is not None:
        raise InputError(
            f"n: {n} problems, but a text is one; leave it out (samples are the policy's: -p 'self-consistency?n={max(n, 1)}')"
        )
    with _saying("reading the problems", not (quiet or as_json)):
        loaded = load(
            text=text, input=input, task=task, n=n if n is not None or task is None else 100, seed=seed,
            skip_bad_rows=skip_bad_rows, verifier=verifier,
        )  # fmt: skip
    options: dict[str, Any] = {"concurrency": concurrency}
    if engine.startswith("openai"):
        for name, value, mend in (
            ("kv-page", kv_page, "--block-size"),
            ("kv-when", kv_when, "TTC_SPARSE in its environment"),
            ("engine-arg", engine_arg or None, "vllm serve's own options"),
            ("think-close", think_close, "the model's own files, beside the server"),
        ):
            if value is not None:
                raise InputError(f"{name}: is set where the server is started ({mend}); leave it out")
        options |= {"context": context} | ({"shape": _shape(shape)} if shape is not None else {})
    else:
        if shape is not None:
            raise InputError("shape: the engine in this process knows its model's shape; leave it out")
        model = model or DEFAULT_MODEL
        options |= {"context": context, "think_close": think_close}
        page = kv_page if kv_page is not None or kv_budget is None else SPARSE_PAGE
        options |= {} if page is None else {"kv_page": page}
        if engine_arg:
            from ttc.engine.vllm_args import read_engine_args

            options |= {"engine_args": read_engine_args(engine_arg)}
        if kv_when is not None and kv_budget is None:
            raise InputError(f"kv-when: {kv_when!r} needs a budget; add --kv-budget TOKENS")
        options |= {} if kv_when is None else {"kv_when": check_when(kv_when)}
        options |= {"short_pages": True} if "steps" in traits_of(rule).needs else {}
    judge = load_reward(reward) if reward is not None else None
    check_reward(rule, judge, most.unit)
    with _opened(model or "", engine, options, say=not (quiet or as_json)) as opened:
        from ttc.api import Run, fitting
        from ttc.cli.render import note

        problems = list(loaded.problems)
        skipped = list(loaded.skipped)
        if loaded.extras:
            note(f"columns kept in each problem's meta: {', '.join(loaded.extras)}")
        if skip_bad_rows:
            problems, long = fitting(problems, opened, settings)
            skipped += long
        run = Run(problems, opened, settings, out=out, skipped_rows=skipped, reward=judge)
        results = _follow(run, quiet=quiet or as_json, lines=len(problems) > 1)
        _close(run, results, as_json=as_json, single=len(problems) == 1 and text is not None)


def demo(
    n: Annotated[int, typer.Option("--n", help="How many problems.")] = 100,
    model: Model = None,
    seed: Seed = 0,
    budget: BudgetOption = "4k tokens",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Solve reasoning-gym problems with an embedded reasoner: what do eight votes buy over one sample?"""
    from ttc import nano
    from ttc.api import DEFAULT_MODEL, Run, Settings
    from ttc.problems import from_task

    name = model or DEFAULT_MODEL
    known = {m.name: m for m in nano.catalog()}
    if name not in known:
        raise InputError(
            f"model: the demo runs on an embedded reasoner, not {name!r}; use one of {', '.join(known)}"
        )
    task = known[name].tasks[0]
    with _saying("drawing the problems", not (quiet or as_json)):
        problems = from_task(task, n, seed)
    settings = Settings(policy="self-consistency?n=8", budget=budget, seed=seed)
    settings.check()
    with _opened(name, "vllm", {"concurrency": 64}, say=not (quiet or as_json)) as opened:
        run = Run(problems, opened, settings)
        results = _follow(run, quiet=quiet or as_json, lines=True)
        if run.interrupted:
            raise typer.Exit(3)
        from ttc.cli.render import print_answer, print_summary, stdout
        from ttc.curves import vote_curve

        curve = vote_curve(results, (1, 2, 4, 8), seed=seed)
        summary = run.summary() | {"task": task, "votes": [point._asdict() for point in curve]}
        if as_json:
            print(json.dumps(summary))
            return
        stdout.rule(f"{name} on {task}")
        shown = max(results, key=_telling)
        print_answer(next(p for p in problems if p.id == shown.problem_id), shown, thought=True)
        stdout.print()
        print_summary(summary)
        stdout.print("\nWhat votes buy (the same samples; 95 % intervals over problems):")
        for point in curve:
            bar = "█" * round(40 * point.accuracy)
            stdout.print(
                f"  {point.votes} vote{'s' if point.votes > 1 else ' '}  {point.accuracy:6.1%}"
                f"  ({point.low:.1%} to {point.high:.1%})  {bar}"
            )
        gain = curve[-1].gain
        stdout.print(
            f"  gain of {curve[-1].votes} votes over 1: {gain.mean:+.1%}  ({gain.low:+.1%} to {gain.high:+.1%}, paired)"
        )


def _telling(result: Result) -> tuple[bool, int]:
    """How well a problem shows what votes are for: won by the right answer against the most others."""
    return bool(result.verdict and result.verdict.correct), len(result.votes)


def _shape(name: str) -> Any:
    from ttc import nano
    from ttc.costmodel import ModelShape

    return ModelShape.of(str(nano.resolve(name) or name))


@contextmanager
def _opened(model: str, engine: str, options: dict[str, Any], *, say: bool) -> Iterator[Any]:
    """An open engine; a word on stderr while it starts."""
    from ttc.api import start_engine

    with _saying(f"starting {model or engine}", say):
        opened = start_engine(model, engine, **options)
    try:
        yield opened
    finally:
        opened.close()


def _saying(what: str, say: bool) -> AbstractContextManager[Any]:
    """A word on stderr, on a terminal, while the block runs."""
    from ttc.cli.render import stderr

    return stderr.status(what) if say else nullcontext()


def _follow(run: Run, *, quiet: bool, lines: bool) -> list[Result]:
    """Run to the end, or to the first signal, showing progress."""
    from ttc.cli.render import Live, note, print_line

    for notice in run.notices:
        note(notice)
    for line in run.skipped_rows:
        note(f"skipped {line}")
    by_id = {p.id: p for p in run.problems}
    results: list[Result] = []
    unsaid = True

    def step(status: Status) -> None:
        nonlocal unsaid
        if unsaid and run.driver.crowded:
            note(run.driver.crowded)
        unsaid = False
        live.update(status)

    try:
        with _signals(run), Live(run.budget, len(run.problems), quiet=quiet) as live:
            run.driver.on_step = step
            for result in run.results():
                results.append(result)
                if lines and not quiet and (len(run.problems) <= 40 or result.error):
                    print_line(by_id[result.problem_id], result)
    except EngineError as error:
        raise EngineError(f"{error}; {_saved(run, len(results))}") from error
    except KeyboardInterrupt:  # a second Ctrl-C
        _stopped(run, len(results))
        raise typer.Exit(3) from None
    return results


def _stopped(run: Run, done: int) -> None:
    """Say that the run was stopped, and the command that goes on with it."""
    from ttc.cli.render import note

    note(f"stopped: {_saved(run, done)}")
    if run.ledger.directory:
        note(f"to go on: {shlex.join(['ttc', *sys.argv[1:]])}", whole=True)


def _saved(run: Run, done: int) -> str:
    """How far a run came that ended early, and how to go on."""
    out = run.ledger.directory
    how = (
        f" and saved in {out}; the same command resumes them"
        if out
        else "; give --out DIR to be able to resume"
    )
    return f"{done} of {len(run.problems)} problems are done{how}"


@contextmanager
def _signals(run: Run) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the run after the current step; a second SIGINT is Python's own KeyboardInterrupt."""

    def stop(number: int, frame: FrameType | None) -> None:
        run.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _close(run: Run, results: list[Result], *, as_json: bool, single: bool) -> None:
    from ttc.cli.render import note, print_answer, print_summary

    summary = run.summary()
    if as_json:
        print(json.dumps(summary))
    elif single and results:
        print_answer(run.problems[0], results[0])
        if not run.interrupted:
            print_summary(summary, replayed_tokens=run.status.replayed_tokens)
    else:
        print_summary(summary, replayed_tokens=run.status.replayed_tokens)
    if run.interrupted:
        _stopped(run, len(results))
        raise typer.Exit(3)
    for result in results:
        if result.error and not as_json:
            note(f"{result.problem_id} failed: {result.error}")
    sys.stdout.flush()
    if single and results and results[0].answer is None and results[0].error.startswith("budget:"):
        raise typer.Exit(2)
    if results and all(result.error for result in results):
        raise typer.Exit(1)
