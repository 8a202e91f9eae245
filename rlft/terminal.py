"""What a person sees: one live progress bar, a few samples with their rewards, and before against after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rlft.interval import told
from rlft.types import Group, Trajectory


class Terminal:
    """Writes to the terminal; where output is not a terminal, a line per step instead of the live bar."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=not Console().is_terminal)
        self._live = self.console.is_terminal
        self._progress: Progress | None = None
        self._bar = None

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Say what takes a while."""
        if not self._live:
            self.console.print(f"{what} ...")
            yield
        elif self._progress is not None:
            description = self._progress.tasks[0].description
            self._progress.update(self._progress.tasks[0].id, description=what)
            yield
            self._progress.update(self._progress.tasks[0].id, description=description)
        else:
            with self.console.status(what):
                yield

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text)

    def begin(self, start: int, steps: int) -> None:
        """Show the bar."""
        if not self._live:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._progress.add_task("training", total=steps, completed=start, numbers="")
        self._progress.start()

    def step(self, step: int, row: dict[str, float]) -> None:
        """Move the bar by one."""
        reward = row.get("reward/mean", float("nan"))
        generated, seconds = row.get("tokens/generated"), row.get("time/generate")
        speed = f", {generated / seconds:.0f} tokens/s" if generated and seconds else ""
        numbers = f"reward {reward:.3f}{speed}, gradient {row.get('loss/grad_norm', 0.0):.3f}"
        if self._progress is not None:
            self._progress.update(self._progress.tasks[0].id, completed=step, numbers=numbers)
        else:
            self.console.print(f"step {step}: {numbers}, {row['time/step']:.1f} s")

    def samples(self, step: int, groups: Sequence[Group], count: int) -> None:
        """A few trajectories of this step with their rewards."""
        table = Table(title=f"step {step}: samples", title_justify="left")
        for name in ("prompt", "completion", "score", "parts"):
            table.add_column(name, overflow="fold")
        for group in groups[:count]:
            trajectory = group[0]
            score = "none" if trajectory.total is None else f"{trajectory.total:.2f}"
            parts = ", ".join(f"{k[7:]} {v:.2g}" for k, v in trajectory.metrics.items() if _component(k))
            table.add_row(_prompt(trajectory), _clip(trajectory.completion), score, parts)
        self.console.print(table)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The result of one evaluation."""
        count = int(metrics["eval/tasks"])
        self.console.print(f"step {step}: held-out accuracy {told(metrics, 'eval/accuracy')} of {count} tasks")
        several = [f"{k[5:]} {told(metrics, k)}" for k in metrics if "@" in k and f"{k}_low" in metrics]
        if several:
            self.console.print(f"step {step}: {', '.join(several)}")
        if "eval/win_rate" in metrics:
            low, high = metrics["eval/win_rate_low"], metrics["eval/win_rate_high"]
            rate = metrics["eval/win_rate"]
            self.console.print(
                f"step {step}: better than before training in {rate:.1%} of tasks, ties half \\[{low:.1%}, {high:.1%}]"
            )

    def report(self, accuracies: list[tuple[int, str]], first: list[Group], last: list[Group]) -> None:
        """Before against after, side by side. accuracies: of a step, with its interval."""
        (start, before), (end, after) = accuracies[0], accuracies[-1]
        table = Table(title="held-out tasks, greedy", title_justify="left")
        for name in ("prompt", f"step {start}", f"step {end}"):
            table.add_column(name, overflow="fold")
        for old, new in list(zip(first, last, strict=True))[:8]:
            table.add_row(_prompt(new[0]), _clip(old[0].completion), _clip(new[0].completion))
        self.console.print(table)
        self.console.print(f"[bold]held-out accuracy: {before} before, {after} after[/bold]")

    def done(self, step: int, folder: Path, speaks: bool = True) -> None:
        """Where the run lies and what to do with it. speaks: it was trained in what it says, not in how it scores."""
        use = (
            f"Talk to it: rlft sample {folder}" if speaks else f"Score with it: reward={{type: model, path: {folder}}}"
        )
        self.console.print(f"done: {step} steps in {folder}. {use}", markup=False)

    def stopped(self, step: int, steps: int, folder: Path) -> None:
        """How to go on after Ctrl-C."""
        kept = f"step {step} of {steps} is kept. Go on with" if step else "nothing was learned yet. Begin again with"
        self.console.print(f"stopped: {kept}: rlft resume {folder}")

    def end(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _component(name: str) -> bool:
    return name.startswith("reward/") and name != "reward/missing"


def _prompt(trajectory: Trajectory) -> str:
    """What the policy was asked first, by the task or by its environment."""
    asked = trajectory.said[0].messages[:-1] if trajectory.said else trajectory.task.messages
    return _clip(str(asked[-1]["content"]) if asked else "")


def _clip(text: str, width: int = 160) -> str:
    """One safe line of text."""
    flat = escape(" ".join(text.split()))
    return flat if len(flat) <= width else flat[: width - 3] + "..."
