"""A recorded pool in the format of the published ones, of problems whose outcome under every policy is known by construction."""

from __future__ import annotations

import json
import random
from pathlib import Path

BRANCHES, EVERY, LONG = 64, 10, 200
"""Branches a problem, tokens between anytime answers, tokens of each branch of a sure problem."""
SURE, CLOSE, HOPELESS, SPLIT = 6, 5, 4, 3
"""Problems of each kind: all branches are right; 40 are right and 24 share a wrong answer; 24 are right and 40 share a wrong one;
all are wrong and no two agree."""


def write_pool(folder: Path, seed: int = 0) -> Path:
    """Branches and problems in a random order. All branches of a sure problem have LONG tokens, those of another are 101 to 164
    tokens long, each length once. What a branch answers at any time is what it answers in the end."""
    rng = random.Random(seed)
    problems = []
    for kind, count in (("sure", SURE), ("close", CLOSE), ("hopeless", HOPELESS), ("split", SPLIT)):
        for i in range(count):
            right = {"sure": BRANCHES, "close": 40, "hopeless": 24, "split": 0}[kind]
            gold = str(rng.randint(100, 999))
            wrong = [str(1000 + b) if kind == "split" else "7" for b in range(right, BRANCHES)]
            answers = [gold] * right + wrong
            lengths = [LONG if kind == "sure" else 101 + b for b in range(BRANCHES)]
            rng.shuffle(answers)
            rng.shuffle(lengths)
            branches = [
                [[answer] * (length // EVERY), length, answer]
                for answer, length in zip(answers, lengths, strict=True)
            ]
            problems.append(
                {"id": f"{kind}-{i}", "gold_answer": gold, "probe_freq": EVERY, "each_branch": branches}
            )
    rng.shuffle(problems)
    path = folder / "made_pool.json"
    path.write_text(json.dumps(problems))
    return path
