"""What happens around the steps of a run: records, evaluation, checkpoints, and the terminal."""

from __future__ import annotations

import time
from pathlib import Path

from rlft.agents import learners
from rlft.batch import note_advantages
from rlft.build import Parts
from rlft.chance import undisturbed
from rlft.checkpoint import Checkpoints
from rlft.evaluate import win_rate
from rlft.guards import Guards, signs
from rlft.interval import told
from rlft.terminal import Terminal
from rlft.track import Record, summary
from rlft.types import Group


class Around:
    """The hooks of `train`. Evaluation and checkpoints are timed apart; `time/step` leaves them out."""

    def __init__(self, parts: Parts, record: Record, checkpoints: Checkpoints, terminal: Terminal) -> None:
        self._parts = parts
        self._config = parts.material.config
        self._record = record
        self._checkpoints = checkpoints
        self._terminal = terminal
        self._faults = parts.faults
        self._guards = Guards()
        self._components = self._config.reward.components() if self._config.reward is not None else []
        self.first: list[Group] = []
        self.last: list[Group] = []
        self._accuracies: list[tuple[int, str]] = []
        self._saved = -1
        self._writing: dict[str, float] = {}  # what the last checkpoint took, for the next row

    async def before(self, start: int) -> None:
        """See `Hooks.before`: the evaluation before training is the row of step 0."""
        self._saved = start if start else -1
        self._faults.step = start + 1
        if self._parts.evaluation is not None:
            metrics = await self._evaluate(start, record=start == 0)
            self.first = self.last
            if start == 0:
                self._record.metrics(0, {k: v for k, v in metrics.items() if k.startswith("eval/")})
        self._terminal.begin(start, self._config.steps)

    async def after(self, step: int, groups: list[Group], chosen: list[Group], metrics: dict[str, float]) -> None:
        """See `Hooks.after`."""
        begun = time.perf_counter()
        seen = signs(groups, self._components)
        row = summary(groups) | seen | metrics | self._lag(step, chosen) | self._writing
        self._writing = {}
        learned = learners(self._parts.trainee)
        for credited in (learner.credited for learner in learned):
            if credited is not None:
                note_advantages(credited, chosen)
        self._record.trajectories("rollouts", step, groups)
        last = step == self._config.steps
        improved = False
        beside = 0.0
        if self._due(self._config.eval.every, step) or last:
            begun_eval = time.perf_counter()
            row |= await self._evaluate(step)
            improved = self._checkpoints.improved(step, row.get("eval/accuracy"))
            beside += time.perf_counter() - begun_eval
        row["time/step"] += time.perf_counter() - begun - beside
        self._record.metrics(step, row)  # first: a row without its checkpoint is cut, one that is lost is not made up
        skipped = [step for learner in learned for step in learner.skipped]
        self._faults.skipped(skipped, max(learner.stepper.skipped_in_a_row for learner in learned), chosen)
        if self._due(self._config.checkpoint.every, step) or last or improved:
            self._save(step)
        self._terminal.step(step, row)
        for warning in self._guards.warnings(seen):
            self._terminal.say(warning)
        if self._due(self._config.show.every, step):
            self._terminal.samples(step, groups, self._config.show.samples)
        self._faults.step = step + 1

    def _lag(self, step: int, chosen: list[Group]) -> dict[str, float]:
        """By how many versions what was trained on was older than the weights it moved, where sampling goes ahead."""
        if not self._parts.source.overlaps:
            return {}
        own = [sample.version for group in chosen for t in group if not t.drawn for sample in t.samples]
        ages = [step - 1 - version for version in own]
        return {"rollout/lag": sum(ages) / max(len(ages), 1)}

    def keep(self, step: int) -> None:
        """Save what was learned up to `step`, if that is not done yet."""
        if step > 0 and step != self._saved:
            self._save(step)

    async def finish(self, step: int, stopped: bool) -> None:
        """See `Hooks.finish`: what was learned is kept, and the user is told how to go on."""
        self.keep(step)
        self._terminal.end()
        if stopped:
            self._terminal.stopped(step, self._config.steps, self._record.folder)
            return
        if self._accuracies:
            self._terminal.report(self._accuracies, self.first, self.last)
        self._terminal.done(step, self._record.folder, speaks=self._parts.material.algorithm.vocabulary)

    async def _evaluate(self, step: int, record: bool = True) -> dict[str, float]:
        """record: False where a resumed run measures what it goes on from, which is recorded if it was due."""
        evaluation = self._parts.evaluation
        if evaluation is None:
            return {}
        with self._terminal.busy(f"evaluating {len(evaluation.tasks)} held-out tasks"):
            synced = await self._parts.serve(step)
            with undisturbed():
                metrics, self.last = await evaluation(step)
        if record:
            self._record.trajectories("eval", step, self.last)
        if step and record:
            metrics |= win_rate(self._record.scores("eval", 0), self._record.scores("eval", step))
        self._accuracies.append((step, told(metrics, "eval/accuracy")))
        self._terminal.evaluated(step, metrics)
        return synced | metrics

    def _save(self, step: int) -> None:
        begun = time.perf_counter()
        self._checkpoints.save(step, self._parts.trainee, self._parts.source)
        self._saved = step
        self._writing = {"time/checkpoint": time.perf_counter() - begun}

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0


def run_folder(out: str | None, name: str) -> Path:
    """The folder of a new run: `out`, else runs/<name>; one that ends in -N takes the next free number."""
    text = out or f"runs/{name}"
    if not text.endswith("-N"):
        return Path(text)
    number = 1
    while (folder := Path(f"{text[:-1]}{number}")).exists():
        number += 1
    return folder
