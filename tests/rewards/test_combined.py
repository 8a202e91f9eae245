"""Who is asked, what counts how much, and what is left on the trajectories, for rewards that hold other rewards."""

from __future__ import annotations

import asyncio
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rlft.forecast import _reward_models  # pyright: ignore[reportPrivateUsage]
from rlft.rewards.base import Config
from rlft.rewards.catalog import RewardConfig
from rlft.types import InputError, Trajectory, at_step
from rlft.unfit import refuse_unjudged
from tests.rewards.doubtful import BARE, FAILS, NUMBER, SHORT, UNSURE

CODE = '''
seen = []
async def asked(group):
    """0.5 for everybody, and a note of who was shown."""
    seen.append([t.completion for t in group])
    return [0.5] * len(group)
'''
ASKED = {"type": "custom", "path": "my_own:asked", "per": "group"}
PAYS = {"type": "per_turn", "of": NUMBER}


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    (tmp_path / "my_own.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_own", None)


def build(plain: dict[str, Any]) -> Config:
    return TypeAdapter(RewardConfig).validate_python(plain)  # type: ignore[return-value]


def values(trajectory: Trajectory) -> dict[str, float]:
    return {key.removeprefix("reward/"): value for key, value in trajectory.metrics.items()}


GATED = {"type": "gated", "gate": BARE, "of": {**ASKED, "weight": 2.0}, "otherwise": -1.0}


def test_what_a_gate_stops_is_not_asked_about(play, judge):
    good, bad = play("12"), play("twelve")
    assert judge(GATED, good, bad) == [1.0, -1.0]
    assert sys.modules["my_own"].seen == [["12"]]
    gate = {"gated/gate": 1.0, "gated/of": 0.5, "gated/of/asked": 1.0, "gated": 1.0, "missing": 0.0}
    assert values(good) == gate
    assert values(bad) == {"gated/gate": 0.0, "gated/of/asked": 0.0, "gated": -1.0, "missing": 0.0}
    assert not good.failures + bad.failures


def test_nobody_through_a_gate_asks_nobody(play, judge):
    assert judge(GATED, play("a"), play("b")) == [-1.0, -1.0]
    assert "my_own" not in sys.modules or sys.modules["my_own"].seen == []


@pytest.mark.parametrize(("at_least", "through"), [(0.5, True), (0.5 + 1e-9, True), (0.51, False)])
def test_a_gate_passes_at_its_threshold_whatever_its_weight(play, judge, at_least, through):
    gate = {**SHORT, "weight": 0.0}  # 2 of 4 tokens: 0.5
    config = {"type": "gated", "gate": gate, "of": NUMBER, "at_least": at_least, "otherwise": 0.0}
    assert judge(config, play("12", chosen=2, answer=12)) == [float(through)]


def test_a_second_judgement_leaves_nothing_of_a_first_that_went_further(play, judge):
    for config in (GATED, {"type": "sequence", "terms": {"bare": BARE, "all": ASKED}}):
        one = play("12")
        judge(config, one)
        one.messages = (one.messages[0], {"role": "assistant", "content": "none"})
        judge(config, one)
        other = play("none")
        judge(config, other)
        assert values(one) == values(other)


@pytest.mark.parametrize("place", ["gate", "of"])
def test_a_failing_reward_in_a_gate_is_a_failure_and_no_score(play, judge, place):
    config = {"type": "gated", "gate": BARE, "of": NUMBER} | {place: FAILS}
    one = play("12", answer=12)
    assert judge(config, one) == [None]
    assert [(failure.reward, failure.kind) for failure in one.failures] == [(f"gated/{place}", "raised")]
    assert one.metrics["reward/missing"] == 1.0
    assert "reward/gated" not in one.metrics


STAGES = {
    "type": "sequence",
    "terms": {"bare": {**BARE, "weight": 0.25}, "right": NUMBER, "liked": {**ASKED, "weight": 0.5}},
}


def test_a_sequence_ends_where_a_term_is_not_passed(play, judge):
    group = [play(text, answer=12) for text in ("12", "13", "It is 12.")]
    assert judge(STAGES, *group) == [1.5, 0.25, 0.0]  # 0.25 + 1 + 0.5 * 0.5; 0.25 + 0; 0
    assert sys.modules["my_own"].seen == [["12"]]
    assert values(group[0]) == {
        "bare": 1.0, "bare/asked": 1.0, "right": 1.0, "right/asked": 1.0, "liked": 0.5, "liked/asked": 1.0,
        "missing": 0.0,
    }  # fmt: skip
    assert values(group[1]) == {
        "bare": 1.0, "bare/asked": 1.0, "right": 0.0, "right/asked": 1.0, "liked/asked": 0.0, "missing": 0.0,
    }  # fmt: skip
    assert values(group[2]) == {
        "bare": 0.0, "bare/asked": 1.0, "right/asked": 0.0, "liked/asked": 0.0, "missing": 0.0,
    }  # fmt: skip


def test_a_sequence_may_pass_on_less(play, judge):
    assert judge({**STAGES, "at_least": {"right": 0.0}}, play("13", answer=12)) == [0.5]  # 0.25 + 0 + 0.5 * 0.5


def test_a_failing_stage_leaves_no_part_of_a_sum(play, judge):
    config = {"type": "sequence", "terms": {"bare": BARE, "broken": FAILS, "liked": ASKED}}
    good, bad = play("12"), play("none")
    assert judge(config, good, bad) == [None, 0.0]
    assert [failure.reward for failure in good.failures] == ["broken"]
    assert not bad.failures
    assert "my_own" in sys.modules
    assert sys.modules["my_own"].seen == []


FIRST = {"type": "first", "terms": {"sure": {**UNSURE, "weight": 4.0}, "else": {**ASKED, "weight": 6.0}}}


def test_the_first_verdict_counts_and_later_ones_are_asked_only_without_it(play, judge):
    sure, unsure = play("yes"), play("yes?")
    assert judge(FIRST, sure, unsure) == [1.0, 3.0]
    assert sys.modules["my_own"].seen == [["yes?"]]
    assert values(sure) == {
        "first/sure": 0.25, "first/sure/asked": 1.0, "first/else/asked": 0.0, "first": 1.0, "missing": 0.0,
    }  # fmt: skip
    assert values(unsure) == {
        "first/sure/asked": 1.0, "first/else": 0.5, "first/else/asked": 1.0, "first": 3.0, "missing": 0.0,
    }  # fmt: skip


def test_a_failure_is_fallen_back_from_and_stays_on_record(play, judge):
    one = play("12", answer=12)
    assert judge({"type": "first", "terms": {"remote": FAILS, "local": NUMBER}}, one) == [1.0]
    assert [failure.reward for failure in one.failures] == ["first/remote"]
    assert one.metrics["reward/missing"] == 0.0
    none = play("?")
    assert judge({"type": "first", "terms": {"a": UNSURE, "b": UNSURE}}, none) == [None]
    assert not none.failures


ROUTED = {
    "type": "routed",
    "column": "kind",
    "routes": {"openai/gsm8k": "sum", "true": "sum"},
    "terms": {"sum": {**NUMBER, "weight": 3.0}, "text": {"type": "exact"}},
}


def test_a_column_says_who_judges(play, judge):
    for kind, text, value in (("openai/gsm8k", "It is 12.", 3.0), (True, "12", 3.0), ("text", "It is 12.", 0.0)):
        one = play(text, answer="12", kind=kind)
        assert judge(ROUTED, one) == [value]
        term = "text" if kind == "text" else "sum"
        other = "sum" if kind == "text" else "text"
        assert one.metrics[f"reward/routed/{term}/asked"] == 1.0
        assert one.metrics[f"reward/routed/{other}/asked"] == 0.0
        assert f"reward/routed/{other}" not in one.metrics
        assert one.metrics["reward/routed"] == value


def test_a_row_without_a_route_is_refused_unless_there_is_a_default(play, judge):
    row = {"answer": "12", "kind": "tables"}
    with pytest.raises(InputError, match=r"row-7.*column 'kind' holds 'tables'.*it has openai/gsm8k, true, sum, text"):
        judge(ROUTED, play("12", **row))
    assert judge({**ROUTED, "default": "text"}, play("12", **row)) == [1.0]
    with pytest.raises(InputError, match=r"column 'kind' is missing \(there is: answer\)"):
        judge({**ROUTED, "default": "text"}, play("12", answer="12"))


def test_only_the_rows_that_a_term_judges_need_its_column(play):
    """Before a run begins, over all rows."""
    run = SimpleNamespace(reward=build({"type": "gated", "gate": BARE, "of": {**ROUTED, "default": "length"} | {
        "terms": {**ROUTED["terms"], "length": SHORT}}}))  # fmt: skip
    free = play("x", kind="essay").task
    refuse_unjudged(run, [play("x", kind="text", answer="12").task, free])  # type: ignore[arg-type]
    for row, said in (({"kind": "text"}, "column 'answer' is missing"), ({"answer": 12}, "column 'kind' is missing")):
        with pytest.raises(InputError, match=said):
            refuse_unjudged(run, [free, play("x", **row).task])  # type: ignore[arg-type]


def test_a_reward_model_in_a_gate_is_counted_in_the_memory_forecast():
    model = {"type": "model", "path": "runs/judge"}
    for plain in ({"gate": model, "of": NUMBER}, {"gate": NUMBER, "of": {"type": "first", "terms": {"m": model}}}):
        assert list(_reward_models(build({"type": "gated", **plain}))) == [("runs/judge", None)]


def scores(plain: dict[str, Any], step: int, *group: Trajectory) -> list[Any]:
    with at_step(step):
        return list(asyncio.run(build(plain).build()(group)))  # type: ignore[arg-type]


ALL: dict[str, dict[str, Any]] = {
    "gated": {"type": "gated", "gate": BARE, "of": NUMBER},
    "sequence": {"type": "sequence", "terms": {"bare": BARE, "right": NUMBER}},
    "first": {"type": "first", "terms": {"right": NUMBER, "bare": BARE}},
    "routed": {**ROUTED, "terms": {"sum": NUMBER, "text": BARE}},
    "scheduled": {"type": "scheduled", "points": {"bare": {0: 1.0}}, "terms": {"right": NUMBER, "bare": BARE}},
    "normalised": {"type": "normalised", "terms": {"right": NUMBER, "bare": BARE}},
}
ROW = {"answer": 12, "kind": "sum"}


@pytest.mark.parametrize(("kind", "names"), [
    ("gated", ["gated", "gated/of", "gated/gate"]),
    ("sequence", ["right", "bare"]),
    ("first", ["first", "first/right", "first/bare"]),
    ("routed", ["routed", "routed/sum", "routed/text"]),
    ("scheduled", ["right", "bare"]),
    ("normalised", ["right", "bare"]),
])  # fmt: skip
def test_components_are_what_is_logged_at_the_top_and_below_a_name(play, kind, names):
    config = build(ALL[kind])
    assert config.components() == names
    below = build({"type": "weighted", "terms": {"a": ALL[kind]}})
    local = ["a", *(name.removeprefix(f"{kind}/") for name in names if name != kind)]
    assert below.components() == [local[0], *(f"a/{name}" for name in local[1:])]
    for one in (config, below):
        trajectory = play("12", **ROW)
        assert scores(one.model_dump(), 3, trajectory) == [{"gated": 1.0, "first": 1.0, "routed": 1.0}.get(kind, 2.0)]
        logged = {key for key in values(trajectory) if not key.endswith(("/asked", "/factor"))} - {"missing"}
        possible = set(one.components())
        assert logged <= possible
        not_asked = {name for name in possible if name.endswith(("first/bare", "a/bare", "/text"))}
        assert possible - logged <= not_asked


@pytest.mark.parametrize("kind", ALL)
def test_none_pays_asks_the_policy_or_goes_by_turn_and_what_pays_is_refused_inside(kind):
    config = build(ALL[kind])
    assert (config.by_turn, config.pays, config.explored, config.directed) == (False, False, 0, False)
    assert config.by_step == (kind == "scheduled")
    plain = dict(ALL[kind])
    if kind == "gated":
        plain["of"] = PAYS
    else:
        plain["terms"] = {**plain["terms"], "paying": PAYS}
    with pytest.raises(ValidationError, match="'per_turn' pays on the way"):
        build(plain)


@pytest.mark.parametrize("kind", ALL)
def test_it_works_turn_by_turn_and_inside_each_other(play, kind):
    one, other = play("12", **ROW), play("13", **ROW)
    turns = build({"type": "per_turn", "of": ALL[kind], "weight": 2.0})
    assert turns.by_turn
    plain = scores(ALL[kind], 3, play("12", **ROW), play("13", **ROW))
    assert scores(turns.model_dump(), 3, one, other) == [0.0, 0.0]
    assert [t.samples[0].rewards[-1] for t in (one, other)] == pytest.approx([2 * value for value in plain])
    assert scores({"type": "progress", "of": ALL[kind]}, 3, play("12", **ROW), play("13", **ROW)) == plain
    for outer in ALL:
        nested = dict(ALL[outer])
        if outer == "gated":
            nested["of"] = ALL[kind]
        else:
            key = {"sequence": "right", "routed": "sum"}.get(outer, "right")
            nested["terms"] = {**nested["terms"], key: ALL[kind]}
        found = scores(nested, 3, play("12", **ROW), play("13", **ROW))
        assert all(value is not None and math.isfinite(value) for value in found)
        assert found[0] >= found[1]


@pytest.mark.parametrize("kind", ALL)
def test_a_direction_goes_by_its_components(play, judge, kind):
    """And those of a reward that was not asked have no value, so that there is no score."""
    plain = {"type": "directed", "of": ALL[kind]}
    config = build(plain)
    names = config.components()
    assert config.directed
    assert build({"type": "weighted", "terms": {"a": {"type": "gated", "gate": BARE, "of": plain}}}).directed
    one = play("12", direction={names[0]: 0.6, names[1]: -0.8}, **ROW)
    assert scores(plain, 3, one) == [pytest.approx(0.6 - 0.8)]
    if kind == "gated":
        assert judge(plain, play("It is 12.", direction={"gated/of": 1.0}, **ROW)) == [None]
        assert judge(plain, play("It is 12.", direction={"gated": 1.0}, **ROW)) == [0.0]


@pytest.mark.parametrize("kind", ALL)
def test_its_weight_counts_and_it_survives_being_written(play, kind):
    group = [play("12", **ROW), play("13", **ROW)]
    single, double = scores(ALL[kind], 3, *group), scores({**ALL[kind], "weight": 2.0}, 3, *group)
    assert double == pytest.approx([2 * value for value in single])
    config = build(ALL[kind])
    assert build(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("kind", ALL)
def test_a_failing_reward_inside_is_a_failure_and_never_a_zero(play, kind):
    plain = dict(ALL[kind])
    if kind == "gated":
        plain["of"] = FAILS
    else:
        plain["terms"] = dict.fromkeys(plain["terms"], FAILS)
    one = play("12", **ROW)
    assert scores(plain, 3, one) == [None]
    assert one.failures
    assert all(failure.said == "ValueError: no grader here" for failure in one.failures)
    assert one.metrics["reward/missing"] == 1.0


@pytest.mark.parametrize(("plain", "said"), [
    ({"type": "gated", "gate": BARE}, "Field required"),
    ({**STAGES, "at_least": {"rihgt": 0.5}}, "at_least: there is no term 'rihgt'; there is bare, right, liked"),
    ({**ROUTED, "routes": {"x": "code"}}, "routes: there is no term 'code'; there is sum, text"),
    ({**ROUTED, "default": "code"}, "default: there is no term 'code'"),
    ({**ALL["scheduled"], "points": {"rihgt": {0: 1.0}}}, "points: there is no term 'rihgt'; there is right, bare"),
    ({**ALL["scheduled"], "points": {"right": {}}}, "points.right: give at least one step"),
    ({**ALL["scheduled"], "points": {"right": {-1: 1.0}}}, "greater than or equal to 0"),
    ({**ALL["scheduled"], "points": {"right": {0: math.inf}}}, "finite number"),
    ({**ALL["scheduled"], "points": {}}, "at least 1 item"),
    ({"type": "first", "terms": {}}, "at least 1 item"),
    ({"type": "first", "terms": {"asked": BARE}}, "'asked' cannot name a term"),
    ({"type": "normalised", "terms": {"a": BARE}, "epsilon": 0}, "greater than 0"),
])  # fmt: skip
def test_a_wrong_config_is_refused_with_the_reason(plain, said):
    with pytest.raises(ValidationError, match=said.replace(".", r"\.")):
        build(plain)
