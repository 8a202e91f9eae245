"""The config's `agents`: how many policies learn beside each other, or against their past, and what that rules out."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rlft.config_data import Block


class Agents(Block):
    """Several policies on one base, each an adapter of its own, that play the environment's roles."""

    count: int = Field(default=1, ge=1, description="policies that are trained together, each an adapter on one base")
    exchange: int = Field(default=5, ge=0, description="steps after which each takes the next one's role; 0: never")
    past: int = Field(default=0, ge=0, description="earlier versions of the one policy that are kept as its opponents")
    every: int = Field(default=10, ge=1, description="steps between versions that are kept; the oldest makes room")
    against: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the training episodes in which one of them plays all roles but one",
    )

    @property
    def served(self) -> int:
        """How many adapters the engine holds."""
        return self.count + self.past

    @property
    def key(self) -> str:
        """What asks for more than one."""
        return "agents.past" if self.past else "agents.count"


def agents_problem(config: Any) -> str | None:
    """Why several agents, or one and its past, cannot be with the rest of a Config; None where they can, or there are
    none.
    """
    block, roles, env = config.agents, config.env.speaking, config.env.type
    if block.served == 1:
        return None
    none = "agents.past=0" if block.past else "agents.count=1"
    fewer = f"agents.count={roles}, or an environment with more roles, such as env={{type: pioneer_observer}}"
    adapter = config.adapter.type
    merged = config.rollout.engine.type == "vllm" and config.sync.type == "merged"
    problems = [
        (not config.online, f"agents learn from what they sample, and from these data nothing is; set {none}"),
        (
            block.past > 0 and block.count > 1,
            "the past is kept of one policy, and there are several; set agents.count=1, or agents.past=0",
        ),
        (
            block.past > 0 and roles == 1,
            f"{env} has 1 role, which leaves none to the past; set agents.past=0, or take an environment with more "
            "roles, such as env={type: nim}",
        ),
        (block.count > roles, f"{env} has {roles} role(s), so some of {block.count} would never speak; set {fewer}"),
        (adapter == "none", "without an adapter every agent would be a model of its own; set adapter.type=lora"),
        (
            adapter == "adalora",
            "adalora moves its ranks by sums that are kept for the model, not by agent; choose lora",
        ),
        (merged, "vLLM has room for one set of merged weights; set sync.type=auto, or the local engine"),
    ]
    return next((f"{block.key}: {reason}" for holds, reason in problems if holds), None)
