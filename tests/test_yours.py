"""Policies, rewards and verifiers of one's own, named as ``package.module:NAME`` from the folder where one works."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ttc import yours
from ttc.errors import InputError
from ttc.policies import parse
from ttc.rewards import load_reward
from ttc.verify import verifier

MODULE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Mine:
    n: int = 2
    name = "mine"

    def __post_init__(self):
        if self.n > 9:
            raise OverflowError("too many")

    def run(self, problem, brief):
        yield

class Nameless:
    def run(self, problem, brief):
        yield

def scores(problem, texts):
    return [len(text) for text in texts]

class Broken:
    def __init__(self):
        raise RuntimeError("no weights")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "own_things.py").write_text(MODULE)
    (tmp_path / "own_slip.py").write_text("x = 1\ny = undefined_name\n")
    (tmp_path / "own_syntax.py").write_text("x = (\n")
    (tmp_path / "own_needy.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('this one must not be taken')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_what_lies_in_the_working_directory_is_found(folder: Path) -> None:
    assert parse("own_things:Mine?n=3").name == "mine"
    assert load_reward("own_things:scores").score(None, ["a", "bb"]) == [1, 2]  # type: ignore[arg-type]
    assert yours.load("policy", "json:loads")("[1]") == [1]  # a package of the same name goes before


def test_the_command_finds_it_too(folder: Path) -> None:
    """The console script has its own folder, not the working directory, on Python's path."""
    code = "import sys; sys.path = [p for p in sys.path if p]; from ttc.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "policies", "own_things:Mine"], capture_output=True, text=True, check=False,
        cwd=folder, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("own_things:Mine  n=2")


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (parse, "own_thing:Mine", "no module 'own_thing'"),
        (parse, "own_things.deeper:Mine", "no module 'own_things.deeper'"),
        (parse, "own_needy:Mine", "needs a module that is not there .*no_such_package_at_all"),
        (parse, "own_slip:Mine", r"NameError.*undefined_name.*own_slip.py:2"),
        (parse, "own_syntax:Mine", r"SyntaxError.*own_syntax.py, line 1"),
        (parse, "own_things:Mien", "did you mean own_things:Mine"),
        (parse, "own_things:Mine?n=12", "can't be made .OverflowError: too many"),
        (parse, "own_things:Nameless", "is no policy"),
        (parse, "own_things:scores", "can't be made|is no policy"),
        (parse, "best-of-n?n=2&n=3", "given n twice"),
        (load_reward, "own_things:Broken", "can't be made .RuntimeError: no weights"),
        (load_reward, "own_things:score", "did you mean own_things:scores"),
        (verifier, "own_things:Broken", "no weights"),
        (verifier, "own_things:Nameless", "it needs name, verify"),
    ],
)
def test_what_is_wrong_is_one_line(folder: Path, make: object, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        make(name)  # type: ignore[operator]
    assert "\n" not in str(error.value)
