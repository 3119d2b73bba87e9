"""Train, measure and ship the reward models: ``ttc train reward``.

The chains are the reasoners' own: samples on training problems (never held-out ones), judged by reasoning-gym's scorers, so the
mistakes are those that a reward model will meet. The outcome model is trained by TRL's RewardTrainer; TRL 1.16 has no trainer for
process models (its PRMTrainer is gone), so that one has a loop of its own here, with the reasoners' optimisers.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import ttc.nano
from ttc.costmodel.intervals import Estimate, resampled
from ttc.errors import InputError
from ttc.rl import card, heldout, tokenizer
from ttc.rl.evaluate import Answers, Bench, coverage, gain, interval, majority, shown
from ttc.rl.generate import Sampler, VllmSampler
from ttc.rl.model import load, size_config, use_half
from ttc.rl.reasoner import optimizers
from ttc.rl.reward import Kind, NanoReward, RewardNet, save
from ttc.rl.reward import load as load_reward
from ttc.rl.tokenizer import PAD, THINK_CLOSE
from ttc.rl.traces import TASKS

DATA_SIZE = "s"
"""The size whose file gives the distribution of the problems (it is the same in all)."""

SHARES = {"sums": 0.5, "products": 0.2, "countdown": 0.25, "long": 0.05}
"""Of the problems that are sampled. Long sums take ten times the tokens of a short one."""

PAIR_BATCH, MOST_TOKENS = 16, 600
"""Pairs a step of the outcome model; the longest chain that is learnt from."""

CHAINS = "chains.json"
"""In the run folder: the samples, so that a run cut short does not draw them again."""

CLOSE = tokenizer.ID[THINK_CLOSE]


Pair = tuple[list[int], list[int]]


class Chain(NamedTuple):
    """One sample: prompt, thinking, ``</think>`` and answer as token ids (no <eos>), where the prompt ends, whether it is right,
    and the number of its problem."""

    ids: list[int]
    start: int
    right: bool
    problem: int


def problems(n: int, seed: int, families: Sequence[str]) -> Iterator[tuple[str, list[heldout.Item]]]:
    """``n`` training problems by family, none of them held out, as items that reasoning-gym's scorers judge."""
    rng, data, held = random.Random(seed), size_config(DATA_SIZE)["data"], heldout.keys()
    total = sum(SHARES[family] for family in families)
    for family in families:
        items: list[heldout.Item] = []
        while len(items) < round(n * SHARES[family] / total):
            problem = TASKS[family](rng, data, 1.0)
            if problem.key in held:
                continue
            meta: dict[str, Any] = {}
            if family == "countdown":
                meta = {"numbers": list(problem.numbers), "target": problem.target}  # type: ignore[attr-defined]
            answer = str(problem.answer)
            items.append(heldout.Item(problem.prompt, answer, {"answer": answer, "metadata": meta}))
        yield family, items


def collect(
    reasoners: Sequence[Path],
    n: int,
    samples: int,
    families: Sequence[str],
    seed: int = 0,
    show: Callable[[str], None] = print,
) -> list[Chain]:
    """Samples of ``n`` training problems for each reasoner."""
    chains: list[Chain] = []
    count = 0
    for number, folder in enumerate(reasoners):
        sampler = VllmSampler(folder)
        for family, items in problems(n, 1000 * seed + number, families):
            bench = Bench(sampler, heldout.GRADED[family][0], 1, samples, seed, items)
            found = chains_of(bench, count)[0]
            chains += found
            count += len(items)
            right = np.mean([chain.right for chain in found])
            show(f"{folder.name} {family}: {len(items)} problems × {samples}, {right:.1%} right")
        sampler.close()
    return chains


def chains_of(bench: Bench, first: int = 0) -> tuple[list[Chain], Answers]:
    """The samples of a bench as chains; problems are numbered from ``first``."""
    thoughts = bench.think()
    answers = bench.answer(thoughts)
    chains = []
    for index, (prompt, thought) in enumerate(zip(bench.prompts(), thoughts, strict=True)):
        problem, sample = divmod(index, bench.samples)
        ids = [*prompt, *thought, CLOSE, *tokenizer.encode(answers.answers[problem][sample])]
        chains.append(Chain(ids, len(prompt), bool(answers.right[problem, sample]), first + problem))
    return chains, answers


def pairs(chains: Sequence[Chain], most: int, seed: int) -> list[Pair]:
    """Right and wrong chains of one problem, at most ``most`` pairs a problem, each chain at most once."""
    rng = random.Random(seed)
    by_problem: dict[int, tuple[list[Chain], list[Chain]]] = {}
    for chain in chains:
        by_problem.setdefault(chain.problem, ([], []))[not chain.right].append(chain)
    found = []
    for right, wrong in by_problem.values():
        rng.shuffle(right)
        rng.shuffle(wrong)
        found += [(a.ids, b.ids) for a, b in list(zip(right, wrong, strict=False))[:most]]
    rng.shuffle(found)
    return found


def train_outcome(
    base: Path, chains: Sequence[Chain], out: Path, *, epochs: int = 2, rate: float = 1e-3, seed: int = 0
) -> dict[str, Any]:
    """Bradley-Terry on pairs with TRL's RewardTrainer, from a reasoner's weights; writes ``out``."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    found = [pair for pair in pairs(chains, 4, seed) if max(map(len, pair)) <= MOST_TOKENS]
    ordered = _alike(random.Random(seed), found, epochs)
    rows = Dataset.from_dict({"chosen_ids": [a for a, _ in ordered], "rejected_ids": [b for _, b in ordered]})
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    torch.nn.init.zeros_(model.score.weight)
    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(
            output_dir=scratch,
            per_device_train_batch_size=PAIR_BATCH,
            num_train_epochs=1,  # the rows hold every epoch, in batches of like length
            train_sampling_strategy="sequential",
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=20,
            center_rewards_coefficient=0.01,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=25,
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        )
        trainer = RewardTrainer(model, config, train_dataset=rows, processing_class=tokenizer.hf_tokenizer())
        started = time.monotonic()
        trainer.train()
    net = RewardNet(load(base).model)
    net.load_state_dict(model.state_dict())
    save(net, out)
    curve = [
        {"step": row["step"], "loss": row["loss"], "accuracy": round(row["accuracy"], 4)}
        for row in trainer.state.log_history
        if {"loss", "accuracy"} <= row.keys()
    ]
    return {
        "trainer": "TRL RewardTrainer",
        "pairs": len(found),
        "epochs": epochs,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "curve": curve,
    }


def _alike(rng: random.Random, found: list[Pair], epochs: int) -> list[Pair]:
    """All pairs once an epoch, in batches of like length (padding is most of the cost otherwise) that come in random order."""
    out: list[Pair] = []
    for _ in range(epochs):
        rng.shuffle(found)
        ordered = sorted(found, key=lambda pair: max(map(len, pair)))
        batches = [
            ordered[start : start + PAIR_BATCH]
            for start in range(0, len(ordered) - PAIR_BATCH + 1, PAIR_BATCH)
        ]
        rng.shuffle(batches)
        out += [pair for batch in batches for pair in batch]
    return out


def train_process(
    base: Path,
    chains: Sequence[Chain],
    out: Path,
    *,
    epochs: int = 2,
    rate: float = 1e-3,
    seed: int = 0,
    step_tokens: int = 2048,
) -> dict[str, Any]:
    """Cross-entropy, at every token behind the prompt, of whether the chain ends right; from a reasoner's weights; writes
    ``out``."""
    rng, order = random.Random(seed), [chain for chain in chains if len(chain.ids) <= MOST_TOKENS]
    net = RewardNet(load(base).model).train()
    use_half(net, torch.cpu._is_avx512_bf16_supported())
    steps = [step for _ in range(epochs) for step in _steps(rng, order, step_tokens)]
    known = optimizers(net, {"learning_rate": rate, "weight_decay": 0.05})
    curve, recent, started = [], [], time.monotonic()
    for number, step in enumerate(steps):
        for optimizer in known:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (number + 1) / 20) * max(0.02, 1 - number / len(steps))
        tokens = sum(len(chain.ids) - chain.start for chain in step)
        total = 0.0
        for ids, mask, label in _batches(step, 2048):
            logits = net(ids)
            each = F.binary_cross_entropy_with_logits(
                logits, label[:, None].expand_as(logits), reduction="none"
            )
            loss = (each * mask).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in known:
            optimizer.step()
        recent.append(total)
        if (number + 1) % 25 == 0:
            curve.append({"step": number + 1, "loss": round(float(np.mean(recent[-25:])), 4)})
    save(net, out)
    return {
        "trainer": "ttc.rl.train_reward.train_process",
        "chains": len(order),
        "epochs": epochs,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "curve": curve,
    }


def _steps(rng: random.Random, chains: list[Chain], tokens: int) -> list[list[Chain]]:
    """The chains in a new order, in steps of about so many tokens."""
    rng.shuffle(chains)
    found: list[list[Chain]] = [[]]
    size = 0
    for chain in chains:
        if size >= tokens:
            found.append([])
            size = 0
        found[-1].append(chain)
        size += len(chain.ids)
    return found


def _batches(step: Sequence[Chain], tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Padded ids (B, T), mask of what counts (B, T) and label (B,) of chains of like length."""
    groups: list[list[Chain]] = [[]]
    for chain in sorted(step, key=lambda chain: len(chain.ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(chain.ids) > tokens:
            groups.append([])
        groups[-1].append(chain)
    for group in groups:
        ids = torch.full((len(group), len(group[-1].ids)), PAD)
        mask = torch.zeros(ids.shape)
        for row, chain in enumerate(group):
            ids[row, : len(chain.ids)] = torch.tensor(chain.ids)
            mask[row, chain.start : len(chain.ids)] = 1.0
        yield ids, mask, torch.tensor([float(chain.right) for chain in group])


def auc(scores: np.ndarray, right: np.ndarray) -> float:
    """Chance that a right chain scores above a wrong one (ties count half); nan without both."""
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable").astype(float)
    for value in np.unique(scores):  # ties share their mean rank
        same = scores == value
        ranks[same] = ranks[same].mean()
    good = right.sum()
    bad = len(right) - good
    return (
        float((ranks[right].sum() - good * (good - 1) / 2) / (good * bad)) if good and bad else float("nan")
    )


def measure(
    rewards: Sequence[NanoReward],
    sampler: Sampler,
    task: str,
    n: int,
    samples: int,
    seeds: Sequence[int] = (0, 1, 2),
) -> list[dict[str, Any]]:
    """One row a reward model: AUC of right against wrong chains, and best-of-``samples`` against the vote, on ``n`` held-out
    problems, each drawn anew for every seed. All intervals are over problems."""
    right_of: list[np.ndarray] = []
    votes: list[np.ndarray] = []
    found: list[tuple[list[Chain], Answers]] = []
    for seed in seeds:
        chains, answers = chains_of(Bench(sampler, task, n, samples, seed))
        found.append((chains, answers))
        right_of.append(answers.right)
        votes.append(majority(answers, samples))
    right = np.concatenate(right_of, axis=1)
    vote = np.mean(votes, axis=0)
    rows = []
    for reward in rewards:
        grids = [
            np.array([row[-1] for row in reward.positions([chain.ids for chain in chains])]).reshape(
                n, samples
            )
            for chains, _ in found
        ]
        best = np.mean([_best(grid, part) for grid, part in zip(grids, right_of, strict=True)], axis=0)
        weighted = np.mean([_weighted(reward, g, a) for g, (_, a) in zip(grids, found, strict=True)], axis=0)
        scores = np.concatenate(grids, axis=1)
        rows.append(
            {
                "reward": reward.name,
                "task": task,
                "problems": n,
                "samples": samples,
                "seeds": len(seeds),
                "intervals": card.SCORE,
                "auc": _auc_interval(scores, right),
                "auc_within": _within(scores, right),
                "pass@1": interval(right.mean(1)),
                f"coverage@{samples}": interval(np.mean([coverage(a, samples) for _, a in found], axis=0)),
                f"majority@{samples}": interval(vote),
                f"best@{samples}": interval(best),
                f"weighted@{samples}": interval(weighted),
                "best - majority": gain(best - vote),
                "weighted - majority": gain(weighted - vote),
            }
        )
    return rows


def _best(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(P,) whether the sample with the highest score is right."""
    picked: np.ndarray = right[np.arange(len(right)), scores.argmax(1)].astype(float)
    return picked


def _weighted(reward: NanoReward, scores: np.ndarray, answers: Answers) -> np.ndarray:
    """(P,) whether the answer with the largest sum of scores (probabilities) is right."""
    weights = scores if reward.kind == "process" else 1 / (1 + np.exp(-scores))
    out = []
    for row, weight, right in zip(answers.answers, weights, answers.right, strict=True):
        sums: dict[str, float] = {}
        for answer, value in zip(row, weight, strict=True):
            if answer:
                sums[answer] = sums.get(answer, 0.0) + float(value)
        top = max(sums, key=lambda answer: sums[answer], default="")
        out.append(float(any(ok for answer, ok in zip(row, right, strict=True) if answer == top)))
    return np.array(out)


def _auc_interval(scores: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """AUC over all chains, with a bootstrap over problems (rows)."""

    def of(rows: np.ndarray) -> float:
        return auc(scores[rows].ravel(), right[rows].ravel())

    low, high = resampled(of, len(scores), rounds=500) or (math.nan, math.nan)
    return shown(Estimate(of(np.arange(len(scores))), low, high, len(scores)))


def _within(scores: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Mean over problems with right and wrong chains of their own AUC: what choosing between samples needs."""
    values = np.array([auc(a, b) for a, b in zip(scores, right, strict=True) if b.any() and not b.all()])
    return interval(values) if len(values) else {"mean": float("nan"), "ci95": [float("nan")] * 2}


TRAINERS: Mapping[Kind, Callable[..., dict[str, Any]]] = {"outcome": train_outcome, "process": train_process}


def train(
    base: str = "nano-s",
    reasoners: Sequence[str] = (),
    *,
    kinds: Sequence[Kind] = ("outcome", "process"),
    families: Sequence[str] = tuple(SHARES),
    n: int = 1500,
    samples: int = 8,
    epochs: int = 2,
    seed: int = 0,
    out: str | Path = Path("runs/reward"),
    ship: bool = False,
    evaluate: int = 200,
    show: Callable[[str], None] = print,
) -> list[Path]:
    """Sample ``n`` problems × ``samples`` from each reasoner (default: the base), train both reward models from the base's
    weights, measure them on ``evaluate`` held-out problems a task, and write ``out``/BASE-outcome and -process (with ``ship``
    into ttc/nano)."""
    missing = [name for name in ("trl", "datasets", "reasoning_gym") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"training a reward model needs {', '.join(missing)}: pip install 'ttc[train,tasks]'"
        )
    base_folder = _folder(base, "--base")
    sources = [_folder(name, "--reasoner") for name in reasoners] or [base_folder]
    drawn = {"reasoners": [source.name for source in sources], "n": n, "samples": samples, "seed": seed}
    chains = _kept(Path(out), drawn) or []
    if not chains:
        chains = collect(sources, n, samples, families, seed, show)
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / CHAINS).write_text(json.dumps({**drawn, "chains": chains}))
    folders = []
    for kind in kinds:
        name = f"{base_folder.name}-{kind}"
        folder = (ttc.nano.REWARDS if ship else Path(out)) / name
        training = TRAINERS[kind](base_folder, chains, folder, epochs=epochs, seed=seed)
        show(json.dumps(training))
        training |= {
            "base": base_folder.name,
            "reasoners": [source.name for source in sources],
            "problems": n * len(sources),
            "samples": samples,
            "share right": round(float(np.mean([chain.right for chain in chains])), 3),
            "seed": seed,
        }
        params = sum(p.numel() for p in RewardNet(load(base_folder).model).parameters())
        info = {"name": name, "kind": kind, "params": params, "training": training, "evaluation": []}
        card.write_reward(folder, info)
        folders.append(folder)
    if evaluate:
        sampler = VllmSampler(base_folder)
        for task in (task for family in families if family != "long" for task in heldout.GRADED[family]):
            refresh(folders, sampler, base_folder.name, task, evaluate, samples, show)
    return folders


def _kept(out: Path, drawn: Mapping[str, Any]) -> list[Chain] | None:
    """The chains that an earlier run with the same settings left in ``out``."""
    if not (out / CHAINS).exists():
        return None
    data = json.loads((out / CHAINS).read_text())
    if any(data[key] != value for key, value in drawn.items()):
        return None
    return [Chain(*row) for row in data["chains"]]


def refresh(
    folders: Sequence[Path],
    sampler: Sampler,
    reasoner: str,
    task: str,
    n: int,
    samples: int,
    show: Callable[[str], None] = print,
) -> None:
    """Measure on one task and put the rows into the cards."""
    rows = measure([load_reward(folder) for folder in folders], sampler, task, n, samples)
    for folder, row in zip(folders, rows, strict=True):
        row = {"reasoner": reasoner, **row}
        show(json.dumps(row))
        info = card.read(folder)
        same = (row["reasoner"], row["task"])
        info["evaluation"] = [r for r in info["evaluation"] if (r["reasoner"], r["task"]) != same] + [row]
        card.write_reward(folder, info)


def _folder(name: str, flag: str) -> Path:
    folder = ttc.nano.resolve(name) or Path(name)
    if not (folder / "model.safetensors").is_file():
        known = ", ".join(model.name for model in ttc.nano.catalog())
        raise InputError(
            f"{flag} {name!r}: no reasoner of that name, and no folder with one; use {known} or a folder"
        )
    return folder
