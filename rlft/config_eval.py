"""The config's `eval`: held-out tasks, and with what they cannot be played and judged."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rlft.config_data import Block
from rlft.envs.catalog import EnvConfig
from rlft.rewards.catalog import RewardConfig


class Eval(Block):
    """Held-out tasks, greedy, before and after training and every so many steps."""

    every: int = Field(default=0, ge=0, description="steps; 0: only before and after training")
    accuracy: str | None = Field(
        default=None, description="the reward component that means correct; default: the first"
    )
    samples: int = Field(
        default=1,
        ge=1,
        description="above 1: also eval/pass@k and eval/majority@k, from k samples at the run's temperature",
    )
    verifier: RewardConfig | None = Field(
        default=None, description="any reward that scores those samples, and so chooses among their answers"
    )
    env: EnvConfig | None = Field(
        default=None, description="the environment of held-out tasks, where it is another: a fixed opponent, say"
    )
    clusters: int = Field(default=8, ge=1, description="it chooses among so many answers, those that were said most")
    logistic: bool = Field(default=False, description="its scores are log-odds; a vote weighs as much as the chance")


def eval_problem(config: Any) -> str | None:
    """Why held-out tasks cannot be played or judged in a Config; None where they can, or where there are none."""
    block, env, held_out = config.eval, config.eval.env or config.env, config.data.eval is not None
    problems = (
        (
            not held_out and block.every > 0,
            "eval.every: there are no held-out tasks to evaluate on; set data.eval, or eval.every=0",
        ),
        (
            not held_out and block.env is not None,
            "eval.env: there are no held-out tasks to play in it; set data.eval, or leave eval.env out",
        ),
        (
            held_out and env.rivals,
            f"eval.env: in {env.type} the policy's roles are rivals, and against itself it wins half however good it "
            "is; set eval.env to that environment with a fixed opponent",
        ),
        (
            held_out and config.reward is None,
            "reward: data.eval needs a reward to say what is correct",
        ),
    )
    found = next((reason for holds, reason in problems if holds), None)
    return found or (None if config.reward is None else _judging_problem(block, config.reward.components()))


def _judging_problem(block: Eval, known: list[str]) -> str | None:
    if block.accuracy is not None and block.accuracy not in known:
        return f"eval.accuracy: the reward has no component {block.accuracy!r}; it has {', '.join(known)}"
    if block.verifier is None:
        return None
    if block.samples == 1:
        return "eval.verifier: with eval.samples=1 there is nothing to choose among; set eval.samples=4 or more"
    if block.verifier.pays or block.verifier.directed:
        return f"eval.verifier: `{block.verifier.type}` does not score whole answers alone; name a reward that does"
    return None
