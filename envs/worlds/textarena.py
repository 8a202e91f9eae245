"""Games of TextArena (Guertler et al. 2025, arXiv:2504.11442): alone, against an opponent, or against itself.

The library's games draw from Python's one source of chance for the whole process, so episodes at the same time would
disturb each other. Here each has a state of its own, which is put in place while the library has its turn, one episode
at a time. An observation of the library is all that the player was told so far; where it only goes on, what is new is
added to the history, and where it does not (games that show the board alone), it replaces the history.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from pydantic import Field

from rlft.envs.base import Action
from rlft.envs.custom import PATH, load
from rlft.envs.placed import Placed
from rlft.envs.worlds.base import LibraryKnobs, library, opened, said, seed_of
from rlft.types import InputError, Message, Task, Turn

CHANCE = threading.Lock()
PLAYERS = (1, 2)  # games of more are not played here
LISTED = re.compile(r"(?:available|valid|legal)[^\n]*moves?[^\n]*:((?:[^\n]*\[[^\]\n]+\])+[^\n]*)", re.IGNORECASE)
BRACKETS = re.compile(r"\[[^\]\n]+\]")

Opponent = Callable[[str, random.Random], str]


class TextArena:
    """One game. opponent: function of (observation, chance) that says a move; None: the policy plays both sides."""

    def __init__(self, task: Task, knobs: TextArenaConfig, players: int, opponent: Opponent | None) -> None:
        self._task = task
        self._knobs = knobs
        self._players = players
        self._opponent = opponent
        self._seed = seed_of(task)
        self._seat = _seat(knobs, players, opponent, self._seed)
        self._chance = random.Random(self._seed).getstate()
        self._foe = random.Random(f"opponent {self._seed}")
        self._game: Any = None
        self._turn = 0  # whose it is
        self._told = ""
        self._left = knobs.turns

    def reset(self) -> tuple[Message, ...]:
        """The rules, and what the opponent did if it opens."""
        with self._own_chance():
            self._game = _made(self._knobs)
            self._game.reset(num_players=self._players, seed=self._seed % 2**32)
            over = self._others()
        if over:
            raise RuntimeError(f"{self._knobs.id} was over before the policy's first move, with seed {self._seed}")
        return opened(self._task, self._told)

    def step(self, action: Action) -> Turn:
        """What came of the move, the opponent's included. The game itself says what is wrong with a move."""
        self._left -= 1
        before, mover = self._told, self._turn
        with self._own_chance():
            done, _ = self._game.step(action=action.text)
            done = done or self._others()
            if done:
                return self._end()
        if self._left <= 0:
            return Turn(metrics={"success": 0.0})
        role = self._turn if self._opponent is None and self._players > 1 else 0
        goes_on = mover == self._turn and self._told.startswith(before) and self._told != before
        if goes_on:
            return Turn((said(self._told[len(before) :].strip()),), done=False, role=role)
        system = tuple(message for message in self._task.messages if message["role"] == "system")
        return Turn((*system, said(self._told)), done=False, rewrite=True, role=role)

    def close(self) -> None:
        """Nothing is held."""

    def _others(self) -> bool:
        """The opponent's moves until it is the policy's turn; whether the game is over."""
        while True:
            self._turn, observation = self._game.get_observation()
            self._told = str(observation).strip() if self._mine() else self._told
            if self._mine():
                return False
            assert self._opponent is not None
            done, _ = self._game.step(action=self._opponent(str(observation), self._foe))
            if done:
                return True

    def _mine(self) -> bool:
        return self._opponent is None or self._turn == self._seat

    def _end(self) -> Turn:
        """The game's own rewards: the policy's; where it plays both sides, each side its own."""
        rewards, infos = self._game.close()
        rewards = {player: float(paid) for player, paid in (rewards or {}).items()}
        both = {f"player_{player}": paid for player, paid in rewards.items()} if self._players > 1 else {}
        if self._opponent is None and self._players > 1:
            own = {f"{i}/{name}": x for i in rewards for name, x in _result(i, rewards, infos).items()}
            return Turn(pays=rewards, metrics=own | both)
        return Turn(reward=rewards.get(self._seat, 0.0), metrics=_result(self._seat, rewards, infos) | both)

    @contextmanager
    def _own_chance(self) -> Iterator[None]:
        """Python's source of chance is this episode's."""
        with CHANCE:
            others = random.getstate()
            random.setstate(self._chance)
            try:
                yield
            finally:
                self._chance = random.getstate()
                random.setstate(others)


class TextArenaConfig(LibraryKnobs, Placed):
    """A game of TextArena for one or two players."""

    type: Literal["textarena"] = "textarena"
    id: str = Field(min_length=1, description="as textarena.make takes it, such as TicTacToe-v0 or Wordle-v0")
    options: dict[str, Any] = Field(default_factory=dict, description="keywords of textarena.make")
    opponent: str = Field(
        default="random",
        pattern=rf"^(random|policy)$|{PATH}",
        description="in games for two: random (one of the moves that the game lists), policy (plays both sides), or "
        "module:function of (observation, random.Random) that says a move",
    )
    seat: Literal["first", "second", "either"] = Field(
        default="either", description="which player the policy is, if not both; either: by the seed, even is first"
    )

    @property
    def speaking(self) -> int:
        return 2 if self.opponent == "policy" else 1

    @property
    def rivals(self) -> bool:
        return self.speaking > 1

    def build(self) -> Callable[[Task], Any]:
        players = _players(self)
        opponent = {"random": one_of_the_listed, "policy": None}.get(self.opponent, ...)
        if opponent is ...:
            opponent = load(self.opponent, "env.opponent")
        return partial(TextArena, knobs=self, players=players, opponent=opponent if players > 1 else None)


def one_of_the_listed(observation: str, chance: random.Random) -> str:
    """One of the moves that the game lists last; where it lists none, one of all that stands in brackets."""
    listed = LISTED.findall(observation)
    moves = BRACKETS.findall(listed[-1] if listed else observation)
    moves = [move for move in moves if not re.match(r"\[(?:GAME|Player \d)", move)] or ["[0]"]
    return chance.choice(moves)


def _result(player: int, rewards: Mapping[int, float], infos: Any) -> dict[str, float]:
    """Whether a player has won, and whether the game ended with a move of theirs that was none."""
    won = rewards.get(player, 0.0) > 0 and rewards[player] >= max(rewards.values())
    return {"success": float(won), "invalid": float(bool(infos[player].get("invalid_move")))}


def _seat(knobs: TextArenaConfig, players: int, opponent: Opponent | None, seed: int) -> int:
    if players == 1 or opponent is None:
        return 0
    return {"first": 0, "second": 1, "either": seed % 2}[knobs.seat]


def _made(knobs: TextArenaConfig) -> Any:
    try:
        return library("textarena", "textarena").make(knobs.id, **knobs.options)
    except Exception as error:  # each game has its own ways to refuse
        raise InputError(
            f"env: textarena does not make {knobs.id} with {knobs.options}: {type(error).__name__}: {error}"
        ) from error


def _players(knobs: TextArenaConfig) -> int:
    """How many play the game, found by beginning one. Raises InputError where it is neither one nor two."""
    reasons = []
    with CHANCE:
        before = random.getstate()
        try:
            for count in PLAYERS:
                try:
                    _made(knobs).reset(num_players=count, seed=0)
                    return count
                except InputError:
                    raise
                except Exception as error:  # an assertion where the number is wrong
                    reasons.append(f"{count}: {type(error).__name__}: {error}")
        finally:
            random.setstate(before)
    raise InputError(f"env.id: {knobs.id} does not begin with one or two players ({'; '.join(reasons)})")
