"""Where a step of the demo goes: seconds per phase, from the metrics of a short real run. --json for programs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PHASES = ("time/generate", "time/reward", "time/learn", "time/sync", "time/prove")
STEPS = 8


def measure(config: Path) -> dict[str, float]:
    """Medians over the steps of one run; `start` is the time from the command to the first sampled step's begin."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "rlft.cli", "train", str(config), f"steps={STEPS}", f"out={out}"]
        begun = time.time()
        subprocess.run([*command, "data.eval=null", "eval.every=0"], check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        first = (out / "rollouts" / "step-000001.parquet").stat().st_mtime - rows[0]["time/step"]
    medians = {name: statistics.median(row[name] for row in rows) for name in (*PHASES, "time/step")}
    rest = statistics.median(row["time/step"] - sum(row[name] for name in PHASES) for row in rows)
    return {"start": first - begun, **medians, "time/rest": rest}


def main() -> None:
    """Print the table, or JSON."""
    found = measure(Path(__file__).parent.parent / "configs" / "demo.yaml")
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    print(f"demo step, medians of {STEPS} steps, seconds")
    print("\n".join(f"  {name:14} {value:7.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
