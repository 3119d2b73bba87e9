"""The nouns of ttc: frozen, picklable values that policies, samplers, the driver and the engines pass to each other.

Nothing here spends, clocks or draws. Quantities carry their unit in the name; every token count is an integer number of
tokens of the model at hand.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

Messages = tuple[Mapping[str, str], ...]
REFERENCES = ("entry",)
"""The keys of ``Problem.meta`` that tell the answer: reasoning-gym's ``entry``."""
Finish = Literal["stop", "length", "abort", "error", "denied"]
"""How a branch ended: by itself; at its hard cap; cancelled; failed; or never started for want of budget."""


def seed_for(run_seed: int, problem_id: str, index: int) -> int:
    """The seed of one sample: the first 8 bytes of sha256(run seed, problem id, index), below 2**63.

    Hashing keeps samples of neighbouring run seeds and indices independent (adding seeds does not).
    """
    digest = hashlib.sha256(f"{run_seed}\x1f{problem_id}\x1f{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def default_verifier() -> str:
    """``math`` if math-verify is installed, else ``exact``."""
    return "math" if importlib.util.find_spec("math_verify") else "exact"


@dataclass(frozen=True, slots=True)
class Problem:
    """One question. ``messages`` are chat messages (role, content); ``gold`` is None where no answer is known. ``verifier`` is one
    of ``ttc.verify``; the default is the same wherever a problem comes from: ``math``, or ``exact`` without math-verify."""

    id: str
    messages: Messages
    gold: str | None = None
    verifier: str = field(default_factory=default_verifier)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The content of the last message: what is shown to people."""
        return self.messages[-1]["content"]

    def posed(self) -> Problem:
        """The problem as it is put to policies and reward models: without ``gold`` and what else tells the answer (``REFERENCES``
        of ``meta``)."""
        if self.gold is None and not any(key in self.meta for key in REFERENCES):
            return self
        meta = {key: value for key, value in self.meta.items() if key not in REFERENCES}
        return replace(self, gold=None, meta=meta)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one answer: ``score`` in [0, 1], and whether that counts as correct. Raises TypeError for a score
    that is no number, ValueError for one that is not finite."""

    correct: bool
    score: float
    detail: str = ""

    def __post_init__(self) -> None:
        if type(self.correct) is bool and type(self.score) is float and math.isfinite(self.score):
            return
        score = float(self.score)
        if not math.isfinite(score):
            raise ValueError(f"a verdict's score is {score}; give a finite number")
        object.__setattr__(self, "correct", bool(self.correct))  # numpy's, too
        object.__setattr__(self, "score", score)


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How a model writes its thought and its answer, and what is forced when the thought must end.

    ``close_text`` is inserted when the thinking cap is reached inside the thought; ``lead_text`` when the thought is closed but
    the answer is not finished where its room begins ("" : nothing is inserted). ``answer_tokens`` is the room for the answer
    itself, after what was inserted. ``think_close`` is "" for a model that does not think aloud.
    """

    think_open: str = "<think>"
    think_close: str = "</think>"
    close_text: str = "</think>"
    lead_text: str = ""
    extract: Literal["tail", "boxed", "tag", "last-line"] = "tail"
    answer_tokens: int = 32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Control:
    """What is done to a branch while it thinks, inside the engine, beside its cap. Every forced token counts as a token of
    thinking, so a cap bounds the whole; a span that would not fit before the cap is not begun.

    ``triggers`` are texts forced in turn (after the last, the first again): at each checkpoint of ``at`` that finds the thought
    open (tokens of output in all; with ``relative``, tokens since the end of the trigger before), and in place of the first
    ``at_end`` ends of the thought (a closing delimiter or an end of text), each of which uses up a checkpoint too. A thought
    shorter than ``min_thinking`` does not end: a trigger stands in for its end, or, without triggers, the end is made
    impossible. ``loop_repeats`` N > 0: a thought whose last tokens are one period N times over gets a trigger, and is closed if
    it goes on. ``stop_below``: the thought is closed once the mean of its last ``stop_window`` token confidences (nats, the
    mean negative log-probability of the ``stop_top_k`` likeliest tokens: DeepConf, arXiv 2508.15260, Eq. 2 and 3) is lower.
    """

    triggers: tuple[str, ...] = ()
    at: tuple[int, ...] = ()
    relative: bool = False
    at_end: int = 0
    min_thinking: int = 0
    loop_repeats: int = 0
    stop_below: float | None = None
    stop_window: int = 128
    stop_top_k: int = 20

    def most_insertions(self, thinking: int) -> int:
        """How often something may be inserted into a thought of at most ``thinking`` tokens: continuation requests, where a server
        can't do it itself. Every trigger takes a token or more, and one more must fit behind it."""
        return max(min(len(self.at) + self.at_end + self.min_thinking, thinking - 1), 0)


@dataclass(frozen=True, slots=True)
class Request:
    """One branch to be sampled. The engine promises: at most ``thinking_tokens`` tokens before the thought is made to close,
    and at most ``thinking_tokens`` + the format's room in all (see ``Engine.room_tokens``); never an empty answer.

    ``index`` numbers the requests of a problem in the order in which its policy issued them; with the run seed and the problem's id
    it fixes ``seed``. ``prefix`` is text already written that the engine continues. ``signals`` names confidence measures to
    compute ("mean-logprob", "self-certainty"). ``effort`` in (0, 1] goes into the chat template of models that know it.
    ``probe_every`` N > 0 asks an engine that can for the branch's anytime answer after each multiple of N tokens, the first at or
    after ``probe_from`` (where a probe is, changes nothing of the branch itself). ``control`` steers it as it runs. A branch of a
    search is written in steps: it pauses (``Completion.partial``) behind the first token with ``step_text`` in it, or after
    ``step_tokens`` (unless its thought may not be longer: it then runs to its end); the next step's ``prefix_ids`` are the tokens
    of its ``prefix``, exactly as they were sampled.
    """

    problem: Problem
    index: int
    seed: int
    thinking_tokens: int
    sampling: Sampling = Sampling()
    prefix: str = ""
    signals: tuple[str, ...] = ()
    effort: float | None = None
    kv_budget: int | None = None
    kv_method: str | None = None
    probe_from: int = 0
    probe_every: int = 0
    control: Control | None = None
    prefix_ids: tuple[int, ...] = ()
    step_text: str = ""
    step_tokens: int = 0

    @property
    def pauses(self) -> bool:
        """True for a step of a search that ends by its length before its thought has to."""
        return self.pauses_within(self.thinking_tokens)

    def pauses_within(self, thinking_tokens: int) -> bool:
        """``pauses``, where the thought may have ``thinking_tokens`` tokens as it now stands."""
        return 0 < self.step_tokens < thinking_tokens

    def digest(self) -> str:
        """A fingerprint of all that shapes the sample: what a resumed run compares before it trusts a recorded branch."""
        parts: tuple[object, ...] = (
            self.problem.id, self.index, self.seed, self.sampling, self.prefix,
            self.effort, self.kv_budget, self.kv_method,
        )  # fmt: skip
        steering = (self.control, self.prefix_ids, self.step_text, self.step_tokens)
        if steering != (None, (), "", 0):  # runs recorded before there was any are still found
            parts += steering
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Fork(NamedTuple):
    """A request of its own that an anytime answer took, or one of several that a branch took: the branch so far as its prompt, how
    much of that was in the cache, what it wrote (closing included), and its share of weight reads (None: not measured)."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    weight_reads: float | None


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine made of a request, in the engine's own counts.

    ``generated_tokens`` were sampled, ``forced_tokens`` inserted (closing spans, triggers: ``triggers`` of them were begun);
    ``probe_tokens`` is what its anytime answers cost, beside the branch (``forks``: one by one, where each took a request of its
    own). ``calls`` are the requests that the branch itself took, where it took several (continuations over HTTP): each one's
    prompt, which holds what was written before it, is in ``prompt_tokens``. ``partial``: it only paused at the end of a step.
    ``weight_reads`` is the branch's share of the engine's passes over the weights: the sum over its steps of 1 / (sequences in
    that step), None where the engine can't see its batch. ``mean_logprob`` (nats a token) and ``self_certainty`` (nats) are None
    unless the request asked for them. ``kv_skipped`` are the KV tokens that sparse decoding left unread and ``kv_scored`` the page
    vectors that it scored to choose (sums over steps, forks included, of means over layers and KV heads; None: not measured).
    """

    text: str
    finish: Finish
    prompt_tokens: int
    generated_tokens: int
    forced_tokens: int = 0
    cached_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    closed: bool = False
    weight_reads: float | None = None
    mean_logprob: float | None = None
    self_certainty: float | None = None
    error: str = ""
    probe_tokens: int = 0
    triggers: int = 0
    partial: bool = False
    forks: tuple[Fork, ...] = ()
    calls: tuple[Fork, ...] = ()
    kv_skipped: float | None = None
    kv_scored: float = 0.0

    @property
    def output_tokens(self) -> int:
        return self.generated_tokens + self.forced_tokens


@dataclass(frozen=True, slots=True)
class Charge:
    """What a piece of work cost. Tokens by kind; FLOPs, bytes and eFLOPs by the ``full`` convention, and eFLOPs by ``kinetics``
    (docs/costmodel.md); wall seconds of the branch; dollars where a price was given; ``kv_tokens`` read by decoding (the context
    of each step, less what sparse attention skipped; mean over layers and KV heads). Charges add."""

    tokens_generated: int = 0
    tokens_forced: int = 0
    tokens_probe: int = 0
    tokens_judge: int = 0
    tokens_prompt: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    eflops: float = 0.0
    eflops_kinetics: float = 0.0
    seconds: float = 0.0
    dollars: float = 0.0
    kv_tokens: float = 0.0

    @property
    def tokens(self) -> int:
        """What a token budget counts: generated, forced, probe and judge tokens; prompt tokens are apart."""
        return self.tokens_generated + self.tokens_forced + self.tokens_probe + self.tokens_judge

    def __add__(self, other: Charge) -> Charge:
        return Charge(  # written out: replays add hundreds of thousands
            self.tokens_generated + other.tokens_generated, self.tokens_forced + other.tokens_forced,
            self.tokens_probe + other.tokens_probe, self.tokens_judge + other.tokens_judge,
            self.tokens_prompt + other.tokens_prompt, self.flops + other.flops, self.bytes + other.bytes,
            self.eflops + other.eflops, self.eflops_kinetics + other.eflops_kinetics, self.seconds + other.seconds,
            self.dollars + other.dollars, self.kv_tokens + other.kv_tokens,
        )  # fmt: skip


CHARGE_FIELDS = tuple(Charge.__slots__)


class Probe(NamedTuple):
    """An anytime answer: what branch number ``branch`` says after ``tokens`` tokens when it is made to answer (None: nothing)."""

    branch: int
    tokens: int
    vote: str | None


@dataclass(frozen=True, slots=True)
class Branch:
    """A finished request. ``answer`` is what was extracted (None: nothing could be); ``vote`` the representative of its class of
    equal answers, by the verifier's own notion of equality; ``finish`` "denied" means the budget could not pay for it; ``probes``
    are its anytime answers, in order."""

    problem_id: str
    index: int
    seed: int
    completion: Completion
    answer: str | None
    vote: str | None
    charge: Charge = Charge()
    probes: tuple[Probe, ...] = ()

    @property
    def finish(self) -> Finish:
        return self.completion.finish

    @property
    def usable(self) -> bool:
        """True if the branch ended by itself or was made to answer, and an answer was found in it."""
        return self.vote is not None and self.finish in ("stop", "length") and not self.completion.partial


@dataclass(frozen=True, slots=True)
class Generate:
    """Work: sample these requests. The driver starts as many as the budget can pay for, waits for them and replies with a branch
    each, in request order. ``until`` sees the branches finished so far after each arrival; once it is true the rest are cancelled
    (and charged for what they used). ``why`` goes into the decision log."""

    requests: tuple[Request, ...]
    until: Callable[[Sequence[Branch]], bool] | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """Work: score these branches with the run's reward model. The reply's ``scores`` are in the order given. ``texts``: what to
    score of each, where that is not its own completion's text (a step of a search, with all before it)."""

    branches: tuple[Branch, ...]
    why: str = ""
    texts: tuple[str, ...] = ()


class Probing(NamedTuple):
    """A wish for anytime answers of running branch number ``branch``: from ``start`` tokens on, at each multiple of ``every``."""

    branch: int
    start: int
    every: int


class Inserting(NamedTuple):
    """A wish to put ``text`` into the thought of running branch number ``branch``, as its next tokens."""

    branch: int
    text: str


@dataclass(frozen=True, slots=True)
class Steer:
    """Work, one piece at a time: start these requests, cancel, close, probe or put text into running branches (by request index),
    and let the others run on. The driver replies as soon as something new is known: branches that ended, anytime answers, or that
    nothing is running any more. A branch that the policy cancelled ends with finish "abort", and wakes nobody.

    ``value`` is the policy's estimate of what the started piece adds to P(right answer) for each token; a budget that many problems
    share is spent on the highest values first. A routine that returns leaves nothing running: the driver cancels the rest.
    """

    start: tuple[Request, ...] = ()
    cancel: tuple[int, ...] = ()
    close: tuple[int, ...] = ()
    probe: tuple[Probing, ...] = ()
    insert: tuple[Inserting, ...] = ()
    why: str = ""
    value: float = 0.0


Work = Generate | Score | Steer


@dataclass(frozen=True, slots=True)
class Reply:
    """What the driver sends back for a piece of work. ``remaining`` is what is left of the scope's budget, in its unit; ``running``
    how many branches of a ``Steer`` are on their way."""

    branches: tuple[Branch, ...] = ()
    scores: tuple[float, ...] = ()
    probes: tuple[Probe, ...] = ()
    running: int = 0
    remaining: float = float("inf")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A policy's last word on a problem. ``votes`` maps each answer to its weight; ``stop`` says in a word why it ended, ``why`` in
    a sentence, for the decision log. Raises TypeError for what is no text or no number, ValueError for a weight that is not
    finite: a ledger holds neither."""

    answer: str | None
    stop: str
    votes: Mapping[str, float] = field(default_factory=dict)
    why: str = ""

    def __post_init__(self) -> None:
        for answer in (*self.votes, *(() if self.answer is None else (self.answer,))):
            if not isinstance(answer, str):
                raise TypeError(f"an answer is a text, not {answer!r}")
        votes = {answer: float(weight) for answer, weight in self.votes.items()}  # numpy's numbers, too
        for answer, weight in votes.items():
            if not math.isfinite(weight):
                raise ValueError(f"the votes for {answer!r} weigh {weight}; give a finite number")
        object.__setattr__(self, "votes", votes)


Routine = Generator[Work, Reply, Outcome]


@dataclass(frozen=True, slots=True)
class Brief:
    """What a policy may know when it starts on a problem: no clock, no engine, no prices but these.

    ``max_thinking_tokens`` is the longest thought that the context allows beside this prompt and the room for an answer;
    ``budget_share`` what an even split of the budget gives each problem; ``probe_tokens`` the price of an anytime answer (None:
    this engine gives none); ``room_tokens`` what an answer may take.
    """

    seed: int
    max_thinking_tokens: int
    sampling: Sampling
    budget_amount: float = float("inf")
    budget_unit: str = "tokens"
    budget_scope: str = "problem"
    budget_share: float = float("inf")
    effort: float | None = None
    kv_budget: int | None = None
    kv_method: str | None = None
    probe_tokens: int | None = None
    room_tokens: int = 0

    def request(self, problem: Problem, index: int, **changes: Any) -> Request:
        """The run's standard request for one more branch of ``problem``; ``changes`` override its fields."""
        settings: dict[str, Any] = {
            "seed": seed_for(self.seed, problem.id, index),
            "thinking_tokens": self.max_thinking_tokens,
            "sampling": self.sampling,
            "effort": self.effort,
            "kv_budget": self.kv_budget,
            "kv_method": self.kv_method,
        }
        return Request(
            problem, int(index), **(settings | changes)
        )  # int: a policy may count in numpy's numbers


@dataclass(frozen=True, slots=True)
class Decision:
    """A line of the decision log: what was bought or refused for a problem, why, and the most it could cost (budget unit)."""

    problem_id: str
    what: str
    why: str
    price: float
    remaining: float


@dataclass(frozen=True, slots=True)
class Result:
    """All that is known of one problem when it is done. ``right`` lists the votes that were verified as correct (any branch with
    such a vote would have answered rightly); ``error`` is "" unless the problem failed, and ``traceback`` "" unless its
    policy did."""

    problem_id: str
    answer: str | None
    verdict: Verdict | None
    branches: tuple[Branch, ...]
    charge: Charge
    stop: str
    seed: int
    votes: Mapping[str, float] = field(default_factory=dict)
    right: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()
    error: str = ""
    traceback: str = ""

    @property
    def cost(self) -> Charge:
        """All that the problem cost, in every unit."""
        return self.charge
