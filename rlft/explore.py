"""Going on from a place in an answer: what the policy would say from there, for rewards that ask how likely it is to
succeed (see `rlft.rewards.progress`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rlft.episode import append, opened
from rlft.player import Player, derive_seed
from rlft.types import NAN, Trajectory, exploring


class Continuations:
    """Plays on from inside the last answer of an episode. An `Explorer`, see types. seed: of all that is drawn."""

    def __init__(self, player: Player, seed: int = 0) -> None:
        self._player = player
        self._seed = seed

    def ends(self, trajectory: Trajectory, blocks: int) -> tuple[int, list[int]]:
        """Where the last answer begins among its sample's tokens, and where each of at most `blocks` blocks ends.

        Blocks are of nearly the same length; an end moves on to the next line end, if there is one within half a block.
        """
        start = _begins(trajectory)
        said = trajectory.samples[-1].tokens[start : trajectory.turns[-1].end + 1]
        size = max(1, -(-len(said) // blocks))
        lines = [i + 1 for i, token in enumerate(said) if "\n" in self._player.chat.decode([token])]
        found = []
        for even in range(size, len(said), size):
            near = next((line for line in lines if even <= line < min(even + size / 2, len(said))), even)
            found.append(start + near)
        return start, [*found, start + len(said)]

    async def go_on(self, trajectory: Trajectory, end: int, text: str, count: int, most: int) -> list[Trajectory]:
        """`count` answers that begin as the last one up to token `end`, then say `text`, then what the policy says.

        most: how many tokens of its own. Each draws from a seed of its place, so that nothing depends on the order.
        Fewer than `count`, none, where there is no room for a token.
        """
        chat, sampling = self._player.chat, self._player.sampling
        sample = trajectory.samples[-1]
        start = _begins(trajectory)
        forced = chat.encode(text)
        begun = sample.tokens[:end] + forced
        room = min(most, self._player.context - len(begun))
        if room < 1:
            return []

        async def one(number: int) -> Trajectory:
            seed = derive_seed(self._seed, "go on", trajectory.task.id, *begun, number)
            drawn = await self._player.engine.generate(
                begun, replace(sampling, seed=seed, max_tokens=room, agent=sample.agent)
            )
            said = opened(sample.tokens[:start], sample.agent)
            append(said, sample.tokens[start:end], [NAN] * (end - start))
            append(said, forced, None)
            append(said, drawn.tokens, drawn.logprobs)
            messages = (*trajectory.messages[:-1], {"role": "assistant", "content": chat.decode(said.tokens[start:])})
            return Trajectory(trajectory.task, messages, [said], finish=drawn.finish, sampled=len(drawn.tokens))

        return list(await asyncio.gather(*map(one, range(count))))


def _begins(trajectory: Trajectory) -> int:
    """The first token of the last answer in its sample."""
    start, mask = trajectory.turns[-1].end, trajectory.samples[-1].mask
    while start and mask[start - 1]:
        start -= 1
    return start


@contextmanager
def explorable(player: Player, seed: int) -> Iterator[None]:
    """Rewards that judge inside may let the policy go on. seed: of the step."""
    before = exploring.set(Continuations(player, seed))
    try:
        yield
    finally:
        exploring.reset(before)
