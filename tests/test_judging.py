"""What a plan says that judges will cost, against what a real run asks a server that counts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlft.chat import Chat
from rlft.judging import Bill, evaluations, forecast
from rlft.material import material
from rlft.plan import describe
from rlft.rewards.judges import modes
from rlft.rewards.judges.judge import LlmJudge
from tests.faulty import config, run, written
from tests.rewards.scripted import Asked, chat, scored, serving

Row = dict[str, Any]
pytestmark = pytest.mark.usefixtures("one_thread")
REPLIES = {
    "pointwise": scored(7),
    "pairwise": json.dumps({"better": "first"}),
    "listwise": json.dumps({"ranking": [1, 2, 3, 4]}),
}


def planned(model: Path, folder: Path, reward: Row, **changes: Any) -> Any:
    """3 steps of 2 tasks with 4 answers each, out of 6, which are held out too."""
    written(folder, [""] * 6)
    return config(model, folder, reward, tasks=2, **changes)


def judge(url: str, **more: Any) -> Row:
    """Two judges, of which the second alone has a price: 1 for 1000 tokens in, 10 for 1000 out."""
    free = {"url": url, "model": "small", "max_tokens": 20}
    priced = {"url": url, "model": "large", "max_tokens": 30, "price_in": 1000.0, "price_out": 10000.0}
    return {"type": "judge", "judges": {"one": free, "two": priced}, **more}


def counting(model: Path, reply: str, asked: list[tuple[int, int]]) -> Callable[[Asked], Any]:
    """A server that counts as the policy's tokenizer does, and says as much as it may."""
    tokenizer = Chat(model)

    def answer(request: Asked) -> Any:
        read, said = len(tokenizer.prompt(request.body["messages"])), request.body["max_tokens"]
        asked.append((read, said))
        return chat(reply, {"prompt_tokens": read, "completion_tokens": said})

    return answer


# By mode: requests to each judge about a group of 4, and about one greedy answer; and one of 3 samples.
MODES = {
    "pointwise": ({}, 4, 1, 3),
    "pairwise": ({"opponents": 2}, 8, 0, 6),
    "listwise": ({"rounds": 3}, 3, 0, 3),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_asks_no_more_than_was_forecast(mode: str, tiny_model: Path, tmp_path: Path) -> None:
    """The number of requests is met, but for pairs of the same text; no count of tokens and no cost is above it."""
    options, group, _, _ = MODES[mode]
    asked: list[tuple[int, int]] = []
    with serving(counting(tiny_model, REPLIES[mode], asked)) as server:
        made = planned(tiny_model, tmp_path, judge(server.url, mode=mode, **options))
        (billed,) = forecast(material(made))
        left = run(made)
    assert billed.step.requests == 2 * 2 * group
    assert billed.whole.requests == 3 * 2 * 2 * group
    assert len(asked) == billed.whole.requests
    read, said = sum(read for read, _ in asked), sum(said for _, said in asked)
    assert read <= billed.whole.tokens_in < 3 * read
    assert said == billed.whole.tokens_out == 3 * 2 * group * (20 + 30)
    cost = sum(read + 10 * said for read, said in asked if said == 30) / 1000
    assert billed.whole.cost is not None
    assert cost <= billed.whole.cost
    logged = sum(left.metrics[step]["reward/judge/cost"] * 8 for step in left.metrics)
    assert logged == pytest.approx(cost)


@pytest.mark.parametrize("mode", MODES)
def test_evaluations_are_counted_too(mode: str, tiny_model: Path, tmp_path: Path) -> None:
    """6 held-out tasks before and after 3 steps and after the second, each with a greedy answer and 3 samples."""
    options, group, greedy, drawn = MODES[mode]
    reward = judge("http://127.0.0.1:9", mode=mode, **options)
    changes: Row = {"data__eval": str(tmp_path / "train.jsonl"), "eval__every": 2, "eval__samples": 3}
    made = planned(tiny_model, tmp_path, reward, **changes)
    stuff = material(made)
    (billed,) = forecast(stuff)
    assert evaluations(stuff) == billed.evaluations == 3
    assert billed.evaluation.requests == 2 * 6 * (greedy + drawn)
    assert billed.whole.requests == 3 * 2 * 2 * group + 3 * 2 * 6 * (greedy + drawn)


def test_an_evaluation_asks_no_more_than_was_forecast(tiny_model: Path, tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []
    with serving(counting(tiny_model, REPLIES["pointwise"], asked)) as server:
        changes: Row = {"data__eval": str(tmp_path / "train.jsonl"), "steps": 1}
        made = planned(tiny_model, tmp_path, judge(server.url), **changes)
        (billed,) = forecast(material(made))
        run(made)
    # Greedy answers to the same task before and after are two requests; there is no cache.
    assert len(asked) == billed.whole.requests == 2 * 2 * 4 + 2 * 2 * 6
    assert sum(read for read, _ in asked) <= billed.whole.tokens_in


def test_rewards_that_ask_more_than_once_or_inside_others(tiny_model: Path, tmp_path: Path) -> None:
    """progress: 4 answers of 2 blocks, from each of which 3 go on; a gate's judge is asked about all, at most."""
    one = judge("http://127.0.0.1:9")
    progress = {"type": "progress", "of": one, "blocks": 2, "samples": 3, "tokens": 2}
    two = {"type": "gated", "gate": {"type": "length", "limit": 9}, "of": one}
    first, second = forecast(
        material(planned(tiny_model, tmp_path, {"type": "weighted", "terms": {"a": progress, "b": two}}))
    )
    assert first.step.requests == 2 * 2 * (4 + 4 * 2 * 3)
    assert second.step.requests == 2 * 2 * 4


def test_replies_without_a_limit_have_no_bound(tiny_model: Path, tmp_path: Path) -> None:
    """`max_tokens: 0` sends none; a limit in `extra` is one."""
    reward = judge("http://127.0.0.1:9")
    for name in reward["judges"]:
        reward["judges"][name]["max_tokens"] = 0
    (billed,) = forecast(material(planned(tiny_model, tmp_path, reward)))
    assert (billed.whole.tokens_out, billed.whole.cost) == (None, None)
    for name in reward["judges"]:
        reward["judges"][name]["extra"] = {"max_completion_tokens": 50}
    (billed,) = forecast(material(planned(tiny_model, tmp_path, reward)))
    assert billed.whole.tokens_out == 3 * 2 * 4 * 2 * 50


def test_the_plan_says_it(tiny_model: Path, tmp_path: Path) -> None:
    reward = judge("http://127.0.0.1:9", budget=9.0)
    made = planned(tiny_model, tmp_path, reward, data__eval=str(tmp_path / "train.jsonl"))
    said = describe(made)
    (billed,) = forecast(material(made))
    assert re.search(r"^judges +pointwise", said, re.M)
    assert "pointwise, by one (small), two (large): at most, without tries that are made again" in said
    assert f"a step: 16 requests, {billed.step.tokens_in} tokens in and 400 out, cost {billed.step.cost:.4g}\n" in said
    assert "in all (3 steps and 2 evaluations): 72 requests, " in said
    assert "; budget: 9, where a session stops\n" in said
    assert "judges" not in describe(planned(tiny_model, tmp_path, {"type": "length", "limit": 9}))


def test_the_requests_are_those_that_the_page_says() -> None:
    page = (Path(__file__).parents[1] / "docs/rewards-judges.md").read_text()
    table = page.partition("Requests about a group of 8")[2].partition("\n\nA greedy")[0]
    rows = re.findall(r"^\| (`.*) \| (\d+) \|$", table, re.M)
    assert len(rows) == 4
    for said, count in rows:
        modes_said = [word for word in re.findall(r"`(\w+)`", said) if word in modes.REQUESTS]
        options = {name: int(value) for name, value in re.findall(r"`(\w+): (\d+)`", said)}
        for mode in modes_said:
            reward = LlmJudge.model_validate(judge("http://127.0.0.1:9", mode=mode, **options))
            assert modes.REQUESTS[mode](reward, 8) == int(count)


def test_bills_add_up() -> None:
    assert Bill(1, 2, 3, 4.0) + Bill(1, 2, None, None) == Bill(2, 4, None, None)
    assert Bill(1, 2, 3, 4.0).times(3) == Bill(3, 6, 9, 12.0)
