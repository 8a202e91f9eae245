"""What a config gives before a model is loaded: algorithm, renderer, rows and lengths. What is wrong is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rlft.agents import refuse_together
from rlft.algorithms.base import Algorithm
from rlft.chat import Chat
from rlft.config import Config
from rlft.config_rollout import Local, Vllm
from rlft.data import check_lengths, of_answers, prompt_lengths, recorded
from rlft.data import tasks as read_tasks
from rlft.directions import directed
from rlft.draws import demonstrated, hinted
from rlft.models import locate
from rlft.policy import peft_config
from rlft.rows import rows_of
from rlft.serving import refuse_options
from rlft.types import Draw, Group, InputError, Task
from rlft.unfit import refuse_rows, refuse_unfit, refuse_unjudged, refuse_unknown
from rlft.wording import worded

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
    settings = config.adapter.settings()
    if settings is not None and settings["type"] != "saved":
        peft_config(settings)
    model = locate(config.model.path)
    chat = Chat(model, config.model.chat_template, config.model.trust_remote_code)
    config.env.build_for(chat.tokenizer, chat.template)  # refuses what it cannot find
    if config.eval.env is not None:
        try:
            config.eval.env.build_for(chat.tokenizer, chat.template)
        except InputError as error:
            raise InputError(f"eval.env: {error}") from error
    _refuse_draws(config, algorithm)
    if config.agents.served > 1:
        refuse_together(algorithm, config.agents.key)
    if config.online and config.env.rivals:
        _refuse_rivals(config, algorithm)
    tasks: list[Task] = []
    shown: list[Task] = []
    groups: list[Group] = []
    answers: list[Group] = []
    columns = config.data.columns
    word = partial(worded, text=config.data.prompt, system=config.data.system)
    if config.online:
        tasks = _directed(config, map(word, read_tasks(rows_of(config.data.train, "train"), columns, "train")))
        config.data.curriculum.build(tasks, config.seed)  # refuses columns that it cannot read
        shown, answers = _shown(algorithm, tasks), _demonstrations(algorithm, tasks, chat)
    else:
        groups = answers = recorded(rows_of(config.data.train, "train"), columns, "train", chat, word)
        refuse_unfit(config, groups)
    held_out: list[Task] = []
    if config.data.eval is not None:
        asked = {role: column for role, column in columns.items() if not of_answers(role)}
        held_out = _directed(config, map(word, read_tasks(rows_of(config.data.eval, "test"), asked, "eval")))
    refuse_unknown(config, tasks + [group[0].task for group in groups])
    refuse_unjudged(config, tasks, held_out)
    context = _context(config, chat, model, tasks + shown + held_out, answers, algorithm.draws)
    return Material(config, model, chat, algorithm, tasks, held_out, groups, context)


def _directed(config: Config, tasks: Iterable[Task]) -> list[Task]:
    """The tasks, with directions in their prompts if the config wants any."""
    way = config.data.direction
    return list(tasks) if way is None else directed(list(tasks), way.components, way.arc, way.text, config.seed)


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


def _refuse_rivals(config: Config, algorithm: Algorithm) -> None:
    """What cannot be learned where each role is paid for itself."""
    name, fix = config.algorithm.type, "choose one that compares scores of one role"
    if algorithm.draws:
        raise InputError(
            f"algorithm.type: {name} draws further members of a group, and {config.env.type}'s roles are rivals, whose "
            f"groups are their own; {fix}"
        )
    if algorithm.unit > 1:
        raise InputError(
            f"algorithm.type: {name} compares answers to one prompt, and what a rival in {config.env.type} is shown "
            f"depends on the other's moves; {fix}"
        )
    if config.data.curriculum.type != "uniform":
        raise InputError(
            f"data.curriculum.type: {config.data.curriculum.type} chooses tasks by their scores, and in "
            f"{config.env.type} what one role wins another loses; choose uniform"
        )


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
    asked = max((n for _, n in lengths), default=0)
    further = max(
        (env.answers - 1) * (answer + SLACK) + env.room(asked, lambda text: len(chat.encode(text)))
        for env in config.envs
    )
    return min(most, asked + answer + further + SLACK)
