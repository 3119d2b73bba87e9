"""``ttc models``, ``ttc policies`` and ``ttc doctor``: what is here, does it work."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import platform
import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]


def models(as_json: AsJson = False) -> None:
    """List the embedded reasoners and reward models."""
    from ttc import nano

    known = nano.catalog()
    if as_json:
        told = ("name", "params", "context", "tasks", "pass_at_1")
        print(json.dumps([{"path": str(m.path)} | {key: getattr(m, key) for key in told} for m in known]))
        return
    from rich.table import Table

    from ttc.cli.render import in_pieces, show, stdout

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("task: right in one sample, %")
    room = stdout.width - 2 - sum(len(m.name) + 2 for m in known)
    for m in known:
        table.add_column(f"{m.name}\n{m.params / 1e6:.2f} M", justify="right", no_wrap=True)
    for task in dict.fromkeys(task for m in known for task in m.tasks):
        table.add_row(
            in_pieces(task, room),
            *(f"{100 * m.pass_at_1[task]:.0f}" if task in m.pass_at_1 else "" for m in known),
        )
    show(table)
    stdout.print(
        "Held-out problems, 200 a task; intervals, votes, lengths: README.md in a model's folder (--json: its path)."
    )
    stdout.print("A folder with a Hugging Face model, or a hub id, works wherever a name does.")
    stdout.print(f"Reward models, for --reward: {', '.join(nano.rewards())}.")


def policies(
    name: Annotated[str | None, typer.Argument(help="Only this one, with all that there is to say.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the policies with their options, as '--policy' takes them, and what they are if not given."""
    from ttc.policies import POLICIES, parse

    known = {n: parse(n) for n in (POLICIES if name is None else [name.partition("?")[0]])}
    told = {n: _about(type(policy)) for n, policy in known.items()}
    options: dict[str, dict[str, Any]] = {
        n: {f.name: getattr(policy, f.name) for f in fields(policy)} if is_dataclass(policy) else {}
        for n, policy in known.items()
    }
    if as_json:
        rows = [{"name": n, "options": options[n], "about": told[n]} for n in known]
        print(json.dumps(rows, default=str))
        return
    from rich.padding import Padding
    from rich.text import Text

    from ttc.cli.render import show, stdout

    for n in known:
        given = ", ".join(f"{key}={'' if value is None else value}" for key, value in options[n].items())
        show(Text.assemble((n, "bold"), f"  {given}"))
        if not told[n]:
            continue
        first = re.split(r"(?<=[^\s\d])\.\s", told[n], maxsplit=1)[0].rstrip(".") + "."
        show(Padding(Text(" ".join(first.split()) if name is None else told[n]), (0, 0, 0, 4)))
    if name is None:
        stdout.print(
            "Write options as in --policy 'best-of-n?n=16&score=mean-logprob'; 'ttc policies NAME' tells all about one."
        )


def _about(kind: type) -> str:
    """A policy's docstring, for people; not the signature that a dataclass without one is given."""
    text = (inspect.getdoc(kind) or "").replace("``", "'")
    return "" if text.startswith(f"{kind.__name__}(") else text


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor: ``ok`` None means: not there, and only needed for what ``detail`` says."""

    name: str
    ok: bool | None
    detail: str


def doctor(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model for the self-test.")] = None,
    as_json: AsJson = False,
) -> None:
    """What is installed, which engine can start, and a self-test that caps are honoured."""
    checks = [*_packages(), _plugin(), _sparse_plugin(), *_machine()]
    checks += _self_test(model)
    failed = any(check.ok is False for check in checks)
    if as_json:
        print(
            json.dumps(
                {
                    "ok": not failed,
                    "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in checks],
                }
            )
        )
    else:
        from rich.table import Table
        from rich.text import Text

        from ttc.cli.render import show

        table = Table.grid(padding=(0, 1, 0, 0))
        for check in checks:
            mark, style = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "dim")}[check.ok]
            table.add_row(Text(mark, style), check.name, Text(check.detail))
        show(table)
    if failed:
        raise typer.Exit(1)


def _packages() -> list[Check]:
    from importlib.metadata import PackageNotFoundError, version

    wanted = {
        "torch": "the engine, training", "vllm": "solving on this machine", "transformers": "the engine",
        "math_verify": "the math verifier",
        "reasoning_gym": "rg: tasks", "datasets": "hf: tasks", "trl": "training", "ray": "several machines", "matplotlib": "plots",
    }  # fmt: skip
    checks = []
    for module, use in wanted.items():
        if importlib.util.find_spec(module) is None:
            checks.append(Check(module, None, f"not installed; needed for {use}"))
            continue
        for name in (module, f"{module}-cpu", module.replace("_", "-")):
            try:
                checks.append(Check(module, True, version(name)))
                break
            except PackageNotFoundError:
                continue
    return checks


def _plugin() -> Check:
    from ttc.engine.vllm_start import plugin_installed

    if plugin_installed():
        return Check("control plugin", True, "vLLM will load ttc's logits processor")
    return Check(
        "control plugin",
        False,
        "vLLM will not find ttc's logits processor: install the package (pip install -e .), a path is not enough",
    )


def _sparse_plugin() -> Check:
    from ttc.engine.vllm_start import import_vllm
    from ttc.errors import EngineError

    if importlib.util.find_spec("vllm") is None:
        return Check("sparse decoding", None, "needs vLLM")
    try:
        import_vllm()  # before anything imports torch: it is told to be quiet
    except EngineError as error:
        return Check("sparse decoding", None, str(error))
    from ttc.attention import plugin
    from ttc.attention.compiled import selector

    if not plugin.installed():
        return Check(
            "sparse decoding",
            False,
            "vLLM will not find ttc's attention plugin: install the package (pip install -e .)",
        )
    ours = plugin.active()
    if not ours:
        return Check(
            "sparse decoding", None, "off: vLLM's attention backend here is not one that the plugin extends"
        )
    how = "in C++" if selector() is not None else "in torch, which is slower: no C++ compiler here"
    if "CPU_ATTN" not in ours:
        how = "in Triton"
    return Check("sparse decoding", True, f"extends vLLM's {', '.join(ours)}; pages are chosen {how}")


def _machine() -> list[Check]:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = "an NVIDIA device" if Path("/dev/nvidia0").exists() else "no GPU: vLLM's CPU build is used"
    return [Check("machine", True, f"{platform.machine()}, {os.cpu_count()} cores, {gib:.0f} GiB; {gpu}")]


def _self_test(model: str | None) -> list[Check]:
    """Start the engine; a thought capped at 8 tokens must close there and still answer, and a token budget must hold."""
    from ttc.api import DEFAULT_MODEL, Run, Settings, start_engine
    from ttc.errors import TTCError
    from ttc.problems import from_text

    try:
        engine: Any = start_engine(model or DEFAULT_MODEL, concurrency=8)
    except TTCError as error:
        return [Check("engine", False, str(error))]
    try:
        info = engine.info
        checks = [
            Check(
                "engine",
                True,
                f"{info.name} runs {info.model}, context {info.context:,}, {info.concurrency} branches at once",
            )
        ]
        settings = Settings(policy="self-consistency?n=8", budget="2k tokens", max_thinking_tokens=8)
        run = Run(
            from_text("State the final answer to the following arithmetic problem: 12 + 3 - 4 + 9 - 5 ="),
            engine,
            settings,
        )
        result = next(iter(list(run.results())))
        cap = 8 + engine.room_tokens
        longest = max(b.completion.output_tokens for b in result.branches)
        empty = sum(not b.answer for b in result.branches)
        forced = sum(b.completion.forced_tokens for b in result.branches)
        kept = longest <= cap and not empty
        checks.append(
            Check(
                "caps",
                kept,
                f"8 branches, longest {longest} of at most {cap} tokens, {forced} forced, {empty} empty answers",
            )
        )
        ledger, counted = run.status.charge.tokens, engine.counters().output_tokens
        checks.append(
            Check("ledger", ledger == counted, f"{ledger} tokens charged, {counted} counted by the engine")
        )
        return checks
    except TTCError as error:
        return [Check("self-test", False, str(error))]
    finally:
        engine.close()
