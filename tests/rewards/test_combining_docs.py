"""What docs/rewards-combining.md and docs/rewards-shaping.md show must work, with the values that they name."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from benchmarks.length_rewards import draw
from rlft.rewards.catalog import RewardConfig
from rlft.settings import validate
from rlft.types import InputError, Task, Trajectory, at_step

DOCS = Path(__file__).parents[2] / "docs"
COMBINING, SHAPING = ((DOCS / f"rewards-{name}.md").read_text() for name in ("combining", "shaping"))
GATED, SEQUENCE, FIRST, ROUTED, SCHEDULED, NORMALISED = (
    yaml.safe_load(block)["reward"] for block in re.findall(r"```yaml\n(.*?)```", COMBINING, re.S)
)
COSINE, WARM, EXACT, MOST, LAYOUT, LANGUAGE, APART = (
    yaml.safe_load(block)["reward"] for block in re.findall(r"```yaml\n(.*?)```", SHAPING, re.S)
)
WHOLE = "<think>7+5</think><answer>{}</answer>"


def scores(plain: dict[str, Any], *group: Trajectory, step: int = 0) -> list[float | None]:
    reward: Any = TypeAdapter(RewardConfig).validate_python(plain)
    with at_step(step):
        return list(asyncio.run(reward.build()(group)))


def test_the_gate(play):
    texts = (WHOLE.format(12), WHOLE.format(13), "12", "<think>7+5 is 12")
    assert scores(GATED, *(play(text, answer=12) for text in texts)) == [1.0, 0.0, -0.5, -0.5]


def test_the_sequence(play):
    texts = (WHOLE.format(12), WHOLE.format(13), "<think>7+5</think><answer>12")
    group = [play(text, chosen=10, answer=12) for text in texts]
    assert scores(SEQUENCE, *group) == pytest.approx([1.35, 0.2, 0.12])
    assert "reward/right" not in group[2].metrics
    reward: Any = TypeAdapter(RewardConfig).validate_python(SEQUENCE)
    assert reward.components()[0] == "short"


def test_the_fall_back(play):
    """math-verify works on the tower of powers until its time is over; the last number in it is a 9."""
    one = play("So it is 12", answer="12")
    assert scores(FIRST, one) == [1.0]
    slow = {**FIRST, "terms": {**FIRST["terms"], "math": {"type": "math", "seconds": 0.3}}}
    late = play("$9^{9^{9^9}}$", answer="9")
    assert scores(slow, late) == [0.5]
    assert late.metrics["reward/first/math/asked"] == late.metrics["reward/first/number/asked"] == 1.0


def test_the_routes(play):
    for source, gold, said, value in (
        ("openai/gsm8k", 12, "It is 12.", 1.0),
        ("mmlu", "B", "b", 1.0),
        ("number", 12, "13", 0.0),
    ):
        assert scores(ROUTED, play(said, answer=gold, source=source)) == [value]
    with pytest.raises(InputError, match="'tables', which names no term"):
        scores(ROUTED, play("x", answer="x", source="tables"))


@pytest.mark.parametrize(("step", "layout", "short"), [
    (0, 0.5, 0.0), (25, 0.25, 0.0), (50, 0.0, 0.0), (100, 0.0, 0.0), (150, 0.0, 0.1), (200, 0.0, 0.2), (900, 0.0, 0.2),
])  # fmt: skip
def test_the_schedule(play, step, layout, short):
    one = play(WHOLE.format(12), chosen=32, answer=12)
    assert scores(SCHEDULED, one, step=step) == [pytest.approx(1 + layout + short / 2)]


def test_the_objectives_on_their_own_scales(play):
    group = [play(text, chosen=n, answer=12) for text, n in (("12", 10), ("12", 40), ("13", 70), ("13", 100))]
    assert scores(NORMALISED, *group) == pytest.approx([1.447, 1.059, -1.059, -1.447], abs=5e-4)
    assert [t.metrics["reward/short"] for t in group] == pytest.approx([0.9, 0.6, 0.3, 0.0])
    assert scores(NORMALISED, play("12", chosen=10, answer=12)) == [pytest.approx(1.45)]


def test_the_lengths(play):
    right, wrong = ([play(text, chosen=n, answer="12") for n in (0, 500, 999, 1000)] for text in ("12", "13"))
    assert scores(COSINE, *right) == pytest.approx([2.0, 1.5, 1.0, -1.0], abs=1e-4)
    assert scores(COSINE, *wrong) == pytest.approx([-1.0, -0.5, 0.0, -1.0], abs=1e-4)
    group = [play("12", chosen=n, answer=12) for n in (10, 20)]
    assert scores(WARM, *group, step=50) == [1.0, 1.0]
    assert scores(WARM, *group, step=100) == [1.25, 0.75]


def test_the_budget(play):
    """20 tokens for 40 characters, 20 of them thinking: 10 tokens."""
    text = "<think>" + "x" * 20 + "</think>So:12"
    assert len(text) == 40
    right, wrong = (play(text, chosen=20, answer=gold) for gold in (12, 13))
    assert scores(EXACT, right) + scores(EXACT, wrong) == pytest.approx([1 - 0.0003 * 190, -0.0003 * 190])
    assert scores(MOST, right) + scores(MOST, wrong) == pytest.approx([0.0003 * 190 + 0.5, 0.0])


def test_the_layout(play):
    layout, loops = ({**LAYOUT["terms"][name], "weight": 1.0} for name in ("layout", "loops"))
    assert scores(layout, play("<think>a</think><answer>b")) == [0.6]
    assert scores(layout, play("<think></think><answer></answer>")) == [0.8]
    words = {**loops, "n": 2, "unit": "words"}
    assert scores(words, play("1 2 1 2")) == [pytest.approx(-1 / 3)]
    assert scores(LAYOUT, play(WHOLE.format(12), answer=12)) == [pytest.approx(1.2)]


def test_the_language(play):
    one = play("The answer 答案 is", answer=12)
    scores(LANGUAGE, one)
    assert one.metrics["reward/language"] == pytest.approx(0.846, abs=5e-4)


def test_the_language_of_each_part(play):
    (shown,) = re.findall(r"`(<think>Zwei.*?)`", SHAPING)
    one = play(shown, answer=5, language="de")
    for says, asked in (("Was ist 2+3, bitte?", 19 / 36), ("What is the sum of two and three?", 17 / 36)):
        one.task = Task("t", ({"role": "user", "content": says},), one.task.info)
        scores(APART, one)
        assert one.metrics["reward/thinks"] == pytest.approx(asked)
        assert one.metrics["reward/says"] == 1.0
    assert f": {19 / 36:.3f}." in SHAPING
    two = play("<think>Es sind fünf.</think> 5", answer=5, language="fr")
    assert scores(APART, two)
    assert two.metrics["reward/says"] == 1.0, "which APART gives to what has no letter"


def test_what_is_logged_is_what_the_pages_say(play):
    configs = [
        {**COSINE, "of": {"type": "number"}},
        {"type": "relative_length", "of": {"type": "number"}},
        {"type": "overlong", "limit": 4, "margin": 2},
        {"type": "script"},
        {"type": "language", "language": "en", "value": "share"},
        MOST["of"],
        LAYOUT["terms"]["layout"],
        LAYOUT["terms"]["loops"],
    ]
    shown = set(re.findall(r"`(reward/[\w/]+)`", SHAPING.partition("## What is logged")[2]))
    found = set()
    for config in configs:
        one = play("It is 12", answer="12")
        scores(config, one)
        found |= {key for key in one.metrics if key != "reward/missing" and key != f"reward/{config['type']}"}
    assert found == shown


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", COMBINING + SHAPING, re.S))
def test_a_run_accepts_each_example(block):
    around = {
        "name": "example", "steps": 1, "model": {"path": "smollm2-135m-q4"}, "data": {"train": {"type": "generated"}},
        "algorithm": {"type": "grpo"},
    }  # fmt: skip
    validate({**around, **yaml.safe_load(block)})


def test_the_picture_can_be_drawn_again(tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").stat().st_size > 10_000
