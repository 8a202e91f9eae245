"""The named algorithms. Each config *is* its knobs and builds an Algorithm; the union is the registry.

A user's own enters as `type: custom, path: my_pkg.mine:build`, where `build(**options)` returns an Algorithm.
"""

from __future__ import annotations

from typing import Annotated, Union, get_args

from pydantic import Field

from rlft.algorithms.catalog import group, sequence
from rlft.algorithms.catalog import policy_gradient as pg
from rlft.algorithms.catalog.base import Knobs
from rlft.algorithms.catalog.critic import Ppo
from rlft.algorithms.catalog.custom import Custom
from rlft.algorithms.catalog.directional import Dpa
from rlft.algorithms.catalog.distillation import Gflownet, Gkd, OnPolicyDistillation
from rlft.algorithms.catalog.hints import HintRft, Star
from rlft.algorithms.catalog.hybrid import Hpt
from rlft.algorithms.catalog.imitation import Dft, Ift, Raft, ReinforcedSelfTraining, Rejection, RewardWeighted, Sft
from rlft.algorithms.catalog.online_preference import NashMd, Xpo
from rlft.algorithms.catalog.preference import Cpo, Dpo, Orpo, Simpo, StepDpo
from rlft.algorithms.catalog.remax import Remax
from rlft.algorithms.catalog.reward_model import ProcessReward, RewardModel
from rlft.algorithms.catalog.turns import Gigpo, Rise
from rlft.algorithms.catalog.unpaired import Bco, Kto

PolicyGradient = pg.Reinforce | pg.Rloo | pg.Gpg | pg.Opo | pg.MaxRl | pg.ReinforcePp | pg.LooPpo | pg.PassK
Group = group.Grpo | group.Bnpo | group.DrGrpo | group.Dapo | group.Cispo | group.Sapo | Gigpo
Sequence = sequence.Gspo | sequence.Luspo | sequence.Gmpo
Imitation = Sft | Ift | Dft | Rejection | Raft | ReinforcedSelfTraining | RewardWeighted | Dpa | Rise
Distillation = OnPolicyDistillation | Gkd | Gflownet
Preference = Dpo | StepDpo | Simpo | Cpo | Orpo | Kto | Bco
Drawn = Remax | Xpo | NashMd | Star | HintRft | Hpt
Headed = Ppo | RewardModel | ProcessReward
AlgorithmConfig = Annotated[
    Union[Group, Sequence, PolicyGradient, Imitation, Distillation, Preference, Drawn, Headed, Custom],  # noqa: UP007
    Field(discriminator="type"),
]


def entries() -> dict[str, type[Knobs]]:
    """Every entry by its name."""
    return {kind.model_fields["type"].default: kind for kind in get_args(get_args(AlgorithmConfig)[0])}


def names() -> list[str]:
    """The names that `algorithm.type` accepts."""
    return list(entries())
