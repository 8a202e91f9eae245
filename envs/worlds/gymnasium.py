"""Worlds of Gymnasium (Towers et al. 2024, arXiv:2407.17032) whose state can be said and whose moves can be named.

The library's environment is reset with the task's seed and stepped with the moves that the answers name, nothing else:
the same moves give the same states and rewards as without rlft. What cannot be read as a move is not given to it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from pydantic import Field

from rlft.envs.base import Action
from rlft.envs.custom import PATH, load
from rlft.envs.placed import Placed
from rlft.envs.worlds.base import LibraryKnobs, library, opened, said, seed_of
from rlft.envs.worlds.views import KNOWN, plain
from rlft.types import InputError, Message, Task, Turn

Show = Callable[[Any, Any], str]


class Gymnasium:
    """One episode. show: function of (the library's environment, observation) that says the state."""

    def __init__(self, task: Task, knobs: GymnasiumConfig, show: Show) -> None:
        self._task = task
        self._knobs = knobs
        self._show = show
        self._env = _made(knobs)
        self._names = _names(knobs, self._env)
        self._left = knobs.turns
        self._total = 0.0
        self._malformed = 0

    def reset(self) -> tuple[Message, ...]:
        """The rules, the first state and the moves."""
        observation, _ = self._env.reset(seed=seed_of(self._task))
        parts = (rules_of(self._knobs), self._show(self._env, observation), _asking(self._names))
        return opened(self._task, "\n".join(part for part in parts if part))

    def step(self, action: Action) -> Turn:
        """The next state. An answer that names no move is told which there are, and changes nothing."""
        self._left -= 1
        move = self._move(action.text)
        if move is None:
            self._malformed += 1
            told = _asking(self._names) or "Your answer is not a text that this world takes."
            return Turn((said(told),), done=self._left <= 0, metrics=self._metrics(False))
        observation, paid, ended, cut, _ = self._env.step(move)
        reward = float(paid)
        self._total += reward
        won = bool(ended) and (won_by(self._knobs) == "ending" or reward > 0)
        done = bool(ended or cut) or self._left <= 0
        return Turn((said(self._show(self._env, observation)),), reward, done, metrics=self._metrics(won))

    def close(self) -> None:
        """Let go of the library's environment."""
        self._env.close()

    def _move(self, text: str) -> Any:
        """The move that an answer names, None where it names none."""
        space = self._env.action_space
        if self._names:
            found = chosen(text, self._names)
            return None if found is None else int(getattr(space, "start", 0)) + found
        return text.strip() if space.contains(text.strip()) else None

    def _metrics(self, won: bool) -> dict[str, float]:
        return {"success": float(won), "return": self._total, "malformed": float(self._malformed)}


class GymnasiumConfig(LibraryKnobs, Placed):
    """A Gymnasium environment with text: FrozenLake, Taxi, CliffWalking, Blackjack, or one whose state you say."""

    type: Literal["gymnasium"] = "gymnasium"
    id: str = Field(min_length=1, description="as gymnasium.make takes it; module:Name-v0 imports the module first")
    options: dict[str, Any] = Field(default_factory=dict, description="keywords of gymnasium.make")
    show: str | None = Field(
        default=None,
        pattern=PATH,
        description="module:function of (environment, observation) that says the state; none: rlft's own words for the "
        "toy texts, the render with render_mode ansi, else the observation as it is",
    )
    names: list[str] = Field(default_factory=list, description="the moves' names, in their order; none: numbers")
    rules: str | None = Field(default=None, description="said first; none: rlft's own for the toy texts, else nothing")
    won: Literal["ending", "paid"] | None = Field(
        default=None,
        description="what success is: that the episode ended by itself, or that its last move paid more than 0; none: "
        "ending for Taxi and CliffWalking, else paid",
    )

    def build(self) -> Callable[[Task], Any]:
        env = _made(self)
        try:
            names = _names(self, env)
            text = type(env.action_space).__name__ == "Text"
            if not names and not text:
                raise InputError(f"env.id: the moves of {self.id} are {env.action_space}, and no list of moves or text")
        finally:
            env.close()
        return partial(Gymnasium, knobs=self, show=load(self.show, "env.show") if self.show else _show(self))


def chosen(text: str, names: Sequence[str]) -> int | None:
    """The move whose name or number stands last in a text, as a word of its own."""
    by = {name.casefold(): i for i, name in enumerate(names)} | {str(i): i for i in range(len(names))}
    words = "|".join(re.escape(word) for word in sorted(by, key=len, reverse=True))
    found = re.findall(rf"(?<![\w.\-])(?:{words})(?!\w|[.,]\d)", text.casefold())
    return by[found[-1]] if found else None


def rules_of(knobs: GymnasiumConfig) -> str:
    """What is said first."""
    known = KNOWN.get(_family(knobs))
    return knobs.rules if knobs.rules is not None else known.rules if known else ""


def won_by(knobs: GymnasiumConfig) -> str:
    """What counts as success."""
    known = KNOWN.get(_family(knobs))
    return knobs.won or (known.won if known else "paid")


def _family(knobs: GymnasiumConfig) -> str:
    """FrozenLake for FrozenLake-v1 and FrozenLake8x8-v1."""
    return re.split(r"8x8|Slippery|Rainy|-v\d", knobs.id)[0]


def _made(knobs: GymnasiumConfig) -> Any:
    gymnasium = library("gymnasium", "gymnasium")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of newer versions of an id, once for every episode
            return gymnasium.make(knobs.id, **knobs.options)
    except Exception as error:  # each environment has its own ways to refuse
        raise InputError(
            f"env: gymnasium does not make {knobs.id} with {knobs.options}: {type(error).__name__}: {error}"
        ) from error


def _names(knobs: GymnasiumConfig, env: Any) -> tuple[str, ...]:
    """The moves' names; empty where moves are no numbers. Raises InputError where they are more or fewer."""
    count = getattr(env.action_space, "n", None)
    if count is None or type(env.action_space).__name__ != "Discrete":
        return ()
    known = KNOWN.get(_family(knobs))
    names = tuple(knobs.names) or (known.moves if known else tuple(map(str, range(int(count)))))
    if len(names) != count or len({name.casefold() for name in names}) != count:
        raise InputError(f"env.names: {knobs.id} has {count} moves, so it needs {count} different names")
    return names


def _show(knobs: GymnasiumConfig) -> Show:
    if knobs.options.get("render_mode") == "ansi":
        return lambda env, _: plain(env.render())
    known = KNOWN.get(_family(knobs))
    return known.show if known else lambda _, observation: _text(observation)


def _text(observation: Any) -> str:
    """An observation as it is: text, numbers, and lists and mappings of them."""
    if isinstance(observation, Mapping):
        return "\n".join(f"{key}: {_text(value)}" for key, value in observation.items())
    if isinstance(observation, tuple):
        return ", ".join(map(_text, observation))
    return str(observation.tolist() if hasattr(observation, "tolist") else observation)


def _asking(names: Sequence[str]) -> str:
    """Which moves there are."""
    shown = (name if name == str(i) else f"{name} ({i})" for i, name in enumerate(names))
    return f"Answer with one of these moves: {', '.join(shown)}." if names else ""
