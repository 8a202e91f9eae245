"""What judges will be asked in a run, and what that costs at most, so that a plan says it before anything is spent.

Requests follow from the sizes of groups and the way a judge is asked. Tokens in are those of the template, filled in
with each task, and of answers as long as they may be; tokens out are what a reply may have. All are counted by the
policy's tokenizer and chat template, since a judge's own is behind its server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlft.material import Material
from rlft.rewards.base import Config
from rlft.rewards.judges import modes
from rlft.rewards.judges.endpoint import MILLION, Endpoint
from rlft.rewards.judges.judge import LlmJudge
from rlft.types import Task

TAG = 16  # tokens of the numbers in an answer's two tags, 8 hexadecimal digits each
BROKEN = "\ufffd"  # what a token becomes that is no whole character; a judge may read several tokens in it


@dataclass(frozen=True)
class Bill:
    """At most. tokens_out: None where a judge's replies are not limited, and then the cost is not known either."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int | None = 0
    cost: float | None = 0.0

    def __add__(self, other: Bill) -> Bill:
        return Bill(
            self.requests + other.requests,
            self.tokens_in + other.tokens_in,
            None if self.tokens_out is None or other.tokens_out is None else self.tokens_out + other.tokens_out,
            None if self.cost is None or other.cost is None else self.cost + other.cost,
        )

    def times(self, count: int) -> Bill:
        """So many of it."""
        out, cost = self.tokens_out, self.cost
        return Bill(
            self.requests * count,
            self.tokens_in * count,
            None if out is None else out * count,
            None if cost is None else cost * count,
        )


@dataclass(frozen=True)
class Billed:
    """One reward's judges over a run. step: one optimizer batch, of the tasks with the longest prompts; evaluation: one
    of `evaluations`; whole: all of the run."""

    reward: LlmJudge
    step: Bill
    evaluation: Bill
    evaluations: int
    whole: Bill


@dataclass(frozen=True)
class _Shown:
    """What a judge is shown of a task: groups of `size` answers, with so many requests each to every model."""

    size: int
    groups: int


def forecast(stuff: Material) -> list[Billed]:
    """For each judge in the run's reward, in order, and in `eval.verifier`; empty where there is none."""
    config = stuff.config
    count = evaluations(stuff)
    turns, draws = max(env.answers for env in config.envs), stuff.algorithm.draws
    size = config.rollout.group_size + sum(draw.count for draw in draws)
    found: list[Billed] = []
    if config.reward is not None:
        trained = _judges(config.reward, size, turns, sampling=True) if config.online else {}
        greedy, drawn = (_judges(config.reward, n, turns, sampling=False) for n in (1, config.eval.samples))
        for reward in {**trained, **greedy}.values():
            key = id(reward[0])
            shown = greedy[key][1] + (drawn[key][1] if config.eval.samples > 1 else [])
            found.append(_billed(stuff, reward[0], trained[key][1] if trained else [], shown, count))
    if config.eval.verifier is not None and config.eval.samples > 1:
        for reward, shown in _judges(config.eval.verifier, config.eval.samples, turns, sampling=False).values():
            found.append(_billed(stuff, reward, [], shown, count))
    return found


def evaluations(stuff: Material) -> int:
    """How many there are: before, after, and those in between."""
    config = stuff.config
    if not stuff.held_out:
        return 0
    due = range(config.eval.every, config.steps + 1, config.eval.every) if config.eval.every else range(0)
    return 1 + len({*due, config.steps} - {0})


def lines(stuff: Material) -> list[str]:
    """The forecast in words."""
    return [text for billed in forecast(stuff) for text in _said(billed, stuff.config.steps)]


def _said(billed: Billed, steps: int) -> list[str]:
    names = ", ".join(f"{key} ({judge.model})" for key, judge in billed.reward.judges.items())
    parts = [f"{steps} steps"] if billed.step.requests else []
    parts += [f"{billed.evaluations} evaluations"] if billed.evaluation.requests else []
    limit = billed.reward.budget
    stop = f"; budget: {limit:g}, where a session stops" if limit is not None else ""
    found = [f"{billed.reward.mode}, by {names}: at most, without tries that are made again"]
    found += [f"a step: {_worded(billed.step)}"] if billed.step.requests else []
    found += [f"an evaluation: {_worded(billed.evaluation)}"] if billed.evaluation.requests else []
    return [*found, f"in all ({' and '.join(parts) or 'nothing'}): {_worded(billed.whole)}{stop}"]


def _worded(bill: Bill) -> str:
    out = "no limit to those" if bill.tokens_out is None else f"{bill.tokens_out}"
    cost = ", no limit to the cost" if bill.cost is None else f", cost {bill.cost:.4g}" if bill.cost else ""
    return f"{bill.requests} requests, {bill.tokens_in} tokens in and {out} out{cost}"


def _judges(reward: Config, size: int, turns: int, sampling: bool) -> dict[int, tuple[LlmJudge, list[_Shown]]]:
    """What each judge in a reward is shown of a group, by its identity."""
    found: dict[int, tuple[LlmJudge, list[_Shown]]] = {}
    for one, shown, groups in reward.judged(size, turns, sampling):
        if isinstance(one, LlmJudge):
            found.setdefault(id(one), (one, []))[1].append(_Shown(shown, groups))
    return found


def _billed(
    stuff: Material, reward: LlmJudge, trained: Sequence[_Shown], evaluated: Sequence[_Shown], count: int
) -> Billed:
    rollout = stuff.config.rollout
    rounds = rollout.rounds if stuff.algorithm.refill else 1
    answer = _longest(stuff)
    a_step = rollout.tasks_per_step * rounds
    tasks = stuff.tasks if trained else []
    step = sum((_bill(stuff, reward, shown, tasks, a_step, answer) for shown in trained), Bill())
    run = sum((_bill(stuff, reward, s, tasks, a_step * stuff.config.steps, answer) for s in trained), Bill())
    held_out = stuff.held_out
    once = sum((_bill(stuff, reward, shown, held_out, len(held_out), answer) for shown in evaluated), Bill())
    return Billed(reward, step, once, count, run + once.times(count))


def _bill(stuff: Material, reward: LlmJudge, shown: _Shown, tasks: Sequence[Task], drawn: int, answer: int) -> Bill:
    """For `drawn` of the tasks, each as often as the others but for one, the longest most often."""
    requests = modes.REQUESTS[reward.mode](reward, shown.size) * shown.groups
    if not tasks or not requests:
        return Bill()
    answers = modes.sample(reward.mode, shown.size, "")
    each = sum(1 if isinstance(said, str) else len(said) for said in answers.values())
    asked = [len(stuff.chat.prompt(modes.told(reward, task, shown.size, answers))) for task in tasks]
    epochs, rest = divmod(drawn, len(tasks))
    prompts = epochs * sum(asked) + sum(sorted(asked, reverse=True)[:rest])
    tokens_in = requests * (prompts + drawn * each * (answer + TAG))
    bills = (_of(judge, requests * drawn, tokens_in, reward.mode) for judge in reward.judges.values())
    return sum(bills, Bill())


def _of(judge: Endpoint, requests: int, tokens_in: int, mode: str) -> Bill:
    reply = judge.longest(mode == "yes_probability") or judge.extra.get("max_completion_tokens")
    if not isinstance(reply, int):
        return Bill(requests, tokens_in, None, None if judge.price_out else tokens_in * judge.price_in / MILLION)
    out = requests * reply
    return Bill(requests, tokens_in, out, (tokens_in * judge.price_in + out * judge.price_out) / MILLION)


def _longest(stuff: Material) -> int:
    """Tokens that a judge reads of an answer at most: one turn's, or all that there is room for, in an episode and
    where answers were written down or are gone on with."""
    config = stuff.config
    further = any(draw.recorded or draw.go_on for draw in stuff.algorithm.draws)
    explored = config.reward is not None and config.reward.explored > 0
    whole = any(env.several for env in config.envs) or further or explored
    return (stuff.context if whole else config.rollout.sampling.max_tokens) * max(1, len(stuff.chat.encode(BROKEN)))
