"""The ledger of a run: what happened, one line at a time, on disk before anyone acts on it.

A run directory holds ``run.json`` (configuration, seed, versions, model, machine), ``branches.jsonl`` (one whole line per finished
branch, flushed before its policy sees it), ``scores.jsonl`` where a reward model was asked, ``decisions.jsonl``, ``results.jsonl``,
and while it runs ``running.json``: what the branches under way have cost so far, so that a killed run's spending is known.
Opening it again resumes: a torn last line is dropped, and a changed configuration refused. The ledger, not the seed, is the record:
bf16 samples depend on the batch that they ran in. Knows no prices and no engine.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import parse_qsl

from ttc.errors import InputError, LedgerError
from ttc.types import Branch, Charge, Completion, Decision, Fork, Probe, Request, Result, Verdict

T = TypeVar("T")
SCHEMA = 1
COMPARED = (
    "model",
    "identity",
    "policy",
    "budget",
    "seed",
    "sampling",
    "format",
    "problems",
    "effort",
    "kv_budget",
    "kv_method",
    "engine",
    "max_thinking_tokens",
    "thinking_limit",
    "intensity",
    "price",
    "reward",
    "schema",
)
"""The keys of run.json that must be the same for a run to be resumed."""
_DEFAULTS: dict[type, tuple[tuple[str, Any], ...]] = {}  # what the fields of a dataclass are if nobody says
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(slots=True)
class Recorded:
    order: int
    digest: str
    branch: Branch


@dataclass(slots=True)
class Ledger:
    """Open with ``Ledger.open(directory, config)``, or ``Ledger()`` for one that is kept in memory only.

    ``results`` are the finished problems by id, ``interrupted`` charges of branches that were cut by the end of an earlier
    session, and of attempts that failed and were made again: they count as spent, and have no sample. Problems that had failed are
    open again (the server may be back), their failed branches likewise.
    """

    directory: Path | None = None
    results: dict[str, Result] = field(default_factory=dict)
    interrupted: dict[str, list[Charge]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    _recorded: dict[tuple[str, int], list[Recorded]] = field(default_factory=dict)
    _indices: dict[str, dict[int, None]] = field(default_factory=dict)
    _scores: dict[tuple[str, str], deque[tuple[tuple[float, ...], Charge]]] = field(default_factory=dict)
    _files: dict[str, IO[str]] = field(default_factory=dict)
    _branch_rows: int = 0
    _noted: bool = False

    @staticmethod
    def open(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> Ledger:
        """Start a run in ``directory``, or resume the one that is there.

        Raises InputError if the directory holds something else, a run that another process is writing, or one with another
        configuration (naming what differs).
        """
        path = Path(directory)
        ledger = Ledger(path)
        run_file = path / "run.json"
        wanted = json.loads(json.dumps({**config, "schema": SCHEMA}, default=str))
        if not run_file.is_file():
            _refuse_strangers(path)
        branches = ledger._files["branches"] = (path / "branches.jsonl").open("a", encoding="utf-8")
        try:
            ledger._begin(branches, wanted)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def _begin(self, branches: IO[str], wanted: Mapping[str, Any]) -> None:
        """Lock the directory; read back what is there, or write down what the run is."""
        assert self.directory is not None
        path, run_file = self.directory, self.directory / "run.json"
        try:
            fcntl.flock(
                branches, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # let go of when the file is closed, or the process dies
        except OSError:
            raise InputError(
                f"--out {path}: another run is writing there; wait for its end, or give another directory"
            ) from None
        if run_file.is_file():
            _refuse_changes(_read_object(run_file), wanted, path)
            self._load()
        else:
            _write_atomically(run_file, json.dumps(wanted, indent=2) + "\n")
        for name in ("decisions", "results"):
            self._files[name] = (path / f"{name}.jsonl").open("a", encoding="utf-8")
        self._settle_killed(path / "running.json")

    # -- reading back ------------------------------------------------------------------------------------------------------
    def _load(self) -> None:
        assert self.directory is not None
        for order, row in enumerate(self._rows("branches")):
            self._branch_rows = order + 1
            branch = branch_from_json(row)
            if row.get("interrupted"):
                self.interrupted.setdefault(branch.problem_id, []).append(branch.charge)
            else:
                key = (branch.problem_id, branch.index)
                self._recorded.setdefault(key, []).append(Recorded(order, str(row["digest"]), branch))
                self._indices.setdefault(branch.problem_id, {})[branch.index] = None
        for row in self._rows("scores"):
            charge = _build(Charge, row["charge"])
            if row["scores"] is None:
                self.interrupted.setdefault(row["problem"], []).append(charge)
            else:
                asked = (row["problem"], row["digest"])
                self._scores.setdefault(asked, deque()).append((tuple(row["scores"]), charge))
        failed: set[str] = set()
        for row in self._rows("results"):
            result = result_from_json(row)
            self.results[result.problem_id] = result
            (failed.add if result.error else failed.discard)(result.problem_id)
        list(self._rows("decisions"))
        for problem in failed:
            del self.results[problem]
        if failed:
            self.notices.append(f"{len(failed)} problems that had failed are tried again")
        for (problem, _), found in self._recorded.items():
            lost = [r for r in found if r.branch.finish == "error"] if problem not in self.results else ()
            for recorded in lost:
                found.remove(recorded)
                self.interrupted.setdefault(problem, []).append(recorded.branch.charge)

    def _settle_killed(self, note: Path) -> None:
        """Write down as cut what an earlier process had under way when it was killed, as it was last noted."""
        assert self.directory is not None
        if not note.is_file():
            return
        noted = _read_object(note)
        since = self._rows("branches")[noted["after"] :]
        landed = {(row["problem"], row["index"], row["digest"]) for row in since}
        lost = [row for row in noted["rows"] if (row["problem"], row["index"], row["digest"]) not in landed]
        for row in lost:
            self._append("branches", row, sync=True)
            self._branch_rows += 1
            self.interrupted.setdefault(row["problem"], []).append(_build(Charge, row["charge"]))
        note.unlink()
        if lost:
            tokens = sum(_build(Charge, row["charge"]).tokens for row in lost)
            self.notices.append(
                f"{len(lost)} branches were under way when the run was killed; what they had cost is counted"
                f" ({tokens:,} tokens), and they are sampled again"
            )

    def _rows(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a file; a torn last line (no newline, or not JSON) is cut off, with a word about it."""
        assert self.directory is not None
        path = self.directory / f"{name}.jsonl"
        if not path.is_file():
            return []
        data = path.read_bytes()
        rows, good = [], 0
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("torn")
                rows.append(json.loads(line))
                good += len(line)
            except ValueError as error:
                if good + len(line) < len(data):
                    raise InputError(
                        f"{path} line {number} is damaged ({error}); move the directory away or mend the line"
                    ) from None
                self.notices.append(f"{path.name}: the last line was torn and is dropped ({len(line)} bytes)")
                with path.open("r+b") as file:
                    file.truncate(good)
        return rows

    def branch(self, problem_id: str, request: Request) -> tuple[int, Branch] | None:
        """The recorded branch for this very request and its place in the journal, if there is one."""
        for recorded in self._recorded.get((problem_id, request.index), ()):
            if recorded.digest == request.digest():
                return recorded.order, recorded.branch
        return None

    def scores(self, problem_id: str, digest: str) -> tuple[tuple[float, ...], Charge] | None:
        """The next scores that an earlier session had for texts of this digest, and what they cost."""
        found = self._scores.get((problem_id, digest))
        return found.popleft() if found else None

    def branches(self, problem_id: str) -> Iterator[Branch]:
        """The branches of a problem that earlier sessions wrote down."""
        for index in self._indices.get(problem_id, ()):
            for recorded in self._recorded[problem_id, index]:
                yield recorded.branch

    # -- writing -----------------------------------------------------------------------------------------------------------
    @property
    def kept(self) -> bool:
        """Whether anything is written to disk."""
        return bool(self._files)

    def write_branch(self, branch: Branch, request: Request, *, interrupted: bool = False) -> None:
        if not self._files:
            return
        self._append("branches", _branch_row(branch, request, interrupted), sync=True)
        self._branch_rows += 1

    def note_running(self, running: Iterable[tuple[Branch, Request]]) -> None:
        """What the branches under way have cost so far: in place of the last note, and all that is known of them if this process is
        killed."""
        if not self._files or self.directory is None:
            return
        rows = [_branch_row(branch, request, interrupted=True) for branch, request in running]
        note = {"after": self._branch_rows, "rows": rows}
        path, temporary = self.directory / "running.json", self.directory / "running.tmp"
        with self._writing():
            temporary.write_text(
                json.dumps(note, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
            )
            os.replace(temporary, path)
        self._noted = True

    def write_scores(
        self, problem_id: str, digest: str, scores: Sequence[float] | None, charge: Charge
    ) -> None:
        """What the reward model said (None: nothing, though it was paid for)."""
        if not self._files:
            return
        if "scores" not in self._files and self.directory is not None:
            self._files["scores"] = (self.directory / "scores.jsonl").open("a", encoding="utf-8")
        row = {"problem": problem_id, "digest": digest, "scores": scores, "charge": _without_defaults(charge)}
        self._append("scores", row, sync=True)

    def write_result(self, result: Result) -> None:
        if not self._files:
            return
        self._append("results", result_to_json(result), sync=True)

    def write_decision(self, decision: Decision) -> None:
        if not self._files:
            return
        self._append("decisions", asdict(decision))

    def _append(self, name: str, row: Mapping[str, Any], *, sync: bool = False) -> None:
        file = self._files.get(name)
        if file is None:
            return
        line = _ENCODER.encode(row) + "\n"
        with self._writing():
            file.write(line)
            if sync:
                file.flush()  # to the kernel: survives kill -9 of this process

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._noted = (
                False  # what runs can't be written down one by one: the last note stays, for the next session
            )
            raise LedgerError(
                f"out: {self.directory} can't be written ({error.strerror}); make room there, and repeat the command to resume"
            ) from error

    def close(self) -> None:
        if self._noted and self.directory is not None:
            (self.directory / "running.json").unlink(missing_ok=True)  # all that ran has a line of its own
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._files.clear()


# -- JSON forms ------------------------------------------------------------------------------------------------------------
def _branch_row(branch: Branch, request: Request, interrupted: bool) -> dict[str, Any]:
    row = branch_to_json(branch) | {"digest": request.digest()}
    if request.prefix:
        row["prefix"] = request.prefix
    return row | ({"interrupted": True} if interrupted else {})


def branch_to_json(branch: Branch) -> dict[str, Any]:
    """One line of branches.jsonl: Branch, with its Completion and Charge flattened into objects; empty fields left out."""
    completion = _without_defaults(branch.completion)
    if not branch.completion.partial:  # a step of a search is gone on from by its tokens
        completion.pop("token_ids", None)
    return {
        "problem": branch.problem_id,
        "index": branch.index,
        "seed": branch.seed,
        "answer": branch.answer,
        "vote": branch.vote,
        "completion": completion,
        "charge": _without_defaults(branch.charge),
    } | ({"probes": [[p.tokens, p.vote] for p in branch.probes]} if branch.probes else {})


def branch_from_json(row: Mapping[str, Any]) -> Branch:
    try:
        written = row["completion"]
        forks, calls = ([Fork(*each) for each in written.get(key, ())] for key in ("forks", "calls"))
        ids = tuple(written.get("token_ids", ()))
        return Branch(
            problem_id=row["problem"],
            index=row["index"],
            seed=row["seed"],
            completion=_build(
                Completion, {**written, "forks": tuple(forks), "calls": tuple(calls), "token_ids": ids}
            ),
            answer=row["answer"],
            vote=row["vote"],
            charge=_build(Charge, row["charge"]),
            probes=tuple(Probe(row["index"], tokens, vote) for tokens, vote in row.get("probes", ())),
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"branches.jsonl: a line is not a branch of this version of ttc ({error}); start a new run directory"
        ) from error


def result_to_json(result: Result) -> dict[str, Any]:
    """One line of results.jsonl. Branches and decisions have files of their own."""
    return {
        "problem": result.problem_id,
        "answer": result.answer,
        "verdict": _without_defaults(result.verdict) if result.verdict is not None else None,
        "stop": result.stop,
        "votes": dict(result.votes),
        "right": list(result.right),
        "samples": sum(b.finish != "denied" and not b.completion.partial for b in result.branches),
        "charge": _without_defaults(result.charge),
        "seed": result.seed,
        "error": result.error,
    } | ({"traceback": result.traceback} if result.traceback else {})


def result_from_json(row: Mapping[str, Any]) -> Result:
    verdict = row["verdict"]
    return Result(
        problem_id=row["problem"],
        answer=row["answer"],
        verdict=Verdict(**verdict) if verdict is not None else None,
        branches=(),
        charge=_build(Charge, row["charge"]),
        stop=row["stop"],
        seed=row["seed"],
        votes=row["votes"],
        right=tuple(row["right"]),
        error=row["error"],
        traceback=row.get("traceback", ""),
    )


def _without_defaults(value: Any) -> dict[str, Any]:
    kind = type(value)
    if kind not in _DEFAULTS:
        _DEFAULTS[kind] = tuple((f.name, f.default) for f in fields(kind))
    return {name: v for name, default in _DEFAULTS[kind] if (v := getattr(value, name)) != default}


def _build(kind: Callable[..., T], row: Mapping[str, Any]) -> T:
    return kind(**row)


# -- run.json --------------------------------------------------------------------------------------------------------------
def _read_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} can't be read ({error}); give another --out directory") from error


def _refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    same = {key: old.get(key) == new.get(key) for key in COMPARED}
    if isinstance(old.get("policy"), str):
        same["policy"] = _options(old["policy"]) == _options(str(new.get("policy")))
    changed = [words for key in COMPARED if not same[key] for words in _change(key, old, new)]
    if changed:
        more = f"; {len(changed) - 3} more differ" if len(changed) > 3 else ""
        raise InputError(
            f"--out {path}: this run was started with {'; '.join(changed[:3])}{more}; repeat the first command to resume it"
            f"{_command(old)}, or give another directory"
        )


def _options(policy: str) -> tuple[str, frozenset[tuple[str, object]]]:
    """A policy as ``describe`` writes it, whatever the order of its options."""
    name, _, query = policy.partition("?")
    options = parse_qsl(query, keep_blank_values=True)
    return name, frozenset((key, _options(value) if "?" in value else value) for key, value in options)


def _change(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs under ``key``, what it was and what it is."""
    was, now = old.get(key), new.get(key)
    if key == "problems":
        return [_other_problems(old, new)]
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return [f"{key} = {_brief(was)}, not {_brief(now)}"]
    found = []
    for part in dict.fromkeys((*was, *now)):
        if was.get(part) == now.get(part):
            continue
        if (key, part) == ("identity", "weights"):
            found.append(_other_files(old.get("files", {}), new["files"], was.get(part), now.get(part)))
        else:
            found.append(f"{key} {part} = {_brief(was.get(part))}, not {_brief(now.get(part))}")
    return found


def _other_files(old: Mapping[str, str], new: Mapping[str, str], was: object, now: object) -> str:
    names = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
    told = [f"{name} (was {old.get(name, 'not there')}, is {new.get(name, 'not there')})" for name in names]
    return f"other files of the model: {', '.join(told[:3]) or f'was {was}, is {now}'}"


def _other_problems(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    was, now = old.get("digests", {}), new.get("digests", {})
    count, counted = old["problems"]["count"], new["problems"]["count"]
    words = f"{count} problems, not {counted}" if count != counted else "other problems"
    gone, come = [i for i in was if i not in now], [i for i in now if i not in was]
    other = [i for i in was if i in now and was[i] != now[i]]
    kinds = (("not there now", gone), ("new", come), ("of other content", other))
    told = [f"{len(ids)} {what}, as {_brief(ids[0])}" for what, ids in kinds if ids]
    return f"{words} ({'; '.join(told) or 'in another order'})"


def _command(old: Mapping[str, Any]) -> str:
    given = old.get("command") or []
    words = [Path(given[0]).name, *given[1:]] if given else []
    return f" ({_cut(shlex.join(words), 200)})" if len(words) > 1 and "ttc" in words[0] else ""


def _brief(value: Any) -> str:
    return _cut(json.dumps(value), 80)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _refuse_strangers(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file; give a directory")
    strangers = (
        [p.name for p in path.iterdir() if p.suffix == ".jsonl" and p.stat().st_size] if path.is_dir() else []
    )
    if strangers:
        raise InputError(
            f"--out {path} holds {strangers[0]} but no run.json, so it is no run of ttc; give another directory"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--out {path}: can't be created ({error.strerror}); give another directory"
        ) from error


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
