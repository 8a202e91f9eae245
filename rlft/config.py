"""The shape of a run's config: closed models, every default documented, bad combinations refused with the reason.

YAML with `key=value` overrides. Which blocks are unions is decided by `type`: algorithm, reward, env, engine, adapter.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from rlft.algorithms.catalog import AlgorithmConfig
from rlft.allocation import ranks_problem
from rlft.config_agents import Agents, agents_problem
from rlft.config_data import Block, Data
from rlft.config_eval import Eval, eval_problem
from rlft.config_memory import Memory
from rlft.config_parity import Parity
from rlft.config_rollout import Rollout
from rlft.curriculum.catalog import Uniform
from rlft.envs.catalog import EnvConfig, SingleTurnConfig
from rlft.rewards.catalog import RewardConfig

TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow", "swanlab", "comet_ml", "clearml", "aim", "dvclive")


class Model(Block):
    """The policy before training."""

    path: str = Field(description="a folder, a hub id, smollm2-135m-q4, or tiny-random")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: the GPU where there is one")
    chat_template: str = Field(default="auto", description="auto (the model's own), none (plain text), or a Jinja file")
    gradient_checkpointing: bool = Field(default=False, description="less memory, about a third more time to learn")
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")


class Teacher(Block):
    """A frozen model whose distribution the policy learns from; it must share the policy's vocabulary."""

    path: str = Field(description="a folder, a hub id, smollm2-135m-q4, or tiny-random")


class Adapter(BaseModel):
    """Any PEFT config by its type, with that config's own fields; `saved` with `path` goes on with one."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str = Field(
        default="lora", description="a PEFT type (lora, dora is lora with use_dora, vera, ...), saved, or none"
    )

    def settings(self) -> dict[str, Any] | None:
        """What the policy is built from; None for full fine-tuning."""
        return None if self.type == "none" else self.model_dump()


class Learner(Block):
    """How the weights are moved."""

    lr: float = Field(default=1e-5, gt=0, description="learning rate at its highest")
    optimizer: Literal["adamw", "adafactor", "sgd"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="of adamw")
    scheduler: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="over the whole run, after warmup_steps"
    )
    warmup_steps: int = Field(default=0, ge=0, description="optimizer steps from 0 to lr")
    epochs: int = Field(default=1, ge=1, description="passes over each batch")
    minibatches: int = Field(default=1, ge=1, description="optimizer steps per pass")
    micro_tokens: int = Field(
        default=2048, ge=1, description="tokens per forward pass, padding included; a matter of memory only"
    )
    packing: Literal["auto", "on", "off"] = Field(
        default="auto", description="rows end to end without padding; auto: where the model keeps them apart"
    )
    max_grad_norm: float = Field(default=1.0, ge=0, description="gradients are clipped to this norm; 0: never")


class Reference(Block):
    """What KL terms and preference losses measure from: the policy before training, unless it follows the policy."""

    every: int = Field(default=0, ge=0, description="optimizer steps from one refresh to the next; 0: never")
    mix: float = Field(default=1.0, gt=0, le=1, description="ref <- mix * policy + (1 - mix) * ref; 1: a copy")

    @model_validator(mode="after")
    def _mixes(self) -> Reference:
        if self.mix != 1 and not self.every:
            raise ValueError(
                f"reference.mix: with {self.mix:g} the reference would take up the policy, but it is never refreshed; "
                "set reference.every to a number of optimizer steps"
            )
        return self


class Sync(Block):
    """How weights reach the engine. auto: merged on a CPU and wherever an adapter cannot be hot-loaded."""

    type: Literal["auto", "merged", "adapter"] = "auto"


class Checkpoint(Block):
    """What is kept."""

    every: int = Field(default=10, ge=0, description="steps; 0: only the last")
    keep: int = Field(default=2, ge=1, description="the newest so many, and the best by eval/accuracy")


class Faults(Block):
    """How much may go wrong before the run stops."""

    reward: float = Field(
        default=0.25, ge=0, le=1, description="share of a step's trajectories on which the reward may fail"
    )
    env: float = Field(
        default=0.25, ge=0, le=1, description="share of a step's episodes in which the environment may fail"
    )
    restarts: int = Field(default=3, ge=0, description="how often a worker engine that is lost is started again")
    skipped: int = Field(
        default=3, ge=0, description="optimizer steps in a row that may be skipped, their loss or gradient not finite"
    )


class Show(Block):
    """Samples on the terminal."""

    every: int = Field(default=5, ge=0, description="steps; 0: never")
    samples: int = Field(default=3, ge=1, description="how many")


class Config(Block):
    """A run."""

    name: str = Field(pattern=r"^[\w.-]+$", description="names the run's folder: runs/<name>")
    steps: int = Field(ge=0, description="steps to train")
    seed: int = Field(default=0, ge=0, description="of data order, sampling and initial adapter")
    out: str | None = Field(
        default=None, description="the run's folder; one that ends in -N takes the next free number"
    )
    model: Model
    adapter: Adapter = Field(default=Adapter(), description="any PEFT config, or none for full fine-tuning")
    teacher: Teacher | None = Field(default=None, description="for algorithms that learn from another model")
    data: Data
    env: EnvConfig = SingleTurnConfig()
    agents: Agents = Agents()
    reward: RewardConfig | None = None
    rollout: Rollout = Rollout()
    algorithm: AlgorithmConfig
    learner: Learner = Learner()
    reference: Reference = Reference()
    sync: Sync = Sync()
    parity: Parity = Parity()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    show: Show = Show()
    memory: Memory = Memory()
    profile: bool = Field(default=False, description="watch the second step, write a trace and say where it went")
    _from_environment: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)
    track: tuple[str, ...] = Field(default=(), description=f"any of {', '.join(TRACKERS)}")

    @field_validator("adapter", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return {"type": value or "none"} if value is None or isinstance(value, str) else value

    @field_validator("algorithm")
    @classmethod
    def _made_up_for(cls, knobs: AlgorithmConfig, info: ValidationInfo) -> AlgorithmConfig:
        """Samples of older weights are corrected for, unless somebody says otherwise."""
        rollout, fields = info.data.get("rollout"), type(knobs).model_fields
        silent = "correction" in fields and "correction" not in knobs.model_fields_set
        if rollout is None or not rollout.ahead or not silent or getattr(knobs, "old", None) == "rollout":
            return knobs
        return knobs.model_copy(update={"correction": "truncate"})

    @field_validator("track", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(names, list | tuple):
            raise ValueError(f"track: it is a name or a list of names, this is {type(value).__name__}")
        for name in names:
            if name not in TRACKERS:
                raise ValueError(f"there is no tracker {name!r}; it is one of {', '.join(TRACKERS)}")
        return tuple(names)

    @property
    def from_environment(self) -> dict[tuple[str | int, ...], str]:
        """Where the config took text from the environment, and how it is written there; see secrets."""
        return self._from_environment

    @property
    def online(self) -> bool:
        """Groups are sampled from the policy, not read from the data."""
        if self.algorithm.source != "any":
            return self.algorithm.source == "rollouts"
        return not self.data.answered

    @property
    def optimizer_steps(self) -> int:
        """How many optimizer steps the run takes."""
        return self.steps * self.learner.epochs * self.learner.minibatches

    @property
    def envs(self) -> tuple[EnvConfig, ...]:
        """Of the tasks that are trained on, and of those held out where it is another."""
        return (self.env,) if self.eval.env is None else (self.env, self.eval.env)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        of_data = (_direction_problem, _curriculum_problem, _source_problem)
        problems = (_reward_problem, eval_problem, _turn_problem, _group_problem, _dropout_problem, _adapter_problem)
        for problem in (*problems, *of_data, _sync_problem, _ahead_problem, agents_problem):
            reason = problem(self)
            if reason:
                raise ValueError(reason)
        return self


def _reward_problem(config: Config) -> str | None:
    if config.reward is None and config.online and config.algorithm.scored:
        return "reward: samples of the policy need a reward to score them; add a reward block"
    return None


def _direction_problem(config: Config) -> str | None:
    """Prompts, reward and algorithm agree on whether there is a direction, and on its components."""
    known = config.reward.components() if config.reward is not None else []
    missing = [name for name in config.algorithm.reads if name not in known] if config.online else []
    if missing:
        return f"algorithm.objectives: the reward has no component {missing[0]!r}; it has {', '.join(known)}"
    given, rewarded = config.data.direction, config.reward is not None and config.reward.directed
    if given is None:
        asks = "algorithm.type" if config.algorithm.directed else "reward.type" if rewarded else ""
        if asks and "direction" not in config.data.own:
            return f"data.direction: {asks} needs a direction in every task; set it, or name a column with directions"
        if config.algorithm.directed and not rewarded:
            return (
                f"reward.type: {config.algorithm.type} needs a score along each task's direction, and this reward "
                "knows of none; wrap it: reward: {type: directed, of: {...}}"
            )
    elif not config.online:
        return "data.direction: recorded answers were given to other prompts; remove it, or sample from the policy"
    elif not rewarded:
        return "data.direction: the prompts would ask for what nothing rewards; use a reward of type directed"
    unknown = [name for name in given.components if name not in known] if given else []
    if unknown:
        return f"data.direction.components: the reward has no component {unknown[0]!r}; it has {', '.join(known)}"
    return None


def _curriculum_problem(config: Config) -> str | None:
    """A curriculum learns from samples, by a component that there is."""
    block = config.data.curriculum
    if isinstance(block, Uniform):
        return None
    if not config.online:
        return (
            f"data.curriculum: {block.type} chooses by how samples came out, and these answers are recorded; remove it"
        )
    known = config.reward.components() if config.reward is not None else []
    if config.reward is None:
        return f"data.curriculum: {block.type} chooses by scores, and there is no reward; add a reward block"
    if block.component is not None and block.component not in known:
        return f"data.curriculum.component: the reward has no component {block.component!r}; it has {', '.join(known)}"
    return None


def _turn_problem(config: Config) -> str | None:
    name = config.algorithm.type
    if not config.algorithm.by_turn:
        return None
    if not config.env.several:
        return f"env.type: {name} learns from turn to turn, and {config.env.type} has one; set env={{type: retry}}"
    if config.reward is not None and not (config.reward.by_turn or config.env.pays):
        return (
            f"reward.type: {name} needs a verdict on every turn, and {config.reward.type} judges the last answer only; "
            f"wrap it: reward: {{type: per_turn, of: {{type: {config.reward.type}, ...}}}}"
        )
    return None


def _group_problem(config: Config) -> str | None:
    least = config.algorithm.group_size_min
    if config.online and config.rollout.group_size < least:
        return (
            f"rollout.group_size: {config.algorithm.type} compares the samples of one task, with each other or with "
            f"further ones, and {config.rollout.group_size} are too few; set it to {least} or more"
        )
    if config.rollout.tasks_per_step < config.algorithm.tasks_min:
        return (
            f"rollout.tasks_per_step: {config.algorithm.type} compares an answer with that to another task, so a step "
            f"of {config.rollout.tasks_per_step} teaches nothing; set it to {config.algorithm.tasks_min} or more"
        )
    rows = config.rollout.tasks_per_step * (config.rollout.group_size if config.online else 1)
    if config.learner.minibatches > rows:
        return f"learner.minibatches: {rows} samples a step cannot be cut into {config.learner.minibatches}"
    return None


def _source_problem(config: Config) -> str | None:
    recorded = sorted(config.data.answered)
    if config.algorithm.teacher != (config.teacher is not None):
        wants = "learns from a teacher; add teacher: {path: ...}"
        return (
            f"teacher: {config.algorithm.type} {wants if config.algorithm.teacher else 'has no use for one; remove it'}"
        )
    if config.algorithm.source == "rollouts" and recorded and not config.algorithm.demonstrations:
        column = config.data.columns.get(recorded[0], recorded[0])
        return (
            f"data.columns.{recorded[0]}: {config.algorithm.type} learns from its own samples, whose log-probs it "
            f"needs; the recorded answers in column {column!r} have none. Take an algorithm for recorded data; if the "
            f"column is for the reward, give it a role of another name, such as data.columns.recorded={column}"
        )
    return None


def _dropout_problem(config: Config) -> str | None:
    dropout = (config.adapter.model_extra or {}).get("lora_dropout") or 0
    if config.online and dropout:
        return (
            f"adapter.lora_dropout: with {dropout} the learner would score samples under another policy than the one "
            "that drew them; set it to 0"
        )
    return None


def _adapter_problem(config: Config) -> str | None:
    if config.algorithm.second_adapter and config.adapter.type == "none":
        return (
            f"adapter.type: {config.algorithm.type} as it is set wants a second adapter on the policy's base, and "
            "without a first one that would be a second model; choose lora, or a critic that is a head on the policy"
        )
    return ranks_problem(config.adapter.model_dump(), config.optimizer_steps)


def _sync_problem(config: Config) -> str | None:
    if config.sync.type == "adapter" and config.rollout.engine.type == "local":
        return "sync.type: the local engine takes merged weights only; set sync.type=merged or auto"
    if config.sync.type == "adapter" and config.adapter.type == "none":
        return "sync.type: there is no adapter to send; set sync.type=merged or auto"
    return None


def _ahead_problem(config: Config) -> str | None:
    if not config.rollout.ahead:
        return None
    if not config.online:
        return "rollout.ahead: the data are recorded, so nothing is sampled beforehand; remove it"
    if config.rollout.engine.place == "here":
        return (
            "rollout.ahead: the engine is in this process, where sampling and learning take turns; "
            "set rollout.engine.place=worker, or rollout.ahead=0"
        )
    return None
