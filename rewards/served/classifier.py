"""A reward model behind a server: a sequence classifier, which vLLM serves under /classify.

It reads the conversation through its own chat template, on the server, and says one number per class. A generative one
that answers Yes or No is a `judge` in the mode yes_probability.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from rlft.rewards.base import Config
from rlft.rewards.judges.line import Line, Server
from rlft.types import Group, InputError, Reward, RunError, Trajectory


class ServedModel(Config, Server):
    """What a sequence-classification reward model says of the conversation, served by vLLM."""

    type: Literal["served_model"] = "served_model"
    model: str = Field(min_length=1, description="The model's name, as the server knows it.")
    output: int = Field(default=0, ge=0, description="Which of its outputs counts.")
    activation: bool = Field(
        default=False,
        description="Its probabilities (sigmoid or softmax, as the model says) in place of its raw outputs.",
    )

    def judge(self, name: str) -> Reward:
        line = self.line()

        async def judge(group: Group) -> Sequence[Any]:
            said = await asyncio.gather(*(self._said(line, t) for t in group), return_exceptions=True)
            for one in said:
                if isinstance(one, InputError | RunError):
                    raise one
            return said

        return judge

    async def _said(self, line: Line, trajectory: Trajectory) -> float:
        messages = [{"role": m["role"], "content": m["content"]} for m in trajectory.messages]
        body = {"model": self.model, "messages": messages, "use_activation": self.activation}
        # What was answered is the end of the conversation, not the beginning of another answer.
        body |= {"add_generation_prompt": False}
        answer = await line.post("classify", json.dumps(body).encode())
        try:
            outputs = answer["data"][0]["probs"]
            value = float(outputs[self.output])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            shown = json.dumps(answer)[:500]
            raise ValueError(f"output {self.output} is not in the server's answer ({error!r}): {shown}") from error
        if not math.isfinite(value):
            raise ValueError(f"the server's answer is {value}")
        return value
