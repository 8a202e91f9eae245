"""The random states of the process, which anything may draw from: dropout, a reward or an environment of the user's.

What draws for the run itself (order, initial adapter, samples, minibatches) has generators or seeds of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def begin(seed: int) -> None:
    """Seed Python's and NumPy's generators; torch's are where loading the policy left them, a function of its seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)


def states() -> dict[str, Tensor]:
    """The states of torch (CPU, GPU), Python and NumPy as tensors."""
    version, words, second = random.getstate()
    theirs: Any = np.random.get_state(legacy=False)
    assert (version, theirs["bit_generator"]) == (3, "MT19937")
    inner = theirs["state"]
    found = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python.gauss": torch.tensor([0.0 if second is None else 1.0, second or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*inner["key"].tolist(), inner["pos"]]),
        "numpy.gauss": torch.tensor([float(theirs["has_gauss"]), theirs["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def put(states: Mapping[str, Tensor]) -> None:
    """Put back what `states` gave; what it lacks stays as it is."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "python" in states:
        waits, second = states["python.gauss"].tolist()
        random.setstate((3, tuple(states["python"].tolist()), second if waits else None))
    if "numpy" in states:
        *keys, position = states["numpy"].tolist()
        waits, second = states["numpy.gauss"].tolist()
        np.random.set_state(("MT19937", np.array(keys, np.uint32), position, int(waits), second))


@contextmanager
def undisturbed() -> Iterator[None]:
    """What draws inside leaves no trace: evaluations and proofs, which a resumed run has more of, change nothing."""
    kept = states()
    try:
        yield
    finally:
        put(kept)
