"""What of the data a run must not learn from, or could not judge: refused at the start, over all rows at once."""

from __future__ import annotations

from collections.abc import Sequence

from rlft.config import Config
from rlft.rows import first_few
from rlft.types import Group, InputError, Task


def refuse_unfit(config: Config, groups: Sequence[Group]) -> None:
    """Recorded groups that the algorithm must not learn from, all with one reason named at once."""
    have = {name.removeprefix("reward/") for group in groups for t in group for name in t.metrics}
    for name in config.algorithm.reads:
        if name not in have:
            raise InputError(
                f"algorithm.objectives: no row of data.train has a value for {name!r}; there is "
                f"{', '.join(sorted(have)) or 'none at all'}. Name the column with data.columns.objectives/{name}=..."
            )
    found: dict[str, list[str]] = {}
    for group in groups:
        reason = config.algorithm.unfit(group)
        if reason is not None:
            found.setdefault(reason, []).append(group[0].task.id)
    for reason, where in found.items():
        refuse_rows(where, reason)


def refuse_rows(where: Sequence[str], reason: str) -> None:
    """Rows of the training data, by their tasks' ids, whose `reason`, if there are any."""
    if where:
        raise InputError(f"data.train: {len(where)} row(s) whose {reason}. Rows: {first_few(where)}")


def refuse_unknown(config: Config, tasks: Sequence[Task]) -> None:
    """Users whose preferences the algorithm tells apart, and of whom no row of the training data is."""
    have = sorted({str(task.info["user"]) for task in tasks if task.info.get("user") is not None})
    missing = [name for name in config.algorithm.tells_apart if name not in have]
    if missing:
        raise InputError(
            f"algorithm.users: no row of data.train is from {first_few(missing)}; its column `user` has "
            f"{first_few(have) or 'nothing'}. Name users that it has, or the column with data.columns.user=..."
        )


def refuse_unjudged(config: Config, tasks: Sequence[Task], held_out: Sequence[Task] = ()) -> None:
    """Tasks that the reward could not judge: the column with the right answer is missing or empty. Held-out ones are
    for the verifier of the evaluation too."""
    if config.reward is not None:
        for task in (*tasks, *held_out):
            config.reward.check(task)
    for task in held_out:
        if config.eval.verifier is not None:
            config.eval.verifier.check(task)
