"""Rows to tasks and groups; bad rows are refused by number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from rlft.chat import Chat
from rlft.rows import Row, first_few, refuse
from rlft.steps import ends, join
from rlft.types import NAN, Group, InputError, Message, Sample, Task, Trajectory

OBJECTIVE = "objectives/"
ASKING = ("question", "problem")
OF_ANSWERS = ("completion", "completions", "chosen", "rejected", "scores", "ranks", "labels", "objectives")


def tasks(rows: Sequence[Row], columns: Mapping[str, str], name: str) -> list[Task]:
    """A task per row. name: of the data, for ids and messages. Raises InputError with the numbers of bad rows."""
    renamed = _rename(rows, columns, name)
    role = "messages" if "messages" in renamed[0] and "prompt" not in columns else "prompt"
    _require(renamed, role, columns, name)
    opened = [_messages(row[role]) for row in renamed]
    refuse([i for i, messages in enumerate(opened) if messages is None], f"{role} is empty or null", name)
    last = [i for i, m in enumerate(opened) if m and m[-1]["role"] == "assistant"]
    refuse(last, "the messages end with the assistant, so there is nothing to answer", name)
    return [_task(row, messages or (), role, f"{name}:{i + 1}") for i, (row, messages) in
            enumerate(zip(renamed, opened, strict=True))]  # fmt: skip


def recorded(
    rows: Sequence[Row],
    columns: Mapping[str, str],
    name: str,
    chat: Chat,
    word: Callable[[Task], Task] = lambda task: task,
) -> list[Group]:
    """A group per row: a demonstration of one, a pair of two with scores 1 and 0, or scored completions.

    Roles: messages that end with the assistant; or prompt with completion (and its label: true scores 1, false 0),
    with chosen and rejected, or with completions and their scores or ranks (the best scores 1, the worst 0). Without a
    prompt, it is what chosen and rejected share. Completions with labels are the steps of one answer (TRL's stepwise
    supervision); a label is 1 or -1 in the sample's rewards. `objectives` (numbers by name, one such entry for each
    answer) and `objectives/<name>` stand in the trajectory's metrics, as a reward's components do. `samples` beside a
    completion are the tokens of the whole episode as they were sampled, and `score` is its score. word: puts a task
    into the run's own words.
    """
    renamed = _rename(rows, columns, name)
    groups = []
    bad: dict[str, list[int]] = {}
    for i, row in enumerate(renamed):
        try:
            sampled = _is_sampled(row.get("samples"))
            prompt, answers = (_messages(row.get("prompt")) or (), []) if sampled else _answers(row)
            task = word(_task(row, prompt, "prompt", f"{name}:{i + 1}"))
            recordings = (_recorded(task, answer, chat) for answer in answers)
            groups.append((_as_sampled(task, row, chat),) if sampled else tuple(recordings))
        except _BadRow as error:
            bad.setdefault(str(error), []).append(i)
    for reason, where in bad.items():
        refuse(where, reason, name)
    return groups


def prompt_lengths(tasks: Iterable[Task], chat: Chat) -> list[tuple[str, int]]:
    """Id and tokens of every task's prompt. Raises InputError that names all tasks that the chat template refuses."""
    lengths = []
    bad: dict[str, list[str]] = {}
    for task in tasks:
        try:
            lengths.append((task.id, len(chat.prompt(task.messages))))
        except InputError as error:
            bad.setdefault(str(error), []).append(task.id)
    for reason, where in bad.items():
        raise InputError(f"data: {len(where)} row(s) where {reason}: {first_few(where)}")
    return lengths


def of_answers(role: str) -> bool:
    """The role says something of recorded answers, so that tasks to be answered have no such column."""
    return role in OF_ANSWERS or role.startswith(OBJECTIVE)


def check_lengths(lengths: Iterable[tuple[str, int]], room: int, what: str) -> None:
    """Refuse what is longer than `room` tokens. lengths: (id, tokens)."""
    long = [(name, n) for name, n in lengths if n > room]
    if long:
        name, n = max(long, key=lambda entry: entry[1])
        listed = first_few([name for name, _ in long])
        raise InputError(
            f"data: {len(long)} {what} longer than {room} tokens, all that the context leaves; the longest is {name} "
            f"with {n}. Rows: {listed}. Shorten them, lower rollout.sampling.max_tokens, or raise "
            "rollout.engine.context if the model allows it."
        )


class _BadRow(Exception):
    """One row's mistake; collected so that all rows with it are named at once."""


def _rename(rows: Sequence[Row], columns: Mapping[str, str], name: str) -> list[dict[str, Any]]:
    """Rows under role names. A column that is asked for and nowhere to be found is refused."""
    have = {key for row in rows for key in row}
    columns = {**_asking(have, columns), **columns}
    for role, column in columns.items():
        if column not in have:
            raise InputError(f"data.columns.{role}: {name} has no column {column!r}; it has {', '.join(sorted(have))}")
    named = set(columns.values())
    kept = [{key: value for key, value in row.items() if key not in named} for row in rows]
    return [
        left | {role: row[column] for role, column in columns.items() if column in row}
        for left, row in zip(kept, rows, strict=True)
    ]


def _asking(have: Set[str], columns: Mapping[str, str]) -> dict[str, str]:
    """The column that is the prompt in data without `prompt` and `messages`, under a name that many use for it."""
    if {"prompt", "messages"} & (have | set(columns)):
        return {}
    found = next((name for name in ASKING if name in have and name not in columns.values()), None)
    return {"prompt": found} if found else {}


def _require(rows: Sequence[Row], role: str, columns: Mapping[str, str], name: str) -> None:
    if not any(role in row for row in rows):
        have = ", ".join(sorted({key for row in rows for key in row}))
        raise InputError(
            f"data.columns.{role}: {name} has no column {role!r}; say which of its columns it is, e.g. "
            f"data.columns.{role}=... It has {have}"
        )
    refuse([i for i, row in enumerate(rows) if row.get(role) is None], f"{role} is null or missing", name)


def _messages(value: Any) -> tuple[Message, ...] | None:
    """A prompt as messages; None where there is nothing."""
    if isinstance(value, str):
        return ({"role": "user", "content": value},) if value.strip() else None
    if not isinstance(value, list | tuple) or not value:
        return None
    if not all(isinstance(m, Mapping) and m.get("role") and m.get("content") is not None for m in value):
        return None
    return tuple(dict(m) for m in value)


def _task(row: Row, messages: tuple[Message, ...], role: str, name: str) -> Task:
    return Task(name, messages, {key: value for key, value in row.items() if key != role})


@dataclass(frozen=True)
class _Answer:
    """What was said to a prompt. labels: of its steps, None where a step has none. objectives: its score in each."""

    said: str
    score: float = 1.0
    steps: tuple[str, ...] = ()
    labels: tuple[bool | None, ...] = ()
    objectives: Mapping[str, float] = field(default_factory=dict)


def _answers(row: Row) -> tuple[tuple[Message, ...], list[_Answer]]:
    """The prompt of a recorded row, and what was said to it."""
    prompt, answers = _implicit(row) or (_messages(row.get("prompt")), [])
    if prompt is None:
        raise _BadRow("prompt is empty, null or missing")
    if not answers:
        answers = ANSWERS[next((role for role in ANSWERS if role in row), "completion")](row)
    objectives = _objectives(row, len(answers))
    return prompt, [replace(answer, objectives=o) for answer, o in zip(answers, objectives, strict=True)]


def _implicit(row: Row) -> tuple[tuple[Message, ...], list[_Answer]] | None:
    """Prompt and answers of a row without a column for the prompt."""
    if "prompt" not in row and "messages" in row:
        messages = _messages(row["messages"])
        if not messages or messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise _BadRow("messages do not end with an answer of the assistant")
        return messages[:-1], [_Answer(str(messages[-1]["content"]))]
    if "prompt" not in row and "chosen" in row and "rejected" in row:
        prompt, chosen, rejected = _shared(row["chosen"], row["rejected"])
        return prompt, [_Answer(chosen), _Answer(rejected, 0.0)]
    return None


def _pair(row: Row) -> list[_Answer]:
    return [_Answer(_said(row, "chosen")), _Answer(_said(row, "rejected"), 0.0)]


def _single(row: Row) -> list[_Answer]:
    """One completion; its score is 1 where nothing says otherwise."""
    if "label" in row and row["label"] not in (True, False):
        raise _BadRow(
            "label is neither true nor false (if it is not about the completion, give it another role, such as "
            "data.columns.topic=label)"
        )
    return [_Answer(_said(row, "completion"), float(row.get("label", 1.0)))]


def _several(row: Row) -> list[_Answer]:
    """Completions with a verdict on each; or, with labels, the steps of one completion."""
    said = row["completions"]
    plain = "objectives" in row or any(key.startswith(OBJECTIVE) for key in row)
    kind = next((role for role in VERDICTS if role in row), None)
    verdicts = [1.0] * len(said) if kind is None and plain and isinstance(said, list) else row.get(kind or "scores")
    if not isinstance(said, list) or not isinstance(verdicts, list) or len(said) != len(verdicts) or not said:
        raise _BadRow(f"completions and {kind or 'scores'} are not two lists of one length")
    return VERDICTS[kind or "scores"]([_text(one, "completions") for one in said], verdicts)


def _scored(said: list[str], scores: list[Any]) -> list[_Answer]:
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in scores):
        raise _BadRow("a score is not a finite number")
    return [_Answer(text, float(x)) for text, x in zip(said, scores, strict=True)]


def _ranked(said: list[str], ranks: list[Any]) -> list[_Answer]:
    """1 for the best rank, 0 for the worst, evenly between them."""
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in ranks):
        raise _BadRow("a rank is not a number (1 is the best)")
    best, worst = min(ranks), max(ranks)
    return [_Answer(text, (worst - x) / ((worst - best) or 1)) for text, x in zip(said, ranks, strict=True)]


def _stepped(said: list[str], labels: list[Any]) -> list[_Answer]:
    """The steps of one answer, as in PRM800K and Math-Shepherd; no score of the whole."""
    if any(label not in (True, False, None) for label in labels):
        raise _BadRow("a step's label is none of true, false and null")
    known = tuple(None if label is None else bool(label) for label in labels)
    return [_Answer(join(said), 0.0, tuple(said), known)]


ANSWERS: dict[str, Callable[[Row], list[_Answer]]] = {
    "chosen": _pair, "rejected": _pair, "completions": _several, "completion": _single,
}  # fmt: skip
VERDICTS: dict[str, Callable[[list[str], list[Any]], list[_Answer]]] = {
    "scores": _scored, "ranks": _ranked, "labels": _stepped,
}  # fmt: skip


def _objectives(row: Row, count: int) -> list[dict[str, float]]:
    """The scores of each of `count` answers by objective, from the role `objectives` and all `objectives/<name>`."""
    found: list[dict[str, float]] = [{} for _ in range(count)]
    for one, entry in zip(found, _per_answer(row.get("objectives", {}), count), strict=True):
        if not isinstance(entry, Mapping | None):
            raise _BadRow("objectives are not numbers by name (if the column is something else, give it another role)")
        one.update({name: _number(name, value) for name, value in (entry or {}).items() if value is not None})
    for name in (key.removeprefix(OBJECTIVE) for key in row if key.startswith(OBJECTIVE)):
        for one, value in zip(found, _per_answer(row[OBJECTIVE + name], count), strict=True):
            if value is not None:
                one[name] = _number(name, value)
    return found


def _per_answer(value: Any, count: int) -> list[Any]:
    """A list with an entry for each answer; a single answer's entry may stand alone, and nothing is nothing for all."""
    if not value and not isinstance(value, int | float):
        return [None] * count
    entries = [value] if count == 1 and not isinstance(value, list) else value
    if not isinstance(entries, list) or len(entries) != count:
        raise _BadRow("objectives are not one entry for each answer")
    return entries


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise _BadRow(f"the objective {name} is not a finite number")
    return float(value)


def _shared(chosen: Any, rejected: Any) -> tuple[tuple[Message, ...], str, str]:
    """Prompt, chosen and rejected of a row without a prompt: messages that both have, or words that both begin with."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        same = min(len(chosen), len(rejected)) if same is None else same
        start = max((i + 1 for i in range(same) if chosen[i].isspace()), default=0)
        prompt = _messages(chosen[:start])
        if prompt is None:
            raise _BadRow("there is no prompt, and chosen and rejected do not begin alike")
        return prompt, _text(chosen[start:], "chosen"), _text(rejected[start:], "rejected")
    good, bad = _messages(chosen), _messages(rejected)
    if not good or not bad or len(good) < 2 or good[:-1] != bad[:-1]:
        raise _BadRow("there is no prompt, and chosen and rejected do not share all messages but the last")
    if (good[-1]["role"], bad[-1]["role"]) != ("assistant", "assistant"):
        raise _BadRow("chosen and rejected do not end with an answer of the assistant")
    return good[:-1], _text(good, "chosen"), _text(bad, "rejected")


def _said(row: Row, role: str) -> str:
    return _text(row.get(role), role)


def _text(value: Any, role: str) -> str:
    """A completion as text: a string, or messages whose last is the assistant's."""
    if isinstance(value, list | tuple) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise _BadRow(f"{role} is empty, null or missing")
    return value


def _is_sampled(value: Any) -> bool:
    """Samples as `rlft serve-policy --record` writes them."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(o, dict) and {"tokens", "mask"} <= set(o) for o in value)
    )


def _as_sampled(task: Task, row: Row, chat: Chat) -> Trajectory:
    """An episode whose tokens were kept: nothing is encoded again. Its text is for the reader, and may be empty."""
    samples = []
    for one in row["samples"]:
        tokens, mask = list(one["tokens"]), [chosen is True for chosen in one["mask"]]
        if not tokens or len(mask) != len(tokens) or not all(isinstance(t, int) and t >= 0 for t in tokens):
            raise _BadRow("samples are not tokens with a mask of their length")
        if max(tokens) >= chat.vocabulary:
            raise _BadRow("samples have tokens that this model's tokenizer does not; another model said them")
        samples.append(Sample(tokens, mask, [NAN] * len(tokens), [0.0] * len(tokens), -1))
    score = row.get("score", 1.0)
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise _BadRow("score is not a finite number")
    said = {"role": "assistant", "content": str(row.get("completion") or "")}
    return Trajectory(task, (*task.messages, said), samples, score=float(score))


def _recorded(task: Task, answer: _Answer, chat: Chat) -> Trajectory:
    """An answer as a trajectory: a label is 1 or -1 in `rewards` at its step's last token."""
    messages = (*task.messages, {"role": "assistant", "content": answer.said})
    try:
        prompt, completion = chat.demonstration(messages)
    except InputError as error:
        raise _BadRow(str(error)) from error
    n, k = len(prompt), len(completion)
    rewards = [0.0] * (n + k)
    try:
        places = ends(chat.decode, completion, answer.steps)
    except ValueError as error:
        raise _BadRow("a step is not in what the chat template writes") from error
    if len(set(places)) < len(places):
        raise _BadRow("two steps end with the same token; join them")
    for place, label in zip(places, answer.labels, strict=True):
        rewards[n + place] = 0.0 if label is None else 1.0 if label else -1.0
    sample = Sample(prompt + completion, [False] * n + [True] * k, [NAN] * (n + k), rewards, -1)
    metrics = {f"reward/{name}": value for name, value in answer.objectives.items()}
    return Trajectory(task, messages, [sample], score=answer.score, metrics=metrics)
