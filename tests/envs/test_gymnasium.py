"""Worlds of Gymnasium against the library used bare."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlft.envs.base import Action
from rlft.envs.placed import placed
from rlft.envs.process import Died
from rlft.envs.worlds.gymnasium import chosen
from rlft.envs.worlds.views import KNOWN, plain
from rlft.types import InputError, Task, Turn
from tests.envs.libraries import ASKED, heard, knobs_of, played

gymnasium = pytest.importorskip("gymnasium")

MOVES = {
    "FrozenLake-v1": ("right", "down", "left", "up"),
    "CliffWalking-v1": ("up", "right", "down", "left"),
    "Taxi-v4": ("south", "pickup", "north", "dropoff"),
    "Blackjack-v1": ("hit", "stick"),
}


def bare(name: str, moves: Sequence[int], seed: int, **options: Any) -> list[tuple[Any, float, bool]]:
    """What the library says to the moves: observation, reward, whether it is over. The first is the reset's."""
    env = gymnasium.make(name, **options)
    said = [(env.reset(seed=seed)[0], 0.0, False)]
    for move in moves:
        observation, reward, ended, cut, _ = env.step(move)
        said.append((observation, float(reward), ended or cut))
        if ended or cut:
            break
    env.close()
    return said


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_same_moves_give_the_same_states_and_rewards(name: str, seed: int) -> None:
    view = KNOWN[name.partition("-")[0]]
    said = [MOVES[name][i % len(MOVES[name])] for i in range(12)]
    opening, turns = played([f"I go {word}." for word in said], seed, type="gymnasium", id=name, turns=12)
    expected = bare(name, [view.moves.index(word) for word in said], seed)
    env = gymnasium.make(name)  # to say the states by: what is drawn does not matter
    env.reset(seed=0)
    assert opening[0] == ASKED[0]
    assert opening[1]["content"].split("\n")[len(view.rules.split("\n")) : -1] == view.show(env, expected[0][0]).split(
        "\n"
    )
    for turn, (observation, reward, done) in zip(turns, expected[1:], strict=True):
        assert heard(turn) == view.show(env, observation)
        assert turn.reward == reward
        assert turn.done == (done or turn is turns[-1])
    assert turns[-1].metrics["return"] == sum(reward for _, reward, _ in expected)


def test_a_lake_without_slipping_by_hand() -> None:
    """The library's own map of 4 by 4: down, down, right, right, down, right leads round the holes to the goal."""
    way = ("down", "down", "right", "right", "down", "right")
    opening, turns = played(way, type="gymnasium", id="FrozenLake-v1", options={"is_slippery": False})
    assert opening[1]["content"].endswith(
        "PFFF\nFHFH\nFFFH\nHFFG\nAnswer with one of these moves: left (0), down (1), right (2), up (3)."
    )
    assert [heard(turn).replace("\n", "/") for turn in turns][:2] == ["SFFF/PHFH/FFFH/HFFG", "SFFF/FHFH/PFFH/HFFG"]
    assert [turn.reward for turn in turns] == [0.0] * 5 + [1.0]
    assert turns[-1].done
    assert turns[-1].metrics == {"success": 1.0, "return": 1.0, "malformed": 0.0}
    _, hole = played(("right", "down"), type="gymnasium", id="FrozenLake-v1", options={"is_slippery": False})
    assert (hole[-1].done, hole[-1].reward, hole[-1].metrics["success"]) == (True, 0.0, 0.0)


def test_the_cliff_by_hand() -> None:
    """Up, eleven times right, down: 13 steps of -1 to the goal. A step over the edge costs 100 and leads back."""
    way = ["up", *["right"] * 11, "down"]
    _, turns = played(way, type="gymnasium", id="CliffWalking-v1")
    assert turns[-1].metrics == {"success": 1.0, "return": -13.0, "malformed": 0.0}
    _, fallen = played(["right"], type="gymnasium", id="CliffWalking-v1")
    assert (heard(fallen[0]), fallen[0].reward, fallen[0].done) == ("You are in row 3, column 0.", -100.0, False)


def test_what_is_no_move_changes_nothing_and_is_told_what_is_allowed() -> None:
    lake: dict[str, Any] = {"type": "gymnasium", "id": "FrozenLake-v1", "options": {"is_slippery": False}}
    _, turns = played(["downwards", "", "4", "down"], **lake)
    assert [heard(turn) for turn in turns[:3]] == [
        "Answer with one of these moves: left (0), down (1), right (2), up (3)."
    ] * 3
    assert heard(turns[3]) == "SFFF\nPHFH\nFFFH\nHFFG"
    assert turns[3].metrics["malformed"] == 3.0
    _, few = played(["?"] * 5, turns=2, **lake)
    assert [turn.done for turn in few] == [False, True]


@pytest.mark.parametrize(
    ("text", "move"),
    [
        ("right", 2),
        ("Not left but RIGHT!", 2),
        ("2", 2),
        ("I go 2.", 2),
        ("move: down (1)", 1),
        ("-2", None),
        ("0.2", None),
        ("2.5", None),
        ("upright", None),
        ("", None),
    ],
)
def test_a_move_is_the_last_name_or_number(text: str, move: int | None) -> None:
    assert chosen(text, ("left", "down", "right", "up")) == move


def test_a_render_in_colours_as_text() -> None:
    assert plain("  (Right)\nS\x1b[41mF\x1b[0mFF\n") == "  (Right)\nS[F]FF"
    ansi = {"render_mode": "ansi", "is_slippery": False}
    _, turns = played(["right"], type="gymnasium", id="FrozenLake-v1", options=ansi)
    assert heard(turns[0]) == "  (Right)\nS[F]FF\nFHFH\nFFFH\nHFFG"


def test_a_world_of_ones_own_with_texts_and_a_function_that_says_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "echoing.py").write_text(
        "import gymnasium\n"
        "from gymnasium.spaces import Discrete, Text\n"
        "class Echo(gymnasium.Env):\n"
        "    action_space, observation_space = Text(5), Discrete(9)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        return 0, {}\n"
        "    def step(self, action):\n"
        "        return len(action), 1.0, action == 'end', False, {}\n"
        "gymnasium.register('Echo-v0', Echo, disable_env_checker=True)\n"
        "def say(env, observation):\n"
        "    return f'{type(env.unwrapped).__name__} heard {observation} letters.'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    echo: dict[str, Any] = {"type": "gymnasium", "id": "echoing:Echo-v0", "show": "echoing:say", "rules": "Talk."}
    opening, turns = played([" abc ", "much too long", "end"], **echo)
    assert opening[1]["content"] == "Talk.\nEcho heard 0 letters."
    assert [heard(turn) for turn in turns] == [
        "Echo heard 3 letters.",
        "Your answer is not a text that this world takes.",
        "Echo heard 3 letters.",
    ]
    assert [turn.reward for turn in turns] == [1.0, 0.0, 1.0]
    assert turns[-1].metrics == {"success": 1.0, "return": 2.0, "malformed": 1.0}


def test_episodes_that_run_at_once_do_not_touch_each_other() -> None:
    """Slippery ice: eight episodes in threads, move by move in turn, are those of the library one after another."""
    make = placed(knobs_of(type="gymnasium", id="FrozenLake-v1", turns=8))

    async def play(seed: int) -> list[float | str]:
        env = make(Task("row", ASKED, {"seed": seed}))
        said: list[float | str] = [(await env.reset())[-1]["content"].split("\n")[1]]
        for word in MOVES["FrozenLake-v1"] * 2:
            turn = await env.step(Action(word, "stop"))
            said += [heard(turn), turn.reward]
            if turn.done:
                break
        await env.close()
        return said

    async def all_of_them() -> list[list[float | str]]:
        return await asyncio.gather(*map(play, range(8)))

    together = asyncio.run(all_of_them())
    assert together == [asyncio.run(play(seed)) for seed in range(8)]
    assert len({str(one) for one in together}) > 1


def test_without_a_seed_the_id_decides() -> None:
    first, second = (played(["right"] * 4, None, type="gymnasium", id="FrozenLake-v1")[1] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"id": "FrozenLak-v1"}, "does not make FrozenLak-v1"),
        ({"id": "FrozenLake-v1", "options": {"size": 3}}, "unexpected keyword argument 'size'"),
        ({"id": "FrozenLake-v1", "names": ["a", "b"]}, "has 4 moves, so it needs 4 different names"),
        ({"id": "Pendulum-v1"}, "no list of moves or text"),
    ],
)
def test_bad_settings_are_refused_before_the_run(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        knobs_of(type="gymnasium", **given).build()


def test_a_crash_costs_its_own_episode() -> None:
    """Chance walks aborts at move 1, as a native library may: the process dies, and the next episode has another."""
    given: dict[str, Any] = {
        "type": "gymnasium", "id": "tests.envs.crashing:Crashing-v0", "place": "process", "processes": 1,
    }  # fmt: skip
    make = placed(knobs_of(**given))

    async def episode(*moves: str) -> list[Turn]:
        env = make(Task("row", ASKED, {"seed": 1}))
        try:
            await env.reset()
            return [await env.step(Action(move, "stop")) for move in moves]
        finally:
            await env.close()

    with pytest.raises(Died, match="SIGABRT"):
        asyncio.run(episode("0", "1"))
    assert len(asyncio.run(episode("0", "0"))) == 2
