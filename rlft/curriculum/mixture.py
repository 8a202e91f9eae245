"""Mixtures of Gaussians, fitted by expectation-maximisation (Dempster et al. 1977), their number by AIC or BIC.

Points are few (hundreds) and of few numbers, so numpy alone will do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
RIDGE = 1e-6  # added to every variance, so that points on a line, or all equal, have a density
ROUNDS, ENOUGH = 100, 1e-3  # of maximisation at most, and the gain of mean log-likelihood that ends them


@dataclass(frozen=True)
class Mixture:
    """k Gaussians in d dimensions. shares: [k], sum to 1. means: [k, d]. covariances: [k, d, d]."""

    shares: Numbers
    means: Numbers
    covariances: Numbers

    def log_densities(self, points: Numbers) -> Numbers:
        """[n, k]: the log of each Gaussian's share times its density at each of the points [n, d]."""
        d = points.shape[1]
        columns = []
        for share, mean, covariance in zip(self.shares, self.means, self.covariances, strict=True):
            lower = np.linalg.cholesky(covariance)
            away = np.linalg.solve(lower, (points - mean).T)
            volume = float(np.log(np.diag(lower)).sum())
            columns.append(math.log(share) - 0.5 * (d * math.log(2 * math.pi) + (away**2).sum(0)) - volume)
        return np.stack(columns, 1)

    def log_likelihood(self, points: Numbers) -> float:
        """In nats, summed over the points."""
        return float(_summed(self.log_densities(points)).sum())

    @property
    def parameters(self) -> int:
        """How many numbers were free: shares, means and covariances."""
        return parameters(*self.means.shape)

    def state_dict(self) -> dict[str, Any]:
        return {"shares": self.shares.tolist(), "means": self.means.tolist(), "covariances": self.covariances.tolist()}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Mixture:
        """What `state_dict` gave."""
        return cls(*(np.array(state[name], dtype=float) for name in ("shares", "means", "covariances")))


def parameters(k: int, d: int) -> int:
    """Free numbers of k Gaussians in d dimensions."""
    return k * (d + d * (d + 1) // 2) + k - 1


def criterion(mixture: Mixture, points: Numbers, kind: Literal["aic", "bic"]) -> float:
    """Lower is better. AIC: 2 f - 2 ln L (Akaike 1974). BIC: f ln n - 2 ln L (Schwarz 1978). f: free numbers."""
    price = 2.0 if kind == "aic" else math.log(len(points))
    return price * mixture.parameters - 2 * mixture.log_likelihood(points)


def best(points: Numbers, most: int, kind: Literal["aic", "bic"], rng: np.random.Generator) -> Mixture:
    """The mixture of 2 to `most` Gaussians that the criterion likes best, of those with fewer numbers than points.

    A single Gaussian where two have too many.
    """
    n, d = points.shape
    counts = [k for k in range(2, most + 1) if parameters(k, d) < n] or [1]
    fitted = [fit(points, k, rng) for k in counts]
    return min(fitted, key=lambda mixture: criterion(mixture, points, kind))


def fit(points: Numbers, k: int, rng: np.random.Generator) -> Mixture:
    """k Gaussians for the points [n, d], from one start: each point belongs to the nearest of k drawn ones."""
    centres = _apart(points, k, rng)
    belongs = np.eye(k)[_squares(points, centres).argmin(1)]
    mixture, before = _maximised(points, belongs), -math.inf
    for _ in range(ROUNDS):
        logs = mixture.log_densities(points)
        sums = _summed(logs)
        if sums.mean() - before < ENOUGH:
            break
        before = float(sums.mean())
        mixture = _maximised(points, np.exp(logs - sums[:, None]))
    return mixture


def _maximised(points: Numbers, belongs: Numbers) -> Mixture:
    """The most likely mixture, given how much of each point belongs to each Gaussian, [n, k]."""
    weights = belongs.sum(0) + 10 * np.finfo(float).eps
    means = belongs.T @ points / weights[:, None]
    away = points[:, None] - means
    covariances = np.einsum("nk,nki,nkj->kij", belongs, away, away) / weights[:, None, None]
    return Mixture(weights / weights.sum(), means, covariances + RIDGE * np.eye(points.shape[1]))


def _apart(points: Numbers, k: int, rng: np.random.Generator) -> Numbers:
    """k of the points, each drawn by its squared distance to those before (k-means++, Arthur, Vassilvitskii 2007)."""
    chosen = [int(rng.integers(len(points)))]
    while len(chosen) < k:
        near = _squares(points, points[chosen]).min(1)
        sums = np.cumsum(near)
        index = int(np.searchsorted(sums, rng.random() * sums[-1], side="right")) if sums[-1] > 0 else 0
        chosen.append(min(index, len(points) - 1))
    return points[chosen]


def _squares(points: Numbers, centres: Numbers) -> Numbers:
    """[n, k]: squared distances."""
    return ((points[:, None] - centres) ** 2).sum(2)


def _summed(logs: Numbers) -> Numbers:
    """[n]: the log of the sum of the exponentials of each row."""
    top = logs.max(1)
    return top + np.log(np.exp(logs - top[:, None]).sum(1))
