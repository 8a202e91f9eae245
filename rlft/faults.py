"""What goes wrong and does not end the run: written down as it happens, and counted against the config's `faults`.

A run's `failures.jsonl` has one line per fault. It is a log: a resumed run adds to it and takes nothing back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file

from rlft.checkpoint import disk_errors
from rlft.secrets import hidden
from rlft.stepper import Skipped
from rlft.track import append_line, prompt_of
from rlft.types import WORLD, Group, RunError, Trajectory
from rlft.whole import replacing

FILE = "failures.jsonl"


class Bounds(Protocol):
    """How much may go wrong, see the block `faults` of a config."""

    @property
    def reward(self) -> float: ...

    @property
    def env(self) -> float: ...

    @property
    def skipped(self) -> int: ...


class Faults:
    """The faults of one session.

    folder: the run's; None keeps nothing. say: tells the user one line. step: the one that is being taken.
    """

    def __init__(self, folder: Path | None, bounds: Bounds, say: Callable[[str], None] | None = None) -> None:
        self._folder = folder
        self._bounds = bounds
        self._say = say
        self.step = 1

    def note(self, fault: str, tell: str = "", **more: Any) -> None:
        """One line in failures.jsonl; tell: one for the terminal too."""
        row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": self.step, "fault": fault, **more}
        if self._folder is not None:
            append_line(self._folder / FILE, hidden(json.dumps(row, ensure_ascii=False, default=str)))
        self._tell(tell)

    def _tell(self, said: str) -> None:
        if said and self._say is not None:
            self._say(said)

    def untracked(self, name: str, why: str) -> None:
        """A tracker failed; the run goes on without it."""
        self.note("tracker", f"track: {name} failed ({why}); the run goes on without it", tracker=name, said=why)

    def sampled(self, groups: Sequence[Group], later: int = 0) -> None:
        """Write down where rewards and environments failed. Raises RunError where that is too large a share of all.

        later: by how many steps they are drawn ahead.
        """
        step = self.step + later
        self._judged(groups, step=step)
        everyone = [trajectory for group in groups for trajectory in group]
        # Where roles are rivals an episode has a part for each, and role 0 opens all of them.
        episodes = sum(t.failed or t.samples[0].role == 0 for t in everyone)
        for kind, allowed, n in (("env", self._bounds.env, episodes), ("reward", self._bounds.reward, len(everyone))):
            failed = [t for t in everyone if t.failures and t.failed == (kind == "env")]
            if len(failed) > allowed * n:
                raise RunError(self._too_many(kind, failed, n, step, allowed))

    def _too_many(self, kind: str, failed: Sequence[Trajectory], n: int, step: int, allowed: float) -> str:
        trajectory, failure = failed[0], failed[0].failures[0]
        where = f" All are in {self._folder / FILE}." if self._folder else ""
        what = "episodes" if kind == "env" else "trajectories"
        whose = f"reward '{failure.reward}'" if kind == "reward" else "it"
        mend = "Mend the reward, or return None where there is no verdict" if kind == "reward" else "Mend it"
        return (
            f"the {'reward' if kind == 'reward' else 'environment'} failed on {len(failed)} of {n} {what} of "
            f"step {step}, and faults.{kind} allows a share of {allowed:g}. The first: {whose} failed on task "
            f"'{trajectory.task.id}': {failure.said}{where} A failure is not a zero, so these would not be trained on. "
            f"{mend}, and go on with `rlft resume`."
        )

    def evaluated(self, groups: Sequence[Group]) -> None:
        """Write down what failed in an evaluation, which counts as not correct there."""
        failed, n = self._judged(groups, evaluation=True), sum(map(len, groups))
        for what, some in (
            ("environment", [t for t in failed if t.failed]),
            ("reward", [t for t in failed if not t.failed]),
        ):
            if some:
                self._tell(f"the {what} failed on {len(some)} of {n} held-out answers")

    def _judged(self, groups: Sequence[Group], **more: Any) -> list[Trajectory]:
        failed = [t for group in groups for t in group if t.failures]
        for trajectory in failed:
            about = {"task_id": trajectory.task.id, "prompt": prompt_of(trajectory.task)}
            for failure in trajectory.failures:
                kind = "env" if failure.reward == WORLD else "reward"
                self.note(kind, **more, **vars(failure), **about, completion=trajectory.completion)
        return failed

    def skipped(self, steps: Sequence[Skipped], in_a_row: int, chosen: Sequence[Group]) -> None:
        """Keep the batches of optimizer steps that were not taken. Raises RunError when there are too many in a row."""
        for number, skip in enumerate(steps[: self._bounds.skipped + 1], 1):
            kept = self._keep(skip, number, chosen)
            where = f" Its batch is kept in {kept}." if kept else ""
            said = f"step {self.step}: the loss is {skip.loss} and the gradient's norm {skip.norm}: skipped.{where}"
            self.note("skipped", said, loss=str(skip.loss), norm=str(skip.norm), rows=len(skip.rows), kept=str(kept))
        if in_a_row > self._bounds.skipped:
            last = steps[-1]
            raise RunError(
                f"the loss is {last.loss} and the gradient's norm {last.norm}: {in_a_row} optimizer steps in a row "
                f"were not finite, and none of them was taken; faults.skipped allows {self._bounds.skipped}. The "
                f"batches are in {self._folder and self._folder / 'skipped'}. Lower learner.lr, or resume from the "
                "last checkpoint with another setting."
            )

    def _keep(self, skip: Skipped, number: int, chosen: Sequence[Group]) -> Path | None:
        """The batch as safetensors, and beside it, as JSON, what its rows are and which of them are to blame."""
        if self._folder is None:
            return None
        folder = self._folder / "skipped"
        folder.mkdir(exist_ok=True)
        path = folder / (f"step-{self.step:06d}" + (f"-{number}" if number > 1 else "") + ".safetensors")
        tensors = {f.name: getattr(skip.batch, f.name).cpu().clone() for f in fields(skip.batch)}
        about = {
            "step": self.step,
            "loss": str(skip.loss),
            "norm": str(skip.norm),
            "parameters": list(skip.parameters),
            "rows": [_row(i, chosen, skip) for i in range(len(skip.batch))],
        }
        with disk_errors(path), replacing(path) as scratch:
            save_file(tensors, scratch)
        with replacing(path.with_suffix(".json")) as scratch:
            scratch.write_text(json.dumps(about, indent=1))
        return path


def _row(i: int, chosen: Sequence[Group], skip: Skipped) -> dict[str, Any]:
    """What row `i` of a batch that was made of `chosen` is, and whether it alone is not finite."""
    scored = [t for group in chosen for t in group if t.total is not None]
    index = int(skip.batch.trajectory[i])
    found: Trajectory | None = scored[index] if index < len(scored) else None
    about = {"row": i, "finite": i not in skip.rows, "trajectory": index, "group": int(skip.batch.group[i])}
    if found is not None:
        about |= {"task_id": found.task.id, "prompt": prompt_of(found.task), "completion": found.completion}
        about |= {"score": str(found.total), "finish": found.finish, "drawn": found.drawn}
    return about
