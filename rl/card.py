"""Model cards: ``card.json`` and README.md beside the weights, written by shipping a run and refreshed by the
evaluation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import ttc.nano
from ttc.rl import heldout, tokenizer
from ttc.rl.model import CONTEXT_TOKENS, load

SCORE, BOOTSTRAP = "score intervals (`ttc.costmodel.intervals`)", "percentile bootstrap"
"""How a card's intervals were made; cards that don't say so have the bootstrap's, which are too narrow near 0 and 100 %."""

ANSWER_TOKENS = 18  # countdown's expressions of four numbers
SUBJECTS = {
    "sums": "sums and differences of 2 to 12 terms",
    "long": "long ones of up to 32",
    "products": "products",
    "countdown": "countdown",
}
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


def write_reward(folder: Path, info: Mapping[str, Any]) -> None:
    """card.json and README.md of a reward model."""
    (folder / "card.json").write_text(json.dumps(info, indent=1) + "\n")
    (folder / "README.md").write_text(reward_readme(info))


REWARD_KINDS = {
    "outcome": "It scores whole chains: a logit, whose differences between chains of one problem count. Trained on pairs of "
    "a right and\na wrong sample of one problem (Bradley-Terry) with TRL's RewardTrainer.",
    "process": "It scores every token of a chain: the chance that a chain which has got so far ends right. Trained on whether it "
    "did.",
}


def reward_readme(info: Mapping[str, Any]) -> str:
    """A reward model's card in prose and tables, from card.json alone."""
    lines = [
        f"# {info['name']}",
        "",
        f"A reward model ({info['kind']}) of {info['params']:,} parameters (Qwen3ForSequenceClassification, one label, bf16).",
        REWARD_KINDS[info["kind"]],
        "",
        f"`ttc.nano.reward({info['name']!r})` loads it; `ttc train reward` makes it (`rl/reward.py`, `rl/train_reward.py`).",
        "",
        "## Training",
        "",
        *(f"- {key}: {value}" for key, value in info["training"].items() if key != "curve"),
    ]
    if rows := info["evaluation"]:
        k = rows[0]["samples"]
        names = [
            "auc",
            "auc_within",
            "pass@1",
            f"majority@{k}",
            f"best@{k}",
            f"weighted@{k}",
            "best - majority",
        ]
        names.append("weighted - majority")
        heads = ["reasoner", "task", *(name.replace("auc", "AUC").replace("_", " ") for name in names)]
        lines += [
            "",
            "## Held-out results",
            "",
            f"{rows[0]['problems']} problems a row × {k} samples × {rows[0]['seeds']} seeds at temperature 1; percent with 95 %",
            f"intervals over problems: {' or '.join(sorted({row.get('intervals', BOOTSTRAP) for row in rows}))}.",
            "AUC: chance that a right chain scores above a wrong one, over all chains (interval: percentile bootstrap), and",
            f"within one problem (what choosing between samples needs). Best: the highest of {k} scores; weighted: the answer",
            "with the largest sum of scores.",
            "",
            f"| {' | '.join(heads)} |",
            "|" + " --- |" * len(heads),
        ]
        for row in rows:
            cells = [row["reasoner"], short(row["task"]), *(percent(row[name]) for name in names)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def readme(info: Mapping[str, Any]) -> str:
    """The model card in prose and tables, from card.json alone."""
    training, evaluation = info["training"], info["evaluation"]
    triggers = ", ".join(f'"{trigger}"' for trigger in info["format"]["triggers"])
    lines = [
        f"# {info['name']}",
        "",
        f"A reasoner of {info['params']:,} parameters (Qwen3ForCausalLM, bf16 weights, context",
        f"{info['context']} tokens), trained from nothing to think in tokens about {_subjects(info['tasks'])}. It is a",
        "laboratory model for test-time compute: it makes mistakes, can check itself, and gets better with samples and with",
        "length. It knows nothing else.",
        "",
        "It writes `<think>` thinking `</think>` answer. The chat template opens the thought and takes an",
        "optional `effort` (0 to 1, in quarters). When `</think>` is forced at any point, it answers in",
        f"a few tokens. Trigger sentences it was trained on: {triggers}.",
        "",
        "## Training",
        "",
        *(f"- {key}: {value}" for key, value in training.items()),
        "",
        "Problems follow reasoning-gym's distributions. What the held-out seeds of the graded tasks can produce was excluded",
        "(`rl/heldout.py`). How the traces are made, with their mistakes, rechecks and closes: `docs/nano.md`.",
        "",
        "Demo task: `" + info["tasks"][0] + "`",
    ]
    if evaluation:
        lines += ["", *_tables(info, evaluation)]
    return "\n".join(lines) + "\n"


def _subjects(tasks: Sequence[str]) -> str:
    """What the tasks are about, in words."""
    known = [
        words for family, words in SUBJECTS.items() if any(task in tasks for task in heldout.GRADED[family])
    ]
    return " and ".join([", ".join(known[:-1])] * (len(known) > 1) + known[-1:])


def _tables(info: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    rows = evaluation["by_difficulty"]
    demo = info["tasks"][0]
    lines = [
        "## Held-out results",
        "",
        f"Printed by `python -m ttc.rl.evaluate --model {info['name']}`: temperature 1, in vLLM; reasoning-gym's generator (items",
        f"{evaluation['seed']} on) and scorer; percent, with 95 % intervals over problems:",
        f"{evaluation.get('intervals', BOOTSTRAP)}.",
        "A row has as many samples a problem as it says, over three seeds; k is what coverage and vote are of.",
        "",
        "| task | problems × samples | k | pass@1 | coverage@k | majority@k | thinking tokens: median, 99th percentile |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        k = next(key for key in row if key.startswith("coverage@")).removeprefix("coverage@")
        figures = " | ".join(percent(row[key]) for key in ("pass@1", f"coverage@{k}", f"majority@{k}"))
        length = row["thinking_tokens"]
        tail = f"{length['median']:.0f}, {length['p99']:.0f}"
        lines.append(
            f"| {short(row['task'])} | {row['problems']} × {row['samples']} | {k} | {figures} | {tail} |"
        )
    for task, curve in evaluation.get("by_samples", {}).items():
        lines += [
            "",
            f"By samples ({short(task)}; {curve[0]['problems']} problems):",
            "",
            "| k | coverage@k | majority@k |",
            "| --- | --- | --- |",
            *(f"| {row['k']} | {percent(row['coverage'])} | {percent(row['majority'])} |" for row in curve),
        ]
    for task, table in evaluation.get("forced_close", {}).items():
        vote = next(key for key in table[0] if key.startswith("majority@"))
        lines += [
            "",
            f"Thought closed by force after at most so many tokens ({short(task)});",
            "*last total* is what the cut text itself states:",
            "",
            f"| tokens | share cut | pass@1 | {vote} | last total |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in table:
            figures = " | ".join(percent(row[key]) for key in ("pass@1", vote, "last_total"))
            lines.append(f"| {row['budget']} | {row['cut']:.0%} | {figures} |")
    for task, table in evaluation.get("triggers", {}).items():
        lines += [
            "",
            f"Thinking cut at its first conclusion, then k triggers behind it, one at a time ({short(task)}):",
            "",
            "| trigger | k | pass@1 | hard half | gain over k = 0, points | thinking tokens, mean |",
            "| --- | --- | --- | --- | --- | --- |",
            *(
                f"| {r['trigger']} | {r['k']} | {percent(r['pass@1'])} | {percent(r['hard half'])} | {_gain(r)} | "
                f"{r['thinking_tokens']:.0f} |"
                for r in table
            ),
        ]
    if levels := evaluation.get("efforts"):
        lines += [
            "",
            f"Effort in the prompt ({short(demo)}):",
            "",
            "| effort | pass@1 | thinking tokens, mean |",
            "| --- | --- | --- |",
            *map(_effort_row, levels),
        ]
    return lines


def _effort_row(row: Mapping[str, Any]) -> str:
    return f"| {row['effort']} | {percent(row['pass@1'])} | {row['thinking_tokens']['mean']:.0f} |"


def _gain(row: Mapping[str, Any]) -> str:
    return percent(row["gain"]) if "gain" in row else ""  # of what is compared with itself there is none


def percent(value: Mapping[str, Any]) -> str:
    """``61.9 [58.3, 65.2]``."""
    low, high = value["ci95"]
    return f"{100 * value['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def short(task: str) -> str:
    """``rg:chain_sum?min_terms=8&max_terms=8&…`` → ``chain_sum, 8 terms of 2 digits``; the like for the other tasks."""
    name, _, query = task.removeprefix("rg:").partition("?")
    given = {key: int(value) for key, value in parse_qsl(query)}

    def span(what: str) -> str:
        low, high = given[f"min_{what}"], given[f"max_{what}"]
        return f"{low}" if low == high else f"{low} to {high}"

    if name == "chain_sum" and len(given) == 4:
        return f"{name}, {span('terms')} terms of {_digits(span('digits'))}"
    if name == "products" and len(given) == 2:
        return f"{name} of {_digits(span('digits'))}"
    if name == "countdown" and "max_numbers" in given:
        return f"{name}, {span('numbers')} numbers"
    return task


def _digits(span: str) -> str:
    return "1 digit" if span == "1" else f"{span} digits"
