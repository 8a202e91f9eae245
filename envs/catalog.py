"""The named environments. Each config *is* its knobs and builds a function from a task to a fresh environment; the
union is the registry. A user's own enters as `type: custom, path: my_pkg.mine:MyEnv`.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from rlft.envs.agent import AgentConfig
from rlft.envs.base import EnvKnobs
from rlft.envs.custom import CustomConfig
from rlft.envs.own.apps.world import AppsConfig
from rlft.envs.own.blackjack import BlackjackConfig
from rlft.envs.own.bulls import BullsConfig
from rlft.envs.own.code import CodeConfig
from rlft.envs.own.guess import GuessConfig
from rlft.envs.own.nim import NimConfig
from rlft.envs.own.numberline import NumberLineConfig
from rlft.envs.own.rules import RulesConfig
from rlft.envs.own.traces import TracesConfig
from rlft.envs.own.walk import WalkConfig
from rlft.envs.pioneer_observer import PioneerObserverConfig
from rlft.envs.remote import RemoteConfig
from rlft.envs.retry import RetryConfig
from rlft.envs.single_turn import SingleTurnConfig
from rlft.envs.tools.calling import ToolsConfig
from rlft.envs.tools.programs import PythonConfig
from rlft.envs.worlds.gymnasium import GymnasiumConfig
from rlft.envs.worlds.openenv import OpenEnvConfig
from rlft.envs.worlds.textarena import TextArenaConfig
from rlft.envs.worlds.textworld import TextWorldConfig
from rlft.envs.worlds.verifiers import VerifiersConfig

EnvConfig = Annotated[
    AgentConfig
    | SingleTurnConfig
    | RetryConfig
    | PioneerObserverConfig
    | CustomConfig
    | RemoteConfig
    | ToolsConfig
    | PythonConfig
    | GuessConfig
    | BullsConfig
    | WalkConfig
    | NumberLineConfig
    | BlackjackConfig
    | NimConfig
    | TracesConfig
    | RulesConfig
    | AppsConfig
    | CodeConfig
    | GymnasiumConfig
    | TextWorldConfig
    | TextArenaConfig
    | OpenEnvConfig
    | VerifiersConfig,
    Field(discriminator="type"),
]


def entries() -> dict[str, type[EnvKnobs]]:
    """Every environment's config by its name."""
    return {kind.model_fields["type"].default: kind for kind in get_args(get_args(EnvConfig)[0])}


def names() -> list[str]:
    """The names that `env.type` accepts."""
    return list(entries())
