"""Agents on vLLM itself: a run trains one, `rlft serve-policy` records a program; the tokens are the engine's own."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from rlft.after import export
from rlft.chat import Chat
from rlft.engine.vllm import VllmEngine
from rlft.session import begin
from rlft.settings import validate
from rlft.terminal import Terminal
from rlft.types import Completion, Sampling

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FOREIGN = """
import asyncio, sys
from openai import AsyncOpenAI

async def episode(name):
    async with AsyncOpenAI(base_url=sys.argv[1], api_key=name, max_retries=0) as client:
        messages = [{"role": "user", "content": f"I am {name}."}]
        for turn in range(3):
            said = await client.chat.completions.create(model="policy", messages=messages)
            messages += [said.choices[0].message, {"role": "user", "content": f"{turn}, go on."}]
        fresh = [{"role": "user", "content": f"Now for {name}."}]
        async for _ in await client.chat.completions.create(model="policy", messages=fresh, stream=True):
            pass
        await client.post("/episodes/current/reward", body={"reward": len(name), "done": True}, cast_to=object)

async def both():
    await asyncio.gather(episode("left"), episode("right!"))

asyncio.run(both())
assert not [name for name in sys.modules if name.startswith(("rlft", "torch"))]
"""


@dataclass(frozen=True)
class Call:
    """One request to the engine."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Ran:
    """A run, and what vLLM was asked and answered in it."""

    folder: Path
    model: Path
    chat: Chat
    calls: list[Call]


@pytest.fixture(scope="module")
def ran(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Three steps of an agent with several calls an episode."""
    folder, calls = tmp_path_factory.mktemp("agent") / "run", []
    inner = VllmEngine.generate

    async def noted(self: VllmEngine, prompt: Sequence[int], sampling: Sampling) -> Completion:
        completion = await inner(self, prompt, sampling)
        calls.append(Call(list(prompt), completion.tokens, completion.logprobs))
        return completion

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmEngine, "generate", noted)
        assert begin(validate(plain(tiny_model, folder)), Terminal(Console(quiet=True))) == 0
    return Ran(folder, tiny_model, Chat(tiny_model), calls)


def plain(model: Path, folder: Path) -> dict[str, Any]:
    return {
        "name": "agent",
        "out": str(folder),
        "steps": 3,
        "model": {"path": str(model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {"train": {"type": "seeds", "count": 6}},
        "env": {"type": "agent", "path": "tests.envs.agents:varied", "most_answers": 4, "most_said": 120},
        "reward": {"type": "outcome", "weight": 0, "otherwise": 0},
        "algorithm": {"type": "grpo"},
        "learner": {"lr": 0.01},
        "rollout": {
            "engine": {"type": "vllm", "cache_gb": 0.05}, "tasks_per_step": 2, "group_size": 4,
            "sampling": {"max_tokens": 8, "temperature": 1.3},
        },
    }  # fmt: skip


def answers(sample: dict[str, Any]) -> list[Call]:
    """What was chosen in a sample, answer by answer, behind all that stood before it."""
    tokens, mask = sample["tokens"], [False, *sample["mask"], False]
    edges = [i for i, (before, after) in enumerate(pairwise(mask)) if before != after]
    return [
        Call(tokens[:begin], tokens[begin:end], sample["logprobs"][begin:end])
        for begin, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def matched(samples: Sequence[dict[str, Any]], calls: Sequence[Call]) -> list[Call]:
    """The calls that none of the samples holds; each answer of a sample is one call's, to the last bit."""
    left = list(calls)
    for answer in (answer for sample in samples for answer in answers(sample)):
        assert all(map(math.isfinite, answer.logprobs))
        left.remove(answer)
    return left


def test_a_run_trains_on_what_vllm_sampled(ran: Ran) -> None:
    rows = [row for path in sorted(ran.folder.glob("rollouts/*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len(rows) == 3 * 8 * 2, "two conversations an episode: the fresh one is a sample of its own"
    others = matched(rows, ran.calls)
    assert len(ran.calls) - len(others) == 3 * 8 * 4, "the answers of all episodes"
    assert not any("Sum." in ran.chat.decode(call.prompt) for call in others), "the rest proves the syncs"


def test_the_run_learns_what_the_agent_pays_for(ran: Ran) -> None:
    lines = [json.loads(line) for line in (ran.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"]]
    for line in steps:
        assert line["parity/logprob_max"] < 1e-3
        assert (line["env/requests"], line["env/histories"], line["reward/missing"]) == (4, 2, 0)
        assert line["loss/grad_norm"] > 0
        assert 0 < line["reward/mean"] < 1
    assert steps[-1]["sync/version"] == 3


def test_serve_policy_records_what_vllm_sampled(ran: Ran, tmp_path: Path) -> None:
    """Two episodes at once of a program that has never heard of rlft."""
    log = tmp_path / "calls.jsonl"
    command = ["-m", "tests.envs.logged", str(log), "serve-policy", str(ran.folder), "--port", "0"]
    program = subprocess.Popen(
        [sys.executable, *command, "--record", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert program.stdout is not None
        line = next(line for line in program.stdout if "serving" in line)
        (url,) = re.findall(r"http://\S+:\d+", line)
        subprocess.run([sys.executable, "-c", FOREIGN, f"{url}/v1"], cwd=tmp_path, check=True, timeout=180)
    finally:
        program.send_signal(signal.SIGINT)
        assert program.wait(180) == 0
    rows = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert {row["episode"]: row["score"] for row in rows} == {"left": 4, "right!": 6}
    calls = [Call(**json.loads(line)) for line in log.read_text().splitlines()]
    samples = [sample for row in rows for sample in row["samples"]]
    left = matched(samples, calls)
    assert (len(samples), len(calls) - len(left)) == (4, 8), "two conversations of three answers and of one, each"
    assert not any("I am" in ran.chat.decode(call.prompt) for call in left)
    of_the_trained(ran, samples, tmp_path)


def of_the_trained(ran: Ran, samples: Sequence[dict[str, Any]], folder: Path) -> None:
    """The log-probs are those of the weights after the last step, and not of those before the first."""
    export(ran.folder, folder / "merged", merged=True, step=None)
    assert largest_gap(folder / "merged", samples) < 1e-3
    assert largest_gap(ran.model, samples) > 1e-2


def largest_gap(folder: Path, samples: Sequence[dict[str, Any]]) -> float:
    """Between the log-probs of the samples and those of a model at the run's temperature."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gaps = []
    for sample in samples:
        tokens = torch.tensor(sample["tokens"])
        with torch.inference_mode():
            values = (model(tokens[None]).logits[0, :-1] / 1.3).log_softmax(-1)
        again = values.gather(1, tokens[1:, None])[:, 0].tolist()
        gaps += [abs(a - b) for a, b in zip(sample["logprobs"][1:], again, strict=True) if a is not None]
    return max(gaps)
