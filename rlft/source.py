"""Where groups come from: played now (online) or written down before (offline). Offline is a source, not an algorithm.

What has been drawn is one number; the order of an epoch is a function of (seed, epoch), so a resumed source goes on
with the row that an uninterrupted one would have taken. `Refilled` samples on where only some groups are worth a step.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from rlft.earlier import PLAYED, learned
from rlft.explore import explorable
from rlft.player import Player, derive_seed
from rlft.rollout import rollout
from rlft.types import Draw, Failure, Group, InputError, Reward, Said, Sample, Task, Trajectory, at_step

BELIEFS = "curriculum/"  # metrics that say what is believed, so that those of several rounds do not add up


class Source(Protocol):
    """Gives the groups of one step. online: they are sampled from the weights that the engine serves now.

    selected: what of the last groups is trained on, where the source has selected already; else None.
    overlaps: it goes on drawing between one `next` and the other, so that learning must not hold up the event loop.
    later: how many steps after the one in hand the groups are for that are being drawn.
    """

    online: bool
    overlaps: bool
    later: int
    metrics: dict[str, float]
    selected: list[Group] | None

    async def next(self) -> list[Group]:
        """The next step's groups; the state moves on only once they are complete."""
        ...

    async def settled(self) -> None:
        """Nothing is being drawn any more until `next` is called: weights may change, and the state may be read."""
        ...

    async def close(self) -> None:
        """Draw no more, not even what was begun."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Still:
    """A source that draws in `next` alone."""

    overlaps, later = False, 0

    async def settled(self) -> None:
        """See `Source.settled`: it always is."""

    async def close(self) -> None:
        """See `Source.close`: there is nothing to end."""


class Deck:
    """Row numbers without end: every row once an epoch, in an order drawn from (seed, epoch)."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._orders: dict[int, list[int]] = {}

    def at(self, position: int) -> int:
        """The row at a position counted over all epochs."""
        epoch, offset = divmod(position, self._size)
        if epoch not in self._orders:
            order = list(range(self._size))
            random.Random(derive_seed(self._seed, "order", epoch)).shuffle(order)
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return self._orders[epoch][offset]


class Curriculum(Protocol):
    """Which tasks are drawn next, by how those before came out; see `rlft.curriculum`."""

    def choose(self, position: int, count: int) -> list[int]:
        """The rows of the next `count` tasks, when `position` were drawn before. Asked again it says the same."""
        ...

    def learn(self, rows: Sequence[int], groups: Sequence[Group]) -> None:
        """These rows were drawn, and came out so."""
        ...

    def metrics(self) -> dict[str, float]:
        """What it believes now, under curriculum/."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the state of another kind, or an empty one, is passed over. Raises InputError where it is
        about other tasks."""
        ...


class Rollouts(Still):
    """Plays `tasks_per_step` tasks, `group_size` times each, with the weights that the engine serves now.

    watch: is shown the groups once they are judged. Where it raises, they have not been drawn. step: tells for which
    step of the run the next groups are. curriculum: chooses the tasks; none: each once an epoch.
    """

    online = True

    def __init__(
        self,
        tasks: Sequence[Task],
        player: Player,
        reward: Reward,
        tasks_per_step: int,
        group_size: int,
        seed: int,
        draws: Sequence[Draw] = (),
        watch: Callable[[Sequence[Group]], None] = lambda groups: None,
        step: Callable[[], int] = lambda: 1,
        curriculum: Curriculum | None = None,
    ) -> None:
        self._watch = watch
        self._step = step
        self._draws = draws
        self._tasks = tasks
        self._player = player
        self._reward = reward
        self._count = tasks_per_step
        self._group_size = group_size
        self._seed = seed
        self._deck = Deck(len(tasks), seed)
        self._curriculum = curriculum
        self._position = 0
        self.metrics: dict[str, float] = {}
        self.selected: list[Group] | None = None

    async def next(self) -> list[Group]:
        """See `Source.next`."""
        rows = self._rows()
        tasks = [self._tasks[row] for row in rows]
        seed = derive_seed(self._seed, "rollout", self._position)
        with explorable(self._player, seed), at_step(self._step()):
            groups, clock = await rollout(self._player, self._reward, tasks, self._group_size, seed, self._draws)
        self._watch(groups)
        self._position += self._count
        self.metrics = {
            "time/generate": clock.generate,
            "time/reward": clock.reward,
            "time/reward_hidden": clock.reward_hidden,
            "tokens/generated": float(sum(t.sampled for group in groups for t in group)),
        }
        if self._curriculum is not None:
            self._curriculum.learn(rows, groups)
            self.metrics |= self._curriculum.metrics()
        cast = self._player.cast
        if cast.earlier is None:
            return groups
        own = learned(groups, cast.agents)
        self.metrics["past/episodes"] = float(sum(PLAYED in t.metrics for group in own for t in group))
        return own or await self.next()

    def _rows(self) -> list[int]:
        """The next tasks."""
        if self._curriculum is not None:
            return self._curriculum.choose(self._position, self._count)
        return [self._deck.at(self._position + i) for i in range(self._count)]

    def state_dict(self) -> dict[str, Any]:
        """How much has been drawn, and what the curriculum has learned of it."""
        position = {"position": self._position}
        return position if self._curriculum is None else {**position, "curriculum": self._curriculum.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises InputError where samples wait that were drawn ahead, which would be lost."""
        if state.get("ahead"):
            raise InputError(
                f"rollout.ahead: the checkpoint holds samples of {len(state['ahead'])} steps that were drawn ahead; "
                "resume with rollout.engine.place=worker, which takes them first, also with rollout.ahead=0"
            )
        if self._curriculum is not None:
            self._curriculum.load_state_dict(state.get("curriculum", {}))
        self._position = int(state["position"])


class Recorded(Still):
    """Groups that were written down: demonstrations, pairs, scored completions."""

    online = False

    def __init__(self, groups: Sequence[Group], groups_per_step: int, seed: int) -> None:
        self._groups = groups
        self._count = groups_per_step
        self._deck = Deck(len(groups), seed)
        self._position = 0
        self.metrics: dict[str, float] = {}
        self.selected: list[Group] | None = None

    async def next(self) -> list[Group]:
        """See `Source.next`."""
        drawn = [self._groups[self._deck.at(self._position + i)] for i in range(self._count)]
        self._position += self._count
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """How much has been drawn."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._position = int(state["position"])


class Refilled(Still):
    """Samples on until `select` has kept `n` groups, at most `rounds` times; then the step takes what there is.

    Dynamic sampling (Yu et al. 2025, arXiv:2503.14476), but nothing that was kept is thrown away: groups
    beyond the n-th wait for the next step, which takes them first. They are then one version older than fresh ones, and
    their samples say so. `select` is asked group by group, so that it cannot compare groups with each other; one that
    changes from step to step is asked again about those that waited.
    """

    def __init__(self, source: Source, select: Callable[[Sequence[Group]], list[Group]], n: int, rounds: int) -> None:
        self.online = source.online
        self.metrics: dict[str, float] = {}
        self.selected: list[Group] | None = []
        self._inner = source
        self._select = select
        self._n = n
        self._rounds = rounds
        self._waiting: list[Group] = []

    async def next(self) -> list[Group]:
        """See `Source.next`: the groups that `selected` came from, then those that were refused."""
        kept, refused = list(self._waiting), []
        totals: Counter[str] = Counter()
        beliefs: dict[str, float] = {}
        before, rounds = self._inner.state_dict(), 0
        try:
            while len(kept) < self._n and rounds < self._rounds:
                for group in await self._inner.next():
                    (kept if self._select([group]) else refused).append(group)
                totals.update(self._inner.metrics)
                beliefs = {name: value for name, value in self._inner.metrics.items() if name.startswith(BELIEFS)}
                rounds += 1
        except BaseException:  # a step that was not completed is drawn again, from its first round
            self._inner.load_state_dict(before)
            raise
        fresh = len(kept) - len(self._waiting)
        taken, self._waiting = kept[: self._n], kept[self._n :]
        self.selected = [part for group in taken for part in self._select([group])]
        self.metrics = {
            **totals,
            **beliefs,
            "rollout/refills": float(max(rounds - 1, 0)),
            "rollout/kept": fresh / max(fresh + len(refused), 1),
            "rollout/waiting": float(len(self._waiting)),
        }
        return taken + refused

    def state_dict(self) -> dict[str, Any]:
        """How much has been drawn, and the groups that wait, token by token."""
        return {**self._inner.state_dict(), "waiting": [[written(t) for t in group] for group in self._waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; a state of the source alone will do."""
        self._inner.load_state_dict(state)
        self._waiting = [tuple(read(t) for t in group) for group in state.get("waiting", [])]


def written(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory as JSON, without the columns of its task that JSON does not know."""
    return {
        "task": trajectory.task.id,
        "prompt": [dict(message) for message in trajectory.task.messages],
        "info": {name: value for name, value in trajectory.task.info.items() if _is_json(value)},
        "messages": [dict(message) for message in trajectory.messages],
        "samples": [vars(sample) for sample in trajectory.samples],
        "score": trajectory.score,
        "metrics": trajectory.metrics,
        "finish": trajectory.finish,
        "cut": trajectory.cut,
        "drawn": trajectory.drawn,
        "targets": trajectory.targets,
        "user": trajectory.user,
        "paid": trajectory.paid,
        "sampled": trajectory.sampled,
        "failures": [vars(failure) for failure in trajectory.failures],
        "said": [
            [[dict(message) for message in turn.messages], turn.sample, turn.end, turn.finish]
            for turn in trajectory.said
        ],
    }


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def read(written: Mapping[str, Any]) -> Trajectory:
    """What `written` wrote."""
    return Trajectory(
        Task(written["task"], tuple(written["prompt"]), written.get("info", {})),
        tuple(written["messages"]),
        [Sample(**sample) for sample in written["samples"]],
        written["score"],
        dict(written["metrics"]),
        written["finish"],
        written.get("drawn", 0),
        tuple(written.get("targets", ())),
        written.get("user", 0),
        paid={name: [(i, j, amount) for i, j, amount in some] for name, some in written.get("paid", {}).items()},
        sampled=written.get("sampled", 0),
        cut=written.get("cut", ""),
        failures=[Failure(**failure) for failure in written.get("failures", ())],
        said=tuple(Said(tuple(messages), *place) for messages, *place in written.get("said", ())),
    )
