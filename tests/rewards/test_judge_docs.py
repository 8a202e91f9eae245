"""What docs/rewards-judges.md and docs/rewards-served.md show must work, and what they list must be what there is."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from rlft.rewards.catalog import RewardConfig
from rlft.rewards.judges import briefs
from rlft.rewards.judges.endpoint import Endpoint
from rlft.rewards.judges.judge import LOGGED
from tests.rewards.scripted import Answer, scored, serving, texts
from tests.rewards.test_served import served

DOCS = Path(__file__).parents[2] / "docs"
JUDGES, SERVED = ((DOCS / f"rewards-{name}.md").read_text() for name in ("judges", "served"))
ONE, PANEL = (yaml.safe_load(block)["reward"] for block in re.findall(r"```yaml\n(.*?)```", JUDGES, re.S))
GRADED, REMOTE, MODEL = (yaml.safe_load(block)["reward"] for block in re.findall(r"```yaml\n(.*?)```", SERVED, re.S))


def section(page: str, head: str) -> dict[str, list[str]]:
    """The rows of a table below a heading, by what their first cell quotes."""
    (text,) = re.findall(rf"^## {head}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return {name: row[1:] for row in rows[2:] for name in re.findall(r"`([^`]+)`", row[0]) or [row[0]]}


def judged(plain: dict[str, Any], *group: Any) -> list[float | None]:
    return list(asyncio.run(TypeAdapter(RewardConfig).validate_python(plain).build()(group)))  # type: ignore[arg-type]


def test_the_first_judge_gives_the_value_it_says(play, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving(lambda _: scored(3)) as server:
        plain = ONE | {"judges": {"local": ONE["judges"]["local"] | {"url": server.url}}}
        assert judged(plain, play("12", answer="12")) == [0.75]
        assert judged(plain, play("12", answer="12")) == [0.75]
        (asked,) = server.asked
    assert asked.body["model"] == "Qwen/Qwen3-8B"
    assert ONE["rubric"] in asked.prompt
    assert (tmp_path / "judged.sqlite").is_file()


def test_the_panel_is_a_weighted_median_of_those_that_answer(play, monkeypatch):
    """Scores 4, 7 and 10 with weights 1, 2 and 1; then without the largest, of 4 and 10 with equal weights."""
    monkeypatch.setenv("JUDGE_KEY", "sk-0123456789")
    said = {"Qwen/Qwen3-8B": 4, "big": 7, "middle": 10}
    with serving(lambda asked: scored(said[asked.body["model"]])) as server:
        plain = PANEL | {"judges": {name: judge | {"url": server.url} for name, judge in PANEL["judges"].items()}}
        one = play("12")
        assert judged(plain, one) == [pytest.approx(6 / 9)]
        assert one.metrics["reward/judge/cost"] == pytest.approx((100 * 0.4 + 10 * 1.6) / 1e6)
        said["big"] = 99
        assert judged(plain, play("13")) == [pytest.approx(6 / 9)]


def test_how_many_requests_a_group_takes(play):
    def script(asked: Any) -> str:
        count = len(texts(asked.prompt))
        return json.dumps({"better": "tie"} if count == 2 else {"ranking": list(range(1, count + 1))})

    for knobs, requests in (
        ({"mode": "pairwise"}, 30),
        ({"mode": "pairwise", "opponents": 3}, 18),
        ({"mode": "listwise"}, 2),
    ):
        with serving(script) as server:
            judged({"type": "judge", "judges": {"one": server.judge()}, **knobs}, *(play(f"{i}") for i in range(6)))
            assert len(server.asked) == requests


def test_the_table_lists_every_key_of_a_judge_with_its_default():
    listed = section(JUDGES, "What each judge is")
    assert set(listed) == set(Endpoint.model_fields)
    for name, info in Endpoint.model_fields.items():
        default = info.get_default(call_default_factory=True)
        shown = "required" if info.is_required() else "none" if default is None else str(default)
        assert listed[name][0] == shown


def test_the_tables_list_what_is_logged_and_every_placeholder():
    assert set(section(JUDGES, "What is logged")) == {*LOGGED, "<judge>"}
    listed = section(JUDGES, "Templates")
    for mode, holes in briefs.HOLES.items():
        assert {hole for row in ("all", mode) for hole in re.findall(r"\{(\w+)\}", listed[row][0])} == holes


def test_the_served_sum_is_asked_as_it_says(play, monkeypatch):
    monkeypatch.setenv("GRADER_KEY", "sk-0123456789")
    right, wrong = play(r"\boxed{12}", answer="12"), play("13" * 50, answer="12")
    with served(GRADED, "sk-0123456789") as url:
        assert judged(REMOTE | {"url": url}, right, wrong) == [1.3, 0.0]
    assert right.metrics["reward/correct"] == right.metrics["reward/bare"] == 1.0
    remote: Any = TypeAdapter(RewardConfig).validate_python(REMOTE)
    assert remote.components() == list(GRADED["terms"])


def test_the_reward_model_is_asked_as_it_says(play):
    with serving(lambda _: Answer(b'{"data": [{"probs": [2.5]}]}')) as server:
        assert judged(MODEL | {"url": server.url.removesuffix("/v1")}, play("12")) == [2.5]
        assert server.asked[0].body["model"] == MODEL["model"]
