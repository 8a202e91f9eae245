"""One answer out of several samples of a task: by their votes, by a verifier's scores, and by both.

Samples with the same final answer are a cluster. The vote takes the largest (self-consistency, Wang et al. 2022,
arXiv:2203.11171). A verifier that scores every sample can choose instead, or as well: the re-ranking of clusters of
Liu et al. 2023, "Improving Large Language Model Fine-tuning for Solving Math Problems", arXiv:2310.10047. Its variants,
with the paper's names:

- best: the sample of the highest score of all (RR.All);
- rerank: the same among the samples of the `top` largest clusters only (RR.Top-8, which the paper found better);
- weighted: of those clusters the one whose scores have the highest sum (W.RR with top clusters), so that an answer
  gains by being said often and by being believed.

The paper's verifier gives the probability that a solution is right, and its `top` is 8. The paper was at hand only in
its abstract and a review with its variants and results. So it is a guess that RR.Top-8 takes a cluster by its best
sample, and not by the mean; that the weights of W.RR are the scores themselves; and how ties are broken, which here is
for the larger cluster and then for the one that was sampled first.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from rlft.config_eval import Eval
from rlft.interval import counted
from rlft.rewards.base import Config
from rlft.types import Group, Reward, Trajectory

Same = Callable[[Hashable, Hashable], Awaitable[bool | None]]
Clusters = Sequence[Sequence[int]]  # places in a group; the first of a cluster was sampled first
Scores = Sequence[float | None]


@dataclass(frozen=True)
class Ballot:
    """A group's clusters. answered: samples that have an answer. undecided: pairs of which nothing could be said."""

    clusters: Clusters
    answered: int
    undecided: int


async def clustered(answers: Sequence[Hashable | None], same: Same) -> Ballot:
    """Every answer with the first one before it that it is the same as. None, and what is not even the same as itself,
    is no answer and in no cluster. Pairs of which nothing could be said (None) count as different."""
    clusters: list[list[int]] = []
    home: dict[Hashable, int | None] = {}
    undecided = 0
    for place, answer in enumerate(answers):
        if answer is None:
            continue
        if answer not in home:
            home[answer] = None
            for index, head in enumerate([*(answers[cluster[0]] for cluster in clusters), answer]):
                said = await same(head, answer)
                undecided += said is None
                if said or (said is None and head == answer):
                    home[answer] = index
                    break
            if home[answer] == len(clusters):
                clusters.append([])
        if (index := home[answer]) is not None:
            clusters[index].append(place)
    return Ballot(clusters, sum(map(len, clusters)), undecided)


def largest(clusters: Clusters, top: int) -> Clusters:
    """The `top` largest, the largest first; of equal ones the one sampled first."""
    return sorted(clusters, key=lambda cluster: (-len(cluster), cluster[0]))[:top]


def majority(clusters: Clusters) -> int | None:
    """The place of the first sample of the largest cluster; None where there is none."""
    return next((cluster[0] for cluster in largest(clusters, 1)), None)


def best(scores: Scores, places: Iterable[int]) -> int | None:
    """Of these places the one of the highest score, of equal ones the first; None where none has a score."""
    known = [(score, place) for place in places if (score := scores[place]) is not None]
    return max(known, key=lambda one: one[0])[1] if known else None


def rerank(clusters: Clusters, scores: Scores, top: int) -> int | None:
    """The place of the highest score within the `top` largest clusters."""
    return best(scores, [place for cluster in largest(clusters, top) for place in cluster])


def weighted(clusters: Clusters, scores: Scores, top: int) -> int | None:
    """The first place of that of the `top` largest clusters whose scores have the highest sum.

    A sample without a score adds nothing, and a cluster of such samples alone is not chosen. Scores are at least 0:
    below it, one more vote would make an answer worse.
    """
    known = [(c, [s for i in c if (s := scores[i]) is not None]) for c in largest(clusters, top)]
    sums = [(math.fsum(values), cluster[0]) for cluster, values in known if values]
    return max(sums, key=lambda one: one[0])[1] if sums else None


@dataclass(frozen=True)
class Vote:
    """How the samples of an evaluation are put together.

    said: the final answer in a sample, None where there is none. same: whether two of them are one. verifier: scores
    the samples, where there is one. top: how many clusters it chooses among. logistic: its scores are log-odds, and a
    vote weighs as much as the probability.
    """

    said: Callable[[Trajectory], Hashable | None]
    same: Same
    verifier: Reward | None = None
    top: int = 8
    logistic: bool = False

    async def __call__(self, groups: Sequence[Group], right: Callable[[Trajectory], bool]) -> dict[str, float]:
        """Metrics under `eval/`. A task of which nothing is chosen is not right. Failures of the verifier are added to
        those of the trajectories. right: whether the answer of one is."""
        n = len(groups[0])
        ballots = await asyncio.gather(*(clustered([self.said(t) for t in g], self.same) for g in groups))
        clusters = [ballot.clusters for ballot in ballots]
        metrics = counted(f"eval/majority@{n}", _hits(groups, [majority(c) for c in clusters], right))
        metrics["eval/clusters"] = sum(map(len, clusters)) / len(groups)
        metrics["eval/unanswered"] = 1 - sum(ballot.answered for ballot in ballots) / (n * len(groups))
        if undecided := sum(ballot.undecided for ballot in ballots):
            metrics["eval/undecided"] = float(undecided)
        if self.verifier is not None:
            scores = await asyncio.gather(*(verified(self.verifier, group) for group in groups))
            metrics |= self._chosen(groups, clusters, scores, right)
        return metrics

    def _chosen(
        self,
        groups: Sequence[Group],
        clusters: Sequence[Clusters],
        scores: Sequence[Scores],
        right: Callable[[Trajectory], bool],
    ) -> dict[str, float]:
        """What the verifier chooses, and what is to be known of its scores."""
        n, both = len(groups[0]), list(zip(clusters, scores, strict=True))
        known = [score for row in scores for score in row if score is not None]
        metrics = {"eval/verifier_missing": 1 - len(known) / (n * len(groups))}
        if known:
            metrics["eval/verifier_mean"] = math.fsum(known) / len(known)
        metrics |= counted(f"eval/best@{n}", _hits(groups, [best(row, range(n)) for row in scores], right))
        metrics |= counted(f"eval/rerank@{n}", _hits(groups, [rerank(c, row, self.top) for c, row in both], right))
        negative = 0.0 if self.logistic else sum(score < 0 for score in known) / max(len(known), 1)
        if negative:
            return metrics | {"eval/verifier_negative": negative}
        votes = [weighted(c, [self._weight(score) for score in row], self.top) for c, row in both]
        return metrics | counted(f"eval/weighted@{n}", _hits(groups, votes, right))

    def _weight(self, score: float | None) -> float | None:
        """What a vote weighs; None where there is no score."""
        return score if score is None or not self.logistic else 0.5 * (1 + math.tanh(score / 2))


def voting(block: Eval, judge: Config) -> Vote | None:
    """What a run's `eval` block asks for; None without several samples. judge: the reward that reads the answers."""
    if block.samples == 1:
        return None
    verifier = block.verifier.build("verifier") if block.verifier is not None else None
    return Vote(judge.said, judge.same(), verifier, block.clusters, block.logistic)


async def verified(verifier: Reward, group: Group) -> Scores:
    """Its scores. What it logs of a sample is not the reward's, and is left out; its failures are kept."""
    shown = tuple(replace(trajectory, metrics={}, failures=[]) for trajectory in group)
    scores = await verifier(shown)
    for trajectory, seen in zip(group, shown, strict=True):
        trajectory.failures += seen.failures
    return scores


def _hits(groups: Sequence[Group], places: Sequence[int | None], right: Callable[[Trajectory], bool]) -> list[bool]:
    return [place is not None and right(group[place]) for group, place in zip(groups, places, strict=True)]
