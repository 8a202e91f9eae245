"""Games of TextArena against the library used bare."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlft.envs.base import Action
from rlft.envs.placed import placed
from rlft.envs.worlds.textarena import one_of_the_listed
from rlft.types import InputError, Task, Turn
from tests.envs.libraries import ASKED, heard, knobs_of, played

ta = pytest.importorskip("textarena")

Move = Callable[[str], str]


def bare(name: str, players: int, seed: int, move: Move) -> tuple[list[tuple[int, str]], dict[int, float], Any]:
    """Every observation with whose it is, the rewards and the infos, of a game played with the library alone."""
    env = ta.make(name)
    env.reset(num_players=players, seed=seed)
    told, done = [], False
    while not done:
        told.append(env.get_observation())
        done, _ = env.step(action=move(told[-1][1]))
    rewards, infos = env.close()
    return told, rewards, infos


def said_by(turns: list[Turn], opening: str) -> list[str]:
    """What a player had been told at each of its turns: what goes on is added, what is rewritten replaces it."""
    told = [opening]
    for turn in turns[:-1]:
        told.append(heard(turn) if turn.rewrite else f"{told[-1]}\n{heard(turn)}")
    return told


@pytest.mark.parametrize(
    ("name", "turns"), [("GuessTheNumber-v0", 12), ("FrozenLake-v0-train", 6), ("LightsOut-v0", 4)]
)
def test_a_game_for_one_is_the_librarys(name: str, turns: int) -> None:
    """Random moves, some of which are none: the same texts and rewards, to the end."""
    moves = ["[up]", "[right]", "[7]", "[12]", "[15]", "no move", "[1 1]", "[down]", "[3]"]
    said = [random.Random(f"{name} {i}").choice(moves) for i in range(turns)] + ["no move"] * 3
    left = iter(said)
    told, rewards, infos = bare(name, 1, 5, lambda _: next(left))
    opening, replies = played(said, 5, type="textarena", id=name, turns=40)
    assert replies[-1].done
    assert len(replies) == len(told)
    without_system = [
        Turn(tuple(m for m in turn.messages if m["role"] == "user"), rewrite=turn.rewrite) for turn in replies
    ]
    mine = said_by(without_system, opening[1]["content"])
    assert [text.split() for text in mine] == [text.split() for _, text in told]
    assert replies[-1].reward == rewards[0]
    assert replies[-1].metrics["invalid"] == float(infos[0]["invalid_move"])


def test_what_is_no_move_is_answered_by_the_game_itself() -> None:
    _, turns = played(["seven", "seven"], type="textarena", id="GuessTheNumber-v0")
    assert "You attempted an invalid move. Reason: " in heard(turns[0])
    assert not turns[0].rewrite
    assert (turns[1].done, turns[1].metrics["invalid"], turns[1].metrics["success"]) == (True, 1.0, 0.0)


@pytest.mark.parametrize("seat", [0, 1])
@pytest.mark.parametrize("name", ["TicTacToe-v0", "ConnectFour-v0", "KuhnPoker-v0"])
def test_a_game_against_the_random_opponent_is_the_librarys(name: str, seat: int) -> None:
    """The policy plays random moves too. Bare, the library asks both in turn; the states are the same."""
    seed = 10 + seat
    mine, foe = random.Random("mine"), random.Random(f"opponent {seed}")
    answers: list[str] = []

    def move(observation: str, player: int) -> str:
        said = one_of_the_listed(observation, mine if player == seat else foe)
        if player == seat:
            answers.append(said)
        return said

    env = ta.make(name)
    env.reset(num_players=2, seed=seed)
    told, done = [], False
    while not done:
        player, observation = env.get_observation()
        if player == seat:
            told.append(observation)
        done, _ = env.step(action=move(observation, player))
    rewards, _ = env.close()

    opening, turns = played(answers, seed, type="textarena", id=name, turns=60)
    assert [text.split() for text in said_by(turns, opening[1]["content"])] == [text.split() for text in told]
    assert turns[-1].reward == rewards[seat]
    assert turns[-1].metrics["player_1"] == rewards[1]
    assert turns[-1].metrics["success"] == float(rewards[seat] > 0)


def test_tic_tac_toe_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An opponent that fills 0, 1, 3 in turn loses against 2, 4, 6, a diagonal, also where it begins."""
    (tmp_path / "fixed.py").write_text(
        "def row(observation, chance):\n"
        "    return next(f'[{i}]' for i in (0, 1, 3) if f\"'[{i}]'\" in observation.split('Available')[-1])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    game: dict[str, Any] = {"type": "textarena", "id": "TicTacToe-v0", "opponent": "fixed:row"}
    _, turns = played(["[2]", "[4]", "[6]"], **game, seat="first")
    assert turns[-1].reward == 1.0
    assert turns[-1].metrics == {"success": 1.0, "invalid": 0.0, "player_0": 1.0, "player_1": -1.0}
    _, turns = played(["[2]", "[4]", "[6]"], **game, seat="second")
    assert turns[-1].metrics == {"success": 1.0, "invalid": 0.0, "player_0": -1.0, "player_1": 1.0}


def test_the_policy_plays_both_sides() -> None:
    """Each sees its own observation as a whole; the roles alternate, and a game of winner and loser pays 0 in sum."""
    opening, turns = played(["[0]", "[3]", "[1]", "[4]", "[2]"], type="textarena", id="TicTacToe-v0", opponent="policy")
    assert "You are Player 0" in opening[1]["content"]
    assert [turn.role for turn in turns] == [1, 0, 1, 0, 0]
    assert all(turn.rewrite and turn.messages[0] == ASKED[0] for turn in turns[:-1])
    assert "You are Player 1" in heard(turns[0])
    assert turns[-1].reward == 0.0
    assert turns[-1].metrics["player_0"] == 1.0
    assert knobs_of(type="textarena", id="TicTacToe-v0", opponent="policy").speaking == 2


def test_a_players_wrong_move_leaves_it_the_turn() -> None:
    """Also the second player's, who goes on in its own history."""
    _, turns = played(["[4]", "no move", "[0]"], type="textarena", id="TicTacToe-v0", opponent="policy", turns=3)
    assert [(turn.role, turn.rewrite) for turn in turns[:2]] == [(1, True), (1, False)]
    assert "invalid" in heard(turns[1])


def test_episodes_that_run_at_once_do_not_share_their_chance() -> None:
    """2048 draws a tile with every move, from the process's source of chance; here eight games take turns."""
    make = placed(knobs_of(type="textarena", id="2048-v0"))
    moves = ("[up]", "[left]", "[down]", "[right]", "[up]")

    async def play(seed: int) -> list[str]:
        env = make(Task("row", ASKED, {"seed": seed}))
        said = [(await env.reset())[1]["content"]]
        for move in moves:
            said.append(heard(await env.step(Action(move, "stop"))))
        await env.close()
        return said

    async def at_once() -> list[list[str]]:
        return await asyncio.gather(*map(play, range(8)))

    random.seed(1)
    before = random.getstate()
    together = asyncio.run(at_once())
    assert random.getstate() == before
    env = ta.make("2048-v0")
    for seed in (0, 7):
        env.reset(num_players=1, seed=seed)
        told = [env.get_observation()[1]]
        for move in moves:
            env.step(action=move)
            told.append(env.get_observation()[1])
        assert "\n".join(together[seed]).split() == told[-1].split()
        env = ta.make("2048-v0")
    assert len({str(one) for one in together}) == 8


def test_turns_end() -> None:
    _, turns = played(["[1]", "[2]"], type="textarena", id="GuessTheNumber-v0", turns=2)
    assert [turn.done for turn in turns] == [False, True]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("TicTac-v0", "does not make TicTac-v0"),
        ("SecretMafia-v0", "does not begin with one or two players"),
    ],
)
def test_games_that_cannot_be_played_are_refused_before_the_run(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        knobs_of(type="textarena", id=name).build()
