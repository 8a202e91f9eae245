"""The largest micro-batches that a config can make, before anything is sampled.

Rows are as long as they may become: a sampled one ends at its limit, a recorded one is known. They are cut and laid
out by the learner's own functions. What rows without an advantage would save is not counted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlft.algorithms.base import Algorithm
from rlft.config import Config
from rlft.footprint import Shape
from rlft.material import Material
from rlft.packing import Rows, Ways, cut, stretches

LOOKED_AT = 256  # tasks whose prompts are measured


@dataclass(frozen=True)
class Step:
    """The rows of one step. whole, chosen: tokens of each, and how many of them get logits. prompts: its prompt's."""

    whole: list[int]
    chosen: list[int]
    prompts: list[int]
    owner: list[int]

    def head(self, count: int) -> Step:
        """Its first rows."""
        return Step(self.whole[:count], self.chosen[:count], self.prompts[:count], self.owner[:count])

    @property
    def rows(self) -> Rows:
        """As packing sees them."""
        return Rows(self.whole, self.prompts, self.owner)


def prompts_of(stuff: Material) -> list[int]:
    """Tokens of some of the prompts, in no order."""
    tasks = stuff.tasks or stuff.held_out
    some = tasks[:: max(1, len(tasks) // LOOKED_AT)][:LOOKED_AT]
    return [len(stuff.chat.prompt(task.messages)) for task in some]


def longest_step(config: Config, algorithm: Algorithm, prompts: Sequence[int], recorded: Sequence[Step]) -> Step:
    """The step with the longest rows. prompts: tokens of the tasks' prompts. recorded: groups, each as a step."""
    count = config.rollout.tasks_per_step
    whole, chosen, before, owner = [], [], [], []
    if config.online:
        size = config.rollout.group_size + sum(draw.count for draw in algorithm.draws)
        answer = config.rollout.sampling.max_tokens * config.env.answers
        longest = sorted(prompts, reverse=True)
        for group in range(count):
            asked = longest[min(group, len(longest) - 1)]
            whole += [asked + answer] * size
            chosen += [answer] * size
            before += [asked] * size
            owner += [group] * size
        return Step(whole, chosen, before, owner)
    for number, group in enumerate(sorted(recorded, key=lambda one: -max(one.whole))[:count]):
        whole += group.whole
        chosen += group.chosen
        before += group.prompts
        owner += [number] * len(group.whole)
    return Step(whole, chosen, before, owner)


def recorded_steps(stuff: Material) -> list[Step]:
    """The rows of every recorded group."""
    found = []
    for group in stuff.groups:
        samples = [s for t in group for s in t.samples]
        whole = [len(s.tokens) for s in samples]
        chosen = [sum(s.mask) for s in samples]
        before = [next((i for i, mine in enumerate(s.mask) if mine), len(s.mask)) for s in samples]
        found.append(Step(whole, chosen, before, [0] * len(samples)))
    return found


def shapes(ways: Ways, reach: float, step: Step, unit: int, budget: int) -> tuple[list[Shape], int]:
    """The different micro-batches of a step, the largest few first, and how many. ways, reach: see packing."""
    rows = step.rows
    laid = _packed(rows, reach, ways) if ways.packs else _padded(rows)
    parts = list(cut(step.whole, step.owner, unit, lambda some: laid(some)[0] * laid(some)[1], budget))
    found = set()
    for part in parts:
        sequences, width, masked = laid(part)
        chosen = sum(step.chosen[i] for i in part)
        placed = tuple(stretches(rows, ways.plan(rows, part, reach).bins[0])) if ways.segmented else ()
        found.add(Shape(sequences, width, chosen, masked and not placed, placed))
    order = sorted(found, key=lambda one: -(one.tokens + one.chosen))
    return order[:2] + sorted(order[2:], key=lambda one: -one.tokens * one.width)[:1], len(parts)


def _packed(rows: Rows, reach: float, ways: Ways) -> Callable[[Sequence[int]], tuple[int, int, bool]]:
    def laid(some: Sequence[int]) -> tuple[int, int, bool]:
        made = ways.plan(rows, some, reach)
        alone = all(len(pieces) == 1 == len(pieces[0]) for pieces in made.bins)
        same = alone and len({rows.whole[i] for i in some}) == 1
        return len(made.bins), made.width, not same

    return laid


def _padded(rows: Rows) -> Callable[[Sequence[int]], tuple[int, int, bool]]:
    """Each row for itself; that a shared prompt may be computed once is left out."""

    def laid(some: Sequence[int]) -> tuple[int, int, bool]:
        longest = max(rows.whole[i] for i in some)
        return len(some), longest, len({rows.whole[i] for i in some}) > 1

    return laid
