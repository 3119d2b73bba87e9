"""The house: links, import directions, what the light commands may import, the public surface."""

from __future__ import annotations

import ast
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ttc
from ttc.policies import POLICIES, describe, parse

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("policies", "samplers", "rl", "costmodel", "cli")
HEAVY = ("torch", "vllm", "ray", "transformers", "trl")

MAY_IMPORT = {
    "costmodel": {"costmodel", "budget", "errors", "types", "ledger"},
    "samplers": {"samplers", "errors", "types"},
    "policies": {"policies", "samplers", "costmodel", "budget", "errors", "jobs", "types", "yours"},
}
"""ttc modules that each deciding room may import; engines and the clock are not among them."""


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_linked_into_the_package(room: str) -> None:
    if not (ROOT / "policies").exists():
        pytest.skip("an unpacked source distribution has plain folders")
    link = ROOT / "ttc" / room
    assert link.is_symlink(), "clone with core.symlinks=true"
    assert link.resolve() == (ROOT / room).resolve()


def test_the_map_of_the_house_names_every_module() -> None:
    told = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`([a-z_]+)`", told))
    rooms = [
        ROOT / room for room in ("policies", "samplers", "costmodel", "ttc", "ttc/engine", "ttc/attention")
    ]
    modules = {file.stem for room in rooms for file in room.glob("*.py")} - {"__init__"}
    assert not modules - named, "CONTRIBUTING.md knows nothing of these"


def _imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_import_directions(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        for name in _imports(file):
            parts = name.split(".")
            assert parts[0] not in HEAVY, f"{file.name} imports {name}"
            if parts[0] == "ttc" and len(parts) > 1:
                assert parts[1] in MAY_IMPORT[room], f"{room}/{file.name} imports {name}"


@pytest.mark.parametrize(
    "code",
    [
        "import ttc.cli.main",
        "import ttc.costmodel",
        "import ttc.api, ttc.engine.model, ttc.engine.fake, ttc.nano",
        "import ttc; ttc.solve; ttc.policies",
    ],
)
def test_light_imports_stay_light(code: str) -> None:
    probe = f"{code}\nimport sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_public_names_exist_and_are_sorted() -> None:
    assert ttc.__all__ == sorted(ttc.__all__)
    for name in ttc.__all__:
        assert getattr(ttc, name) is not None


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policies_are_frozen_picklable_and_describe_themselves(name: str) -> None:
    policy = parse(name)
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert parse(describe(policy)) == policy
    assert policy.name == name
    with pytest.raises((AttributeError, TypeError)):
        policy.name = "other"  # type: ignore[misc]


def test_default_policies_are_the_vetted_ones() -> None:
    assert [
        describe(parse(name)) for name in ("greedy", "self-consistency", "best-of-n", "weighted-vote")
    ] == [
        "greedy",
        "self-consistency?n=8",
        "best-of-n?n=8&score=self-certainty",
        "weighted-vote?n=8&weight=self-certainty",
    ]
