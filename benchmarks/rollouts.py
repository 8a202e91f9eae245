"""Rollouts through the loop against `vllm.LLM.generate` called bare, on the same prompts, seeds and settings.

One turn: 64 answers of at most 64 tokens. Several: three turns of at most 24 tokens, replies come at once; bare,
each turn is one call for all conversations. Both must say the same tokens. Each side is a process of its own, in turn;
the prefix cache is emptied before every round on both. `python -m benchmarks.rollouts [--rounds N] [--json]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.spec import ROOT, table

KINDS = {
    "one turn": ("rollout.sampling.max_tokens=64",),
    "three turns": ("rollout.sampling.max_tokens=24", "env={type: custom, path: 'benchmarks.rollouts:chat'}"),
}
WARM, REPEATS = 1, 4


class Chat:
    """Asks for more, twice, whatever was said."""

    def __init__(self, task: Any) -> None:
        self._task, self._turns = task, 0

    async def reset(self) -> tuple[Any, ...]:
        return self._task.messages

    async def step(self, action: Any) -> Any:
        from rlft.types import Turn

        self._turns += 1
        return Turn(({"role": "user", "content": "And then?"},), 0.0, self._turns == 3)

    async def close(self) -> None: ...


def chat(task: Any) -> Chat:
    """The environment."""
    return Chat(task)


async def through(kind: str, folder: Path) -> list[list[tuple[float, int, list[Any]]]]:
    """Seconds, tokens and requests of each round of the loop's own rollouts, for each repetition."""
    from rlft.build import assemble
    from rlft.material import material
    from rlft.settings import load

    common = ["data.eval=null", "eval.every=0", "rollout.tasks_per_step=8", "rollout.group_size=8"]
    config = load(ROOT / "configs" / "demo.yaml", [*common, *KINDS[kind], f"out={folder}/run"])
    parts = assemble(material(config), None)
    engine: Any = parts.engine
    try:
        await parts.serve(0)
        plain, found = engine.generate, []
        asked: list[Any] = []

        async def noting(prompt: Any, sampling: Any) -> Any:
            place = len(asked)
            asked.append(None)
            answer = await plain(prompt, sampling)
            asked[place] = {"prompt": list(prompt), "sampling": asdict(sampling), "said": answer.tokens}
            return answer

        engine.generate = noting
        for _ in range(WARM + REPEATS):
            asked.clear()
            await engine.forget()
            begun = time.perf_counter()
            await parts.source.next()
            seconds = time.perf_counter() - begun
            found.append({"seconds": seconds, "requests": list(asked)})
        return found
    finally:
        await parts.close()


def bare(given: list[Any], settings: dict[str, Any]) -> list[Any]:
    """The same requests by LLM.generate, turn by turn; seconds, and what was said."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    type(current_platform).simple_compile_backend = "eager"
    llm: Any = LLM(**settings)
    found = []
    for one in given:
        turns = by_turn(one["requests"])
        llm.reset_prefix_cache()
        begun, said = time.perf_counter(), []
        for turn in turns:
            prompts = [{"prompt_token_ids": request["prompt"]} for request in turn]
            params = [_params(SamplingParams, request["sampling"]) for request in turn]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            said.append([list(output.outputs[0].token_ids) for output in outputs])
        seconds = time.perf_counter() - begun
        same = said == [[request["said"] for request in turn] for turn in turns]
        found.append({"seconds": seconds, "same": same})
    return found


def by_turn(requests: list[Any]) -> list[list[Any]]:
    """Requests whose prompts go on from no other's, then those that go on from these, and so on."""
    ends = {tuple(r["prompt"] + r["said"]): i for i, r in enumerate(requests)}
    depth: dict[int, int] = {}
    for i, request in enumerate(requests):
        prompt = request["prompt"]
        before = [ends[key] for n in range(len(prompt)) if (key := tuple(prompt[:n])) in ends]
        depth[i] = 1 + max((depth.get(j, 0) for j in before if j < i), default=-1)
    turns: dict[int, list[Any]] = defaultdict(list)
    for i, request in enumerate(requests):
        turns[depth[i]].append(request)
    return [turns[n] for n in sorted(turns)]


def _params(kind: Any, sampling: dict[str, Any]) -> Any:
    names = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")
    return kind(**{name: sampling[name] for name in names}, logprobs=0, detokenize=False)


def settings() -> dict[str, Any]:
    """What our engine starts vLLM with on a CPU."""
    from benchmarks.spec import model
    from rlft.engine.vllm import FIXED, _on_cpu

    context = 320
    return {"model": str(model()), "dtype": "float32", "seed": 0, "max_model_len": context, "max_num_seqs": 128} | {
        **_on_cpu(context, 1.0),
        **FIXED,
    }


def side(name: str, kind: str, given: Path, answer: Path) -> None:
    """In a process of its own."""
    import rlft  # noqa: F401
    from rlft.engine.quiet import quiet

    quiet(None)
    if name == "ours":
        with tempfile.TemporaryDirectory() as scratch:
            answer.write_text(json.dumps(asyncio.run(through(kind, Path(scratch)))))
    else:
        answer.write_text(json.dumps(bare(json.loads(given.read_text()), settings())))


def measure(kind: str, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    shares, rates, same = [], [], True
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            mine, other = Path(scratch) / "ours.json", Path(scratch) / "bare.json"
            for name, answer in (("ours", mine), ("bare", other)):
                command = [sys.executable, "-m", "benchmarks.rollouts", "--side", name, kind, str(mine), str(answer)]
                environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
                if not answer.exists():
                    raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            a, b = (json.loads(path.read_text())[WARM:] for path in (mine, other))
        shares += [theirs["seconds"] / ours["seconds"] for ours, theirs in zip(a, b, strict=True)]
        rates += [sum(len(r["said"]) for r in one["requests"]) / one["seconds"] for one in a]
        same = same and all(one["same"] for one in b)
    middle = statistics.median(shares)
    return {
        "kind": kind,
        "share_of_bare": middle,
        "least": min(shares),
        "most": max(shares),
        "tokens_per_second": statistics.median(rates),
        "same_tokens": same,
    }


def main() -> None:
    """Print the table, or JSON."""
    if "--side" in sys.argv:
        name, kind, given, answer = sys.argv[sys.argv.index("--side") + 1 :]
        side(name, kind, Path(given), Path(answer))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = [measure(kind, asked.rounds) for kind in KINDS]
    print(json.dumps(rows) if asked.json else table("Rollouts against LLM.generate", rows))


if __name__ == "__main__":
    main()
