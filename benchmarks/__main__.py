"""Run every benchmark that a CPU can run, in under 30 minutes; those against TRL where it is installed."""

import importlib.util
import subprocess
import sys

OURS = ("demo_step", "rollouts", "cuts", "scaling")
AGAINST_TRL = ("learner_memory", "learner", "grpo_step")

if __name__ == "__main__":
    found = importlib.util.find_spec("trl") is not None
    if not found:
        print(
            f"left out: {', '.join(AGAINST_TRL)}; `make peers` installs TRL, with which they compare", file=sys.stderr
        )
    names = (*OURS, *(AGAINST_TRL if found else ()))
    codes = [subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]).returncode for name in names]
    raise SystemExit(max(codes))
