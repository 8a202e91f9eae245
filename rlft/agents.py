"""Several agents on one base: each has an adapter, a learner and a sync of its own, and the model is held once.

CORY (Ma et al. 2024, arXiv:2410.06101) trains two copies of a model, which play two roles and exchange them every so
many steps. An agent here is a second set of the adapter's values, a copy of the first to begin with. While its
learner steps, its sync sends or its checkpoint is written, its values stand in the model, and nothing that runs there
knows of other agents. So every agent learns from its own samples as if it were alone: credit compares its trajectories
with each other, weights sum to 1 over its rows, and optimizer, clipping, critic and what it remembers are its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlft.algorithms.base import Algorithm
from rlft.batch import Batch
from rlft.engine.base import Engine, Weights
from rlft.learner import Learner
from rlft.parity import Mismatch
from rlft.past import Past
from rlft.policy import Policy
from rlft.swap import Swap
from rlft.sync import Report, Sync, cold
from rlft.types import Completion, InputError, Sampling

COUNTS = ("learner/skipped", "reference/refreshed")
COUNT, PAST = "agents.count", "agents.past"
NONE = {COUNT: "agents.count=1", PAST: "agents.past=0"}
T = TypeVar("T")


class Agents:
    """The learners of `count` agents. make: builds the learner of the policy whose values stand in the model.

    Outside of `acting` agent 0's values are in place, so that what knows of one policy has agent 0. past: earlier
    versions of the one agent that there is then, which play as further agents and learn nothing.
    """

    def __init__(self, policy: Policy, count: int, make: Callable[[], Learner], past: Past | None = None) -> None:
        self.past = past
        first = dict(policy.trainable())
        copies = ({name: nn.Parameter(p.detach().clone()) for name, p in first.items()} for _ in range(count - 1))
        self._swaps = [Swap(policy.model, values) for values in (first, *copies)]
        self._learned: dict[int, dict[str, float]] = {}  # agents that are done, where another's update is begun again
        self.learners: list[Learner] = self.each(lambda _: make())

    @contextmanager
    def acting(self, agent: int) -> Iterator[None]:
        """The agent's values stand in the model."""
        with self._swaps[agent]():
            yield

    def each(self, act: Callable[[int], T]) -> list[T]:
        """What `act` gives for every agent, with its values in place."""
        found = []
        for agent in range(len(self._swaps)):
            with self.acting(agent):
                found.append(act(agent))
        return found

    @property
    def remembered(self) -> Mapping[str, float]:
        """Agent 0's; by them trajectories are selected, which are several agents' at once."""
        return self.learners[0].remembered

    def update(self, batch: Batch, algorithm: Algorithm) -> dict[str, float]:
        """Every agent learns from its own rows. The metrics of all, and each agent's own under `agent/<number>/`."""

        def learn(agent: int) -> dict[str, float]:
            own = (batch.agent == agent).nonzero().flatten()
            if agent not in self._learned:
                try:
                    self._learned[agent] = self.learners[agent].update(batch.rows(own), algorithm)
                except Mismatch as error:
                    error.agent = agent
                    raise
            return self._learned[agent]

        found = self.each(learn)
        self._learned = {}
        if len(found) == 1:
            return found[0]
        own = {f"agent/{agent}/{name}": value for agent, one in enumerate(found) for name, value in one.items()}
        return together(found) | own


Trainee = Learner | Agents


def learners(trainee: Trainee) -> list[Learner]:
    """One, or one of every agent."""
    return trainee.learners if isinstance(trainee, Agents) else [trainee]


def together(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several updates as of one: counts are added, of a maximum the largest is kept, else the mean."""
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for one in found for name in one):
        values = [one[name] for one in found if not math.isnan(one.get(name, math.nan))] or [math.nan]
        if name.startswith("tokens/") or name in COUNTS:
            merged[name] = sum(values)
        else:
            merged[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return merged


class Seat:
    """The engine as one agent's sync knows it: what is sent, asked and read back is that agent's."""

    def __init__(self, engine: Engine, agent: int) -> None:
        self._engine = engine
        self._agent = agent
        self.version = -1

    @property
    def dtype(self) -> torch.dtype | None:
        """What it computes in, where it says so."""
        return getattr(self._engine, "dtype", None)

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        """See `Engine.generate`."""
        return await self._engine.generate(prompt, replace(sampling, agent=self._agent))

    async def load_weights(self, weights: Weights, version: int) -> None:
        """See `Engine.load_weights`."""
        await self._engine.load_weights(replace(weights, agent=self._agent), version)
        self.version = version

    async def units(self, names: Sequence[str]) -> dict[str, str]:
        """See `Engine.units`."""
        return await self._engine.units(names)

    async def read_back(self, names: Sequence[str], seed: int, agent: int = 0) -> dict[str, Tensor]:
        """See `Engine.read_back`: of the agent whose seat this is."""
        return await self._engine.read_back(names, seed, self._agent)

    async def forget(self) -> None:
        """See `Engine.forget`."""
        await self._engine.forget()

    async def kept(self) -> int:
        """See `Engine.kept`."""
        return await self._engine.kept()

    async def close(self) -> None:
        """The engine is closed by whoever started it."""


class Syncs:
    """A sync of every agent, one after the other, each with both proofs. make: one for an engine and a learner.

    Earlier versions go first, where the engine has not got them yet, so that it ends at the version that is current.
    """

    def __init__(self, agents: Agents, engine: Engine, make: Callable[[Engine, Learner], Sync]) -> None:
        self._agents = agents
        self._syncs = agents.each(lambda agent: make(Seat(engine, agent), agents.learners[agent]))
        first, slots = len(self._syncs), range(len(agents.past or ()))
        self._past = [make(Seat(engine, first + slot), agents.learners[0]) for slot in slots]
        self._sent: dict[int, int] = {}  # by slot, the version that the engine has

    async def __call__(self, policy: Policy, version: int) -> Report:
        """See `Sync`: seconds of all agents, and the largest gap."""
        reports = await self._earlier(policy, version)
        for agent, sync in enumerate(self._syncs):
            with self._agents.acting(agent):
                reports.append(await sync(policy, version))
        seconds, proving = sum(r.seconds for r in reports), sum(r.prove_seconds for r in reports)
        return Report(version, seconds, proving, max(r.gap for r in reports))

    async def _earlier(self, policy: Policy, version: int) -> list[Report]:
        past, reports = self._agents.past, []
        if past is None:
            return reports
        past.keep(version)
        for slot, kept in past.versions.items():
            if self._sent.get(slot) != kept:
                with past.acting(slot):
                    reports.append(await self._past[slot](policy, kept))
                self._sent[slot] = kept
        return reports

    def renewed(self) -> None:
        """The engine is another, and has nothing yet."""
        self._sent = {}

    def close(self) -> None:
        """Remove what the syncs have left on the disk."""
        for sync in (*self._syncs, *self._past):
            sync.close()


def synced(trainee: Trainee, engine: Engine, make: Callable[[Engine, Learner], Sync]) -> Sync | Syncs:
    """What brings every agent's weights into the engine."""
    return Syncs(trainee, engine, make) if isinstance(trainee, Agents) else make(engine, trainee)


def refuse_together(algorithm: Algorithm, key: str = COUNT) -> None:
    """What several agents cannot learn by, each from its own samples. key: the config's that asks for them. Raises
    InputError.
    """
    if algorithm.draws:
        raise InputError(
            f"{key}: this algorithm draws further members of a group beside the policy's samples, and whose they "
            f"are is not said; set {NONE[key]}, or choose an algorithm that learns from its own samples alone"
        )
    if algorithm.unit > 1:
        raise InputError(
            f"{key}: this algorithm compares rows in units of {algorithm.unit}, which break where an episode "
            f"ends before every agent has spoken; set {NONE[key]}, or choose an algorithm that compares scores"
        )


def refuse_unservable(policy: Policy, key: str = COUNT) -> None:
    """Adapters that vLLM cannot serve beside each other. Raises InputError."""
    if reason := cold(policy):
        raise InputError(
            f"{key}: vLLM serves several agents as hot-loaded adapters only, and {reason}. Choose lora, or the "
            "local engine"
        )
