"""Problems from templates: exact formulas, disjoint splits, and the same problems for the same seed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlft.config_data import Data
from rlft.formula import Formula, Refused, written
from rlft.settings import validate
from rlft.templates import Split, Template, problems, read_templates
from rlft.types import InputError

SHIPPED = Path(__file__).parents[1] / "configs" / "data" / "problems.jsonl"
SUM = {"name": "sum", "prompt": "What is {a}+{b}?", "numbers": {"a": [0, 9], "b": [0, 9]}, "answer": "a + b"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a + b*2", "19"),
        ("a / b", "7/6"),
        ("0.1 + 0.2", "0.3"),
        ("-a ** 2", "-49"),
        ("a // 2 + a % 2", "4"),
        ("comb(a, 2) + gcd(12, b)", "27"),
        ("max(a, b) - min(a, b) + ceil(a / 2)", "5"),
        ("factorial(5) / 100", "1.2"),
    ],
)
def test_a_formula_is_worked_out_exactly(text, value):
    assert written(Formula(text)({"a": Fraction(7), "b": Fraction(6)})) == value


@pytest.mark.parametrize(("text", "value"), [("a > b", True), ("0 < a < b", False), ("a > 6 and not b == 6", False)])
def test_a_condition(text, value):
    assert Formula(text)({"a": Fraction(7), "b": Fraction(6)}) is value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "a.real",
        "a[0]",
        "[a]",
        "(lambda: 1)()",
        "open('x')",
        "a if b else 1",
        "comb(n=3, k=2)",
        "'a'",
        "True",
        "1j",
        "a = 1",
        "f'{a}'",
        "(a := 3)",
        "a b",
        "",
        "+".join("a" * 500),
        "(" * 300,
    ],
)
def test_what_is_no_formula_is_refused_when_it_is_read(text):
    with pytest.raises(Refused):
        Formula(text)


@pytest.mark.parametrize("text", ["a / 0", "9 ** 9 ** 9", "a ** 0.5", "factorial(10000)", "comb(a / 2, 1)", "min()"])
def test_what_has_no_value_or_too_large_a_one_is_refused(text):
    with pytest.raises(Refused):
        Formula(text)({"a": Fraction(7)})


@pytest.mark.parametrize(
    ("value", "text"), [("12", "12"), ("-15/4", "-3.75"), ("2/3", "2/3"), ("1/20", "0.05"), ("-1/4", "-0.25")]
)
def test_numbers_are_written_as_people_do(value, text):
    assert written(Fraction(value)) == text


def asked(rows: list[dict[str, str]]) -> list[tuple[int, ...]]:
    return [tuple(map(int, re.findall(r"\d+", row["prompt"]))) for row in rows]


@pytest.mark.parametrize("seed", [0, 1])
def test_train_and_eval_part_the_numbers_and_perturb_lies_beyond(seed: int):
    template = [Template.model_validate(SUM)]
    train, held = asked(problems(template, "train", 70, 0.2, seed)), asked(problems(template, "eval", 12, 0.2, seed))
    beyond = asked(problems(template, "perturb", 100, 0.2, seed))
    for some in (train, held, beyond):
        assert len(set(some)) == len(some)
    assert not set(train) & set(held)
    assert {number for pair in (*train, *held) for number in pair} <= set(range(10))
    assert {number for pair in beyond for number in pair} == set(range(10, 20))


def test_the_words_do_not_move_a_problem_to_the_other_side():
    named = SUM | {"prompt": "{who}: {a}+{b}", "words": {"who": ["Ann", "Ben"]}}
    template = [Template.model_validate(named)]
    train, held = (asked(problems(template, split, 12, 0.2, 0)) for split in ("train", "eval"))
    assert not set(train) & set(held)


def test_no_name_seed_or_other_template_moves_a_problem_to_the_other_side():
    """Of a hundred sums nearly all are asked for; were the name or the seed in it, half would be shared."""
    one, other = Template.model_validate(SUM), Template.model_validate(SUM | {"name": "another"})
    train = {row["prompt"] for row in problems([one, other], "train", 140, 0.2, 0)}
    held = {row["prompt"] for row in problems([one, other], "eval", 20, 0.2, 1)}
    assert len(train) >= 70
    assert not train & held


def test_what_lies_beyond_is_not_what_is_trained_on():
    near = Template.model_validate(SUM | {"beyond": {"a": [0, 10], "b": [0, 9]}})
    rows = problems([near], "perturb", 10, 0.2, 0)  # a is 10, for all others are numbers of training
    assert {pair[0] for pair in asked(rows)} == {10}


def test_a_wide_range_costs_nothing():
    wide = Template.model_validate(SUM | {"numbers": {"a": [0, 1e9], "b": [0, 1e9]}})
    assert len(problems([wide], "train", 5, 0.2, 0)) == 5


def test_an_answer_is_a_number():
    with pytest.raises(InputError, match="'a > b' is true or false"):
        problems([Template.model_validate(SUM | {"answer": "a > b"})], "train", 1, 0.2, 0)


def test_both_sides_hold_out_the_same_share():
    sides = {"train": {"holdout": 0.2}, "eval": {"holdout": 0.5}}
    data = {side: {"type": "template", "path": str(SHIPPED), **some} for side, some in sides.items()}
    with pytest.raises(ValidationError, match="hold out different shares"):
        Data.model_validate(data)


def test_a_template_that_has_no_more_is_passed_over_until_none_has():
    wide = Template.model_validate(SUM | {"name": "wide", "numbers": {"a": [0, 99], "b": [0, 99]}})
    small = Template.model_validate(SUM | {"numbers": {"a": [0, 1], "b": [0, 1]}})
    rows = problems([small, wide], "perturb", 50, 0.2, 0)
    assert [row["template"] for row in rows[:9]] == ["sum", "wide"] * 4 + ["wide"]  # two by two numbers
    with pytest.raises(InputError, match="the templates have 4 problems for the split 'perturb', and 5 are asked for"):
        problems([small], "perturb", 5, 0.2, 0)


def test_the_same_seed_gives_the_same_problems_and_more_of_them_begin_alike():
    templates = read_templates(str(SHIPPED))
    first = problems(templates, "train", 40, 0.2, 3)
    assert first == problems(templates, "train", 40, 0.2, 3)
    assert first == problems(templates, "train", 80, 0.2, 3)[:40]
    assert first != problems(templates, "train", 40, 0.2, 4)
    assert first[0]["template"] == first[len(templates)]["template"] == "boxes"


@pytest.mark.parametrize("split", ["train", "eval", "perturb"])
def test_the_programs_of_the_shipped_problems_print_their_answers(split: Split):
    rows = problems(read_templates(str(SHIPPED)), split, 100, 0.2, 0)
    assert len({row["prompt"] for row in rows}) == 100
    whole = "".join(row["program"] for row in rows)
    done = subprocess.run([sys.executable, "-I", "-c", whole], capture_output=True, text=True, check=True)
    for row, line in zip(rows, done.stdout.split(), strict=True):
        assert float(line) == pytest.approx(float(Fraction(row["answer"]))), row


def test_the_reward_takes_the_answers():
    import asyncio

    from rlft.rewards.math import Math
    from rlft.types import Sample, Task, Trajectory

    rows = problems(read_templates(str(SHIPPED)), "eval", 30, 0.2, 0)

    def play(row: dict[str, str], said: str) -> Trajectory:
        sample = Sample([0, 0], [False, True], [0.0] * 2, [0.0] * 2, version=0)
        message = {"role": "assistant", "content": rf"So \boxed{{{said}}}."}
        return Trajectory(Task("t", (), dict(row)), (message,), [sample])

    reward = Math(workers=1).build()
    groups = [(play(row, row["answer"]), play(row, written(Fraction(row["answer"]) + 1))) for row in rows]

    async def all_of_them() -> list[Any]:
        return [await reward(group) for group in groups]

    assert asyncio.run(all_of_them()) == [[1.0, 0.0]] * 30


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "a + c"}, r"there is no number \['c'\]"),
        ({"answer": "open(a)"}, "which a formula may not"),
        ({"prompt": "What is {a}+{c}?"}, r"nothing fills \['c'\]"),
        ({"numbers": {"a": [9, 0], "b": [0, 9]}}, "least, greatest"),
        ({"words": {"a": ["x"]}}, "a number has that name"),
        ({"beyond": {"c": [1, 2]}}, "names a number that is none"),
        ({"colour": "red"}, "Extra inputs"),
        ({"prompt": "What is {a}+1?"}, r"the prompt does not say \['b'\]"),
        ({"prompt": "What is {a:.2f}+{b}?"}, "a place is a name and nothing else"),
        ({"numbers": {"a": [0, float("inf")], "b": [0, 9]}}, "least, greatest"),
        ({"words": {"who": []}}, "at least 1 item"),
        ({"solution": "It is {c}."}, r"solution: nothing fills \['c'\]; add them to derived"),
        ({"solution": r"It is \boxed{answer:.2f}"}, "a place is a name and nothing else"),
        ({"solution": r"It is \boxed{answer"}, "write {{ and }} for braces that are no place"),
        ({"derived": {"c": "a + d"}}, r"derived: c: there is no \['d'\], among the numbers or before it"),
        ({"derived": {"a": "b"}}, "derived: a has another meaning already"),
        ({"derived": {"answer": "b"}}, "derived: answer has another meaning already"),
    ],
)
def test_a_bad_template_is_refused_by_name(tmp_path, change, said):
    file = tmp_path / "templates.json"
    file.write_text(json.dumps([SUM | change]))
    with pytest.raises(InputError, match=rf"templates\.json: template 0.*{said}"):
        read_templates(str(file))


def test_a_solution_says_what_was_worked_out_on_the_way():
    """An intermediate value may use those before it; one that cannot be worked out is refused with its numbers."""
    added = {
        "derived": {"twice": "2 * a", "more": "twice + b"},
        "solution": r"2 * {a} = {twice}, {twice} + {b} = {more}: \boxed{{{answer}}}",
    }
    (template,) = [Template.model_validate(SUM | added)]
    for row in problems([template], "train", 20, 0.2, 0):
        a, b = map(int, re.findall(r"\d+", row["prompt"]))
        assert row["solution"] == rf"2 * {a} = {2 * a}, {2 * a} + {b} = {2 * a + b}: \boxed{{{a + b}}}"
    assert "solution" not in problems([Template.model_validate(SUM)], "train", 1, 0.2, 0)[0]
    bad = Template.model_validate(SUM | {"derived": {"ratio": "a / b"}, "solution": "{ratio}"})
    with pytest.raises(InputError, match=r"template 'sum': with a=\d, b=0: .*Exclude such numbers by `where`"):
        problems([bad], "train", 80, 0.2, 0)


@pytest.mark.parametrize("split", ["train", "eval", "perturb"])
def test_every_equation_in_the_shipped_solutions_is_true_and_they_end_in_the_answer(split: Split):
    rows = problems(read_templates(str(SHIPPED)), split, 200, 0.2, 0)
    checked = 0
    for row in rows:
        assert row["solution"].endswith(rf"The answer is \boxed{{{row['answer']}}}.")
        for chain in re.findall(r"\d[-\d.+*/ ]*(?:= [-\d.+*/ ]+)+", row["solution"]):
            sides = [Formula(side.strip(" ."))({}) for side in chain.split("=")]
            assert len(set(sides)) == 1, (chain, row)
            checked += 1
    assert checked > 200


def test_a_formula_without_a_value_names_the_template_and_the_numbers():
    template = Template.model_validate(SUM | {"answer": "a / b", "numbers": {"a": [1, 3], "b": [0, 0]}})
    with pytest.raises(InputError, match=r"template 'sum': with a=\d, b=0: .* Exclude such numbers by `where`"):
        problems([template], "train", 3, 0.2, 0)


def test_the_files_it_takes(tmp_path):
    for name, text in (
        ("t.jsonl", json.dumps(SUM) + "\n"),
        ("t.yaml", "- " + json.dumps(SUM)),
        ("t.json", f"[{json.dumps(SUM)}]"),
    ):
        (tmp_path / name).write_text(text)
        assert read_templates(str(tmp_path / name))[0].name == "sum"
    for name, text in (
        ("two.json", json.dumps([SUM, SUM])),
        ("none.json", "[]"),
        ("odd.jsonl", "{"),
        ("odd.yaml", "a: ["),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=name):
            read_templates(str(tmp_path / name))
    with pytest.raises(InputError, match="no file"):
        read_templates(str(tmp_path / "absent.yaml"))


def test_a_run_takes_them_and_holds_the_other_side_out():
    config = validate(
        {
            "name": "t",
            "steps": 1,
            "model": {"path": "m"},
            "data": {side: {"type": "template", "path": str(SHIPPED), "count": 200} for side in ("train", "eval")},
            "reward": {"type": "math"},
            "algorithm": {"type": "grpo"},
        }
    )
    assert (config.data.train.split, config.data.eval.split) == ("train", "eval")  # pyright: ignore
    from rlft.rows import rows_of

    train, held = rows_of(config.data.train, "train"), rows_of(config.data.eval, "eval")  # pyright: ignore
    assert len(train) == len(held) == 200
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
