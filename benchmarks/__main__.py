"""Run the benchmarks that a CPU can run, in under 30 minutes; those against TRL where it is installed.

--all: the long ones too, another 25 minutes. Every other argument goes to each benchmark.
"""

import importlib.util
import subprocess
import sys

OURS = (["demo_step"], ["rollouts"])
AGAINST_TRL = (["learner_memory"], ["learner"], ["grpo_step", "--only", "A"])
LONG = (["cuts"], ["scaling"], ["episodes"])
LONG_AGAINST_TRL = (["grpo_step", "--only", "B"],)

if __name__ == "__main__":
    everything, given = "--all" in sys.argv, [word for word in sys.argv[1:] if word != "--all"]
    ours = (*OURS, *(LONG if everything else ()))
    against = (*AGAINST_TRL, *(LONG_AGAINST_TRL if everything else ()))
    if importlib.util.find_spec("trl") is None:
        names = ", ".join(dict.fromkeys(name for name, *_ in against))
        print(f"left out: {names}; `make peers` installs TRL, with which they compare", file=sys.stderr)
        against = ()
    codes = [
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *own, *given]).returncode
        for name, *own in (*ours, *against)
    ]
    raise SystemExit(max(codes))
