"""What holds for every world of our own, whatever is said to it, and how they stand in the engine's hands."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as checked
from hypothesis import strategies as st
from rich.console import Console

from rlft.envs import catalog
from rlft.envs.base import Action
from rlft.envs.own.apps.world import AppsConfig
from rlft.envs.own.blackjack import BlackjackConfig
from rlft.envs.own.bulls import BullsConfig
from rlft.envs.own.guess import GuessConfig
from rlft.envs.own.numberline import NumberLineConfig
from rlft.envs.own.play import WorldKnobs
from rlft.envs.own.rules import RulesConfig
from rlft.envs.own.traces import TracesConfig
from rlft.envs.own.walk import WalkConfig
from rlft.session import begin
from rlft.settings import validate
from rlft.terminal import Terminal
from tests.envs.playing import SYSTEM, task

WORLDS: tuple[WorldKnobs, ...] = (
    GuessConfig(),
    BullsConfig(),
    WalkConfig(),
    NumberLineConfig(),
    BlackjackConfig(),
    TracesConfig(draft="dynamic"),
    RulesConfig(path="configs/data/worlds/study.yaml"),
    AppsConfig(level=3),
)
WORD = st.sampled_from([
    "12", "123", "-5", "0", "99999", "north", "east", "+", "-", "hit", "stand", "go", "to", "kitchen", "take", "the",
    "key", "lamp", "light", "unlock", "oak_door", "Action:",
])  # fmt: skip
CALL = st.from_regex(
    r"(mail|files|shop|calendar|payments|apis)\.(list|read|send|add|pay|buy|done|help|write|move)"
    r"""\((([a-z]{2,6}=)?("[a-z\\ ]{0,9}"|-?[0-9]{1,3})(, ?)?){0,4}\)""",
    fullmatch=True,
)
SAID = st.lists(st.one_of(st.text(max_size=40), st.lists(WORD, max_size=6).map(" ".join), CALL), max_size=25)


def replied(knobs: WorldKnobs, seed: int, said: list[str]) -> list[Any]:
    """The opening, and the turns until it is done or all is said."""

    async def play() -> list[Any]:
        env = knobs.build()(task(seed))
        found: list[Any] = [(await env.reset())[1]["content"]]
        for text in said:
            if len(found) == 1 or not found[-1].done:
                found.append(await env.step(Action(text, "stop")))
        await env.close()
        return found

    return asyncio.run(play())


@pytest.mark.parametrize("knobs", WORLDS, ids=[knobs.type for knobs in WORLDS])  # type: ignore[attr-defined]
def test_no_text_breaks_a_world(knobs: WorldKnobs) -> None:
    room = knobs.room(0, len)

    @checked(max_examples=60, deadline=None)
    @given(seed=st.integers(0, 5), said=SAID)
    def holds(seed: int, said: list[str]) -> None:
        opening, *turns = replied(knobs, seed, said)
        assert [opening, *turns] == replied(knobs, seed, said)
        assert len(turns) <= knobs.answers
        assert all(math.isfinite(value) for turn in turns for value in (turn.reward, *turn.metrics.values()))
        assert all(-1 <= turn.reward <= 1 for turn in turns)
        heard = [message["content"] for turn in turns for message in turn.messages]
        assert all(text.strip() for text in heard)
        assert len(opening) + sum(map(len, heard)) <= room
        if len(turns) < len(said) or len(turns) == knobs.answers:
            assert turns[-1].done

    holds()


def test_every_world_is_in_the_catalog() -> None:
    own = {name for name, kind in catalog.entries().items() if issubclass(kind, WorldKnobs)}
    assert own == {knobs.type for knobs in WORLDS}  # type: ignore[attr-defined]


@pytest.mark.parametrize("knobs", WORLDS, ids=[knobs.type for knobs in WORLDS])  # type: ignore[attr-defined]
def test_the_engine_plays_it(knobs: WorldKnobs, play: Callable[..., Any]) -> None:
    """A tiny random model says nothing that wins, and the episode is whole all the same."""
    trajectory = play(knobs.build(), task(3), 0, tokens=20, context=20_000).trajectory
    assert trajectory.messages[0] == SYSTEM
    assert trajectory.metrics["env/success"] in (0.0, 1.0)
    assert trajectory.failures == []
    assert 1 <= len(trajectory.turns) <= knobs.answers


def test_the_row_without_a_seed_is_played_by_its_id() -> None:
    async def opening(info: dict[str, Any]) -> str:
        one = task()
        env = WalkConfig().build()(type(one)("row-7", one.messages, info))
        return (await env.reset())[-1]["content"]

    assert asyncio.run(opening({})) == asyncio.run(opening({"seed": "row-7"}))
    assert asyncio.run(opening({})) != asyncio.run(opening({"seed": 1}))


def test_a_run_logs_what_the_world_reports(tiny_model: Path, tmp_path: Path) -> None:
    config = validate({
        "name": "guess", "steps": 1, "out": str(tmp_path / "run"), "model": {"path": str(tiny_model), "device": "cpu"},
        "data": {"train": {"type": "seeds", "count": 8}, "eval": {"type": "seeds", "count": 4}},
        "env": {"type": "guess", "highest": 9, "turns": 3}, "reward": {"type": "outcome"},
        "algorithm": {"type": "grpo"}, "eval": {"accuracy": "outcome"},
        "rollout": {
            "engine": {"type": "local"}, "tasks_per_step": 2, "group_size": 2,
            "sampling": {"max_tokens": 12, "stop": list("aeiounrst")},
        },
    })  # fmt: skip
    assert begin(config, Terminal(Console(quiet=True))) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = next(line for line in lines if "env/malformed" in line and "loss/total" in line)
    assert trained["env/success"] == trained["reward/outcome"]
    assert 0 <= trained["env/malformed"] <= 3
    assert lines[0]["eval/accuracy"] == lines[0]["eval/outcome"]
