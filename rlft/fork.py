"""Where an episode could have gone another way: at the turns, or the tokens, that the policy itself expected least.

The log-prob of what was sampled, negated, is its surprise, whose mean is the entropy; so branching where it is large is
entropy-guided sampling (Tool-Light, arXiv:2509.23285, branches where steps begin with high entropy) without a further
pass. One level of the tree that step-level search grows; outcomes on both sides of a fork prefer one step to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlft.player import Rehearsed
from rlft.types import Completion, Trajectory

FIRST = 16  # tokens of a turn by whose mean surprise it is chosen


@dataclass(frozen=True)
class Fork:
    """A place in an earlier episode: before token `end` of its sample number `sample`."""

    earlier: Trajectory
    sample: int
    end: int
    rehearsed: Rehearsed

    def begins(self, other: Trajectory) -> bool:
        """Whether another episode is the same up to there, token by token."""
        if len(other.samples) <= self.sample:
            return False
        pairs = zip(self.earlier.samples[: self.sample + 1], other.samples, strict=False)
        ends = [len(sample.tokens) for sample in self.earlier.samples[: self.sample]] + [self.end]
        return all(a.tokens[:end] == b.tokens[:end] for (a, b), end in zip(pairs, ends, strict=True))


def branch(earlier: Trajectory, where: Literal["", "turn", "token"], rank: int) -> Fork | None:
    """The place of an episode that is the rank-th by surprise, counted from 0; None where it has no such place.

    A turn is ranked by the mean surprise of its first tokens; the first turn of an episode is no branch but a new one.
    """
    spans = [_span(earlier, turn) for turn in range(len(earlier.said))]
    places: list[tuple[float, int, int]] = []  # surprise, turn, token
    for turn, (sample, start, end) in enumerate(spans):
        surprise = [-x for x in earlier.samples[sample].logprobs[start : end + 1]]
        if where == "turn" and turn:
            first = surprise[:FIRST]
            places.append((sum(first) / len(first), turn, start))
        elif where == "token":
            places += [(value, turn, start + i) for i, value in enumerate(surprise) if turn or i]
    places.sort(key=lambda place: (-place[0], place[1], place[2]))
    if rank >= len(places):
        return None
    _, turn, token = places[rank]
    sample, start, _ = spans[turn]
    ends = [said.finish for said in earlier.said]
    whole = tuple(_completion(earlier, *span, end) for span, end in zip(spans[:turn], ends, strict=False))
    begun = _completion(earlier, sample, start, token - 1, "stop") if token > start else None
    return Fork(earlier, sample, token, Rehearsed(whole, begun))


def _span(earlier: Trajectory, turn: int) -> tuple[int, int, int]:
    """The sample of a turn, its first and its last token."""
    said = earlier.said[turn]
    start, mask = said.end, earlier.samples[said.sample].mask
    while start and mask[start - 1]:
        start -= 1
    return said.sample, start, said.end


def _completion(earlier: Trajectory, sample: int, start: int, end: int, finish: str) -> Completion:
    held = earlier.samples[sample]
    return Completion(held.tokens[start : end + 1], held.logprobs[start : end + 1], finish, held.version)
