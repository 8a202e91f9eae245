"""The parity gate's block of a config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlft.config_data import Block


class Parity(Block):
    """The gate between engine and learner: their log-probs of the sampled tokens agree before anything is learned."""

    check: Literal["stop", "warn", "off"] = Field(default="stop", description="what to do where they do not")
    every: int = Field(default=1, ge=0, description="steps from one check to the next; 0: only the first step")
    max: float | None = Field(default=None, gt=0, description="largest gap of a token, nats; default: by dtype")
    mean: float | None = Field(default=None, gt=0, description="mean gap, nats; outliers are 10 times as far")
    kl: float | None = Field(default=None, gt=0, description="KL divergence of the learner from the engine, nats")

    @property
    def bounds(self) -> dict[str, float | None]:
        """Those that are set."""
        return {"max": self.max, "mean": self.mean, "kl": self.kl}
