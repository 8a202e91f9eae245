"""A whole step of GRPO against TRL's GRPOTrainer, which samples with transformers: 8 tasks, 8 samples, 32 tokens.

Table A: a reward that scatters, so that every group has variance and no row may be dropped. Table B: sums of two digits
from step 0 to 8, most of whose groups have none. Both begin with the same adapter and get the same prompts in the same
order; each samples by itself. First, on what ours sampled for table A, both take three steps: they must train the same
tokens, and the gradient of the fourth step must be the same. `python -m benchmarks.grpo_step [--rounds N] [--json]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.spec import ROOT, Outcome, Row, Spec, cut, model, ratios, run, same_gradient, table

COMMON = ("rollout.tasks_per_step=8", "rollout.group_size=8", "rollout.sampling.max_tokens=32", "checkpoint.every=0")
TABLES: dict[str, dict[str, Any]] = {
    "A": {
        "given": ("demo", "reward={type: custom, path: 'benchmarks.grpo_step:scatter'}"),
        "reward": "benchmarks.grpo_step:scattered",
        "steps": 4,
        "warm": 1,
    },
    "B": {"given": ("arithmetic",), "reward": "benchmarks.grpo_step:summed", "steps": 8, "warm": 0},
}
PHASES = ("generate", "learn", "sync", "prove")


def scattered(text: str, ids: list[int], answer: str) -> float:
    """A number that no two different completions are likely to share."""
    value = 0
    for token in ids:
        value = (value * 31 + token) % 9973
    return value / 9973


def scatter(trajectory: Any) -> float:
    """The same, as a reward of rlft's."""
    sample = trajectory.samples[-1]
    return scattered("", [t for t, mine in zip(sample.tokens, sample.mask, strict=True) if mine], "")


def summed(text: str, ids: list[int], answer: str) -> float:
    """The last number is the right one."""
    from rlft.rewards.match import numbers_in

    found = numbers_in(text)
    return float(bool(found) and found[-1] == int(answer))


def ours(name: str, folder: Path) -> tuple[Outcome, list[list[Row]], list[list[str]]]:
    """A run of rlft; what it sampled, and the tasks' answers, step by step."""
    import pyarrow.parquet as pq

    config, *overrides = TABLES[name]["given"]
    steps, out = TABLES[name]["steps"], folder / "run"
    command = [sys.executable, "-m", "rlft.cli", "train", str(ROOT / "configs" / f"{config}.yaml"), f"out={out}"]
    given = [
        f"steps={steps}",
        "data.eval=null",
        "eval.every=0",
        "eval.accuracy=null",
        "learner.scheduler=constant",
        *COMMON,
        *overrides,
    ]
    done = subprocess.run([*command, *given], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"rlft failed:\n{done.stderr[-3000:]}")
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    played, asked = [], []
    for step in range(1, steps + 1):
        rows = pq.read_table(out / "rollouts" / f"step-{step:06d}.parquet").to_pylist()
        played.append([_row(row) for row in rows])
        asked.append([_sum(row["prompt"]) for row in rows[::8]])
    shares = [1 - row["tokens/trained"] / row["tokens/generated"] for row in metrics]
    parts = {phase: [row[f"time/{phase}"] for row in metrics] for phase in PHASES}
    extra = {"dropped": shares, "tokens": [row["tokens/generated"] for row in metrics], **parts}
    seconds = [row["time/step"] for row in metrics]
    return Outcome(seconds, [int(row["tokens/trained"]) for row in metrics], 0, "", extra), played, asked


def _row(row: dict[str, Any]) -> Row:
    first = row["mask"].index(True)
    return Row(row["tokens"][:first], row["tokens"][first:], row["score"], row["group"])


def _sum(prompt: Any) -> str:
    """The answer of `What is a+b?`."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    a, b = text.partition("What is ")[2].partition("?")[0].split("+")
    return str(int(a) + int(b))


def theirs(name: str, played: list[list[Row]], answers: list[list[str]], micro: int, folder: Path) -> Outcome:
    """A run of GRPOTrainer on the same prompts."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model())
    prompts = [[tokenizer.decode(row.prompt) for row in step[::8]] for step in played]
    again = [[tokenizer(text)["input_ids"] for text in step] for step in prompts]
    if again != [[row.prompt for row in step[::8]] for step in played]:
        raise SystemExit("the prompts as text are not the prompts that rlft gave the engine")
    live = {"prompts": prompts, "answers": answers, "reward": TABLES[name]["reward"], "max_tokens": 32}
    spec = Spec("grpo", [], micro, lr=5e-4, live={**live, "steps": len(played)})
    return run("trl", spec, folder)


def measure(name: str, rounds: int, micro: int) -> dict[str, Any]:
    """One table's line: medians over the steps, the ratio over the rounds."""
    warm = TABLES[name]["warm"]
    found: dict[str, list[Outcome]] = {"rlft": [], "trl": []}
    agreed: dict[str, Any] = {}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as scratch:
            mine, played, answers = ours(name, Path(scratch))
            if not number and name == "A":
                agreed = same_gradient(Spec("grpo", played, micro, lr=5e-4))
            other = theirs(name, played, answers, micro, Path(scratch))
        found["rlft"].append(cut(mine, warm))
        found["trl"].append(cut(other, warm))
    middle = {phase: statistics.median(s for one in found["rlft"] for s in one.extra[phase]) for phase in PHASES}
    dropped = statistics.fmean(s for one in found["rlft"] for s in one.extra["dropped"])
    sampled = statistics.fmean(s for one in found["rlft"] for s in one.extra["tokens"])
    others = statistics.fmean(s for one in found["trl"] for s in one.extra["sampled"])
    return {
        "table": name,
        **ratios(found),
        **{f"rlft_{phase}": seconds for phase, seconds in middle.items()},
        "dropped_tokens": dropped,
        "sampled_rlft": sampled,
        "sampled_trl": others,
        **agreed,
    }


def main() -> None:
    """Print the tables, or JSON: table A's figures at the top, and both under `tables`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--micro", type=int, default=16, help="TRL's rows per forward pass; 16 and 32 were its best")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = [measure(name, asked.rounds, asked.micro) for name in asked.only]
    if asked.json:
        print(json.dumps({**rows[0], "tables": rows}))
        return
    for row in rows:
        print(table(f"Table {row['table']}, seconds per step", [row]), "\n")


if __name__ == "__main__":
    main()
