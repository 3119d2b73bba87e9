"""Reasoning traces: a first chain, rechecks, a conclusion; sometimes cut short, so that a forced close can be
answered.

Task-neutral: a task (ttc.rl.sums, products, countdown) draws problems and works them out in styles ordered from weak to strong
(``ttc.rl.chains``); this module composes the chains. What a trace teaches, and why (measurements in docs/nano.md):

* A recheck after a trigger is written in a stronger style than what it checks, so a trigger buys accuracy.
* The number of rechecks does not depend on agreement, so a second trigger does no harm.
* The answer is the vote of the conclusions, ties to the latest. Mistakes are planted, never imitated (weight
  0), and found.
* A trigger may come in the middle of a chain (as iterative deepening does), with white space around it.
* A share of traces is cut at a random token and closed: a conclusion so far is repeated; without one, the
  true answer is the target at low weight.
* The effort mark says how long the thinking is, in units of one written-out chain, and carries loss.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ttc.rl import countdown, products, sums, tokenizer
from ttc.rl.chains import Piece, Value, Worked

EFFORT_EDGES = (0.7, 1.4, 2.6)
"""Thinking tokens over the tokens of one chain in the task's unit style (sums: equations): below the first edge effort is
0.25, … above the last 1.0."""

RECHECKS = (0.38, 0.28, 0.18, 0.10, 0.06)  # probabilities of 0, 1, … rechecks
CHECKED_FROM = 0.3  # share of traces that may be rechecked at the start of training; it rises with progress
TRIGGER_SHARE = (0.5, 0.2, 0.3)  # of tokenizer.TRIGGERS
FIRST_WRONG, SECOND_WRONG = 0.5, 0.2  # chance of a planted mistake in a chain that will be rechecked
INTERRUPTED = 0.10  # share of rechecked first chains that a trigger cuts short
CUT = 0.25  # share of traces closed by force at a random token
GUESS_WEIGHT = 0.3  # of an answer that cannot yet be known
EFFORT_GIVEN = 0.5
OTHER_WORDS = 0.10  # share of problems in words other than reasoning-gym's
SPACE_NOISE = (
    0.12  # share of triggers and closes with white space around them, as a controller may write them
)
LONG = 0.04  # share of small problems with many rechecks, so that long contexts are seen
SMALL_TOKENS = 60

TASKS: Mapping[str, Callable[[random.Random, Mapping[str, Any], float], Worked]] = {
    "sums": sums.draw,
    "long": sums.draw_long,
    "products": products.draw,
    "countdown": countdown.draw,
}
"""What the table ``data.tasks`` of a size's file may name."""


class Trace(NamedTuple):
    """Token ids, the weight of each as a target, and the answer (a true one)."""

    ids: list[int]
    weights: list[float]
    answer: str


class Thought(NamedTuple):
    """Thinking as pieces; ``conclusions`` are (index of the piece after which it stands, value)."""

    pieces: list[Piece]
    conclusions: list[tuple[int, Value]]
    unit_tokens: int


def vote(values: Sequence[Value]) -> Value:
    """The most frequent value, ties to the latest."""
    counts = Counter(values)
    most = max(counts.values())
    return next(value for value in reversed(values) if counts[value] == most)


def trace(rng: random.Random, problem: Worked, progress: float = 1.0) -> Trace:
    """One training example of a problem; early in training (``progress``) few are rechecked: first chains
    teach more a token."""
    while True:
        thought = _think(rng, problem, checked=rng.random() < CHECKED_FROM + progress)
        answer = vote([value for _, value in thought.conclusions])
        if not problem.right(answer):
            continue
        ids, weights = flatten(thought.pieces)
        if len(ids) <= problem.max_tokens:
            break
    head, head_weights = flatten(_prompt(rng, problem, len(ids) / thought.unit_tokens))
    if rng.random() < CUT:
        ids, weights, ending = _cut(rng, problem, thought, answer, ids, weights)
    else:
        ending = [Piece("</think>"), Piece(str(answer))]
    tail, tail_weights = flatten([*ending, Piece("<eos>")])
    return Trace(head + ids + tail, head_weights + weights + tail_weights, str(answer))


def flatten(pieces: Sequence[Piece]) -> tuple[list[int], list[float]]:
    """Pieces to token ids and one weight per token."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in pieces:
        tokens = tokenizer.encode(text)
        ids += tokens
        weights += [weight] * len(tokens)
    return ids, weights


def _think(rng: random.Random, problem: Worked, checked: bool) -> Thought:
    """Chains and conclusions, with mistakes planted where a recheck will find them."""
    style = rng.choices(list(problem.first), list(problem.first.values()))[0]
    unit = len(flatten(problem.work(rng, problem.unit_style).pieces)[0])
    rechecks = rng.choices(range(len(RECHECKS)), RECHECKS)[0] if checked else 0
    if checked and unit < SMALL_TOKENS and rng.random() < LONG:
        rechecks = rng.randint(5, 8)
    pieces: list[Piece] = []
    conclusions: list[tuple[int, Value]] = []
    for index in range(rechecks + 1):
        wrong = (
            FIRST_WRONG if index == 0 and rechecks else SECOND_WRONG if index == 1 and rechecks > 1 else 0.0
        )
        previous = conclusions[-1][1] if conclusions else None
        chain = problem.work(rng, style, rng.random() < wrong, previous)
        interrupted = index == 0 and rechecks > 0 and rng.random() < INTERRUPTED
        if interrupted:
            pieces += _interrupt(rng, chain.pieces)
        else:
            pieces += [*chain.pieces, Piece("So "), Piece(str(chain.value), chain.said), Piece(".")]
            conclusions.append((len(pieces), chain.value))
        if index < rechecks:
            pieces += _trigger(rng, by_force=interrupted)
            style = rng.choice(problem.stronger[style])
    return Thought(pieces, conclusions, unit)


def _interrupt(rng: random.Random, pieces: Sequence[Piece]) -> list[Piece]:
    """A chain cut at a random token."""
    ids, weights = flatten(pieces)
    keep = rng.randrange(len(ids)) if ids else 0
    return [
        Piece(tokenizer.VOCABULARY[token], weight) for token, weight in zip(ids[:keep], weights, strict=False)
    ]


def _trigger(rng: random.Random, by_force: bool) -> list[Piece]:
    """A trigger; one that a controller forces is read, not imitated."""
    text = rng.choices(tokenizer.TRIGGERS, TRIGGER_SHARE)[0]
    if rng.random() >= SPACE_NOISE:
        return [Piece(text, float(not by_force))]
    return [Piece(_space(rng), 0.0), Piece(text, 0.0), Piece(_space(rng), 0.0)]


def _space(rng: random.Random) -> str:
    return rng.choice(("", " ", "\n", "\n\n"))


def _prompt(rng: random.Random, problem: Worked, length: float) -> list[Piece]:
    """The chat up to ``<think>``; mostly reasoning-gym's own words, sometimes other ways to ask."""
    words = problem.other_words(rng) if rng.random() < OTHER_WORDS else problem.prompt
    level = sum(length >= edge for edge in EFFORT_EDGES)
    effort = [Piece(tokenizer.EFFORTS[level])] if rng.random() < EFFORT_GIVEN else []
    return [
        Piece("<bos><|user|>" + words, 0.0),
        *effort,
        Piece("<|assistant|>", float(not effort)),
        Piece("<think>", 0.0),
    ]


def _cut(
    rng: random.Random, problem: Worked, thought: Thought, answer: Value, ids: list[int], weights: list[float]
) -> tuple[list[int], list[float], list[Piece]]:
    """Close by force at a random token and answer with the best current guess.

    After a conclusion the guess is the vote so far. Before one it is the true answer at low weight: the
    expected target of that is the most likely completion of the running total. A wrong guess is never a
    target.
    """
    keep = rng.randrange(len(ids) + 1)
    ends = [len(flatten(thought.pieces[:count])[0]) for count, _ in thought.conclusions]
    known = [value for end, (_, value) in zip(ends, thought.conclusions, strict=True) if end <= keep]
    guess = vote(known) if known else answer
    weight = 0.0 if not problem.right(guess) else 1.0 if known else GUESS_WEIGHT
    noise = [Piece(_space(rng), 0.0)] if rng.random() < SPACE_NOISE else []
    return ids[:keep], weights[:keep], [*noise, Piece("</think>", 0.0), Piece(str(guess), weight)]


class Corpus:
    """An endless, resumable stream of traces of problems that are not held out. ``rng`` and ``written`` are its whole state.

    ``data`` is the table of that name in a size's file; ``data["tasks"]`` gives the tasks' shares of the tokens,
    ``data["from"]`` the share of training after which a task starts (0 if not named).
    """

    def __init__(self, rng: random.Random, data: Mapping[str, Any], held_out: frozenset[str]) -> None:
        self.rng, self.data, self.held_out = rng, data, held_out
        self.written: dict[str, float] = {}

    def draw(self, progress: float) -> Trace:
        """The next trace, at a share ``progress`` of training: of the task that is furthest behind its share of tokens."""
        shares, start = self.data["tasks"], self.data.get("from", {})
        for name in shares:
            if name not in self.written and progress >= start.get(name, 0.0):
                self.written[name] = shares[name] * min(
                    (self.written[n] / shares[n] for n in self.written), default=0.0
                )
        name = min(self.written, key=lambda name: self.written[name] / shares[name])
        while True:
            problem = TASKS[name](self.rng, self.data, progress)
            if problem.key not in self.held_out:
                found = trace(self.rng, problem, progress)
                self.written[name] += len(found.ids)
                return found
