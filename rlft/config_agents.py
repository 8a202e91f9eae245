"""The config's `agents`: how many policies learn beside each other, and with what they cannot be."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rlft.config_data import Block


class Agents(Block):
    """Several policies on one base, each an adapter of its own, that play the environment's roles."""

    count: int = Field(default=1, ge=1, description="policies that are trained together, each an adapter on one base")
    exchange: int = Field(default=5, ge=0, description="steps after which each takes the next one's role; 0: never")


def agents_problem(config: Any) -> str | None:
    """Why several agents cannot be trained with the rest of a Config; None where they can, or where there is one."""
    count = config.agents.count
    if count == 1:
        return None
    roles, adapter = config.env.speaking, config.adapter.type
    fewer = f"agents.count={roles}, or an environment with more roles, such as env={{type: pioneer_observer}}"
    merged = config.rollout.engine.type == "vllm" and config.sync.type == "merged"
    problems = [
        (not config.online, "agents learn from what they sample, and from these data nothing is; set agents.count=1"),
        (count > roles, f"{config.env.type} has {roles} role(s), so some of {count} would never speak; set {fewer}"),
        (adapter == "none", "without an adapter every agent would be a model of its own; set adapter.type=lora"),
        (
            adapter == "adalora",
            "adalora moves its ranks by sums that are kept for the model, not by agent; choose lora",
        ),
        (merged, "vLLM has room for one set of merged weights; set sync.type=auto, or the local engine"),
    ]
    return next((f"agents.count: {reason}" for holds, reason in problems if holds), None)
