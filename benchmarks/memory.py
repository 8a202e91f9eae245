"""The memory plan against real runs: each process's peak less what its modules take.

Every setting is a run of its own in a fresh process. FIT are the settings that led to a constant or a rule of the
prediction, HELD_OUT led to none; GIVEN_BACK are settings of both kinds with `memory.keep=false`, where no heap is
played and nothing was fitted. The high-water mark is VmHWM, put back after the imports. --json for programs; --fit,
--held-out or --given-back for some of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MB = 2**20
TINY, HOT = "model.path=tiny-random", "rollout.sampling.temperature=2.0"  # hot: samples run to their limit
DENSE, LOCAL = "algorithm={type: grpo, kl: 0.01}", "rollout.engine.type=local"
FULL, WORKER = "adapter.type=none", "rollout.engine.place=worker"
# Of the rejected answers in configs/data/pairs.jsonl, which are long.
SFT = ("algorithm={type: sft}", "data.train=SPOKEN", "rollout.tasks_per_step=16")
GRPO = ("demo", DENSE)
SIZE, LONG = "rollout.group_size", "rollout.sampling.max_tokens"
MICRO = "learner.micro_tokens"
AGAIN, LESS = "model.gradient_checkpointing=true", "rollout.engine.cache_gb="
FIT: dict[str, tuple[str, ...]] = {
    "grpo, lora, vllm here": GRPO,
    "grpo, lora, local": (*GRPO, LOCAL),
    "grpo, lora, worker": (*GRPO, WORKER),
    "grpo, lora, tiny, vllm here": (*GRPO, TINY),
    "grpo, lora, tiny, local, 8192 tokens": (*GRPO, TINY, LOCAL, f"{MICRO}=8192", f"{SIZE}=16", f"{LONG}=96"),
    "grpo, lora r 8, local, checkpointing": (*GRPO, HOT, LOCAL, AGAIN, "adapter.r=8"),
    "dpo, lora r 8, checkpointing": ("dpo", AGAIN, "adapter.r=8", "rollout.tasks_per_step=16"),
    "sft, full, adafactor": ("dpo", *SFT, FULL, "learner.optimizer=adafactor", "learner.lr=1e-5"),
    "dpo, full, 1024 tokens": ("dpo", FULL, f"{MICRO}=1024", "learner.lr=1e-6"),
}
HELD_OUT: dict[str, tuple[str, ...]] = {
    "sft, lora, 1024 tokens": ("dpo", *SFT, f"{MICRO}=1024"),
    "dpo, lora": ("dpo",),
    "ppo, lora, vllm here, 0.5 GB": ("ppo", HOT, f"{LESS}0.5", f"{LONG}=24"),
    "grpo, lora, worker, 0.25 GB": (*GRPO, HOT, WORKER, f"{LESS}0.25", f"{SIZE}=4", f"{LONG}=32"),
    "grpo, full, local, 512 tokens": (*GRPO, HOT, LOCAL, FULL, f"{MICRO}=512", "learner.lr=1e-6"),
    "sft, full, sgd, 700 tokens": ("dpo", *SFT, FULL, f"{MICRO}=700", "learner.optimizer=sgd", "learner.lr=1e-5"),
    "sft, lora, tiny, 16384 tokens": ("dpo", *SFT, TINY, f"{MICRO}=16384", "rollout.tasks_per_step=200"),
}
# Sampled at a high temperature, so that samples are as long as the prediction takes them to be.
GIVEN_BACK: dict[str, tuple[str, ...]] = {
    name: (*some[name], *((HOT,) if HOT not in some[name] and some[name][0] == "demo" else ()), "memory.keep=false")
    for some in (FIT, HELD_OUT)
    for name in some
    if name not in ("grpo, lora, worker", "grpo, lora, tiny, vllm here")  # nearly as others
}


def measure(name: str, *overrides: str) -> dict[str, Any]:
    """One run, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", str(ROOT / "configs" / f"{name}.yaml")]
    given = ["steps=2", "data.eval=null", "eval.every=0", "checkpoint.every=0", *overrides]
    done = subprocess.run([*command, *given], capture_output=True, text=True)
    answer = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if not answer:
        raise SystemExit(f"{name} {overrides}: {done.stderr.strip()[-2000:]}")
    return json.loads(answer[-1].removeprefix("MEASURED "))


def mark(pid: int | str = "self", name: str = "VmHWM") -> int:
    """A process's high-water mark in bytes, or another line of its status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def one(config: str, overrides: list[str]) -> dict[str, Any]:
    """Predict and run in this process."""
    import rlft.session as session
    from rlft.forecast import Forecast
    from rlft.material import material
    from rlft.memory import MODULES
    from rlft.settings import load
    from rlft.terminal import Terminal

    with tempfile.TemporaryDirectory() as folder:
        said = [text.replace("SPOKEN", str(spoken(Path(folder)))) for text in overrides]
        read = load(Path(config), [*said, f"out={folder}/run"])
        stuff = material(read)
        begun = time.perf_counter()
        planned = Forecast(stuff).footprint(read)
        seconds = time.perf_counter() - begun
        engine = read.rollout.engine
        import_like_a_run(stuff.needs_engine and engine.type == "vllm" and getattr(engine, "place", "") == "here")
        apart = len(planned.processes) > 1
        modules = worker_modules() if apart else 0
        before, workers = mark(name="VmRSS"), dict[str, int]()
        Path("/proc/self/clear_refs").write_text("5")
        threading.Thread(target=watch, args=(workers,), daemon=True).start()
        code = session.begin(read, Terminal())
        found = [mark() - before] + ([max(workers.values()) - modules] if apart else [])
    net = [p.peak - sum(t.bytes for t in p.terms if t.name == MODULES) for p in planned.processes]
    names = [p.name for p in planned.processes]
    rows = [{"process": n, "predicted": a, "measured": b} for n, a, b in zip(names, net, found, strict=True)]
    return {"code": code, "seconds": seconds, "rows": rows}


def spoken(folder: Path) -> Path:
    """Demonstrations."""
    lines = (ROOT / "configs" / "data" / "pairs.jsonl").read_text().splitlines()
    rows = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in map(json.loads, lines)]
    (folder / "spoken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "spoken.jsonl"


def import_like_a_run(vllm: bool) -> None:
    """The modules that a run imports anyway."""
    import peft  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    if vllm:
        import_vllm()


def import_vllm() -> None:
    """What an engine needs before its model is there."""
    import vllm.engine.arg_utils
    import vllm.model_executor.models.llama
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401


def worker_modules() -> int:
    """Bytes of a process with the modules of a worker and nothing else."""
    code = (
        "from benchmarks.memory import *; import rlft.build; import_like_a_run(True); print('RSS', mark(name='VmRSS'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.rsplit("RSS ", 1)[1].split()[0])


def watch(workers: dict[str, int]) -> None:
    """A thread: note the high-water marks of this process's children."""
    while True:
        for folder in Path("/proc").iterdir():
            try:
                if (
                    folder.name.isdigit()
                    and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
                ):
                    workers[folder.name] = mark(folder.name)
            except (OSError, StopIteration, IndexError, ValueError):  # it has just ended
                continue
        time.sleep(0.1)


def main() -> None:
    """Print the table, or JSON."""
    if "--one" in sys.argv:
        config, *overrides = sys.argv[sys.argv.index("--one") + 1 :]
        print("\nMEASURED " + json.dumps(one(config, overrides)))
        return
    found = []
    kinds = {"fit": FIT, "held out": HELD_OUT, "given back": GIVEN_BACK}
    chosen = [kind for kind in kinds if f"--{kind.replace(' ', '-')}" in sys.argv] or [*kinds]
    for kind in chosen:
        for name, (config, *overrides) in kinds[kind].items():
            answer = measure(config, *overrides)
            for row in answer["rows"]:
                found.append({"setting": name, "kind": kind, "plan_seconds": answer["seconds"], **row})
                if "--json" not in sys.argv:
                    show(found[-1])
    if "--json" in sys.argv:
        print(json.dumps(found, indent=1))


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    error = row["predicted"] / row["measured"] - 1
    numbers = f"{row['predicted'] / MB:8.0f} {row['measured'] / MB:8.0f} {100 * error:+6.1f}%"
    print(
        f"{row['setting']:38} {row['process']:8} {row['kind']:10} {numbers}   plan {row['plan_seconds']:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
