"""Playing a world of our own by a function in place of a model, and what must hold for every such world."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlft.envs.base import Action, Env, EnvKnobs
from rlft.types import Task, Turn

SYSTEM = {"role": "system", "content": "Be short."}
Policy = Callable[[Env, str], str]

GARBAGE = (
    "", " ", "\n", "0", "-1", "9" * 5000, "+ and -", "1,2,3", "\x00\ud800", "é𝔘ß" * 50, "(((((" * 200, "mail.read(id=",
    'mail.send(to="', "a.b(c=1)", "shop.buy(id=-1)", "north" * 99, "{}", "{you.at}", "```python\nwhile True: pass\n```",
)  # fmt: skip


def task(seed: int | str = 0, **info: Any) -> Task:
    return Task("t", (SYSTEM, {"role": "user", "content": "Begin."}), {"seed": seed, **info})


@dataclass
class Episode:
    """What the world said, the opening first, and every turn."""

    heard: list[str]
    turns: list[Turn] = field(default_factory=list)

    @property
    def won(self) -> bool:
        return self.turns[-1].metrics["success"] == 1.0

    @property
    def reward(self) -> float:
        return sum(turn.reward for turn in self.turns)


def played(knobs: EnvKnobs, policy: Policy, seed: int | str = 0, **info: Any) -> Episode:
    """One episode until it is done. policy: of the environment and what it said last."""

    async def play() -> Episode:
        env = knobs.build()(task(seed, **info))
        system, opening = await env.reset()
        assert system == SYSTEM
        episode = Episode([opening["content"]])
        while not (episode.turns and episode.turns[-1].done):
            text = policy(env, episode.heard[-1])
            episode.turns.append(await env.step(Action(text, "stop")))
            episode.heard += [message["content"] for message in episode.turns[-1].messages]
        await env.close()
        return episode

    return asyncio.run(play())


def wins(knobs: EnvKnobs, policy: Policy, seeds: int) -> float:
    """The share of episodes that a policy wins."""
    return sum(played(knobs, policy, seed).won for seed in range(seeds)) / seeds


def among(*moves: str, seed: int = 0) -> Policy:
    """One of the moves, by chance."""
    chance = random.Random(seed)
    return lambda env, heard: chance.choice(moves)


def babble(moves: tuple[str, ...], seed: int = 0) -> Policy:
    """Moves, texts that are none, and random characters."""
    chance = random.Random(seed)

    def say(env: Env, heard: str) -> str:
        text = chance.choice(moves if chance.random() < 0.6 else GARBAGE)
        return text if chance.random() < 0.8 else text + "".join(map(chr, chance.choices(range(1, 0x2FF), k=30)))

    return say


def holds(knobs: EnvKnobs, moves: tuple[str, ...], seeds: int = 20, least: float = 0.0, most: float = 0.0) -> None:
    """What holds for every world: no text makes it raise, the same seed is the same episode and another one is not,
    rewards keep their bounds, an episode has no more answers than the knobs say, and they say no more than `room`.
    """
    counts: tuple[Callable[[str], int], ...] = (len, lambda text: len(text.encode()), lambda text: len(text.split()))
    rooms = [knobs.room(0, count) for count in counts]
    known = set()
    for seed in range(seeds):
        one, other = (played(knobs, babble(moves, seed), seed) for _ in range(2))
        assert one == other
        known.add((*played(knobs, among(*moves), seed).heard,))
        assert 1 <= len(one.turns) <= knobs.answers
        assert all(turn.done == (turn is one.turns[-1]) for turn in one.turns)
        assert all(turn.metrics["success"] in (0.0, 1.0) for turn in one.turns)
        assert least <= one.reward <= most
        for count, room in zip(counts, rooms, strict=True):
            assert sum(map(count, one.heard)) <= room
    assert len(known) > 1 or seeds == 1
