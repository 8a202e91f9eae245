"""How sure a share is that was counted on a number of tasks: Wilson's interval at 95%.

Wilson 1927, "Probable inference, the law of succession, and statistical inference". Unlike the share plus or minus two
standard errors it stays within 0 and 1, and says something where all tasks or none are right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Z = 1.959964  # standard deviations to either side that hold 95% of a normal distribution


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Both ends of the interval around a share `rate` of `n` independent trials, n at least 1."""
    middle = (rate + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    return min(rate, max(0.0, middle - half)), max(rate, min(1.0, middle + half))  # but for rounding they hold it


def rated(name: str, rate: float, n: int) -> dict[str, float]:
    """A share as metrics: itself, and the ends of its interval as <name>_low and <name>_high."""
    low, high = wilson(rate, n)
    return {name: rate, f"{name}_low": low, f"{name}_high": high}


def counted(name: str, hits: Sequence[bool]) -> dict[str, float]:
    """The share of hits as metrics; of at least one trial."""
    return rated(name, sum(hits) / len(hits), len(hits))


def told(metrics: Mapping[str, float], name: str) -> str:
    """A share with its interval as people read it: 0.120 (0.070 to 0.198)."""
    return f"{metrics[name]:.3f} ({metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f})"
