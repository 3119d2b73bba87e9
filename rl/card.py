"""Model cards: ``card.json`` and README.md beside the weights, written by shipping a run and refreshed by the
evaluation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ttc.nano
from ttc.rl import tokenizer
from ttc.rl.model import CONTEXT_TOKENS, load

ANSWER_TOKENS = 10
_NUMBER = re.compile(r"(?:^| = |,|So )(-?\d+)(?=[;,.])")


def last_total(thought: str) -> str:
    """The last whole number that a thought states as a total, or "" (what one could answer without the
    model)."""
    found = _NUMBER.findall(thought.replace(";", ";,"))
    return found[-1] if found else ""


def read(folder: Path) -> dict[str, Any]:
    """The card of a model folder."""
    data: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return data


def write(folder: Path, info: Mapping[str, Any]) -> None:
    """card.json and README.md."""
    (folder / "card.json").write_text(json.dumps(info, indent=1) + "\n")
    (folder / "README.md").write_text(readme(info))


def ship(run: Path, name: str, tasks: Sequence[str], training: Mapping[str, Any]) -> Path:
    """Copy a run's model into the package as ``name``, with a card that waits for its evaluation."""
    folder = ttc.nano.ROOT / name
    folder.mkdir(exist_ok=True)
    for file in [*(run / "model").iterdir(), run / "loss.json"]:
        shutil.copy(file, folder / file.name)
    info = {
        "name": name,
        "params": load(folder).params,
        "context": CONTEXT_TOKENS,
        "tasks": list(tasks),
        "format": {
            "think_open": tokenizer.THINK_OPEN,
            "think_close": tokenizer.THINK_CLOSE,
            "extract": "tail",
            "close_text": tokenizer.THINK_CLOSE,
            "answer_tokens": ANSWER_TOKENS,
            "triggers": list(tokenizer.TRIGGERS),
            "efforts": list(tokenizer.EFFORT_LEVELS),
        },
        "sampling": {"temperature": 1.0, "top_p": 1.0},
        "typical_thinking_tokens": 0,
        "training": dict(training),
        "evaluation": {},
    }
    write(folder, info)
    return folder


def readme(info: Mapping[str, Any]) -> str:
    """The model card in prose and tables, from card.json alone."""
    training, evaluation = info["training"], info["evaluation"]
    triggers = ", ".join(f'"{trigger}"' for trigger in info["format"]["triggers"])
    lines = [
        f"# {info['name']}",
        "",
        f"A reasoner of {info['params']:,} parameters (Qwen3ForCausalLM, bf16 weights, context",
        f"{info['context']} tokens), trained from nothing to think in tokens about sums and differences. It is",
        "a laboratory model for test-time compute: it makes mistakes, can check itself, and gets better with",
        "samples and with length. It knows nothing else.",
        "",
        "It writes `<think>` thinking `</think>` answer. The chat template opens the thought and takes an",
        "optional `effort` (0 to 1, in quarters). When `</think>` is forced at any point, it answers in",
        f"a few tokens. Trigger sentences it was trained on: {triggers}.",
        "",
        "## Training",
        "",
        *(f"- {key}: {value}" for key, value in training.items()),
        "",
        "Problems follow the distribution of reasoning-gym's chain_sum (2 to 12 terms, 1 to 4 digits). What",
        "the held-out seeds of the graded tasks can produce was excluded by expression. How the traces are",
        "made, with their mistakes, rechecks and closes: `rl/traces.py`, `docs/nano.md`.",
        "",
        "Demo task: `" + info["tasks"][0] + "`",
    ]
    if evaluation:
        lines += ["", *_tables(info, evaluation)]
    return "\n".join(lines) + "\n"


def _tables(info: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    rows = evaluation["by_difficulty"]
    demo = info["tasks"][0]
    lines = [
        "## Held-out results",
        "",
        f"Printed by `python -m ttc.rl.evaluate --model {info['name']}`: {rows[0]['problems']} problems",
        f"a row, {rows[0]['samples']} samples each at temperature 1; reasoning-gym's generator (items",
        f"{evaluation['seed']} on) and scorer; percent, with 95 % bootstrap intervals over problems.",
        "Triggers and efforts have half as many samples.",
        "",
        "| task | pass@1 | coverage@8 | majority@8 | thinking tokens: median, 99th percentile |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = " | ".join(_percent(row[key]) for key in ("pass@1", "coverage@8", "majority@8"))
        length = row["thinking_tokens"]
        lines.append(f"| {_short(row['task'])} | {figures} | {length['median']:.0f}, {length['p99']:.0f} |")
    lines += [
        "",
        f"Thought closed by force after at most so many tokens ({_short(demo)});",
        "*last total* is what the cut text itself states:",
        "",
        "| tokens | share cut | pass@1 | majority@8 | last total |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in evaluation["forced_close"]:
        figures = " | ".join(_percent(row[key]) for key in ("pass@1", "majority@8", "last_total"))
        lines.append(f"| {row['budget']} | {row['cut']:.0%} | {figures} |")
    for task, table in evaluation["triggers"].items():
        lines += [
            "",
            f"Thinking cut at its first conclusion, then k triggers behind it, one at a time ({_short(task)}):",
            "",
            "| trigger | k | pass@1 | thinking tokens, mean |",
            "| --- | --- | --- | --- |",
            *(
                f"| {r['trigger']} | {r['k']} | {_percent(r['pass@1'])} | {r['thinking_tokens']:.0f} |"
                for r in table
            ),
        ]
    lines += [
        "",
        f"Effort in the prompt ({_short(demo)}):",
        "",
        "| effort | pass@1 | thinking tokens, mean |",
        "| --- | --- | --- |",
        *map(_effort_row, evaluation["efforts"]),
    ]
    return lines


def _effort_row(row: Mapping[str, Any]) -> str:
    return f"| {row['effort']} | {_percent(row['pass@1'])} | {row['thinking_tokens']['mean']:.0f} |"


def _percent(value: Mapping[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{100 * value['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _short(task: str) -> str:
    """``rg:chain_sum?min_terms=8&max_terms=8&…`` → ``chain_sum, 8 terms of 2 digits``."""
    match = re.fullmatch(r"rg:(\w+)\?min_terms=(\d+)&max_terms=(\d+)&min_digits=(\d+)&max_digits=(\d+)", task)
    if not match:
        return task
    name, *numbers = match.groups()
    (a, b), (c, d) = numbers[:2], numbers[2:]
    digits = "1 digit" if c == d == "1" else f"{c if c == d else f'{c} to {d}'} digits"
    return f"{name}, {a if a == b else f'{a} to {b}'} terms of {digits}"
