"""Opponents from the policy's past: who plays whom, what is kept and sent, and that nobody learns from them."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft.agents import Agents, Syncs
from rlft.batch import Batch
from rlft.earlier import PAID, PLAYED, Earlier, learned
from rlft.engine.base import Weights
from rlft.engine.local import LocalEngine
from rlft.learner import Learner, Schedule
from rlft.past import Past
from rlft.player import Cast
from rlft.policy import Policy
from rlft.sync import Sync
from rlft.types import (
    NAN,
    WORLD,
    Failure,
    InputError,
    RunError,
    Said,
    Sample,
    Sampling,
    Task,
    Trajectory,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LORA: dict[str, Any] = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


# Who plays whom


def test_versions_are_kept_in_turn() -> None:
    earlier = Earlier(count=2, every=3, against=0.5, roles=2)
    assert [earlier.kept(version) for version in range(10)] == [[0]] * 3 + [[0, 3]] * 3 + [[3, 6]] * 3 + [[6, 9]]
    assert [earlier.slot(version) for version in (0, 3, 6, 9)] == [0, 1, 0, 1]


def test_seats_are_drawn_as_said() -> None:
    """In 4000 episodes each share is within four of its standard errors; who plays follows from seed and version."""
    earlier = Earlier(count=3, every=2, against=0.3, roles=3)
    cast = Cast(earlier=earlier)
    seats = [[cast.seated(seed, 9)(role) for role in range(3)] for seed in range(4000)]
    assert seats == [[cast.seated(seed, 9)(role) for role in range(3)] for seed in range(4000)]
    alone = [seat for seat in seats if seat == [0, 0, 0]]
    met = [seat for seat in seats if seat != [0, 0, 0]]
    assert abs(len(met) / 4000 - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert len(alone) + len(met) == 4000
    for seat in met:
        assert seat.count(0) == 1
        assert len(set(seat)) == 2, "one version plays all the others"
    for drawn in (Counter(seat.index(0) for seat in met), Counter(max(seat) for seat in met)):
        assert len(drawn) == 3
        assert all(abs(n / len(met) - 1 / 3) < 4 * (2 / 9 / len(met)) ** 0.5 for n in drawn.values())
    assert {max(cast.seated(seed, 1)(role) for role in range(3)) for seed in range(400)} == {0, 1}, "one slot is filled"
    noted = [cast.noted(seed, 9) for seed in range(4000)]
    slots = {version: 1 + earlier.slot(version) for version in (4, 6, 8)}
    assert [slots[int(one[PLAYED])] if one else 0 for one in noted] == [max(seat) for seat in seats]


def test_without_a_past_nothing_changes() -> None:
    assert {Cast().seated(seed, 7)(role) for seed in range(50) for role in (0, 1)} == {0}
    assert Cast().noted(1, 7) == {}
    assert [Cast(2, 5).seated(3, version)(0) for version in (0, 5)] == [0, 1]


# What is left to learn from


def spoken(agents: list[int], score: float | None, **more: Any) -> Trajectory:
    """A sample of each agent, whose last token was paid its place, the first 1; a turn ends every sample."""
    samples = [Sample([5, 6 + i], [False, True], [NAN, -0.5], [0.0, 1.0 + i], 3, a) for i, a in enumerate(agents)]
    said = tuple(Said(({"role": "assistant", "content": str(i)},), i, 1) for i in range(len(agents)))
    return Trajectory(Task("t", ()), (), samples, score, said=said, sampled=len(agents), **more)


def test_what_the_past_said_is_not_trained_on() -> None:
    """A whole trajectory goes with a rival; of a shared one the samples go, and its total stays."""
    met: dict[str, Any] = {"metrics": {PLAYED: 4.0}}
    rivals = [(spoken([0], 1.0), spoken([0], 0.5, **met), spoken([2], 0.0, **met)), (spoken([1], 2.0, **met),)]
    (group,) = learned(rivals, 1)
    assert group[0] is rivals[0][0]
    assert [t.metrics for t in group] == [{}, {PLAYED: 4.0, PAID: 1.5}]
    shared = spoken([2, 0, 2, 0], 0.25, paid={"own": [(0, 1, 1.0), (3, 1, 4.0)]}, **met)
    ((left,),) = learned([(shared,)], 1)
    assert [sample.tokens[1] for sample in left.samples] == [7, 9]
    assert [(turn.sample, turn.text) for turn in left.said] == [(0, "1"), (1, "3")]
    assert left.paid == {"own": [(1, 1, 4.0)]}
    assert left.sampled == 2
    assert left.total == shared.total == left.metrics[PAID] == 0.25 + 1 + 2 + 3 + 4
    batch = Batch.of([(left, spoken([0], 0.0))])
    assert batch.agent.tolist() == [0, 0, 0]
    assert batch.scores.tolist() == [10.25, 10.25, 1.0]
    unscored = spoken([0, 1], None, **met)
    assert learned([(unscored,)], 1)[0][0].metrics == {PLAYED: 4.0}
    failed = spoken([0, 1], None, failures=[Failure(WORLD, "raised", "broke")])
    assert learned([(failed,)], 1) == [(failed,)]


# What is kept, and what the engine has


def moved(policy: Policy, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.copy_(0.2 * torch.randn(p.shape, generator=draw))


def with_past(path: Path, earlier: Earlier) -> Agents:
    policy = Policy(path, LORA, device="cpu", dtype="float32")
    return Agents(policy, 1, lambda: Learner(policy, Schedule(lr=1e-2, steps=1)), Past(policy, earlier))


def test_a_version_stays_as_it_was_until_its_slot_is_taken(tiny_model: Path) -> None:
    past = with_past(tiny_model, Earlier(2, 2, 0.5, 2))
    policy, kept = past.learners[0].policy, past.past
    assert kept is not None
    values: dict[int, dict[str, torch.Tensor]] = {}
    for version in range(7):
        moved(policy, version)
        values[version] = {name: p.detach().clone() for name, p in policy.trainable()}
        kept.keep(version)
        moved(policy, 100)
        kept.keep(version)  # is there already: what has changed since is not taken
        for slot, older in kept.versions.items():
            with kept.acting(slot):
                assert all(torch.equal(p, values[older][name]) for name, p in policy.trainable())
    assert kept.versions == {0: 4, 1: 6}
    again = Past(policy, Earlier(2, 2, 0.5, 2))
    again.load_state_dict(kept.state_dict(), 7)
    assert again.versions == kept.versions
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in kept.state_dict().items())
    with pytest.raises(InputError, match=r"agents\.past: .* steps 4, 6, and with past=2 and every=3 .* of 3, 6"):
        Past(policy, Earlier(2, 3, 0.5, 2)).load_state_dict(kept.state_dict(), 7)


class Counting:
    """A real engine that notes what it is sent; confused: it takes everybody's weights for the current policy's."""

    def __init__(self, inner: LocalEngine, confused: bool = False) -> None:
        self.inner, self.confused = inner, confused
        self.sent: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def load_weights(self, weights: Weights, version: int) -> None:
        self.sent.append((weights.agent, version))
        await self.inner.load_weights(replace(weights, agent=0) if self.confused else weights, version)


def syncs_of(agents: Agents, engine: Any) -> Syncs:
    policy = agents.learners[0].policy
    return Syncs(agents, engine, lambda seat, learner: Sync(policy, seat, learner, "merged", [[7, 8, 9]], Sampling()))


def test_only_what_changed_is_sent_and_each_is_proved(tiny_model: Path) -> None:
    """The engine answers as version 0 with the values of then; a lost engine's place is filled whole."""
    agents = with_past(tiny_model, Earlier(2, 2, 0.5, 2))
    policy, past = agents.learners[0].policy, agents.past
    engine = Counting(LocalEngine(tiny_model, torch.float32, torch.device("cpu")))
    syncs = syncs_of(agents, engine)
    for version in range(4):
        moved(policy, version)
        report = asyncio.run(syncs(policy, version))
        assert report.version == engine.version == version
        assert report.gap < 1e-4
    assert engine.sent == [(1, 0), (0, 0), (0, 1), (2, 2), (0, 2), (0, 3)]
    said = asyncio.run(engine.generate([7, 8, 9], Sampling(max_tokens=6, seed=1, agent=1)))
    assert said.version == 0
    row = Sample([7, 8, 9, *said.tokens], [False] * 3 + [True] * 6, [NAN] * 3 + said.logprobs, [0.0] * 9, 0)
    batch = Batch.of([(Trajectory(Task("t", ()), (), [row], score=0.0),)])

    def gap() -> float:
        return float((agents.learners[0].logprobs(batch) - batch.logprobs)[batch.mask].abs().max())

    assert past is not None
    with past.acting(0):
        assert gap() < 1e-4
    assert gap() > 0.1
    engine.sent.clear()
    syncs.renewed()
    asyncio.run(syncs(policy, 3))
    assert engine.sent == [(1, 0), (2, 2), (0, 3)]
    wrong = syncs_of(agents, Counting(engine.inner, confused=True))
    moved(policy, 4)
    with pytest.raises(RunError, match="weights of version 4 did not arrive"):
        asyncio.run(wrong(policy, 4))
