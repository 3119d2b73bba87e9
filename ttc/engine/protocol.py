"""What the driver asks of an engine: five verbs. vLLM in process, an HTTP server, a recorded pool and the fake for tests all
speak them, so that a policy cannot tell one from another.

An engine turns requests into tokens and counts them; it knows no budget. Tickets are the driver's own numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from ttc.types import AnswerFormat, Completion, Control, Problem, Request, Sampling

if TYPE_CHECKING:
    from ttc.attention.settings import KvSetting
    from ttc.costmodel import ModelShape


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is: facts fixed at start-up.

    ``context`` is the longest sequence (prompt + output) in tokens; ``concurrency`` how many branches run at once; ``steerable``
    whether ``steer`` acts within one step; ``shape`` is None where the model's config is unknown (a remote server), and
    FLOPs can't be charged then. ``prompt_error``: a prompt has at most so many times the tokens that ``count_prompt`` tells (1: it
    is exact). ``probe_tokens`` is the most that one anytime answer costs (None: the engine can't probe; one that
    can is a ``ProbingEngine``); where it takes a request of its own, ``probe_prefill`` is how much of the branch that may have to
    compute again (None: it takes none). ``inserts``: it is an ``InsertingEngine``. ``kv_page`` is the tokens of a KV page where
    branches can decode sparsely; None: they can't, and ``kv_reason`` says why. ``identity`` names model and versions for run.json,
    which a resumed run must match; ``engine_args`` (settings of the engine's own) and ``files`` (digests of
    the model's files) are told there, too.
    """

    name: str
    model: str
    context: int
    concurrency: int
    format: AnswerFormat
    sampling: Sampling
    steerable: bool
    shape: ModelShape | None = None
    prompt_passes: int = 1
    prompt_error: int = 1
    thinking_tokens: int = 0
    signals: tuple[str, ...] = ()
    probe_tokens: int | None = None
    probe_prefill: int | None = None
    inserts: bool = False
    kv_page: int | None = None
    kv_reason: str = ""
    identity: Mapping[str, str] = field(default_factory=dict)
    engine_args: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


class Progress(NamedTuple):
    """A running branch: output tokens so far (generated + forced) and its share of weight reads (None: not measured)."""

    tokens: int
    weight_reads: float | None


class Probed(NamedTuple):
    """An anytime answer of a running branch: where it was, and the text as if it had been made to answer there."""

    ticket: int
    tokens: int
    text: str


@dataclass(slots=True)
class StepReport:
    """What one ``step`` brought: the branches that ended, where each running one is (those that moved), anytime answers.

    ``standing``: ``progress`` tells of all that run, as it is when it is read, so that it need not be read at every step.
    """

    finished: list[tuple[int, Completion]] = field(default_factory=list)
    progress: Mapping[int, Progress] = field(default_factory=dict)
    probes: list[Probed] = field(default_factory=list)
    standing: bool = False


@dataclass(frozen=True, slots=True)
class Counters:
    """The engine's own totals since it was opened: what the ledger must agree with.

    ``output_tokens`` are generated + forced + probes, those of cancelled branches included; ``prompt_tokens`` every prompt token
    handed over, cached or not; ``steps`` the passes over the weights (0 where unseen).
    """

    requests: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    steps: int = 0


class Engine(Protocol):
    """Raises ``EngineError`` from any verb when the engine itself is gone; a request's own failure is a ``Completion`` with finish
    "error" instead."""

    @property
    def info(self) -> EngineInfo: ...

    def count_prompt(self, problem: Problem, effort: float | None = None) -> int:
        """Prompt length in tokens, after the chat template."""
        ...

    @property
    def room_tokens(self) -> int:
        """Tokens kept for closing the thought and answering: a branch uses at most thinking_tokens + room_tokens."""
        ...

    def submit(self, ticket: int, request: Request) -> None:
        """Take a request. The driver never has more than ``info.concurrency`` in flight."""
        ...

    def step(self) -> StepReport:
        """Advance. Returns within a fraction of a second also when nothing moved."""
        ...

    def steer(self, ticket: int, word: Literal["close"]) -> None:
        """Make a running branch end its thought now and answer inside its room. Unknown or finished tickets are ignored."""
        ...

    def abort(self, tickets: Sequence[int]) -> None:
        """Cancel. Each ends in a later step's ``finished`` with finish "abort" and all that it used."""
        ...

    def counters(self) -> Counters: ...

    def close(self) -> None:
        """Free everything; idempotent."""
        ...


@runtime_checkable
class ProbingEngine(Protocol):
    """What an engine with ``info.probe_tokens`` can do besides: ask running branches for anytime answers. Each costs at most that
    many tokens and leaves its branch as it was; ``Request.probe_every`` asks for them from the start."""

    def probe(self, ticket: int, start: int, every: int) -> None:
        """From ``start`` tokens on, ask a running branch at each multiple of ``every`` tokens. Unknown tickets are ignored."""
        ...


@runtime_checkable
class SteeringEngine(Protocol):
    """An engine that does what ``Request.control`` says."""

    def check_control(self, control: Control, thinking: int) -> None:
        """Raise InputError for what can't be done to a thought of at most ``thinking`` tokens here."""
        ...


@runtime_checkable
class SteppingEngine(Protocol):
    """An engine whose branches can pause at the end of a step (``Request.step_text``, ``step_tokens``)."""

    def check_steps(self, text: str) -> None:
        """Raise InputError where no branch can pause, or none behind ``text`` ("": its length alone ends a step)."""
        ...


@runtime_checkable
class SparseEngine(Protocol):
    """What an engine with ``info.kv_page`` that counts what is read can say besides: where a KV budget is in force."""

    def sparse(self, kv: KvSetting) -> tuple[float, float] | None:
        """The context, in tokens, up to which a branch with this setting reads everything (infinity: at any), and the part of the
        layers without a window that then read less. None where it can't say, and does not count."""
        ...


@runtime_checkable
class ServedEngine(Protocol):
    """An engine behind a server, of which it has to be asked whether branches can decode sparsely."""

    def learn_kv(self) -> EngineInfo:
        """Ask the server, once, what tokens its KV page has and whether requests can set a KV budget; ``info``, as it is then."""
        ...

    def wake(self) -> None:
        """From any thread: a ``step`` that waits for news returns."""
        ...


@runtime_checkable
class InsertingEngine(Protocol):
    """What an engine with ``info.inserts`` can do besides: put text into a thought that is running, on the controller's word."""

    def insert(self, ticket: int, text: str) -> None:
        """Force ``text`` as the branch's next tokens (they count as thinking, so its cap holds). No effect where the thought is
        closed or closing, another text is being forced, or it does not fit before the cap; unknown tickets are ignored. Raises
        InputError for a text without a token of this model's."""
        ...
