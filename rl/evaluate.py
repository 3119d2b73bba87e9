"""Measure a nano reasoner on held-out problems and refresh its card: ``python -m ttc.rl.evaluate --model
nano-s``.

Problems, prompts and verdicts are reasoning-gym's own; the samples are vLLM's. Every figure carries a 95 % interval over
problems, which are the independent draws (samples of one problem are not): ``ttc.costmodel.intervals``. Majority ties count by
their chance under a fair coin.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ttc.nano
from ttc.costmodel import accuracy, intervals
from ttc.costmodel.intervals import Estimate
from ttc.rg_tasks import grade
from ttc.rl import card, heldout, tokenizer
from ttc.rl.generate import Sampler, VllmSampler

MAX_THINKING_TOKENS = 1024
LONG_THINKING_TOKENS = 2600
ANSWER_TOKENS = card.ANSWER_TOKENS
SEEDS = (0, 1, 2)
THINK_CLOSE = tokenizer.ID[tokenizer.THINK_CLOSE]
FULL_STOP = tokenizer.ID["."]
"""Ends every conclusion ("So 85.") and nothing else."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Verdicts (P, S) and answers (P, S) of P problems × S samples, with their thinking tokens (P, S)."""

    right: np.ndarray
    answers: list[list[str]]
    thinking: np.ndarray
    closed: np.ndarray


class Bench:
    """A model and the problems of one task, each repeated ``samples`` times: ``n`` held-out ones, or the ``items`` given."""

    def __init__(
        self,
        sampler: Sampler,
        task: str,
        n: int,
        samples: int,
        seed: int = 0,
        items: Sequence[heldout.Item] | None = None,
    ) -> None:
        self.sampler, self.task, self.samples, self.seed, self.calls = sampler, task, samples, seed, 0
        self.most = LONG_THINKING_TOKENS if task in heldout.GRADED["long"] else MAX_THINKING_TOKENS
        self.data = heldout.dataset(task, heldout.EVAL_SEED, n)
        self.items = heldout.items(task, n) if items is None else list(items)

    def prompts(self, effort: float | None = None) -> list[list[int]]:
        """Prompt ids, problem by problem, each ``samples`` times."""
        return [
            tokenizer.encode(tokenizer.prompt(item.prompt, effort))
            for item in self.items
            for _ in range(self.samples)
        ]

    def extend(self, texts: list[list[int]], max_tokens: int, stop: Sequence[int]) -> list[list[int]]:
        """New tokens for each text; every call of a bench has a seed of its own."""
        self.calls += 1
        return self.sampler(texts, max_tokens, stop, 1000 * self.seed + self.calls)

    def think(self, effort: float | None = None) -> list[list[int]]:
        """Thinking, without its closing mark; at most ``most`` tokens."""
        return [
            _before(new) for new in self.extend(self.prompts(effort), self.most, (THINK_CLOSE, tokenizer.EOS))
        ]

    def answer(self, thoughts: list[list[int]], effort: float | None = None) -> Answers:
        """Close every thought and read the answer."""
        texts = [
            p + thought + [THINK_CLOSE] for p, thought in zip(self.prompts(effort), thoughts, strict=True)
        ]
        news = self.extend(texts, ANSWER_TOKENS, (tokenizer.EOS,))
        flat = [tokenizer.decode(token for token in new if token != tokenizer.EOS).strip() for new in news]
        grid = [flat[start : start + self.samples] for start in range(0, len(flat), self.samples)]
        right = np.array([[self.verdict(p, answer) for answer in row] for p, row in enumerate(grid)])
        lengths = np.array([len(thought) for thought in thoughts]).reshape(right.shape)
        closed = np.array([tokenizer.EOS in new for new in news]).reshape(right.shape)
        return Answers(right, grid, lengths, closed)

    def verdict(self, problem: int, answer: str) -> bool:
        """reasoning-gym's own."""
        return bool(self.data.score_answer(answer, self.items[problem].entry) >= 1.0)

    def with_triggers(self, trigger: str, most: int) -> list[Answers]:
        """Answers after the first conclusion, then after 1 … ``most`` triggers put behind it, one at a
        time."""
        prompts = self.prompts()
        thoughts = [_before(new) for new in self.extend(prompts, self.most, (FULL_STOP, THINK_CLOSE))]
        out = [self.answer(thoughts)]
        for _ in range(most):
            thoughts = [thought + tokenizer.encode(trigger) for thought in thoughts]
            texts = [p + thought for p, thought in zip(prompts, thoughts, strict=True)]
            news = self.extend(texts, self.most, (FULL_STOP, THINK_CLOSE))
            thoughts = [thought + _before(new) for thought, new in zip(thoughts, news, strict=True)]
            out.append(self.answer(thoughts))
        return out


def _before(new: list[int]) -> list[int]:
    """Tokens before a closing mark or the end."""
    return new[:-1] if new and new[-1] in (THINK_CLOSE, tokenizer.EOS) else new


def coverage(answers: Answers, votes: int) -> np.ndarray:
    """(P,) chance that one of ``votes`` samples is right, without bias from the number drawn."""
    return accuracy.coverage(answers.right.sum(1), answers.right.shape[1], votes)


def majority(answers: Answers, votes: int) -> np.ndarray:
    """(P,) chance that the most frequent of ``votes`` answers is right, over samples drawn without replacement; empty answers do
    not vote, and each text votes for itself where several are right."""
    coded = [_codes(row, right) for row, right in zip(answers.answers, answers.right, strict=True)]
    return np.array([accuracy.vote(codes, votes, right=good) for codes, good in coded])


def _codes(row: Sequence[str], right: np.ndarray) -> tuple[np.ndarray, int]:
    """Each answer as an integer and how many of these, from 0 on, are right ones; -1 is no answer."""
    good = sorted({answer for answer, ok in zip(row, right, strict=True) if ok and answer})
    place = {answer: code for code, answer in enumerate([*good, *sorted(set(row) - set(good) - {""})])}
    return np.array([place.get(answer, -1) for answer in row]), len(good)


def interval(values: np.ndarray) -> dict[str, Any]:
    """Mean of per-problem values (P,) in [0, 1] and its 95 % interval over problems."""
    return shown(intervals.mean(values))


def gain(differences: np.ndarray) -> dict[str, Any]:
    """Mean of per-problem differences (P,) and its 95 % interval, paired by problem."""
    return shown(intervals.paired(differences))


def shown(estimate: Estimate) -> dict[str, Any]:
    """As it stands in a card."""
    return {
        "mean": round(estimate.mean, 4),
        "ci95": [round(estimate.low, 4), round(estimate.high, 4)],
        "problems": estimate.problems,
    }


def summary(answers: Answers, votes: int = 8) -> dict[str, Any]:
    """pass@1, coverage and majority vote, and the lengths of the thinking."""
    votes = min(votes, answers.right.shape[1])
    return {
        "problems": len(answers.right),
        "samples": answers.right.shape[1],
        "pass@1": interval(answers.right.mean(1)),
        f"coverage@{votes}": interval(coverage(answers, votes)),
        f"majority@{votes}": interval(majority(answers, votes)),
        **({"gain": gain(majority(answers, votes) - answers.right.mean(1))} if votes > 2 else {}),
        "thinking_tokens": {
            "median": float(np.median(answers.thinking)),
            "mean": round(float(answers.thinking.mean()), 1),
            "p99": float(np.quantile(answers.thinking, 0.99)),
        },
        "unended": round(float(1 - answers.closed.mean()), 4),
    }


def joined(parts: Sequence[Answers]) -> Answers:
    """The same problems drawn several times, side by side."""
    return Answers(
        np.concatenate([part.right for part in parts], axis=1),
        [
            [answer for row in rows for answer in row]
            for rows in zip(*(part.answers for part in parts), strict=True)
        ],
        np.concatenate([part.thinking for part in parts], axis=1),
        np.concatenate([part.closed for part in parts], axis=1),
    )


def stacked(parts: Sequence[Answers]) -> Answers:
    """Different problems drawn equally often, one below the other."""
    return Answers(
        np.concatenate([part.right for part in parts]),
        [row for part in parts for row in part.answers],
        np.concatenate([part.thinking for part in parts]),
        np.concatenate([part.closed for part in parts]),
    )


def difficulty(
    sampler: Sampler, task: str, n: int, samples: int, seeds: Sequence[int] = SEEDS, votes: int = 8
) -> dict[str, Any]:
    """One row of the table by difficulty: ``samples`` for each seed. Long problems are dear: each seed takes a share of them,
    so that the row still has ``n``."""
    long = task in heldout.GRADED["long"]
    items = heldout.items(task, n)
    parts, tokens, started = [], 0, time.monotonic()
    for index, seed in enumerate(seeds):
        bench = Bench(sampler, task, n, samples, seed, items[index :: len(seeds)] if long else items)
        thoughts = bench.think()
        parts.append(bench.answer(thoughts))
        tokens += sum(map(len, thoughts))
    found = (stacked if long else joined)(parts)
    by_seed = [round(float(part.right.mean()), 4) for part in parts]
    rate = round(tokens / (time.monotonic() - started))
    return {"task": task, **summary(found, votes), "by_seed": by_seed, "tokens_per_s": rate}


def by_samples(sampler: Sampler, task: str, n: int, samples: int = 64) -> list[dict[str, Any]]:
    """Coverage and majority vote at 1, 2, 4 … ``samples`` samples."""
    bench = Bench(sampler, task, n, samples)
    answers = bench.answer(bench.think())
    sizes = [2**power for power in range(samples.bit_length()) if 2**power <= samples]
    return [
        {
            "k": k,
            "problems": n,
            "coverage": interval(coverage(answers, k)),
            "majority": interval(majority(answers, k)),
        }
        for k in sizes
    ]


def forced_close(
    sampler: Sampler, task: str, n: int, samples: int, budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """Accuracy when ``</think>`` is forced after at most so many tokens of thinking.

    ``last_total`` is the accuracy of the best that can be read off the cut text without the model: the last
    whole number after "=", "," or "So".
    """
    bench = Bench(sampler, task, n, samples)
    whole = bench.think()
    rows = []
    for budget in budgets:
        cut = [thought[:budget] for thought in whole]
        answers = bench.answer(cut)
        totals = np.array(
            [bench.verdict(i // samples, card.last_total(tokenizer.decode(t))) for i, t in enumerate(cut)]
        )
        rows.append(
            {
                "budget": budget,
                "cut": round(float(np.mean([len(thought) > budget for thought in whole])), 3),
                "pass@1": interval(answers.right.mean(1)),
                f"majority@{samples}": interval(majority(answers, samples)),
                "last_total": interval(totals.reshape(-1, samples).mean(1)),
                "unended": round(float(1 - answers.closed.mean()), 4),
            }
        )
    return rows


def triggers(
    sampler: Sampler,
    task: str,
    n: int,
    samples: int,
    sentences: Sequence[str] = tokenizer.TRIGGERS,
    most: int = 2,
) -> list[dict[str, Any]]:
    """Accuracy after the first conclusion and after 1 … ``most`` triggers, for each trigger sentence; on all problems and on
    the hard half of them (by grade: above the median, or all where one grade is the whole task)."""
    rows = []
    for trigger in sentences:
        bench = Bench(sampler, task, n, samples)
        grades = np.array([grade(item.entry["metadata"]) for item in bench.items], dtype=float)
        hard = grades > np.median(grades) if (grades > np.median(grades)).any() else grades == grades
        first: np.ndarray | None = None
        for k, answers in enumerate(bench.with_triggers(trigger, most)):
            right = answers.right.mean(1)
            first = right if first is None else first
            rows.append(
                {
                    "trigger": trigger,
                    "k": k,
                    "pass@1": interval(right),
                    "hard half": interval(right[hard]),
                    **({"gain": gain(right - first)} if k else {}),
                    "thinking_tokens": round(float(answers.thinking.mean()), 1),
                }
            )
    return rows


def efforts(sampler: Sampler, task: str, n: int, samples: int) -> list[dict[str, Any]]:
    """Accuracy and length at each effort level."""
    rows = []
    for level in tokenizer.EFFORT_LEVELS:
        bench = Bench(sampler, task, n, samples)
        rows.append({"effort": level, **summary(bench.answer(bench.think(effort=level), level))})
    return rows


def by_samples_of(tasks: Sequence[str], n: int, curve: int) -> dict[str, tuple[int, int]]:
    """Problems and samples of the curves by samples: the demo, the easiest sums (for the smallest model), and a task of each
    other short family."""
    shown = (*heldout.GRADED["sums"][1:2], heldout.GRADED["products"][0], heldout.GRADED["countdown"][0])
    return {tasks[0]: (n // 2, curve)} | {task: (n, min(16, curve)) for task in shown if task in tasks}


def evaluate(
    sampler: Sampler,
    tasks: Sequence[str],
    n: int = 200,
    samples: int = 3,
    curve: int = 64,
    known: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """All measurements of a model, part by part (the whole so far is given each time, ``known`` parts are kept); the first task
    is the demo.

    A row by difficulty has ``n`` problems × ``samples`` × three seeds, or one sample a problem where they are long. Coverage and
    vote go up to ``curve`` samples on half the problems of the demo, and to 16 on one task of each short family. Triggers are
    measured on every short task, forced closes on the demo, products and long sums.
    """
    fresh: dict[str, Any] = {"seed": heldout.EVAL_SEED, "intervals": card.SCORE, "by_difficulty": []}
    found = dict(known) if known else fresh
    if card.SCORE not in found.setdefault("intervals", card.BOOTSTRAP):
        found["intervals"] += f"; {card.SCORE} in the parts measured later"
    rows, long = found["by_difficulty"], heldout.GRADED["long"]
    for task in tasks:
        if all(row["task"] != task for row in rows):
            rows.append(
                difficulty(sampler, task, n, *((1, SEEDS, 1) if task in long else (samples, SEEDS, 8)))
            )
            yield found
    some = max(1, samples - 1)
    close = {
        task: (n, (0, 16, 32, 64, 128, 256, 512))
        for task in (tasks[0], heldout.GRADED["products"][0])
        if task in tasks
    }
    close |= {task: (n // 2, (0, 64, 128, 256, 512, 1024, 2048)) for task in long[:1] if task in tasks}
    for task in tasks:
        if task not in long and task not in found.setdefault("triggers", {}):
            found["triggers"][task] = triggers(
                sampler, task, n, some, tokenizer.TRIGGERS[: None if task == tasks[0] else 1]
            )
            yield found
    for task, (size, budgets) in close.items():
        if task not in found.setdefault("forced_close", {}):
            found["forced_close"][task] = forced_close(sampler, task, size, some, budgets)
            yield found
    if "efforts" not in found:
        found["efforts"] = efforts(sampler, tasks[0], n, some)
        yield found
    for task, (size, most) in by_samples_of(tasks, n, curve).items():
        if task not in found.setdefault("by_samples", {}):
            found["by_samples"][task] = by_samples(sampler, task, size, most)
            yield found


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ttc.rl.evaluate", description=__doc__)
    parser.add_argument("--model", required=True, help="an embedded model's name, or a folder")
    parser.add_argument("--task", action="append", help="measure these tasks and write nothing (repeatable)")
    parser.add_argument("--n", type=int, default=200, help="problems per task")
    parser.add_argument("--samples", type=int, default=3, help="for each of the three seeds")
    parser.add_argument("--curve", type=int, default=64, help="most samples of the curve by samples")
    parser.add_argument("--more", action="store_true", help="keep what the card has, measure what it lacks")
    args = parser.parse_args(argv)
    folder = ttc.nano.resolve(args.model) or Path(args.model)
    sampler = VllmSampler(folder)
    if args.task:
        for task in args.task:
            print(json.dumps(difficulty(sampler, task, args.n, args.samples)), flush=True)
        return
    info = card.read(folder)
    known = info["evaluation"] if args.more else None
    for found in evaluate(sampler, info["tasks"], args.n, args.samples, args.curve, known):
        info["evaluation"] = found
        info["typical_thinking_tokens"] = round(found["by_difficulty"][0]["thinking_tokens"]["median"])
        card.write(folder, info)
        print(f"{list(found)[-1]}: measured", flush=True)


if __name__ == "__main__":
    main()
