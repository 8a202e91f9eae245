"""Environments of verifiers (github.com/PrimeIntellect-ai/verifiers) in its classic form: rows, a rollout, a rubric.

The library plays them itself: its own rollout asks an OpenAI client, which is this policy (see `agent`), so that turns,
tools, stop conditions and rewards are its own, and what was sampled is kept token by token. As it expects, all of its
rollouts share one event loop, in a thread of their own.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field

from rlft.envs.agent import AgentEnv, reading
from rlft.envs.agent_endpoint import Endpoint
from rlft.envs.agent_start import Seat, Slot
from rlft.envs.base import Env
from rlft.envs.custom import PATH, load
from rlft.envs.worlds.base import LibraryKnobs, library, seed_of
from rlft.types import InputError, Task

HELD_OUT = 10**9  # the seeds of held-out tasks begin here, as those of `data: {type: seeds}` do
HANDLED = (signal.SIGINT, signal.SIGTERM)


class VerifiersConfig(LibraryKnobs):
    """An environment of verifiers: single-turn, of several turns, or with tools, judged by its own rubric."""

    type: Literal["verifiers"] = "verifiers"
    id: str | None = Field(default=None, description="as verifiers.load_environment takes it: an installed package")
    path: str | None = Field(default=None, pattern=PATH, description="or module:function that returns the environment")
    options: dict[str, Any] = Field(default_factory=dict, description="keywords of the environment's loader")
    holdout: float = Field(
        default=0.1, ge=0, lt=1, description="share of the rows, its last ones, held out where it has no eval_dataset"
    )
    format: Literal["auto", "hermes", "llama", "mistral", "plain"] = Field(
        default="auto", description="how the model writes the calls of tools; auto: as its chat template shows them"
    )

    def build(self) -> Callable[[Task], Env]:
        return self.build_for(None, "")

    def build_for(self, tokenizer: Any, template: str) -> Callable[[Task], Env]:
        """As `build`, for one model. template: its chat template, empty for plain text. Raises InputError."""
        env = loaded(self)
        calls, endpoint = reading(self.format, template), Endpoint("127.0.0.1", 0)
        return partial(AgentEnv, endpoint, Rollouts(env, Rows(env, self.holdout)), calls, None)


def loaded(knobs: VerifiersConfig) -> Any:
    """The library's environment, with the run's signal handlers left as they were. Raises InputError."""
    if (knobs.id is None) == (knobs.path is None):
        raise InputError("env: verifiers needs either id=an installed environment, or path=module:function")
    vf = library("verifiers", "verifiers")
    try:
        _ = vf.MultiTurnEnv
    except Exception as error:  # its parts are imported when they are asked for
        raise InputError(
            f"env: verifiers {vf.__version__} is not one whose environments have a rollout of their own, or lacks a "
            f"package ({error.__cause__ or error}): take 0.3.1, as in requirements/worlds.txt"
        ) from error
    make = partial(vf.load_environment, knobs.id) if knobs.id else load(str(knobs.path), "env.path")
    main = threading.current_thread() is threading.main_thread()
    before = {one: signal.getsignal(one) for one in HANDLED} if main else {}
    try:
        env = make(**knobs.options)
    except Exception as error:  # each environment has its own ways to refuse
        raise InputError(
            f"env: verifiers cannot load {knobs.id or knobs.path} with {knobs.options}: {type(error).__name__}: {error}"
        ) from error
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    if not isinstance(env, vf.MultiTurnEnv):
        raise InputError(
            f"env: {knobs.id or knobs.path} is {type(env).__name__}, no environment that plays one rollout"
        )
    if env.requires_group_rollouts:
        raise InputError(
            f"env: the rubric of {knobs.id or knobs.path} judges groups, and episodes are judged one by one"
        )
    return env


class Rows:
    """The rows of an environment by a task's seed: those to train on, and from HELD_OUT on those that are held out."""

    def __init__(self, env: Any, holdout: float) -> None:
        """holdout: the share of the rows, its last ones, that are held out where it has no eval_dataset."""
        own = env.eval_dataset_source is not None
        train: Any = () if env.dataset_source is None else env.get_dataset()
        count = len(train)
        kept = count if own else count - int(count * holdout)
        self._train = train.select(range(kept)) if kept else None
        if own:
            self._eval = env.get_eval_dataset()
        else:
            self._eval = train.select(range(kept, count)) if kept < count else None

    def of(self, task: Task) -> dict[str, Any]:
        """Raises InputError."""
        seed = seed_of(task)
        rows = self._eval if seed >= HELD_OUT else self._train
        if rows is None:
            side = "held-out rows: raise env.holdout" if seed >= HELD_OUT else "rows to train on: lower env.holdout"
            raise InputError(f"env: this verifiers environment has no {side}, or give its loader other env.options")
        return dict(rows[seed % HELD_OUT % len(rows)])


class Rollouts:
    """Rollouts of one environment, in a loop of their own. See `agent_start.Start`."""

    def __init__(self, env: Any, rows: Rows) -> None:
        self._env = env
        self._rows = rows
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="rlft-verifiers").start()

    async def slot(self) -> Slot:
        """There is one."""
        return asyncio.Semaphore()

    async def run(self, task: Task, seat: Seat) -> Any:
        """Its verdict. Raises RuntimeError where the policy or the world could not be reached; cancelled, it ends."""
        return await self._there(_rollout(self._env, self._rows.of(task), seat))

    async def _there(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def __del__(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _rollout(env: Any, row: Mapping[str, Any], seat: Seat) -> dict[str, Any]:
    """One rollout, judged by the rubric. An error that the policy made is a metric, every other one is raised."""
    openai, vf = library("openai", "verifiers"), library("verifiers", "verifiers")
    clients = library("verifiers.clients", "verifiers")
    async with openai.AsyncOpenAI(base_url=seat.base_url, api_key=seat.api_key, max_retries=0) as client:
        asks = clients.OpenAIChatCompletionsClient(client)
        state = await env._run_rollout_state(dict(row), asks, seat.model, {})
    error = state.get("error")
    if isinstance(error, (vf.ModelError, vf.InfraError)):
        raise RuntimeError(f"verifiers: the rollout ended with {type(error).__name__}: {error.__cause__ or error}")
    metrics = {name: float(value) for name, value in (state["metrics"] or {}).items()}
    return {"reward": float(state["reward"]), "metrics": metrics | {"error": float(error is not None)}}
