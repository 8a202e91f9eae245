"""Progress: what every block of an answer does to the chance of success.

Meta reinforcement fine-tuning (Qu et al. 2025, arXiv:2503.07572) asks of each block of a reasoning whether it has
brought the answer nearer. J(k), the chance of success after k blocks, is estimated by letting the policy answer at once
from there, a few times; what a block gains, J(k) - J(k - 1), is paid where the block ends. After the last block
nothing is estimated: J is the verdict itself. The gains add up to the verdict less J(0), and the score is lower by what
was paid, so that an answer's total is its verdict: credit moves between blocks, and no length is favoured.

The paper's RL samples only the next block from a given prefix and pays its gain; here all blocks of a whole answer are
paid, and an algorithm that credits tokens by what is still to come (`ppo`, or `to_go` of the others) tells them apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise

from rlft.rewards.base import pay
from rlft.types import Explorer, Group, Reward, Trajectory, exploring

Asked = dict[tuple[int, ...], "asyncio.Future[tuple[float | None, int]]"]  # by what was said so far


def by_block(
    inner: Reward, name: str, weight: float, blocks: int, samples: int, tokens: int, force: str, scale: float
) -> Reward:
    """The verdicts of `inner`, with `scale` times `weight` times each block's gain paid where the block ends.

    Where nothing can be sampled (evaluation, audit, a recorded run judged again), or a chance is unknown because no
    continuation has a verdict, nothing is paid. Metrics: `reward/<name>/start`, the chance before the first block,
    `/block_<k>`, what block k gained, `/tokens`, sampled to find out, and `/unknown`, the share of chances that are not
    known.
    """

    async def chance(explorer: Explorer, trajectory: Trajectory, end: int) -> tuple[float | None, int]:
        """Of success from token `end`, and how many tokens were sampled for it."""
        said = await explorer.go_on(trajectory, end, force, samples, tokens)
        known = [verdict for verdict in await inner(tuple(said)) if verdict is not None]
        return (sum(known) / len(known) if known else None), sum(one.sampled for one in said)

    async def paid(explorer: Explorer, trajectory: Trajectory, verdict: float, asked: Asked) -> None:
        start, ends = explorer.ends(trajectory, blocks)
        places = [(end, tuple(trajectory.samples[-1].tokens[:end])) for end in (start, *ends[:-1])]
        fresh = {key for _, key in places if key not in asked}
        for end, key in places:
            if key in fresh:
                asked[key] = asyncio.ensure_future(chance(explorer, trajectory, end))
        found = [await asked[key] for _, key in places]
        known = [value for value, _ in found if value is not None]
        own = sum(count for (_, count), (_, key) in zip(found, places, strict=True) if key in fresh)
        trajectory.metrics[f"reward/{name}/tokens"] = float(own)
        trajectory.metrics[f"reward/{name}/unknown"] = 1 - len(known) / len(found)
        if len(known) < len(found):
            return
        gains = [after - before for before, after in pairwise([*known, verdict])]
        last = len(trajectory.samples) - 1
        pay(trajectory, name, [(last, end - 1, weight * scale * gain) for end, gain in zip(ends, gains, strict=True)])
        trajectory.metrics[f"reward/{name}/start"] = known[0]
        trajectory.metrics |= {f"reward/{name}/block_{k}": gain for k, gain in enumerate(gains, 1)}

    async def reward(group: Group) -> Sequence[float | None]:
        verdicts, explorer, asked = await inner(group), exploring.get(), Asked()
        judged = [(t, v) for t, v in zip(group, verdicts, strict=True) if v is not None and t.turns]
        for trajectory in group:
            pay(trajectory, name, [])
        if explorer is not None:
            paying = [asyncio.ensure_future(paid(explorer, t, v, asked)) for t, v in judged]
            try:
                await asyncio.gather(*paying)
            finally:  # one that fails, or is cancelled, leaves nothing running
                for task in (*paying, *asked.values()):
                    task.cancel()
                await asyncio.gather(*paying, *asked.values(), return_exceptions=True)
        return verdicts

    return reward


def less_what_was_paid(judged: Reward, name: str) -> Reward:
    """The scores of `judged` less what stands in the samples under `name`, so that totals are what they were without:
    shaping by a potential, the chance of success (Ng et al. 1999).
    """

    async def reward(group: Group) -> list[float | None]:
        scores = await judged(group)
        spent = [sum(amount for *_, amount in trajectory.paid.get(name, ())) for trajectory in group]
        return [None if score is None else score - out for score, out in zip(scores, spent, strict=True)]

    return reward
