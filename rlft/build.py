"""From a config to the objects of a run. What can be refused is refused before a model is loaded."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlft.agents import Agents, Syncs, Trainee, learners, refuse_together, refuse_unservable, synced
from rlft.ahead import Ahead
from rlft.algorithms.base import Algorithm
from rlft.chance import undisturbed
from rlft.chat import Chat
from rlft.config import Config
from rlft.config_data import Generated, Rows
from rlft.config_rollout import Local, Vllm
from rlft.data import Row, check_lengths, of_answers, prompt_lengths, read, recorded
from rlft.data import tasks as read_tasks
from rlft.directions import directed
from rlft.draws import demonstrated, hinted
from rlft.engine.base import Engine
from rlft.engine.restart import Restarting
from rlft.evaluate import Evaluation
from rlft.faults import Faults
from rlft.generated import sums
from rlft.kernels import give_memory_back, keep_memory
from rlft.learner import Learner, Schedule
from rlft.models import locate
from rlft.player import Cast, Player
from rlft.policy import Policy, device_of, dtype_of, peft_config
from rlft.recover import surviving
from rlft.reference import Reference
from rlft.serving import refuse_options, start_engine
from rlft.source import Recorded, Refilled, Rollouts, Source
from rlft.sync import Sync, refuse_hot_loading
from rlft.types import Draw, Group, InputError, Reward, Sampling, Task
from rlft.unfit import refuse_rows, refuse_unfit, refuse_unjudged, refuse_unknown

REFERENCE = "the algorithm samples from the policy before training, which the engine serves by leaving the adapter off"
SLACK = 32  # tokens of context beyond the longest prompt and completion


@dataclass
class Material:
    """What a config gives before any weight is loaded. context: the most tokens that a sample can have."""

    config: Config
    model: Path
    chat: Chat
    algorithm: Algorithm
    tasks: list[Task]
    held_out: list[Task]
    groups: list[Group]
    context: int

    @property
    def needs_engine(self) -> bool:
        """Something has to be sampled."""
        return self.config.online or bool(self.held_out)


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


def material(config: Config) -> Material:
    """Read and check data, template and lengths. Raises InputError."""
    if isinstance(config.rollout.engine, Vllm):
        refuse_options(config.rollout.engine)
    algorithm = config.algorithm.build()
    if config.reference.every and "ref_logprobs" not in algorithm.needs:
        raise InputError(
            f"reference.every: {config.algorithm.type} with these knobs measures from no reference, so there is none "
            "to refresh; set reference.every=0, or give it a KL term"
        )
    config.env.build()  # refuses what it cannot find
    settings = config.adapter.settings()
    if settings is not None and settings["type"] != "saved":
        peft_config(settings)
    model = locate(config.model.path)
    chat = Chat(model, config.model.chat_template, config.model.trust_remote_code)
    _refuse_draws(config, algorithm)
    if config.agents.count > 1:
        refuse_together(algorithm)
    tasks: list[Task] = []
    shown: list[Task] = []
    groups: list[Group] = []
    answers: list[Group] = []
    columns = config.data.columns
    if config.online:
        tasks = _directed(config, read_tasks(_rows(config.data.train, "train"), columns, "train"))
        shown, answers = _shown(algorithm, tasks), _demonstrations(algorithm, tasks, chat)
    else:
        groups = answers = recorded(_rows(config.data.train, "train"), columns, "train", chat)
        refuse_unfit(config, groups)
    held_out: list[Task] = []
    if config.data.eval is not None:
        asked = {role: column for role, column in columns.items() if not of_answers(role)}
        held_out = _directed(config, read_tasks(_rows(config.data.eval, "test"), asked, "eval"))
    refuse_unknown(config, tasks + [group[0].task for group in groups])
    refuse_unjudged(config, tasks + held_out)
    context = _context(config, chat, model, tasks + shown + held_out, answers, algorithm.draws)
    return Material(config, model, chat, algorithm, tasks, held_out, groups, context)


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
    """The learner before the first step, or one of every agent, who share a teacher."""
    config = stuff.config
    if config.agents.count == 1:
        return make_learner(stuff, policy, dropout)
    teacher = frozen_model(config.teacher.path, policy) if config.teacher else None
    return Agents(policy, config.agents.count, partial(make_learner, stuff, policy, dropout, teacher))


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
    env = config.env.build()
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
    _connect(parts, Player(engine, stuff.chat, env, sampling, stuff.context), reward)
    return parts


def _connect(parts: Parts, player: Player, reward: Reward) -> None:
    """Source and evaluation on a running engine."""
    stuff, config = parts.material, parts.material.config
    rollout = config.rollout
    if config.online:
        sizes = (rollout.tasks_per_step, rollout.group_size)
        draws = stuff.algorithm.draws
        players = replace(player, cast=Cast(config.agents.count, config.agents.exchange))

        def watch(groups: Sequence[Group]) -> None:
            parts.faults.sampled(groups, later=parts.source.later)

        parts.source = Rollouts(stuff.tasks, players, reward, *sizes, config.seed, draws, watch)
        if stuff.algorithm.refill:
            parts.source = Refilled(parts.source, parts.select, rollout.tasks_per_step, rollout.rounds)
        if rollout.ahead or rollout.engine.place == "worker":  # 0: what a checkpoint holds of a run ahead goes first
            parts.source = Ahead(parts.source, rollout.ahead)
    if stuff.held_out and config.reward is not None:
        component = config.eval.accuracy or config.reward.components()[0]
        samples, fixed = config.eval.samples, rollout.deterministic
        parts.evaluation = Evaluation(
            player, reward, stuff.held_out, component, samples, config.seed, fixed, parts.faults.evaluated
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
    if config.agents.count > 1 and not isinstance(config.rollout.engine, Local):
        refuse_unservable(policy)
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


def _directed(config: Config, tasks: list[Task]) -> list[Task]:
    """The tasks, with directions in their prompts if the config wants any."""
    way = config.data.direction
    return tasks if way is None else directed(tasks, way.components, way.arc, way.text, config.seed)


def _refuse_draws(config: Config, algorithm: Algorithm) -> None:
    """Further members of a group that this run could not sample."""
    if algorithm.draws and not config.online:
        role = min(config.data.answered, default="completion")
        column = config.data.columns.get(role, role)
        raise InputError(
            f"data.columns.{role}: the algorithm draws further answers beside samples of the policy, and where column "
            f"{column!r} has recorded answers nothing is sampled. Give that column a role of another name, such as "
            f"data.columns.recorded={column}, which a draw may name"
        )
    for draw in algorithm.draws:
        try:
            re.compile(draw.at)
        except re.error as error:
            raise InputError(
                f"algorithm: {draw.at!r}, the place for a hint, is no regular expression: {error}"
            ) from error
    if not any(draw.reference for draw in algorithm.draws):
        return
    if isinstance(config.rollout.engine, Local):
        raise InputError(f"rollout.engine.type: {REFERENCE}; the local engine has none. Choose vllm")
    if config.sync.type == "merged":
        raise InputError(f"sync.type: {REFERENCE}; merged weights replace it. Set sync.type=adapter or auto")
    if config.adapter.type in ("none", "saved"):
        raise InputError(f"adapter.type: {REFERENCE}; {config.adapter.type} has no such base. Choose lora")
    if config.reference.every:
        raise InputError(f"reference.every: {REFERENCE}, so the reference must stay that policy. Set reference.every=0")


def _shown(algorithm: Algorithm, tasks: list[Task]) -> list[Task]:
    """The tasks with the prompts that hints make of them; refuses a task that lacks a hint's column."""
    hints = [draw for draw in algorithm.draws if draw.hint]
    return [replace(task, messages=hinted(draw, task)) for draw in hints for task in tasks]


def _demonstrations(algorithm: Algorithm, tasks: list[Task], chat: Chat) -> list[Group]:
    """The recorded answers that are drawn beside samples, to be checked; refuses a task that has none.

    And a completion that is labelled wrong. What another column holds no label is about.
    """
    recorded = [draw for draw in algorithm.draws if draw.recorded]
    if any(draw.recorded == "completion" for draw in recorded):
        wrong = [task.id for task in tasks if task.info.get("label") in (False,)]
        refuse_rows(
            wrong,
            "label is false, and the completion would be imitated; leave such rows out, or give the label another role "
            "if it is about something else, such as data.columns.topic=label",
        )
    return [(demonstrated(chat, draw, task),) for draw in recorded for task in tasks]


def _rows(rows: Rows, split: str) -> Sequence[Row]:
    if isinstance(rows, Generated):
        return sums(rows.digits, rows.split, rows.holdout, rows.seed)[: rows.limit]
    return read(rows.path, rows.subset, rows.split or ("train" if split == "train" else "test"), rows.limit)


def _context(
    config: Config, chat: Chat, model: Path, tasks: list[Task], groups: list[Group], draws: Sequence[Draw]
) -> int:
    """The context to reserve; refuses rows that do not fit."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(model, trust_remote_code=config.model.trust_remote_code).get_text_config()
    most = int(getattr(text, "max_position_embeddings", 2**31))
    allowed = min(most, config.rollout.engine.context or most)
    answer = config.rollout.sampling.max_tokens
    answer += max((answer + len(chat.encode(draw.go_on)) for draw in draws if draw.go_on), default=0)
    lengths = prompt_lengths(tasks, chat)
    check_lengths(lengths, allowed - answer, "prompts are")
    written = [(t.task.id, len(s.tokens)) for g in groups for t in g for s in t.samples]
    check_lengths(written, most, "recorded samples are")
    if config.rollout.engine.context:
        return allowed
    asked, env = max((n for _, n in lengths), default=0), config.env
    further = (env.answers - 1) * (answer + SLACK) + env.room(asked, lambda text: len(chat.encode(text)))
    return min(most, asked + answer + further + SLACK)


def served_model(stuff: Material) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that the policy will have."""
    device = device_of(stuff.config.model.device)
    return device, dtype_of(stuff.config.model.dtype, device)
