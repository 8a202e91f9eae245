"""What docs/rewards-instructions.md and docs/rewards-text.md show must work, with the values that they name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

from rlft.rewards.ifeval import KINDS

DOCS = Path(__file__).parents[2] / "docs"
FOLLOWING, LIKE = ((DOCS / f"rewards-{name}.md").read_text() for name in ("instructions", "text"))
ROWS, OWN, SCHEMA, LANGUAGE, LENGTH = (
    yaml.safe_load(block)["reward"] for block in re.findall(r"```yaml\n(.*?)```", FOLLOWING, re.S)
)
TRANSLATION, SUMMARY, FUZZY = (
    yaml.safe_load(block)["reward"] for block in re.findall(r"```yaml\n(.*?)```", LIKE, re.S)
)
ASKED = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"num_words": 5, "relation": "at least"}],
}


def test_the_instructions_of_a_row(play, judge):
    group = [play(text, **ASKED) for text in ("Yes, a boat.", "A boat.", "We took a small boat.")]
    assert all(group[i].completion in " ".join(FOLLOWING.split()) for i in range(3))
    assert judge(ROWS, *group) == [0.0, 0.5, 1.0]
    assert judge({"type": "instructions"}, *group) == [0.0, 0.0, 1.0]


def test_instructions_of_the_config(play, judge):
    group = [play(text) for text in ("It rains. That is all.", "One. Two. Three. That is all.", "It rains.")]
    assert judge(OWN, *group) == [1.0, 0.0, 0.0]
    assert group[1].metrics["reward/instructions/end_checker"] == 1.0


def test_the_kinds_are_listed_with_their_keywords():
    listed = dict(re.findall(r"^\| `(\w+:\w+)` \| ([^|]*) \|", FOLLOWING, re.M))
    assert list(listed) == list(KINDS)
    for kind, keywords in listed.items():
        assert set(re.findall(r"`(\w+)`", keywords)) == set(inspect.signature(KINDS[kind]).parameters), kind


def test_the_schema_the_language_and_the_length(play, judge):
    ann = '{"name": "Ann", "age": 7}'
    assert judge(SCHEMA, play(ann), play(f"```json\n{ann}\n```"), play(ann.replace("7", '"7"'))) == [1.0, 1.0, 0.0]
    german = "Der Hund schläft unter dem Tisch."
    assert german in FOLLOWING
    assert judge(LANGUAGE, play(german, language="de"), play(german, language="fr")) == [1.0, 0.0]
    two, one = play("Dr. Smith left at 3 p.m. on Monday. Nobody saw him."), play("Nobody saw him.")
    assert judge(LENGTH, two, one) == [1.0, 0.0]
    assert judge(LENGTH | {"outside": "falling"}, two, one) == [1.0, 0.5]
    assert two.metrics["reward/text_length/count"] == 2.0


def test_translation_and_summaries(play, judge):
    said = play("the cat sat", answer="the cat sat down")
    judge(TRANSLATION, said)
    for logged in ("reward/bleu", "reward/bleu/brevity"):
        assert said.metrics[logged] == pytest.approx(0.717, abs=5e-4)
    assert judge(SUMMARY, play("testing two", answer="testing one two")) == [pytest.approx(0.8)]
    bank = play("The bank did fail", answer="The bank did not fail")
    assert judge(SUMMARY, bank) == [pytest.approx(0.89, abs=5e-3)]


def test_short_answers(play, judge):
    group = [play(text, answer="New York City") for text in ("new york city.", "New York Cty", "Newark")]
    assert judge(FUZZY, *group) == [1.0, pytest.approx(0.96), 0.0]
    for measure in ("partial", "word_set"):
        assert judge({"type": "fuzzy", "measure": measure}, play("London Paris Rome", answer="Paris")) == [1.0]
    for names, value in re.findall(r"^\| ((?:`\w+`,? ?)+)\| (0\.\d+) \|", LIKE, re.M):
        for measure in re.findall(r"`(\w+)`", names):
            alike = judge({"type": "fuzzy", "measure": measure}, play("kitten", answer="sitting"))
            assert alike == [pytest.approx(float(value), abs=5e-4)], measure
