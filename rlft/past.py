"""The values of earlier versions of a policy, which stand in the model while the engine is sent them and proves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlft.earlier import Earlier
from rlft.policy import Policy
from rlft.swap import Swap
from rlft.types import InputError


class Past:
    """Slots for a policy's trained values as they were. versions: what each filled slot holds."""

    def __init__(self, policy: Policy, earlier: Earlier) -> None:
        self._earlier = earlier
        self._policy = policy
        own = dict(policy.trainable())
        slots = range(earlier.count)
        self._values = [{n: nn.Parameter(p.detach().clone()) for n, p in own.items()} for _ in slots]
        self._swaps = [Swap(policy.model, values) for values in self._values]
        self.versions: dict[int, int] = {}

    def __len__(self) -> int:
        """How many slots there are."""
        return len(self._values)

    def keep(self, version: int) -> None:
        """Take the policy as it is, where it is of a version that is kept and is not there yet."""
        slot = self._earlier.slot(version)
        if version % self._earlier.every == 0 and self.versions.get(slot) != version:
            self._fill(version, dict(self._policy.trainable()))

    @contextmanager
    def acting(self, slot: int) -> Iterator[None]:
        """The slot's values stand in the model."""
        with self._swaps[slot]():
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that is kept, under `version|parameter`."""
        return {
            f"{version}|{name}": p.detach().cpu().contiguous()
            for slot, version in self.versions.items()
            for name, p in self._values[slot].items()
        }

    def load_state_dict(self, state: dict[str, Tensor], version: int) -> None:
        """Go on from what was kept at `version`. Raises InputError where other versions were kept than are now."""
        found: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            kept, _, name = key.partition("|")
            found.setdefault(int(kept), {})[name] = tensor
        wanted = self._earlier.kept(version)
        if sorted(found) != wanted:
            raise InputError(
                f"agents.past: the checkpoint holds the policy of steps {', '.join(map(str, sorted(found)))}, and "
                f"with past={self._earlier.count} and every={self._earlier.every} it would be that of "
                f"{', '.join(map(str, wanted))}; resume with the agents.past and agents.every that the run began with"
            )
        self.versions = {}
        for kept, values in found.items():
            self._fill(kept, values)

    def _fill(self, version: int, values: dict[str, Tensor]) -> None:
        slot = self._earlier.slot(version)
        with torch.no_grad():
            for name, p in self._values[slot].items():
                p.copy_(values[name])
        self.versions[slot] = version
