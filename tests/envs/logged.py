"""`rlft` with what vLLM is asked, and what it answers, added to a file: python -m tests.envs.logged FILE ARGUMENTS."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rlft.cli import app
from rlft.engine.vllm import VllmEngine
from rlft.types import Completion, Sampling

generate = VllmEngine.generate


async def noted(self: VllmEngine, prompt: Sequence[int], sampling: Sampling) -> Completion:
    """As `VllmEngine.generate`."""
    completion = await generate(self, prompt, sampling)
    row = {"prompt": list(prompt), "tokens": completion.tokens, "logprobs": completion.logprobs}
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(row) + "\n")
    return completion


if __name__ == "__main__":
    VllmEngine.generate = noted  # type: ignore[method-assign]
    app(sys.argv[2:])
