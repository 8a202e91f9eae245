"""From a config to the objects of a run. What can be refused is refused before a model is loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlft.agents import Agents, Syncs, Trainee, learners, refuse_unservable, synced
from rlft.ahead import Ahead
from rlft.chance import undisturbed
from rlft.config import Config
from rlft.config_rollout import Local
from rlft.earlier import Earlier
from rlft.engine.base import Engine
from rlft.engine.restart import Restarting
from rlft.envs.placed import placed
from rlft.evaluate import Evaluation
from rlft.faults import Faults
from rlft.kernels import give_memory_back, keep_memory
from rlft.learner import Learner, Schedule
from rlft.material import REFERENCE, Material
from rlft.models import locate
from rlft.past import Past
from rlft.player import Cast, Limits, Player
from rlft.policy import Policy, device_of, dtype_of
from rlft.recover import surviving
from rlft.reference import Reference
from rlft.serving import start_engine
from rlft.source import Recorded, Refilled, Rollouts, Source
from rlft.sync import Sync, refuse_hot_loading
from rlft.types import Group, InputError, Reward, Sampling
from rlft.vote import voting


@dataclass
class Parts:
    """Everything that is alive in a run. trainee: what learns, a learner or several agents'. learning: see `Run`."""

    material: Material
    policy: Policy
    trainee: Trainee
    source: Source
    kind: str
    faults: Faults
    engine: Engine | None = None
    sync: Sync | Syncs | None = None
    evaluation: Evaluation | None = None
    served: int | None = None
    learning: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def learner(self) -> Learner:
        """The learner, or agent 0's."""
        return learners(self.trainee)[0]

    def select(self, groups: Sequence[Group]) -> list[Group]:
        """What the algorithm trains on, given what it remembers now."""
        return self.material.algorithm.at(self.learner.remembered).select(groups)

    async def serve(self, version: int) -> dict[str, float]:
        """Bring version `version` into the engine, unless it is there; the sync's metrics."""
        if self.sync is None or self.served == version:
            return {}
        self.served, sync = None, self.sync
        with undisturbed():
            report = await surviving(lambda: sync(self.learner.weights(), version))
        self.served = version
        return {
            "sync/version": float(version),
            "sync/seconds": report.seconds,
            "sync/gap": report.gap,
            "time/sync": report.seconds,
            "time/prove": report.prove_seconds,
        }

    async def refill(self) -> None:
        """Bring the weights into the engine that was started in a lost one's place: those there are once nothing is
        being learned, which are a version newer where the lost one was sampling ahead.
        """
        version, self.served = self.served, None
        if isinstance(self.sync, Syncs):
            self.sync.renewed()
        if version is None:  # an engine that is lost while it is filled is filled again by who does that
            return
        async with self.learning:
            await self.serve(max(version, min(learner.version for learner in learners(self.trainee))))

    async def close(self) -> None:
        """Leave nothing behind."""
        await self.source.close()
        if self.sync is not None:
            self.sync.close()
        if self.engine is not None:
            await self.engine.close()


def make_policy(config: Config, model: Path) -> Policy:
    """The policy before training."""
    if device_of(config.model.device).type == "cpu":
        (keep_memory if config.memory.keep else give_memory_back)()
    return Policy(
        model,
        config.adapter.settings(),
        device=config.model.device,
        dtype=config.model.dtype,
        gradient_checkpointing=config.model.gradient_checkpointing,
        trust_remote_code=config.model.trust_remote_code,
        seed=config.seed,
    )


def make_trainee(stuff: Material, policy: Policy, dropout: bool) -> Trainee:
    """The learner before the first step, or one of every agent, who share a teacher, with what is kept of the past."""
    config = stuff.config
    if config.agents.served == 1:
        return make_learner(stuff, policy, dropout)
    teacher = frozen_model(config.teacher.path, policy) if config.teacher else None
    earlier = _earlier(config)
    past = Past(policy, earlier) if earlier else None
    return Agents(policy, config.agents.count, partial(make_learner, stuff, policy, dropout, teacher), past)


def _earlier(config: Config) -> Earlier | None:
    """The versions of the policy that it plays against, if any."""
    block = config.agents
    return Earlier(block.past, block.every, block.against, config.env.speaking) if block.past else None


def make_learner(stuff: Material, policy: Policy, dropout: bool, teacher: Any = None) -> Learner:
    """The learner before the first step, with what the algorithm owns, the teacher and a reference that moves."""
    config, moving = stuff.config, stuff.config.reference
    schedule = Schedule(steps=config.steps, **config.learner.model_dump())
    if config.teacher and teacher is None:
        teacher = frozen_model(config.teacher.path, policy)
    reference = Reference(policy, moving.every, moving.mix) if moving.every else None
    owned = stuff.algorithm.owned
    return Learner(policy, schedule, _temperature(config), config.seed, dropout, owned, teacher, reference)


def _temperature(config: Config) -> float:
    """What the rollouts are sampled at; nobody sampled what was recorded."""
    return config.rollout.sampling.temperature if config.online else 1.0


def assemble(stuff: Material, log: Path | None, faults: Faults | None = None) -> Parts:
    """Load the policy, start the engine, and connect everything. log: the engine's own messages go there."""
    faults = faults or Faults(None, stuff.config.faults)
    config = stuff.config
    policy = make_policy(config, stuff.model)
    kind = sync_kind(config, policy, any(draw.reference for draw in stuff.algorithm.draws))
    draw = config.rollout.sampling
    sampling = Sampling(draw.temperature, draw.max_tokens, stop=draw.stop)
    trainee = make_trainee(stuff, policy, dropout=not config.online)
    reward = config.reward.build() if config.reward else unscored
    env = placed(config.env, stuff.chat.tokenizer, stuff.chat.template)
    prompts = [stuff.chat.prompt(task.messages) for task in (stuff.tasks or stuff.held_out)[:2]]
    recorded_groups = Recorded(stuff.groups, config.rollout.tasks_per_step, config.seed)
    parts = Parts(stuff, policy, trainee, recorded_groups, kind, faults)
    if not stuff.needs_engine:
        return parts
    # The last thing that can fail: what follows only connects, so that no engine is left without anybody to close it.
    parts.engine = engine = start_engine(stuff, policy, kind, log, faults)
    if isinstance(engine, Restarting):
        engine.refill = parts.refill
    proof = replace(sampling, temperature=_temperature(config))
    how = "adapter" if kind == "adapter" else "merged"
    said = {"kind": how, "prompts": prompts, "sampling": proof, "deterministic": config.rollout.deterministic}
    parts.sync = synced(trainee, engine, lambda seat, learner: Sync(policy, seat, learner, **said))
    limits = _limits(config)
    rivals = config.env.rivals
    _connect(parts, Player(engine, stuff.chat, env, sampling, stuff.context, limits=limits, rivals=rivals), reward)
    return parts


def _connect(parts: Parts, player: Player, reward: Reward) -> None:
    """Source and evaluation on a running engine."""
    stuff, config = parts.material, parts.material.config
    rollout = config.rollout
    if config.online:
        sizes = (rollout.tasks_per_step, rollout.group_size)
        draws = stuff.algorithm.draws
        players = replace(player, cast=Cast(config.agents.count, config.agents.exchange, _earlier(config)))

        def watch(groups: Sequence[Group]) -> None:
            parts.faults.sampled(groups, later=parts.source.later)

        def step() -> int:
            return parts.faults.step + parts.source.later

        curriculum = config.data.curriculum.build(stuff.tasks, config.seed)
        parts.source = Rollouts(stuff.tasks, players, reward, *sizes, config.seed, draws, watch, step, curriculum)
        if stuff.algorithm.refill:
            n = rollout.tasks_per_step * (config.env.speaking if config.env.rivals else 1)
            parts.source = Refilled(parts.source, parts.select, n, rollout.rounds)
        if rollout.ahead or rollout.engine.place == "worker":  # 0: what a checkpoint holds of a run ahead goes first
            parts.source = Ahead(parts.source, rollout.ahead)
    if stuff.held_out and config.reward is not None:
        if (env := config.eval.env) is not None:
            player = replace(player, env=placed(env, stuff.chat.tokenizer, stuff.chat.template), rivals=env.rivals)
        component = config.eval.accuracy or config.reward.components()[0]
        samples, fixed = config.eval.samples, rollout.deterministic
        parts.evaluation = Evaluation(
            *(player, reward, stuff.held_out, component, samples, config.seed, fixed, parts.faults.evaluated),
            vote=voting(config.eval, config.reward.reader(component)),
        )


async def unscored(group: Group) -> list[float]:
    """The reward of a run without one, whose samples are judged by something else: 0 for every trajectory."""
    return [0.0 for _ in group]


def frozen_model(path: str, policy: Policy) -> torch.nn.Module:
    """A model to learn from, on the policy's device; refused where its vocabulary is another."""
    model = policy.load(locate(path)).to(policy.device).eval().requires_grad_(False)
    own, other = (m.config.get_text_config().vocab_size for m in (policy.causal_lm, model))
    if own != other:
        raise InputError(f"teacher.path: {path} has a vocabulary of {other} tokens, the policy one of {own}")
    return model


def sync_kind(config: Config, policy: Policy, reference: bool = False) -> str:
    """merged or adapter; auto is merged on a CPU, whose adapter kernels are slow, and wherever it must be.

    reference: the engine also samples from the policy before training, which is its base without the adapter.
    """
    if reference:
        refuse_hot_loading(policy)
        if policy.reference_kind != "adapter off":
            raise InputError(f"adapter.type: {REFERENCE}, and with this adapter the base alone is not that policy")
        return "adapter"
    if config.agents.served > 1 and not isinstance(config.rollout.engine, Local):
        refuse_unservable(policy, config.agents.key)
        return "adapter"
    if config.sync.type != "auto":
        if config.sync.type == "adapter":
            refuse_hot_loading(policy)
        return config.sync.type
    if policy.device.type == "cpu" or isinstance(config.rollout.engine, Local):
        return "merged"
    try:
        refuse_hot_loading(policy)
    except InputError:
        return "merged"
    return "adapter"


def _limits(config: Config) -> Limits:
    episode = config.rollout.episode
    return Limits(episode.turns, episode.tokens, episode.seconds, episode.call, episode.history == "split")


def served_model(stuff: Material) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that the policy will have."""
    device = device_of(stuff.config.model.device)
    return device, dtype_of(stuff.config.model.dtype, device)
