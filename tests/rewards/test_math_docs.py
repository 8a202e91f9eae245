"""What docs/rewards-math.md shows must work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from rlft.formula import CALLS
from rlft.templates import Template, problems

PAGE = (Path(__file__).parents[2] / "docs" / "rewards-math.md").read_text()
SUM, CHOICE, DATA = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S))
TEMPLATE = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.S)[0])
ROW = {"choices": ["Paris", "Rome", "Berlin"], "answer": "B"}


def test_the_first_example_gives_the_scores_it_says(play, judge):
    said = (r"So it is \boxed{\frac{2}{4}}.", "So it is 0.5.", r"\boxed{0.25}")
    scores = [1.1, 1.0, 0.1]
    assert all(text in PAGE.replace("\n", " ") for text in said)
    assert judge(SUM["reward"], *(play(text, answer="1/2") for text in said)) == pytest.approx(scores)


@pytest.mark.parametrize(
    "said", ["(B)", "B.", r"\boxed{B}", "**Answer:** B", "I thought of A, but the answer is B", "B) Rome", "Rome"]
)
def test_the_choices_that_it_calls_right_are(play, judge, said):
    assert said in PAGE
    assert judge(CHOICE["reward"], play(said, **ROW)) == [1.0]


def test_the_template_is_one():
    rows = problems([Template.model_validate(TEMPLATE)], "train", 20, 0.2, 0)
    for row in rows:
        a, b = map(int, re.findall(r"\d+", row["prompt"]))
        assert row["answer"] == str(2 * (a + b))
        assert a > b


def test_its_tables_list_what_there_is():
    table = PAGE.partition("## Problems made of templates")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == set(Template.model_fields)
    (row,) = re.findall(r"^\| `answer` \|.*$", table, re.M)
    assert set(CALLS) <= set(re.findall(r"\w+", row))


@pytest.mark.parametrize(
    ("gold", "said"), [("3\\sqrt{2}", r"\sqrt{18}"), ("(x+1)^2", "x^2+2x+1"), ("{1,2}", r"\{2,1\}")]
)
def test_what_it_calls_equal_is(play, judge, gold, said):
    assert judge({"type": "math"}, play(rf"\boxed{{{said}}}", answer=gold)) == [1.0]
