"""rlft: reinforcement and preference fine-tuning of language models that proves its own steps."""

import os

__version__ = "0.1.0"

# OpenMP threads that spin while they wait take the CPU from whoever they wait for: with other work on two cores a
# learning step took four times as long. Set before torch loads; a value of your own wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
