"""Environments of verifiers as people write them: single-turn, of several turns, with tools, and such that fail."""

from __future__ import annotations

from typing import Any

import verifiers as vf  # pyright: ignore[reportMissingImports]
from datasets import Dataset

ROWS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(10)]


def text(message: Any) -> str:
    """What it says."""
    return str(message["content"] or "")


async def right(completion: list[Any], answer: str) -> float:
    """The last answer has the number."""
    return float(answer in text(completion[-1]))


async def short(completion: list[Any]) -> float:
    """A share of what is left of 100 characters."""
    return max(0.0, 1 - sum(len(text(one)) for one in completion) / 100)


def judged() -> Any:
    """The right answer, and a quarter of brevity."""
    return vf.Rubric(funcs=[right, short], weights=[1.0, 0.25])


def single(system: str = "Be exact.") -> Any:
    """One answer. It has rows of its own that are held out."""
    held_out = Dataset.from_list([{"question": "What is 50 + 50?", "answer": "100"}])
    return vf.SingleTurnEnv(
        dataset=Dataset.from_list(ROWS), eval_dataset=held_out, system_prompt=system, rubric=judged()
    )


class Guess(vf.MultiTurnEnv):
    """Says whether the number is higher or lower."""

    async def setup_state(self, state: Any) -> Any:
        state["tries"] = 0
        return state

    @vf.stop
    async def found(self, state: Any) -> bool:
        """The last answer is the number."""
        return bool(state["trajectory"]) and text(state["trajectory"][-1]["completion"][-1]) == state["answer"]

    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        state["tries"] += 1
        try:
            low = int(text(messages[-1])) < int(state["answer"])
        except ValueError:
            return [{"role": "user", "content": "A number, please."}]
        return [{"role": "user", "content": f"Try {state['tries']}: {'higher' if low else 'lower'}."}]


def guess() -> Any:
    """At most four answers."""
    return Guess(dataset=Dataset.from_list(ROWS), rubric=judged(), max_turns=4)


def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


def tools() -> Any:
    """It may add."""
    return vf.ToolEnv(tools=[add], dataset=Dataset.from_list(ROWS), rubric=judged(), max_turns=5)


class Broken(vf.SingleTurnEnv):
    """Its world cannot be reached."""

    async def setup_state(self, state: Any) -> Any:
        raise vf.InfraError("no world today")


def broken() -> Any:
    """It fails in every rollout."""
    return Broken(dataset=Dataset.from_list(ROWS), rubric=judged())


def best(completions: list[Any]) -> list[float]:
    """A verdict on a group."""
    return [float(i == 0) for i, _ in enumerate(completions)]


def grouped() -> Any:
    """Its rubric compares."""
    return vf.SingleTurnEnv(dataset=Dataset.from_list(ROWS), rubric=vf.Rubric(funcs=[best]))


def nothing() -> int:
    """It is no environment."""
    return 3
