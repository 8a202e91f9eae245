"""Questions and verdicts of reasoning-gym: against the library used bare, and against answers that attack it."""

from __future__ import annotations

import json
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlft.config_data import Data, ReasoningGym
from rlft.reasoning import held_out, pack, surroundings, unpack
from rlft.rewards.reasoning_gym import ReasoningGym as Judged
from rlft.rewards.reasoning_gym import Worker
from rlft.rows import rows_of
from rlft.types import InputError

rg = pytest.importorskip("reasoning_gym")

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
# Scorers of every kind: text, numbers, eval of the answer, sympy, tuples in the entry, and no answer of its own.
KINDS = ("chain_sum", "leg_counting", "spiral_matrix", "countdown", "rearc", "prime_factorization", "rubiks_cube")
ANSWERS = ("", "12", "The answer is 12.", "1 2 3", "[1, 2]", "{", "a b\nc d")


def rows(**given: Any) -> list[Any]:
    return list(rows_of(ReasoningGym(**given), "train"))


@cache
def spiral() -> Any:
    """A question whose scorer evaluates the answer."""
    return rows(dataset="spiral_matrix", count=1)[0]


def test_questions_are_the_librarys_and_each_is_on_one_side() -> None:
    bare = rg.create_dataset("chain_sum", seed=5, size=60, **ONE_DIGIT)
    asked = list(dict.fromkeys(bare[i]["question"] for i in range(60)))
    shared: dict[str, Any] = {"dataset": "chain_sum", "options": ONE_DIGIT, "seed": 5, "holdout": 0.3}
    train = [row["prompt"] for row in rows(count=20, **shared)]
    held = [row["prompt"] for row in rows(count=5, split="eval", **shared)]
    assert train == [text for text in asked if not held_out(text, 0.3)][:20]
    assert held == [text for text in asked if held_out(text, 0.3)][:5]


def test_a_small_dataset_gives_all_it_has_and_no_question_twice() -> None:
    """Sums of two digits with + or -: there are 10 * 10 * 2 of them."""
    found = [
        row["prompt"]
        for side in ("train", "eval")
        for row in rows(dataset="chain_sum", options=ONE_DIGIT, count=400, split=side, seed=1)
    ]
    assert len(found) == len(set(found))
    assert 190 <= len(found) <= 200


def test_a_side_without_questions_is_an_error() -> None:
    """Nothing is left to chance: a generator of one question has it on one side."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": False}
    with pytest.raises(InputError, match="no question on the side 'eval'"):
        rows(dataset="chain_sum", options=options, count=1, split="eval", holdout=0.001)


def test_generators_that_walk_over_sets_ask_the_same_every_time(monkeypatch: Any) -> None:
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.append(rows(dataset="isomorphic_strings", count=3, holdout=0.01))
    assert found[0] == found[1]


def test_verdicts_are_the_librarys(play: Any, judge: Any) -> None:
    """Of all kinds of scorers, asked in one group, which is how many datasets one worker holds."""
    parts = [{"name": name} for name in KINDS]
    asked = {row["prompt"]: row for row in rows(dataset="composite", options={"datasets": parts}, count=20, seed=3)}
    bare = rg.create_dataset(
        "composite", seed=3, size=40, datasets=[rg.composite.DatasetSpec(name, 1.0, {}) for name in KINDS]
    )
    said, expected, sources = [], [], set()
    for entry in (entry for entry in bare if entry["question"] in asked):
        row = asked[entry["question"]]
        assert unpack(json.loads(row["entry"])["entry"]) == entry
        sources.add(entry["metadata"]["source_dataset"])
        for text in (*ANSWERS, *([row["answer"]] if row["answer"] is not None else [])):
            said.append(play(text, entry=row["entry"]))
            try:
                expected.append((float(bare.score_answer(text.strip(), entry)), 0.0))
            except Exception:
                expected.append((0.0, 1.0))
    assert sources == set(KINDS)
    values = judge({"type": "reasoning_gym"}, *said)
    assert [(value, one.metrics["reward/reasoning_gym/raised"]) for value, one in zip(values, said, strict=True)] == (
        expected
    )
    assert {raised for _, raised in expected} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("extract", "text", "answer"),
    [
        ("whole", " 12\n", "12"),
        ("tag", "<answer>0</answer> or <answer> 12 </answer>, said he", "12"),
        ("tag", "12", None),
        ("box", r"so \boxed{12}, not 7", "12"),
        ("box", "12", None),
    ],
)
def test_the_answer_is_found_where_it_is_asked_for(extract: Any, text: str, answer: str | None, play: Any) -> None:
    assert Judged(extract=extract).said(play(text)) == answer


def test_an_answer_that_is_run_as_python_reaches_nothing(tmp_path: Path) -> None:
    """spiral_matrix evaluates the answer. What it writes, reads, starts and spends stays without effect."""
    row = spiral()
    secret, mark = tmp_path / "secret", tmp_path / "mark"
    secret.write_text("7")
    worker = Worker(1.0)

    def ask(answer: str) -> dict[str, Any]:
        return worker.ask({"kept": row["entry"], "answer": answer})

    listed = str([int(number) for number in row["answer"].split()])
    assert ask(listed)["value"] == 0.1  # the library's price for a list: it does evaluate, and so below if it may
    right = f"[open({str(secret)!r}).read()] and {listed}"
    tried = (
        right,
        f"open({str(mark)!r}, 'w').write('x') and {listed}",
        f"__import__('os').system('touch {mark}') or {listed}",
        f"__import__('os').kill({os.getpid()}, 0) or {listed}",
        f"__import__('socket').create_connection(('127.0.0.1', 1)) or {listed}",
    )
    for answer in tried:
        assert ask(answer) == {"value": 0.0}, answer
    assert not mark.exists()
    began = time.monotonic()
    assert ask("[1 for i in iter(int, 1)]") == {"value": None, "timeout": True}
    assert ask("[9**9**9]") == {"value": None, "timeout": True}
    assert time.monotonic() - began < 15
    assert ask(row["answer"])["value"] == 1.0


def test_an_answer_that_is_run_as_python_says_no_more_than_its_own_value() -> None:
    """Nor does it end its process for no score, nor shift the verdicts of the answers behind it."""
    row = rows(dataset="string_insertion", count=1)[0]
    worker = Worker(1.0)

    def ask(answer: str) -> dict[str, Any]:
        return worker.ask({"kept": row["entry"], "answer": answer})

    os_, nothing = "__import__('os')", {"value": 0.0, "raised": True}
    said = (b'{"value": 1000}', b'{"value": NaN}', b'{"value": "x"}', b'{"value": [1]}', b'{"value": true}', b"[1]")
    for told in (*said, b'{"error": "x"}', b"[" * 60000):
        assert ask(f"[{os_}.write(3, {told!r}), {os_}._exit(0)]") == nothing, told
    assert ask("exit()") == ask(f"{os_}._exit(0)") == nothing
    for stream in (0, 1, 2, 4, 5, 6):
        ask(f"[{os_}.write({stream}, b'{{\"value\": 1.0}}\\n'), {os_}._exit(0)]")
    assert ask(f"[{os_}.read(0, 99), {os_}._exit(0)]") == nothing
    assert ask("no list") != {"value": 1.0}
    assert ask(row["answer"]) == {"value": 1.0}


def test_a_reply_to_another_request_is_no_verdict() -> None:
    worker = Worker(1.0)
    asked = {"kept": spiral()["entry"], "answer": spiral()["answer"]}
    assert worker.ask(asked) == {"value": 1.0}
    worker._asked += 1
    process: Any = worker._process
    process.stdin.write(json.dumps({**asked, "number": worker._asked}) + "\n")
    with pytest.raises(RuntimeError, match="answered another request"):
        worker.ask(asked)
    assert worker.ask(asked) == {"value": 1.0}


def test_a_hang_has_no_score_and_says_so(play: Any, judge: Any) -> None:
    row = spiral()
    hang, right = play("[9**9**9]", entry=row["entry"]), play(row["answer"], entry=row["entry"])
    assert judge({"type": "reasoning_gym", "seconds": 1.0}, hang, right) == [None, 1.0]
    assert hang.metrics["reward/reasoning_gym/timeout"] == 1.0
    assert not hang.failures


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dataset": "chain_summ"}, "no dataset 'chain_summ'. Near it: chain_sum"),
        ({"dataset": "chain_sum", "options": {"digits": 1}}, "It has allow_negation, max_digits"),
        ({"dataset": "chain_sum", "options": {"min_terms": 0}}, "min_terms must be positive"),
        ({"dataset": "composite"}, "composite needs its parts"),
        ({"dataset": "composite", "options": {"datasets": [{"name": "nim"}]}}, "no dataset 'nim'"),
    ],
)
def test_bad_names_and_options_are_refused_with_what_there_is(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ReasoningGym(**given)


def test_sides_of_different_shares_are_refused() -> None:
    side = {"type": "reasoning_gym", "dataset": "chain_sum"}
    with pytest.raises(ValidationError, match="hold out different shares"):
        Data.model_validate({"train": side, "eval": {**side, "holdout": 0.5}})
    assert Data.model_validate({"train": side, "eval": side}).eval.split == "eval"  # type: ignore[union-attr]


def test_a_row_of_another_kind_is_refused(play: Any, judge: Any) -> None:
    with pytest.raises(InputError, match="column 'entry' holds no question of reasoning-gym's"):
        judge({"type": "reasoning_gym"}, play("4", entry="4"))


def test_values_survive_as_they_are() -> None:
    value = {"a": (1, (2, [3])), "b": {1: "x", (2, 3): None}, "c": [{"d": ()}]}
    assert unpack(json.loads(json.dumps(pack(value)))) == value
    assert surroundings()["PYTHONHASHSEED"] == "0"
