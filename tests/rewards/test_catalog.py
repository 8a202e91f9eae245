"""The union, sums of rewards, and what every verdict passes through."""

from __future__ import annotations

import asyncio
import math
import re
import sys
from fractions import Fraction

import pytest
from pydantic import TypeAdapter, ValidationError

from rlft.rewards.base import scored
from rlft.rewards.catalog import RewardConfig, names, types
from rlft.rewards.combine import total
from rlft.types import InputError, Reward, RunError

PARSE = TypeAdapter(RewardConfig).validate_python
NUMBER = {"type": "number"}
BARE = {"type": "format", "pattern": r"-?\d+"}


def returning(values):
    async def judge(group):
        if isinstance(values, Exception):
            raise values
        return values

    return judge


def test_names_are_the_types():
    shape = ["format", "length", "overlong", "cosine", "relative_length", "thinking", "tags", "repetition", "script"]
    texts = ["instructions", "json_schema", "language", "text_length", "bleu", "chrf", "rouge", "fuzzy"]
    single = ["exact", "number", "math", "choice", "matching", "code", "program", "syntax", *shape, *texts]
    asked = ["model", "served_model", "judge", "remote", "outcome", "reasoning_gym"]
    combining = ["weighted", "gated", "sequence", "first", "routed", "scheduled", "normalised"]
    assert names() == [*single, *asked, *combining, "directed", "per_turn", "progress", "custom"]
    assert types()["number"].__name__ == "Number"


@pytest.mark.parametrize("config", types().values(), ids=names())
def test_every_field_is_described(config):
    assert config.__doc__
    assert all(field.description for name, field in config.model_fields.items() if name != "type")


@pytest.mark.parametrize(
    ("config", "loc"),
    [
        ({"type": "number", "tolerence": 1}, ("number", "tolerence")),
        ({"type": "number", "tolerance": -1}, ("number", "tolerance")),
        ({"type": "number", "weight": math.inf}, ("number", "weight")),
        ({"type": "weighted", "terms": {}}, ("weighted", "terms")),
        ({"type": "weighted"}, ("weighted", "terms")),
        ({"type": "weighted", "terms": {"a": {"type": "length"}}}, ("weighted", "terms", "a", "length", "limit")),
        ({"type": "weighted", "terms": {"a": {"type": "nubmer"}}}, ("weighted", "terms", "a")),
        ({"type": "weighted", "terms": {"mean": NUMBER}}, ("weighted", "terms", "mean", "[key]")),
        ({"type": "weighted", "terms": {"a/b": NUMBER}}, ("weighted", "terms", "a/b", "[key]")),
        ({"type": "weighted", "terms": {"": NUMBER}}, ("weighted", "terms", "", "[key]")),
        ({"type": "custom", "path": "no_colon"}, ("custom", "path")),
        ({"type": "math", "seconds": 0}, ("math", "seconds")),
    ],
)
def test_a_bad_config_is_refused_by_its_whole_path(config, loc):
    with pytest.raises(ValidationError) as caught:
        PARSE(config)
    assert [error["loc"] for error in caught.value.errors()] == [loc]


def test_a_config_survives_being_written_and_read():
    config = {"type": "weighted", "terms": {"a": {"type": "weighted", "weight": 2, "terms": {"b": NUMBER}}, "c": BARE}}
    parsed = PARSE(config)
    assert PARSE(parsed.model_dump(mode="json")) == parsed


def test_components_are_the_names_that_are_logged(play, judge):
    inner = {"type": "weighted", "weight": 2, "terms": {"correct": NUMBER, "short": {"type": "length", "limit": 4}}}
    config = {"type": "weighted", "terms": {"correct": NUMBER, "style": inner, "bare": BARE}}
    names = ["correct", "style", "style/correct", "style/short", "bare"]
    assert PARSE(config).components() == names
    assert PARSE(NUMBER).components() == ["number"]
    one = play("12", chosen=1, answer=12)
    assert judge(config, one) == [1 + 2 * (1 + 0.75) + 1]
    assert one.metrics == {
        "reward/correct": 1.0,
        "reward/style": 1.75,
        "reward/style/correct": 1.0,
        "reward/style/short": 0.75,
        "reward/bare": 1.0,
        "reward/missing": 0.0,
    }


def test_weighted_adds_weight_times_value_and_logs_the_bare_values(play, judge):
    config = {"type": "weighted", "terms": {"correct": NUMBER, "bare": {"weight": 0.25, **BARE}}}
    group = [play(text, answer=12) for text in ("12", "It is 12.", "13", "It is 13.")]
    assert judge(config, *group) == [1.25, 1.0, 0.25, 0.0]
    assert [one.metrics["reward/bare"] for one in group] == [1.0, 0.0, 1.0, 0.0]
    assert [one.metrics["reward/correct"] for one in group] == [1.0, 1.0, 0.0, 0.0]


def test_weights_may_be_negative_or_zero(play, judge):
    config = {"type": "weighted", "terms": {"a": {"weight": -2, **NUMBER}, "b": {"weight": 0, **BARE}}}
    one = play("12", answer=12)
    assert judge(config, one) == [-2.0]
    assert one.metrics["reward/b"] == 1.0


def test_a_single_reward_logs_itself_under_its_type_and_its_weight_counts(play, judge):
    one = play("12", answer=12)
    assert judge({"weight": 3, **NUMBER}, one) == [3.0]
    assert one.metrics == {"reward/number": 1.0, "reward/missing": 0.0}


def test_none_in_any_term_makes_the_total_none(play, judge, tmp_path, monkeypatch):
    (tmp_path / "sometimes.py").write_text("def score(t): return None if t.completion == '12' else 0.5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = {"type": "weighted", "terms": {"n": NUMBER, "s": {"type": "custom", "path": "sometimes:score"}}}
    group = [play("12", answer=12), play("13", answer=13)]
    assert judge(config, *group) == [None, 1.5]
    assert group[0].metrics == {"reward/n": 1.0, "reward/missing": 1.0}
    assert group[1].metrics == {"reward/n": 1.0, "reward/s": 0.5, "reward/missing": 0.0}


def test_terms_run_at_the_same_time(play, judge, tmp_path, monkeypatch):
    # Each term waits for the other: one after the other they would wait for ever.
    (tmp_path / "meet.py").write_text(
        "import threading\nbarrier = threading.Barrier(2)\ndef score(t): barrier.wait(timeout=5); return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    term = {"type": "custom", "path": "meet:score"}
    assert judge({"type": "weighted", "terms": {"a": term, "b": term}}, play("x")) == [2.0]


def test_a_crash_is_not_a_zero(play):
    group = (play("x"), play("y"))
    assert asyncio.run(scored(returning(ZeroDivisionError("division by zero")), "mine")(group)) == [None, None]
    for one in group:
        (failure,) = one.failures
        assert (failure.reward, failure.kind) == ("mine", "raised")
        assert failure.said == "ZeroDivisionError: division by zero"
        assert failure.trace.endswith("ZeroDivisionError: division by zero\n")
        assert one.metrics == {"reward/missing": 1.0}


def test_a_term_that_crashes_leaves_no_half_of_a_sum(play):
    """The other term's value is logged; the sum has none, and the failure is that of the term."""
    one = play("x")
    broken, good = scored(returning(KeyError("k")), "broken"), scored(returning([0.5]), "good")
    assert asyncio.run(scored(total([broken, good]), "sum", record=False)((one,))) == [None]
    assert [failure.reward for failure in one.failures] == ["broken"]
    assert one.metrics == {"reward/good": 0.5, "reward/missing": 1.0}


def test_an_input_error_stays_one(play):
    with pytest.raises(InputError, match=r"^row 3$"):
        asyncio.run(scored(returning(InputError("row 3")), "mine")((play("x"),)))
    with pytest.raises(RunError, match=r"^out of money$"):
        asyncio.run(scored(returning([1.0, RunError("out of money")]), "mine")((play("x"), play("y"))))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1.0], "returned 1 values for the 2 trajectories"),
        ([1.0, 1.0, 1.0], "returned 3 values"),
        ([], "returned 0 values"),
        (None, "returned None"),
        (1.0, "returned 1.0"),
        ("ab", "returned 'ab'"),
        ({0: 1.0, 1: 1.0}, "Return a list"),
    ],
)
def test_a_wrong_count_is_a_failure_for_all(play, values, reason):
    group = (play("x"), play("y"))
    assert asyncio.run(scored(returning(values), "mine")(group)) == [None, None]
    assert all(one.failures[0].kind == "count" for one in group)
    assert all(re.search(reason, one.failures[0].said) for one in group)


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        (True, "value", r"the value is True \(bool\)"),
        (math.inf, "value", "the value is inf"),
        (math.nan, "nan", "the value is nan"),
        ("1", "value", "the value is '1'"),
        (10**400, "value", "not a finite number"),
        ([1.0], "value", r"\(list\)"),
        (TimeoutError("late"), "timeout", "TimeoutError: late"),
        (ValueError("broken"), "raised", "ValueError: broken"),
    ],
)
def test_what_is_no_verdict_is_a_failure_of_that_trajectory(play, value, kind, reason):
    good, bad = play("x"), play("y")
    assert asyncio.run(scored(returning([1.0, value]), "mine")((good, bad))) == [1.0, None]
    assert not good.failures
    (failure,) = bad.failures
    assert failure.kind == kind
    assert re.search(reason, failure.said)


def test_none_is_no_score_and_no_failure(play):
    group = (play("x"), play("y"))
    assert asyncio.run(scored(returning([None, Fraction(1, 4)]), "mine")(group)) == [None, 0.25]
    assert not group[0].failures
    assert group[0].metrics == {"reward/missing": 1.0}
    assert group[1].metrics == {"reward/mine": 0.25, "reward/missing": 0.0}


def test_a_second_judgement_leaves_nothing_of_the_first(play):
    one = play("x")
    asyncio.run(scored(returning([0.5]), "mine")((one,)))
    asyncio.run(scored(returning([math.nan]), "mine")((one,)))
    assert one.metrics == {"reward/missing": 1.0}
    assert len(one.failures) == 1
    asyncio.run(scored(returning([None]), "mine")((one,)))
    assert not one.failures


def test_an_empty_group_has_no_verdicts(judge):
    assert judge(NUMBER) == []
    assert isinstance(PARSE(NUMBER).build(), Reward)
