"""Every command line that the docs, the docstrings and the help texts show is one that the program takes.

Nothing is run: the real parsers read the lines, and budgets, policies and tasks are read as a run would read them.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from ttc.budget import Budget
from ttc.cli.main import app
from ttc.errors import InputError
from ttc.policies import POLICIES, parse
from ttc.rg_tasks import parse_spec

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("ttc", "policies", "samplers", "costmodel", "rl", "cli")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("ttc/nano/**/README.md")])
SCRIPTS = [ROOT / "docs/reproduce.sh", ROOT / "Makefile"]
OTHERS = {"--help", "--block-size", "--enable-mfu-metrics", "--runner", "--pooler-config"}
"""Options that every parser has, or that are other programs'."""
PLACEHOLDER = re.compile(r"[A-Z]+(:[A-Z]+)?$|.*[…$]")
"""POOL, DIR, vllm:MODEL, "…", $P/file: what a reader puts something of his own for."""


@dataclass(frozen=True)
class Line:
    """A command line of the docs: its words, and whether it is only a name in running text."""

    where: str
    words: tuple[str, ...]
    named: bool

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def _blocks(page: str) -> tuple[str, str]:
    """The lines of a page's code blocks, fenced and indented, and the rest. Python and JSON are no command lines."""
    code, rest, fence, indented = [], [], "", True
    for line in page.splitlines():
        if line.startswith("```"):
            fence = "" if fence else (line[3:] or "sh")
            rest.append("")
        elif fence:
            code.append(line if fence in ("sh", "bash", "console") else "")
        elif line.startswith("    ") and indented:
            code.append(line.strip())
        else:
            rest.append(line)
            indented = not line.strip()
    return "\n".join(code), "\n".join(rest)


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of ours in a shell text, in words: continued lines are joined, comments and redirections left out."""
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"(^|[ /@$])ttc( |$)|-m ttc|^make ", line):
            continue
        read = shlex.shlex(re.sub(r"(?<=[a-z])[|](?=[a-z])", "¦", line), posix=True, punctuation_chars=";&|")
        read.whitespace_split = True
        command: list[str] = []
        for word in [*read, ";"]:
            if word in ("&&", "||", "|", ";", "do"):
                yield from _ours(command)
                command = []
            else:
                command.append(word)


def _ours(words: list[str]) -> Iterator[list[str]]:
    """From the name of ours on: behind settings, ``nice`` and the path of the program."""
    for at, word in enumerate(words):
        name = word.strip("@").rsplit("/", 1)[-1]
        rest = [w.strip("[]") for w in words[at + 1 :]]
        if "=" not in word and name in ("ttc", "$ttc"):
            yield ["ttc", *rest]
        elif name in ("python", "$(PY)") and rest[:1] == ["-m"] and "".join(rest[1:2]).startswith("ttc"):
            yield ["python", *rest]
        elif name == "make" and at == 0:
            yield ["make", *rest]
        else:
            continue
        return


def _alternatives(words: list[str]) -> Iterator[tuple[str, ...]]:
    """``study deepening|anytime`` stands for two commands."""
    yield from product(*(word.split("¦") for word in words))


def _documented() -> Iterator[Line]:
    for file in PAGES:
        where = str(file.relative_to(ROOT))
        if file.name == "CHANGELOG.md":
            continue
        code, rest = _blocks(file.read_text())
        for words in _commands(code):
            yield from (Line(where, found, False) for found in _alternatives(words))
        for span in re.findall(r"`([^`]+)`", rest):
            flat = " ".join(span.split())
            if re.match(r"(ttc|python -m ttc\S*|make) [a-z-]", flat):
                for words in _commands(flat):
                    yield from (Line(where, found, True) for found in _alternatives(words))
    for file in SCRIPTS:
        lines = [
            line for line in file.read_text().splitlines() if not re.match(r"[a-z][a-z .-]*:[^=]|#", line)
        ]
        for words in _commands("\n".join(lines)):
            yield Line(file.name, tuple(words), False)
    for file in sorted({p for room in ROOMS for p in (ROOT / room).rglob("*.py")}):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for span in re.findall(r"``([^`]+)``|'(ttc [a-z][^']*)'", node.value):
                    flat = " ".join("".join(span).split())
                    if re.match(r"(ttc|python -m ttc\S*) [a-z]", flat):
                        for words in _commands(flat):
                            for found in _alternatives(words):
                                yield Line(str(file.relative_to(ROOT)), found, True)


LINES = sorted(set(_documented()), key=str)


def _context(command: Any, words: list[str], named: bool, parent: Any = None) -> Any:
    """What the real parser makes of the words; nothing is called."""
    try:
        made = command.make_context(command.name, list(words), parent=parent)
    except Exception as error:  # typer's own copy of click, or click
        partial = type(error).__name__ in ("MissingParameter", "BadOptionUsage", "NoArgsIsHelpError")
        if type(error).__name__ == "Exit" or (named and partial):
            return None
        raise
    if not hasattr(command, "commands") or not made._protected_args + made.args:
        return made
    _, inner, rest = command.resolve_command(made, made._protected_args + made.args)
    return _context(inner, rest, named, made)


def _check_values(given: dict[str, Any]) -> None:
    """Budgets, policies and tasks, as a run would read them."""
    budgets, policies, tasks = (given.get(name) for name in ("budget", "policy", "task"))
    for text in budgets if isinstance(budgets, list) else [budgets or "1 s"]:
        if not PLACEHOLDER.match(text):
            Budget.parse(text)
    for text in policies if isinstance(policies, list) else [policies or "greedy"]:
        if not PLACEHOLDER.match(text) and not text.startswith("your."):
            parse(text)
    for text in tasks if isinstance(tasks, list) else [tasks or ""]:
        if text.startswith("rg:"):
            parse_spec(text)


@pytest.mark.parametrize("line", [x for x in LINES if x.words[0] == "ttc"], ids=str)
def test_a_documented_command_is_taken(line: Line) -> None:
    made = _context(get_command(app), list(line.words[1:]), line.named)
    if made is not None:
        _check_values(made.params)


class Read(Exception):
    """The arguments were taken; nothing is to be run."""


@pytest.mark.parametrize("line", [x for x in LINES if x.words[0] == "python"], ids=str)
def test_a_documented_module_takes_its_arguments(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, name, *words = line.words
    if name.startswith("ttc.rl"):
        pytest.importorskip("torch")
    module = importlib.import_module("ttc.crossfit" if name == "ttc.simulate" else name)
    if not hasattr(module, "argparse"):
        alone = typer.Typer(add_completion=False)
        alone.command()(module.main)
        get_command(alone).make_context(name, words)
        return
    real = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        real(self, args, namespace)
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises((Read, SystemExit)) as end:
        module.main(words)
    assert end.type is Read or (line.named and "are required" in capsys.readouterr().err)


def test_documented_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {w for line in LINES if line.words[0] == "make" for w in line.words[1:] if not w.startswith("#")}
    assert named
    assert named <= targets, named - targets


def _options(command: Any) -> set[str]:
    found = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    for inner in getattr(command, "commands", {}).values():
        found |= _options(inner)
    return found


def test_documented_options_and_policies_exist() -> None:
    known = _options(get_command(app)) | OTHERS
    for file in (p for room in ROOMS for p in (ROOT / room).rglob("*.py")):
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', file.read_text()))
    unknown, specs = [], 0
    for file in PAGES:
        code, rest = _blocks(file.read_text())
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
        ours = [span for span in spans if not re.match(r"(curl|vllm|pip|pytest|git) ", span)]
        unknown += [
            (file.name, o)
            for span in ours
            for o in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)
            if o not in known
        ]
        for spec in (span.strip("'") for span in spans):
            if spec.partition("?")[0] in POLICIES and "…" not in spec and "POOL" not in spec:
                parse(spec)
                specs += 1
        for line in [*code.splitlines(), *spans]:
            bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line).partition(" #")[0]
            assert not re.search(r"^ttc .*\w\?\w", bare), (
                f"{file.name}: put quotes round what a shell would read: {line}"
            )
    assert not unknown
    assert specs > 30


@pytest.mark.parametrize("name", ["solve", "plan", "cost", "frontier", "simulate", "report"])
def test_every_option_is_told_on_some_page(name: str) -> None:
    told = "\n".join(file.read_text() for file in PAGES if file.name != "CHANGELOG.md")
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    options = {option for option in _options(command) if option.startswith("--")}
    assert not {option for option in options if not re.search(rf"{option}(?![\w-])", told)}


def test_documented_names_of_python_exist() -> None:
    """What pages use as ``ttc.name`` is there after ``import ttc`` and nothing else."""
    names = set()
    for file in PAGES:
        text = file.read_text()
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            names |= set(re.findall(r"\bttc(?:\.\w+)+(?=\()", block))
        names |= set(re.findall(r"`(ttc(?:\.\w+)+)\(", text))
    assert {"ttc.solve", "ttc.problems.load", "ttc.nano.reward"} <= names
    probe = "import sys, operator, ttc; [operator.attrgetter(name[4:])(ttc) for name in sys.argv[1:]]"
    done = subprocess.run([sys.executable, "-c", probe, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wrong_command_is_seen() -> None:
    """The check itself can fail."""
    for words in (["solve", "--polcy", "greedy"], ["bench", "overheads"], ["cost", "--samples", "many"]):
        with pytest.raises(Exception, match=r"(?i)no such|valid integer"):
            _context(get_command(app), words, named=True)
    for words in (["solve", "-p", "greedy?n=2"], ["solve", "-b", "3 parsecs"]):
        with pytest.raises(InputError):
            _check_values(_context(get_command(app), words, named=True).params)
    assert len(LINES) > 80
