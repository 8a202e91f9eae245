"""The rollout's block of a config: the engine, how much is sampled, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlft.config_data import Block


class Vllm(Block):
    """vLLM, on a GPU or a CPU."""

    type: Literal["vllm"] = "vllm"
    place: Literal["here", "worker"] = Field(default="here", description="in this process, or in one of its own")
    patience: float = Field(
        default=120.0, ge=3, description="worker: seconds without a sign of life or of progress before it is replaced"
    )
    context: int | None = Field(
        default=None, ge=2, description="most tokens of prompt and completion; default: what is needed"
    )
    max_sequences: int = Field(default=128, ge=1, description="how many requests advance together")
    cache_gb: float | None = Field(default=None, gt=0, description="memory for keys and values; default on a CPU: 1")
    memory_fraction: float | None = Field(default=None, gt=0, le=1, description="of the GPU; default there: 0.4")
    options: dict[str, Any] = Field(default_factory=dict, description="any other engine argument of vLLM")


class Local(Block):
    """transformers: slower, runs any model."""

    type: Literal["local"] = "local"
    place: Literal["here", "worker"] = Field(default="here", description="in this process, or in one of its own")
    patience: float = Field(
        default=120.0, ge=3, description="worker: seconds without a sign of life or of progress before it is replaced"
    )
    context: int | None = Field(
        default=None, ge=2, description="most tokens of prompt and completion; default: what is needed"
    )
    max_sequences: int = Field(default=128, ge=1, description="how many requests advance together")


class Draw(Block):
    """How the policy is sampled for training."""

    temperature: float = Field(default=1.0, gt=0, description="the learner divides its logits by the same")
    max_tokens: int = Field(default=128, ge=1, description="per turn")
    stop: tuple[str, ...] = Field(default=(), description="strings that end a completion")
    top_p: float = Field(default=1.0, description="must be 1, see below")
    top_k: int = Field(default=0, description="must be 0")
    min_p: float = Field(default=0.0, description="must be 0")

    @model_validator(mode="after")
    def _whole_distribution(self) -> Draw:
        for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            value = getattr(self, name)
            if value != neutral and not (name == "top_k" and value == -1):
                raise ValueError(
                    f"{name}={value:g} cuts the distribution that is sampled from, and the learner would score another "
                    f"one, so every ratio would be wrong. Leave {name} at {neutral:g}; sample colder with temperature."
                )
        return self


class Episode(Block):
    """What one episode may take, and what becomes of its history."""

    turns: int | None = Field(default=None, ge=1, description="answers of the policy; none: the environment's own end")
    tokens: int | None = Field(default=None, ge=1, description="tokens that the policy says, over all turns")
    seconds: float | None = Field(
        default=None, gt=0, description="wall-clock time, looked at before each turn; a resumed run is not equal then"
    )
    call: float = Field(default=60.0, gt=0, description="seconds of one call of the environment, failed after that")
    history: Literal["refuse", "split"] = Field(
        default="refuse",
        description="where the chat template changes earlier turns: an error, or a new sample with every turn",
    )


class Rollout(Block):
    """How a step's groups are made. For recorded data only `tasks_per_step` counts, and the engine if there is eval."""

    engine: Annotated[Vllm | Local, Field(discriminator="type")] = Vllm()
    tasks_per_step: int = Field(default=8, ge=1, description="tasks (recorded: groups) per step")
    group_size: int = Field(default=8, ge=1, description="samples per task")
    rounds: int = Field(
        default=10, ge=1, description="how often a step is sampled at most, where the algorithm keeps only some groups"
    )
    ahead: int = Field(
        default=0,
        ge=0,
        description="steps that samples are drawn before they are learned from, beside the learner; 0: in turn",
    )
    sampling: Draw = Draw()
    episode: Episode = Episode()
    deterministic: bool = Field(
        default=True,
        description="forget cached prompts after each evaluation and proof: a resumed run is equal",
    )

    @field_validator("engine", mode="before")
    @classmethod
    def _typed(cls, value: Any) -> Any:
        return {"type": "vllm", **value} if isinstance(value, dict) and "type" not in value else value
