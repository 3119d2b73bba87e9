"""Reward models by name: what a name means, what is refused, a pooling model in process and behind a server's API."""

from __future__ import annotations

import json
import math
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import ttc
from tests.conftest import make_problems
from ttc.api import Run, Settings
from ttc.engine.fake import FakeEngine, Script
from ttc.errors import InputError
from ttc.rewards import PoolingReward, load_reward, reward_name
from ttc.types import Problem


def lengths(problem: Problem, texts: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in texts]


class Outcome:
    name, kind = "whole-chains", "outcome"

    def tokens(self, problem: Problem, texts: Sequence[str]) -> int:
        return len(texts)

    def score(self, problem: Problem, texts: Sequence[str]) -> list[float]:
        return [-3.0] * len(texts)


# -- names -----------------------------------------------------------------------------------------------------------------------
def test_a_callable_and_its_name_are_reward_models() -> None:
    for given in (lengths, "tests.test_rewards:lengths"):
        model = load_reward(given)
        assert model.score(make_problems(1)[0], ["a", "abc"]) == [1.0, 3.0]
        assert reward_name(model) == "lengths"
    assert isinstance(load_reward("tests.test_rewards:Outcome"), Outcome)


def test_a_run_takes_a_callable_and_writes_its_name_down(tmp_path: Any) -> None:
    settings = Settings(policy="best-of-n?n=3&score=reward")
    list(Run(make_problems(2), FakeEngine(), settings, reward=lengths, out=tmp_path / "run").results())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["reward"] == "lengths"
    with pytest.raises(InputError, match="reward"):
        Run(make_problems(2), FakeEngine(), settings, reward=Outcome(), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nano-s-proces", "use one of nano-s-outcome, nano-s-process"),
        ("vllm:", "write vllm:NAME-OR-FOLDER"),
        ("vllm:nano-z", "there is no 'nano-z' for vLLM; use one of nano-s-outcome, nano-s-process"),
        ("http://127.0.0.1:9?last=1", "has no option 'last'"),
        ("http://127.0.0.1:9?step=;", "needs end"),
        ("no.such:thing", "package.module:NAME"),
        ("tests.test_rewards:nothing", "package.module:NAME"),
        ("tests.test_rewards:__name__", "needs tokens and score"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=r"^reward: ") as caught:
        load_reward(name)
    assert words in str(caught.value)


def test_a_search_is_not_led_by_scores_of_whole_chains() -> None:
    with pytest.raises(InputError, match="whole-chains scores whole chains"):
        ttc.Run(make_problems(1), FakeEngine(), Settings(policy="beam"), reward=Outcome())


def test_what_has_no_price_in_eflops_is_refused_under_such_a_budget() -> None:
    settings = Settings(policy="best-of-n?n=2&score=reward", budget="1e15 eflops")
    with pytest.raises(InputError, match="whole-chains does not tell its shape"):
        Run(make_problems(1), FakeEngine(), settings, reward=Outcome())
    [result] = Run(make_problems(1), FakeEngine(), settings, reward=lengths).results()
    assert result.answer is not None


def test_a_callable_that_gives_too_few_scores_fails_its_problem() -> None:
    def short(problem: Problem, texts: Sequence[str]) -> list[float]:
        return [1.0]

    [result] = ttc.run(
        make_problems(1), engine=FakeEngine(), policy="best-of-n?n=3&score=reward", reward=short
    )
    assert "1 scores for 3 texts" in result.error


# -- scores of any size -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "policy", ["best-of-n?n=3&score=reward", "weighted-vote?n=3&weight=reward", "plain?n=3&select=reward"]
)
def test_a_score_that_is_no_number_is_told_of_its_problem_and_the_rest_goes_on(
    score: float, policy: str, tmp_path: Any
) -> None:
    def wild(problem: Problem, texts: Sequence[str]) -> list[float]:
        return [score if problem.id == "p1" else 1.0] * len(texts)

    settings: dict[str, Any] = {"policy": policy, "reward": wild, "out": tmp_path / "run"}
    by_id = {r.problem_id: r for r in ttc.run(make_problems(3), engine=FakeEngine(), **settings)}
    assert f"wild gave {score} for text 1 of 3; a score is a finite number" in by_id["p1"].error
    votes = Counter(b.vote for b in by_id["p1"].branches)
    assert votes[by_id["p1"].answer] == max(votes.values()), "answered by vote, as where there are no scores"
    assert all(result.answer is not None for result in by_id.values())
    assert not by_id["p0"].error and not by_id["p2"].error


@pytest.mark.parametrize("offset", [0.0, -100.0])
def test_best_of_n_takes_the_highest_score_of_any_sign(offset: float) -> None:
    """Every branch has an answer of its own: another choice than the highest score's is seen."""

    def crc(problem: Problem, texts: Sequence[str]) -> list[float]:
        return [offset + zlib.crc32(f"{problem.id}{text}".encode()) / 2**32 for text in texts]

    engine = FakeEngine(writer=lambda request, issued: Script(5, str(request.index), 1))
    [*results] = ttc.run(make_problems(12), engine=engine, policy="best-of-n?n=6&score=reward", reward=crc)
    problems = {p.id: p for p in make_problems(12)}
    for result in results:
        scores = crc(problems[result.problem_id], [b.completion.text for b in result.branches])
        assert result.answer == result.branches[scores.index(max(scores))].vote
    assert len({r.answer for r in results}) > 3


def test_a_weighted_vote_adds_up_chances_and_refuses_less_than_nothing() -> None:
    def by_answer(problem: Problem, texts: Sequence[str]) -> list[float]:
        return [0.9 if text.endswith("8") else 0.2 for text in texts]

    def logits(problem: Problem, texts: Sequence[str]) -> list[float]:
        return [-1.5] * len(texts)

    engine = FakeEngine(writer=lambda request, issued: Script(10, "8" if request.index == 3 else "7", 1))
    policy, problems = "weighted-vote?n=4&weight=reward", make_problems(1)
    [result] = ttc.run(problems, engine=engine, policy=policy, reward=by_answer)
    assert result.votes == pytest.approx({"7": 0.6, "8": 0.9}) and result.answer == "8"
    [result] = ttc.run(problems, engine=engine, policy=policy, reward=logits)
    assert "the reward model gives -1.5" in result.error and "sigmoid" in result.error


def test_the_shipped_outcome_model_weighs_votes_by_its_logits_sigmoid() -> None:
    """Its logits are negative as often as not; every vote must add to its answer."""
    pytest.importorskip("torch")
    from ttc.rl.reward import _inputs

    def write(request: Any, issued: int) -> Script:
        return Script(5, "7" if request.index % 2 else "8", 1)

    model: Any = load_reward("nano-s-outcome")
    [result] = ttc.run(
        make_problems(1),
        engine=FakeEngine(writer=write),
        policy="weighted-vote?n=4&weight=reward",
        reward=model,
    )
    assert not result.error and result.answer in ("7", "8")
    texts = [b.completion.text for b in result.branches]
    logits = [row[-1] for row in model.positions(_inputs(make_problems(1)[0], texts))]
    assert min(logits) < 0, "else this shows nothing"
    for answer, weight in result.votes.items():
        own = [
            1 / (1 + math.exp(-x)) for x, b in zip(logits, result.branches, strict=True) if b.vote == answer
        ]
        assert weight == pytest.approx(sum(own), abs=1e-4)


# -- a server --------------------------------------------------------------------------------------------------------------------
def test_the_study_gives_every_chain_its_own_score() -> None:
    """A result holds its branches as they ended; best-of-n and the weighted vote must not take another chain's score."""
    from ttc.bench.study import Scored

    def digests(problem: Problem, texts: Sequence[str]) -> list[float]:
        return [float(zlib.crc32(text.encode())) for text in texts]

    engine = FakeEngine(writer=lambda request, issued: Script(30 - 4 * request.index, str(request.index), 1))
    scored = Scored(6)
    policy: Any = scored
    settings = Settings(policy=policy, budget="100k tokens")
    for result in Run(make_problems(8), engine, settings, reward=load_reward(digests)).results():
        own = {b.index: float(zlib.crc32(b.completion.text.encode())) for b in result.branches}
        assert scored.scores[result.problem_id] == own
        assert len(set(own.values())) > 1


def test_the_study_takes_no_cell_of_other_weights(tmp_path: Any) -> None:
    """A reward model that was trained anew under its old name: its cells are measured again, what others made stays theirs."""
    from ttc.bench.study import PLAIN, Study
    from ttc.engine.model import fingerprint

    folders = []
    for k in range(2):
        folders.append(tmp_path / f"model{k}")
        folders[k].mkdir()
        (folders[k] / "config.json").write_text("{}")
        (folders[k] / "model.safetensors").write_bytes(bytes([k]))
    old, new = map(fingerprint, folders)
    assert old != new
    out, ran = tmp_path / "new" / "cells.jsonl", []
    for weights in (old, new, old):
        engine = FakeEngine()
        study = Study(engine, {"sums": make_problems(2)}, 1, 64, "", out, (weights,))
        study.cell("sums", PLAIN, "1k tokens", 0)
        ran.append(engine.counters().output_tokens > 0)
    assert ran == [True, True, False]
    assert len(out.read_text().splitlines()) == 2
    out.write_text(out.read_text() + "nothing\n")
    with pytest.raises(InputError, match=r"^out: line 3 of .* is no cell of a study"):
        Study(FakeEngine(), {}, 1, 64, "", out)
    with pytest.raises(InputError, match=r"^out: can't use"):
        Study(FakeEngine(), {}, 1, 64, "", out / "below")


class Api(BaseHTTPRequestHandler):
    """The part of vLLM's API that a classifier serves: a token is a character, a score 1 / (1 + tokens). The path of the other kind
    is there, too, and answers 501, as vLLM's does."""

    whole = True
    pools = True

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._reply(200, {"data": [{"id": "judge"}]})
        else:
            self._reply(404, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert asked["model"] == "judge"
        if self.path == "/tokenize":
            text = asked.get("prompt") or "".join(f"<{m['role']}>{m['content']}" for m in asked["messages"])
            self._reply(200, {"tokens": [ord(c) for c in text]})
        elif self.path == "/classify" and self.whole:
            found = [{"index": i, "probs": [0.5, 1 / (1 + len(row))]} for i, row in enumerate(asked["input"])]
            self._reply(200, {"data": found[::-1]})
        elif self.path == "/classify":
            self._reply(501, {"error": "The model does not support Classification API"})
        elif self.path == "/pooling" and self.pools and asked["task"] == "token_classify":
            found = [
                {"index": i, "data": [[0.0], [1 / (1 + len(row))]]} for i, row in enumerate(asked["input"])
            ]
            self._reply(200, {"data": found})
        else:
            self._reply(400, {"error": "no such task"})

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(of: type[Api] = Api, **how: bool) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (of,), how)) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


@pytest.fixture(params=[True, False], ids=["classify", "pooling"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    with served(whole=request.param) as url:
        yield url


def test_a_served_model_scores_prompt_text_and_end(server: str) -> None:
    problem = make_problems(1)[0]
    prompt = len("<user>" + problem.text)
    for query, end in (("", 0), ("?end=<end>", 5)):
        model = load_reward(server + query)
        assert model.tokens(problem, ["abc", ""]) == 2 * (prompt + end) + 3
        assert model.score(problem, ["abc", ""]) == pytest.approx(
            [1 / (1 + prompt + 3 + end), 1 / (1 + prompt + end)]
        )
    [result] = ttc.run([problem], engine=FakeEngine(), policy="best-of-n?n=3&score=reward", reward=server)
    assert result.charge.tokens_judge > 3 * prompt


def test_a_server_that_scores_nothing_is_refused_at_the_door() -> None:
    with (
        served(whole=False, pools=False) as url,
        pytest.raises(InputError, match="serve a classifier with --runner pooling"),
    ):
        load_reward(url)


def test_a_server_that_lets_go_of_an_idle_connection_is_asked_again() -> None:
    """It drops every connection at its second call, unanswered, as servers do that give up an idle one at that moment."""

    class Dropping(Api):
        protocol_version = "HTTP/1.1"
        used = False

        def parse_request(self) -> bool:
            drops, self.used = self.used, True
            self.close_connection = True
            if not drops and super().parse_request():
                self.close_connection = False
                return True
            return False

    with served(of=Dropping) as url:
        model, problem = load_reward(url), make_problems(1)[0]
        for _ in range(3):
            assert model.score(problem, ["abc"]) == pytest.approx([1 / (4 + len("<user>" + problem.text))])


class Letters:
    """A pooling model whose tokens are letters, with its score at a mark: the share of the row before it."""

    name, shape, at_once = "letters", None, 0

    def prompt(self, problem: Problem) -> list[int]:
        return [0]

    def text(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def outputs(self, rows: Sequence[list[int]]) -> list[list[float]]:
        return [[float(len(row))] for row in rows]


@pytest.mark.parametrize(
    ("step", "text", "read"),
    [
        ("", "a;b;", "a;b;#"),
        (";", "a;b;", "a;#b;#"),
        (";", "a;b", "a;#b#"),
        (";", "ab", "ab#"),
        (";", "", "#"),
        ("\n\n", "a\n\nb\n\n", "a#b#"),
        ("\n\n", "a\nb", "a\nb#"),
    ],
)
def test_a_mark_stands_behind_every_step(step: str, text: str, read: str) -> None:
    model = PoolingReward(Letters(), "#", step)
    problem = make_problems(1)[0]
    assert model._rows(problem, [text]) == [[0, *map(ord, read)]]
    assert model.tokens(problem, [text]) == 1 + len(read)


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"^reward: http://127.0.0.1:9 does not answer"):
        load_reward("http://127.0.0.1:9")


def test_a_prompt_is_read_with_all_of_its_messages() -> None:

    class Spelt(Letters):
        def prompt(self, problem: Problem) -> list[int]:
            return [0] * sum(len(message["content"]) for message in problem.messages)

    reward, question = PoolingReward(Spelt()), {"role": "user", "content": "1+1"}
    briefly, slowly = (Problem("0", ({"role": "system", "content": c}, question)) for c in ("ab", "abcd"))
    assert [reward.tokens(p, ["x"]) for p in (briefly, slowly, briefly)] == [6, 8, 6]
