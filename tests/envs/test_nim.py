"""Nim: its rules against the theory, both opponents, and both sides played by one policy."""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any

import pytest

from rlft.envs.base import Action
from rlft.envs.own.nim import NimConfig
from rlft.envs.own.play import last_number
from rlft.settings import validate
from rlft.types import InputError, Turn
from tests.envs.playing import GARBAGE, SYSTEM, task


def game(seed: int, move: Any, **knobs: Any) -> tuple[list[str], list[Turn]]:
    """One episode; move: of the stones that are left."""

    async def play() -> tuple[list[str], list[Turn]]:
        env = NimConfig(**knobs).build()(task(seed))
        system, opening = await env.reset()
        assert system == SYSTEM
        shown, turns = [opening["content"]], []
        while not (turns and turns[-1].done):
            turns.append(await env.step(Action(str(move(stones(shown[-1]))), "stop")))
            if not turns[-1].done:
                assert turns[-1].rewrite
                shown.append(turns[-1].messages[-1]["content"])
        await env.close()
        return shown, turns

    return asyncio.run(play())


def stones(shown: str) -> int:
    return int(re.findall(r"There are (\d+) stones", shown)[0])


def right(left: int) -> int:
    return left % 4 or 1


def test_who_leaves_a_multiple_of_four_wins_against_the_best() -> None:
    """By the theory: the policy wins exactly where the heap that it is shown first is no multiple of 4."""
    outcomes = {}
    for seed in range(60):
        shown, turns = game(seed, right, stones=12, fewest=4, opponent="best")
        won = turns[-1].metrics["success"] == 1.0
        assert turns[-1].reward == (1.0 if won else -1.0)
        assert won == (stones(shown[0]) % 4 != 0)
        outcomes[won] = outcomes.get(won, 0) + 1
    assert min(outcomes.values()) > 5


def test_the_best_opens_right() -> None:
    """Where it begins and can, what it leaves is a multiple of 4: of 5 to 7 stones, 4."""
    shown = [stones(game(seed, right, stones=7, fewest=5, opponent="best")[0][0]) for seed in range(60)]
    assert set(shown) == {4, 5, 6, 7}
    assert 15 < shown.count(4) < 45


def test_a_game_against_itself_pays_one_what_the_other_loses() -> None:
    """Played right by both, whoever is to move at no multiple of 4 wins; roles take turns."""
    for seed in range(20):
        shown, turns = game(seed, right, stones=9, fewest=5)
        winner = 0 if stones(shown[0]) % 4 else 1
        assert turns[-1].pays == {winner: 1.0, 1 - winner: -1.0}
        assert turns[-1].metrics[f"{winner}/success"] == 1.0
        assert [turn.role for turn in turns[:-1]] == [(i + 1) % 2 for i in range(len(turns) - 1)]
        assert all(turn.reward == 0 for turn in turns)


@pytest.mark.parametrize("text", [text for text in GARBAGE if last_number(text) not in (1, 2, 3)])
def test_what_is_no_move_loses(text: str) -> None:
    _, turns = game(1, lambda left: text)
    assert turns[-1].metrics["0/malformed"] == 1.0
    assert turns[-1].pays == {1: 1.0, 0: -1.0}


def test_the_table_in_the_docs() -> None:
    """The shares that docs/envs-own.md gives, of a player that plays right and of one that moves by chance."""
    chance = random.Random(0)
    for move, least, most in ((right, 0.85, 1.0), (lambda left: chance.randint(1, min(3, left)), 0.4, 0.6)):
        won = sum(game(seed, move, opponent="random")[1][-1].metrics["success"] for seed in range(1000)) / 1000
        assert least <= won <= most


def test_a_heap_whose_fewest_is_above_its_most_is_refused() -> None:
    config = {"name": "n", "steps": 1, "model": {"path": "tiny"}, "data": {"train": {"type": "seeds"}}}
    with pytest.raises(InputError, match=r"env\.fewest: 5 is more than env\.stones=4"):
        validate({**config, "env": {"type": "nim", "stones": 4}, "algorithm": {"type": "grpo"}})
