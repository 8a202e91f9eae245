"""BLEU, chrF, ROUGE and fuzzy match: by hand, and as the libraries' own tests have them.

Values marked with a repository are from its test files. mjpost/sacrebleu (Apache 2.0): test_sentence_bleu.py and
test_chrf.py in test/. google-research/google-research (Apache 2.0): rouge/rouge_scorer_test.py. rapidfuzz/RapidFuzz
(MIT): tests/distance/test_JaroWinkler.py.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rlft.rewards import pooled as pooling
from rlft.rewards.base import scored
from rlft.rewards.catalog import RewardConfig
from rlft.types import InputError, Task

SUGAR = (
    "Producția de zahăr primă va fi exprimată în ceea ce privește zahărul alb;",
    "producţia de zahăr brut se exprimă în zahăr alb;",
)
LINES = "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5"


def valued(judge, play, config, said, gold):
    (value,) = judge(config, play(said, answer=gold))
    return value


@pytest.mark.parametrize(
    ("config", "published"),
    [  # mjpost/sacrebleu
        ({}, 8.493),
        ({"smooth": "none"}, 0.0),
        ({"smooth": "floor"}, 4.51688),
        ({"smooth": "add-k"}, 14.882),
        ({"tokenize": "none"}, 7.347),
        ({"tokenize": "intl"}, 8.493),
        ({"tokenize": "char"}, 40.8759),
        ({"tokenize": "char", "ignore_case": True}, 42.0267),
    ],
)
def test_bleu_as_published(config, published, play, judge):
    assert valued(judge, play, {"type": "bleu", **config}, *SUGAR) == pytest.approx(published / 100, abs=1e-5)


def test_bleu_by_hand(play, judge):
    """All 3 words and both pairs of "the cat sat" are in a reference of 4 words: 1·1·exp(1 - 4/3)."""
    said = play("the cat sat", answer="the cat sat down")
    assert judge({"type": "bleu", "order": 2}, said) == [pytest.approx(math.exp(-1 / 3))]
    assert said.metrics["reward/bleu/brevity"] == pytest.approx(math.exp(-1 / 3))
    # of "the cat ran" 2 of 3 words and 1 of 2 pairs: the root of a third
    assert valued(judge, play, {"type": "bleu", "order": 2}, "the cat ran", "the cat sat") == pytest.approx(3**-0.5)
    assert valued(judge, play, {"type": "bleu", "order": 2}, "the cat ran", ["the cat sat", "he ran off"]) > 3**-0.5


def test_bleu_of_a_short_answer(play, judge):
    """One word of two, right: without pairs exp(1 - 2) remains; with the orders it lacks there is nothing."""
    assert valued(judge, play, {"type": "bleu"}, "test", "a test") == pytest.approx(math.exp(-1))
    assert valued(judge, play, {"type": "bleu", "effective": False}, "test", "a test") == 0.0


@pytest.mark.parametrize(
    ("said", "gold", "published"),
    [("a", "a", 100.0), ("", "reference", 0.0), ("a b c", "a b c", 100.0), ("a b c", "abc", 100.0), ("aa", "ab", 25.0)],
)  # mjpost/sacrebleu
def test_chrf_as_published(said, gold, published, play, judge):
    assert valued(judge, play, {"type": "chrf", "beta": 3}, said, gold) == pytest.approx(published / 100)


def test_chrf_by_hand(play, judge):
    """Characters of "ab" in "abc": precision 1, recall 2/3, and F = (1 + b²)pr / (b²p + r) = 5·2/3 / (4 + 2/3)."""
    assert valued(judge, play, {"type": "chrf", "characters": 1}, "ab", "abc") == pytest.approx(5 / 7)
    assert valued(judge, play, {"type": "chrf", "characters": 1, "beta": 1}, "ab", "abc") == pytest.approx(4 / 5)
    assert valued(judge, play, {"type": "chrf", "characters": 1}, "AB", "ab") == 0.0
    assert valued(judge, play, {"type": "chrf", "characters": 1, "ignore_case": True}, "AB", "ab") == 1.0
    # with words too: characters 1, words 0 of 1 and 1, so F is the harmonic mean of 1/2 and 1/2
    assert valued(judge, play, {"type": "chrf", "characters": 1, "words": 1}, "a b", "ab") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("variant", "said", "gold", "published"),
    [  # google-research/google-research
        ("rouge1", "testing", "testing one two", (1, 1 / 3, 1 / 2)),
        ("rouge2", "testing one", "testing one two", (1, 1 / 2, 2 / 3)),
        ("rougeL", "testing one", "testing one two", (1, 2 / 3, 4 / 5)),
        ("rougeL", "testing two", "testing one two", (1, 2 / 3, 4 / 5)),
        ("rougeLsum", LINES, "w1 w2 w3 w4 w5", (0.4, 0.8, 0.64 / 1.2)),
        ("rougeLsum", "/", "w1 w2 w3 w4 w5", (0, 0, 0)),
        ("rouge1", "", "testing one two", (0, 0, 0)),
    ],
)
def test_rouge_as_published(variant, said, gold, published, play, judge):
    for words in ("english", "any"):
        one = play(said, answer=gold)
        for measure, value in zip(("precision", "recall", "f1"), published, strict=True):
            config = {"type": "rouge", "variant": variant, "measure": measure, "words": words}
            assert judge(config, one) == [pytest.approx(value)]
            assert one.metrics[f"reward/rouge/{measure}"] == pytest.approx(value)


def test_rouge_reads_stems_and_scripts_where_asked_for(play, judge):
    assert valued(judge, play, {"type": "rouge"}, "running dogs", "run dog") == 0.0
    assert valued(judge, play, {"type": "rouge", "stem": True}, "running dogs", "run dog") == 1.0
    assert valued(judge, play, {"type": "rouge", "words": "any"}, "Кошка спит", "кошка ест") == 0.5
    with pytest.raises(InputError, match=r"row-7.*no word of a-z or 0-9"):
        valued(judge, play, {"type": "rouge"}, "Кошка спит", "кошка ест")
    with pytest.raises(ValidationError, match="stem: only English"):
        TypeAdapter(RewardConfig).validate_python({"type": "rouge", "stem": True, "words": "any"})


@pytest.mark.parametrize(
    ("measure", "said", "gold", "value"),
    [
        ("ratio", "kitten", "sitting", 8 / 13),  # "ittn" in common
        ("levenshtein", "kitten", "sitting", 4 / 7),  # 3 changes
        (
            "jaro_winkler",
            "martha",
            "marhta",
            0.9611111,
        ),  # (1 + 1 + 5/6) / 3, a tenth of what lacks for each of 3 letters
        ("jaro_winkler", "0" * 63, "0" * 65, 0.9938),  # rapidfuzz/RapidFuzz
        ("jaro_winkler", "0", "00", 0.85),  # rapidfuzz/RapidFuzz
        ("partial", "Paris", "It is Paris, France.", 1.0),
        ("sorted_words", "Bob and Ann", "Ann and Bob", 1.0),
        ("word_set", "London Paris Rome", "Paris", 1.0),
        ("ratio", "NEW  york\ncity.", "New York City", 1.0),
        ("ratio", "?!", "yes", 0.0),
        ("ratio", "", "yes", 0.0),
    ],
)
def test_fuzzy(measure, said, gold, value, play, judge):
    config = {"type": "fuzzy", "measure": measure}
    assert valued(judge, play, config, said, gold) == pytest.approx(value, abs=1e-4)


def test_fuzzy_counts_case_and_punctuation_where_asked_for(play, judge):
    strict = {"type": "fuzzy", "ignore_case": False, "punctuation": True}
    assert valued(judge, play, strict, "ab.", "Ab") == pytest.approx(2 / 5)
    assert valued(judge, play, {"type": "fuzzy"}, "ab.", "Ab") == 1.0
    with pytest.raises(InputError, match=r"row-7.*only punctuation"):
        valued(judge, play, {"type": "fuzzy"}, "x", "...")


def test_fuzzy_is_nothing_below_a_bound_and_takes_the_best_reference(play, judge):
    config = {"type": "fuzzy", "at_least": 0.6}
    assert valued(judge, play, config, "kitten", "sitting") == pytest.approx(8 / 13)
    assert valued(judge, play, config | {"at_least": 0.62}, "kitten", "sitting") == 0.0
    assert valued(judge, play, config, "kitten", ["dog", "kitten"]) == 1.0


@pytest.mark.parametrize("kind", ["bleu", "chrf", "rouge", "fuzzy"])
def test_a_text_is_all_of_itself_and_a_row_without_one_is_refused(kind, play, judge):
    text = "the cat sat on the mat"
    assert valued(judge, play, {"type": kind}, text, [text, "something else"]) == pytest.approx(1.0)
    assert valued(judge, play, {"type": kind}, "", text) == 0.0
    config = TypeAdapter(RewardConfig).validate_python({"type": kind})
    config.check(Task("row-7", (), {"answer": [text]}))
    for info in (
        {},
        {"answer": ""},
        {"answer": []},
        {"answer": ["a", " "]},
        {"answer": ["a", 3]},
        {"answer": {"a": 1}},
    ):
        with pytest.raises(InputError, match="row-7"):
            config.check(Task("row-7", (), info))


def test_a_library_that_is_missing_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.fuzz", None)
    with pytest.raises(InputError, match=r"`fuzzy` needs .* pip install 'rlft\[texts\]'"):
        TypeAdapter(RewardConfig).validate_python({"type": "fuzzy"}).build()


def test_one_that_fails_or_hangs_fails_alone_and_the_rest_goes_on(play):
    def verdict(trajectory):
        if trajectory.completion == "hangs":
            time.sleep(1)
        return 1 / len(trajectory.completion), {"length": float(len(trajectory.completion))}

    group = tuple(play(text) for text in ("ab", "", "hangs", "abcd"))
    reward, beats = scored(pooling.pooled(verdict, "name", seconds=0.2), "name"), 0

    async def beside():
        nonlocal beats
        while True:
            await asyncio.sleep(0.01)
            beats += 1

    async def run():
        other = asyncio.create_task(beside())
        values = await reward(group)
        other.cancel()
        return values

    assert asyncio.run(run()) == [0.5, None, None, 0.25]
    assert beats > 5  # of about 20
    assert [[failure.kind for failure in one.failures] for one in group] == [[], ["raised"], ["timeout"], []]
    assert [one.metrics.get("reward/name/length") for one in group] == [2.0, None, None, 4.0]


@pytest.mark.parametrize("config", [{"type": "fuzzy"}, {"type": "rouge", "words": "any"}], ids=lambda c: c["type"])
def test_marks_belong_to_their_letters(config, play, judge):
    """Two Hindi words that differ in a vowel sign; one word in two ways to write its accent."""
    other, same = judge(config, play("दान", answer="दिन"), play("cafe\u0301", answer="caf\u00e9"))
    assert other < 1
    assert same == 1.0


@pytest.mark.parametrize(("config", "gold"), [({"type": "rouge"}, "你好"), ({"type": "fuzzy"}, "?!")])
def test_a_reference_that_nothing_can_match_is_refused_before_the_run(config, gold, play):
    reward: Any = TypeAdapter(RewardConfig).validate_python(config)
    with pytest.raises(InputError, match="column 'answer'"):
        reward.check(play("x", answer=gold).task)
