"""Problems in: every source, and every fault as one line with its mend."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ttc import hf_tasks, problems
from ttc.errors import InputError
from ttc.problems import Loaded, from_jsonl, from_task, from_text, load, problem_from_json, problem_to_json
from ttc.rg_tasks import parse_spec
from ttc.sandbox import Sandbox, leave, take
from ttc.types import Problem
from ttc.verify import verifier


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_text() -> None:
    (posed,) = from_text("What is 2+2?")
    assert posed.text == "What is 2+2?"
    assert posed.gold is None
    assert posed.id == from_text("What is 2+2?")[0].id != from_text("What is 2+3?")[0].id
    with pytest.raises(InputError, match="empty"):
        from_text(" \n")


def test_jsonl(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "2+2?", "answer": 4},
        "",
        {
            "id": 7,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3?"}],
        },
        {"id": "c", "prompt": "é?", "answer": "0.10", "verifier": "exact", "meta": {"level": 3}},
        {"prompt": "?", "answer": None},
    )
    first, second, third, fourth = from_jsonl(path).problems
    assert (first.id, first.gold, first.text) == ("line-1", "4", "2+2?")
    assert (second.id, second.gold, len(second.messages)) == ("7", None, 2)
    assert (third.id, third.gold, third.verifier, third.meta) == ("c", "0.10", "exact", {"level": 3})
    assert (fourth.id, fourth.gold) == ("line-5", None)
    assert from_jsonl(path).extras == ()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert from_jsonl(path).problems == (first, second, third, fourth)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ('{"prompt": ', "not valid JSON .* one JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[1]", "of type list; write an object"),
        ("3", "of type number"),
        ({"prompt": "?", "anwser": 1}, "unknown key 'anwser'; did you mean 'answer'. keys are id, prompt,"),
        ({"prompt": "?", "Answer": 1}, "unknown key 'Answer'; did you mean 'answer'"),
        ({"prompt": "?", "answers": [1]}, "unknown key 'answers'; did you mean 'answer'"),
        ({"promt": "?"}, "unknown key 'promt'; did you mean 'prompt'"),
        ({"question": "?", "gold": 1}, "exactly one of 'prompt' and 'messages' .the row has question, gold"),
        ({"prompt": "?", "level": 1, "meta": {"level": 2}}, "'level' is a column and in meta; keep one"),
        ({"answer": 1}, "exactly one of 'prompt' and 'messages'"),
        ({"prompt": "?", "messages": []}, "exactly one of"),
        ({"prompt": 3}, r"prompt is of type number \(3\); give a string"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": None}, "prompt is of type null"),
        ({"prompt": "?", "answer": [1]}, r"answer is of type list \(\[1\]\); give a string or a number"),
        ({"prompt": "?", "answer": True}, "answer is of type boolean"),
        ({"prompt": "?", "answer": ""}, "answer is empty"),
        ({"prompt": "?", "id": 1.5}, "id is of type number"),
        ({"prompt": "?", "id": " "}, "id is ' '"),
        ({"prompt": "?", "meta": 1}, "meta is of type number .* give an object"),
        ({"prompt": "?", "verifier": "mathh"}, "verifier 'mathh' is unknown; use exact, math, rg"),
        ({"prompt": "?", "verifier": "rg"}, "only problems of --task rg:NAME"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"messages": "hi"}, "messages is of type string"),
        ({"messages": []}, "messages is of type list"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] is of type object"),
        ({"messages": [{"role": "usr", "content": "?"}]}, r'messages\[0\]\.role is "usr"; use system, user'),
        ({"messages": [{"role": ["user"], "content": "?"}]}, r"messages\[0\]\.role"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\]\.content is of type number"),
        ({"messages": [{"role": "assistant", "content": "?"}]}, "end with the user's question"),
    ],
)
def test_a_bad_row_is_named_by_line_and_field(row: Any, fault: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "fine"}, "", row, {"prompt": "fine too"})
    with pytest.raises(InputError, match=fault) as caught:
        from_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)
    loaded = from_jsonl(path, skip_bad_rows=True)
    assert [p.text for p in loaded.problems] == ["fine", "fine too"]
    assert loaded.skipped == (str(caught.value),)


def test_other_columns_are_kept_in_meta_and_named(tmp_path: Path) -> None:
    rows: tuple[Any, ...] = (
        {"prompt": "1", "unique_id": "a/1", "level": 5, "meta": {"by": "me"}},
        {"prompt": "2", "level": None, "metadata": {}, "prompt_id": 3, "idx": 4, "answer_type": "int"},
    )
    loaded = from_jsonl(write(tmp_path, *rows))
    assert [p.meta for p in loaded.problems] == [
        {"by": "me", "unique_id": "a/1", "level": 5},
        {"level": None, "metadata": {}, "prompt_id": 3, "idx": 4, "answer_type": "int"},
    ]
    assert loaded.extras == ("unique_id", "level", "metadata", "prompt_id", "idx", "answer_type")


def test_one_verifier_is_the_default_wherever_a_problem_comes_from(tmp_path: Path) -> None:
    made = Problem("p", ({"role": "user", "content": "?"},), "1/2")
    (read,), (posed,) = from_jsonl(write(tmp_path, {"prompt": "?"})).problems, from_text("?")
    assert made.verifier == read.verifier == posed.verifier == "math"


def test_files_that_cannot_do(tmp_path: Path) -> None:
    for rows in ((), ("", " ")):
        with pytest.raises(InputError, match="the file is empty"):
            from_jsonl(write(tmp_path, *rows))
    with pytest.raises(InputError, match=r"not one good row among 2; the first: .*:1: "):
        from_jsonl(write(tmp_path, "{", "["), skip_bad_rows=True)
    with pytest.raises(InputError, match="No such file"):
        from_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="Is a directory"):
        from_jsonl(tmp_path)
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r":1: not valid JSON .*utf-8"):
        from_jsonl(path)


def test_a_duplicate_id_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": "a", "prompt": "1"}, {"id": "b", "prompt": "2"}, {"id": "a", "prompt": "3"})
    with pytest.raises(InputError, match=r":3: id 'a' is already that of line 1; make ids unique"):
        from_jsonl(path)
    assert len(from_jsonl(path, skip_bad_rows=True).problems) == 2


def test_exactly_one_source(tmp_path: Path) -> None:
    path = write(tmp_path, *({"prompt": str(i)} for i in range(5)))
    assert len(load(input=path, n=3).problems) == 3
    assert load(text="?", verifier="exact") == Loaded(tuple(load(text="?", verifier="exact").problems))
    with pytest.raises(InputError, match="no problem given; give one of"):
        load()
    with pytest.raises(InputError, match=r"several sources of problems \(text, task\)"):
        load(text="?", task="rg:gcd", n=1)
    with pytest.raises(InputError, match="n is 0"):
        load(input=path, n=0)
    with pytest.raises(InputError, match="unknown"):
        load(text="?", verifier="none")
    with pytest.raises(InputError, match="only problems of --task rg"):
        load(input=path, verifier="rg")
    assert {p.verifier for p in load(input=path, verifier="exact").problems} == {"exact"}


SPEC = "rg:chain_sum?min_terms=2&max_terms=3"


def test_reasoning_gym_draws_are_independent_reproducible_and_nested() -> None:
    some, more, other = from_task(SPEC, 8, 0), from_task(SPEC, 24, 0), from_task(SPEC, 24, 1)
    assert more[:8] == some
    assert from_task("rg:chain_sum?max_terms=3&min_terms=2", 8, 0) == some, (
        "the order of settings means nothing"
    )
    assert not {p.text for p in more} & {p.text for p in other}, "neighbouring seeds share no items"
    assert len({p.text for p in more}) == len({p.id for p in more}) == 24
    assert some[0].id == "rg:chain_sum?max_terms=3&min_terms=2/0/0"
    assert {p.verifier for p in some} == {"rg"}
    assert all(2 <= sum(p.text.count(sign) for sign in (" + ", " - ")) + 1 <= 3 for p in some)


def test_draws_are_the_same_in_another_process() -> None:
    """Of these, the first depends on the hashes of strings and the second on the global random generator."""
    one, another = take("rg"), Sandbox("rg")
    for task in ("rg:isomorphic_strings", "rg:list_functions"):
        for seed in range(6):
            item = one.call("draw", 60.0, task=task, seed=seed)
            assert item == another.call("draw", 60.0, task=task, seed=seed)
    another.close()
    leave(one)


def test_reasoning_gym_problems_survive_pickle_and_json_and_verify() -> None:
    judge = verifier("rg", limit_s=20.0)
    for task in ("rg:rearc", "rg:needle_haystack", "rg:isomorphic_strings"):
        for posed in from_task(task, 2, 0):
            assert pickle.loads(pickle.dumps(posed)) == posed
            back = problem_from_json(json.loads(json.dumps(problem_to_json(posed), allow_nan=False)))
            assert back == posed
            assert judge.verify(back, posed.gold or "").correct
    judge.close()


def test_identical_questions_are_drawn_once() -> None:
    task = "rg:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    drawn = from_task(task, 60, 0)
    assert len({p.text for p in drawn}) == 60
    assert drawn[-1].meta["index"] >= 60
    with pytest.raises(InputError, match=r"only \d different questions in \d+ draws, 9 wanted; lower n or"):
        from_task("rg:coin_flip?min_trials=3&max_trials=3&allow_at_least=false", 9, 0)


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        ("chain_sum", "no known kind; write rg:NAME"),
        ("rg:", "no dataset named"),
        ("rg:chain_sun", "no dataset 'chain_sun'; did you mean chain_sum"),
        ("rg:qqqq", "no dataset 'qqqq'; chain_sum, gcd and countdown are some"),
        ("rg:composite", "not supported"),
        ("rg:chain_sum?terms=3", "no setting 'terms'; it has allow_negation, max_digits"),
        ("rg:chain_sum?min_terms=two", "min_terms is 'two'; give a value of type int"),
        ("rg:chain_sum?min_terms=none", "min_terms is 'none'; give a value of type int"),
        (
            "rg:chain_sum?min_terms=9&max_terms=2",
            r"refuses these settings \(max_terms must be >= min_terms\)",
        ),
        ("rg:chain_sum?min_terms", "not of the form name=value"),
        ("rg:chain_sum?min_terms=2&min_terms=3", "given twice"),
        ("rg:chain_sum?seed=3", "use --seed"),
        ("rg:chain_sum?size=3", "use --n"),
    ],
)
def test_a_bad_task_is_one_line(task: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault) as caught:
        from_task(task, 3, 0)
    assert "\n" not in str(caught.value)


def test_settings_are_read_by_their_types() -> None:
    for task in (
        "rg:basic_arithmetic?operators=%2B,-&allow_negation=false",
        'rg:basic_arithmetic?operators=["+","-"]&format_style=simple',
        "rg:propositional_logic?min_complexity=2&max_complexity=2",
        "rg:calendar_arithmetic?tasks=is_leap_year",
        "rg:letter_jumble?min_corruption_level=0.5&consecutive_words=no",
    ):
        assert len(from_task(task, 1, 0)) == 1


def test_n_is_wanted_where_there_is_no_end() -> None:
    with pytest.raises(InputError, match="say how many with --n"):
        load(task="rg:gcd")


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"pip install 'ttc\[tasks\]'"):
        from_task("rg:gcd", 1, 0)
    assert from_text("?")[0].verifier == "exact"


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.text("abc,1.5-", min_size=1), max_size=4
    )
)
def test_specs_are_canonical(settings: dict[str, str]) -> None:
    forward = "rg:x?" + "&".join(f"{k}={v}" for k, v in settings.items())
    backward = "rg:x?" + "&".join(f"{k}={v}" for k, v in reversed(settings.items()))
    assert parse_spec(forward) == parse_spec(backward)
    assert parse_spec(parse_spec(forward).text).settings == settings


class Table(list[dict[str, Any]]):
    """What the conversion needs of a datasets.Dataset."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


@pytest.mark.parametrize(
    ("row", "text", "gold"),
    [
        ({"question": "Q", "answer": "Reason <<1+1=2>>.\n#### 1,234"}, "Q", "1,234"),
        ({"problem": "P", "solution": "So \\boxed{1} and \\boxed{\\frac{1}{2}}."}, "P", "\\frac{1}{2}"),
        ({"problem": "P", "solution": "long", "answer": "7"}, "P", "7"),
        ({"prompt": "P", "gold": 7}, "P", "7"),
        ({"prompt": [{"role": "user", "content": "M", "extra": 1}], "answer": ["x"]}, "M", "x"),
        ({"messages": [{"role": "user", "content": "M"}, {"role": "assistant", "content": "A"}]}, "M", None),
        ({"question": "Q", "answer": None}, "Q", None),
    ],
)
def test_columns_of_data_sets(row: dict[str, Any], text: str, gold: str | None) -> None:
    (found,) = hf_tasks.convert("hf:x", "hf:x:test", Table([row]), [0])
    assert (found.id, found.messages[-1]["content"], found.gold) == ("hf:x:test/0", text, gold)


def test_data_sets_are_loaded_in_part_and_reproducibly(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table({"question": f"Q{i}", "answer": f"#### {i}"} for i in range(50))
    monkeypatch.setattr(hf_tasks, "_data", lambda task, name, split, config: (table, split or "test"))
    everything = from_task("hf:some/set", None, 0)
    assert [p.gold for p in everything] == [str(i) for i in range(50)]
    few, more, other = (from_task("hf:some/set:train", n, seed) for n, seed in ((5, 0), (20, 0), (20, 1)))
    assert {p.id for p in few} < {p.id for p in more} != {p.id for p in other}
    assert few == from_task("hf:some/set:train", 5, 0)
    assert few[0].id.startswith("hf:some/set:train/")
    assert isinstance(few[0], Problem)
    with pytest.raises(InputError, match="n is 51, but split 'train' has 50 rows; lower n to 50"):
        from_task("hf:some/set:train", 51, 0)
    with pytest.raises(InputError, match=r"write hf:ID\[:SPLIT\]"):
        from_task("hf:some/set?split=train", 5, 0)
    table[0] = {"text": "no question"}
    with pytest.raises(InputError, match="no column of prompt, question"):
        from_task("hf:some/set", 5, 0)


def test_a_data_set_that_cannot_be_loaded_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*arguments: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "get_dataset_config_names", unreachable)
    with pytest.raises(
        InputError, match=r"cannot be loaded \(no route to host\); check the name and the network"
    ):
        from_task("hf:some/set", 5, 0)


def test_a_real_data_set_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"question": f"{split} {i}", "answer": f"so\n#### {i}"}) for i in range(4)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    found = from_task(f"hf:{folder}", None, 0)
    assert [(p.text, p.gold) for p in found] == [(f"test {i}", str(i)) for i in range(4)]
    assert from_task(f"hf:{folder}:train", 2, 0)[0].text.startswith("train")
    with pytest.raises(InputError, match="no split 'dev'; it has train, test"):
        from_task(f"hf:{folder}:dev", 2, 0)


@given(
    st.builds(
        Problem,
        st.text(min_size=1),
        st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text()}), min_size=1).map(
            tuple
        ),
        st.none() | st.text(),
        st.sampled_from(["exact", "math"]),
        st.dictionaries(st.text(), st.integers() | st.text(), max_size=3),
    )
)
def test_json_round_trip(posed: Problem) -> None:
    assert problem_from_json(json.loads(json.dumps(problem_to_json(posed)))) == posed
