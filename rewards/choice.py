"""Exam questions: the letter or letters that a completion chooses, and pairs such as 1-C, 2-A.

A letter is read where people put it: in a box, after "answer", in brackets, at the start of a line, alone at the end.
Stronger places come first, and of one kind of place the last counts, for that is what the text ends on. A letter
within prose ("A train leaves") is no choice. Matching tasks and their partial credit are those of the exam work of
Syromiatnikov et al. 2025, arXiv:2503.13988, whose exams pair numbers with letters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal

from pydantic import Field

from rlft.rewards.base import KEY_HELP, Config, answer
from rlft.rewards.math_text import last_box, tagged
from rlft.types import Group, InputError, Reward, Task, Trajectory

WRAPPING = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")
ANSWER = "answers?|відповід[ьі]|ответы?|antwort|réponse|respuesta|答案"
OPTION = "option|choice"  # one of them: "options A and C are wrong" chooses nothing
BEFORE = r"[*_$\s`\"']*(?:\\[(\[]|\\(?:text|math)(?:bf|rm|it)?\{)?[(\[`\"']*(?:letter\s+)?"
SAYS, NAMES = (
    re.compile(rf"\b(?:{words})\b(?:\s+(?:is|are|would\s+be|must\s+be))?\s*[:：]?{BEFORE}", re.IGNORECASE)
    for words in (ANSWER, OPTION)
)
RIGHTLY = r"is\s+(?:the\s+)?(?:correct|right|best)"
# "A train" is no choice of A, and "A, B" none of one letter.
GOES_ON = rf"(?![\w'])(?!\s+(?!because|since|as|and|or|with|та|і|{RIGHTLY})[a-zа-я])"
SEPARATED = r"(?:\s*(?:[-–—:=.)]|->|→|\\to|\\rightarrow)+\s*|)"
PAIR = re.compile(rf"(?<![\w.])\(?(\d{{1,2}})\)?{SEPARATED}\(?([A-Za-z\u0400-\u04ff])\)?{GOES_ON}")


class Choice(Config):
    """1 if the letter or letters that the completion chooses are the right ones, else 0.

    Logged as reward/<name>/unread: the share of completions in which no choice was found.
    """

    type: Literal["choice"] = "choice"
    key: str = Field(default="answer", description=KEY_HELP + " A letter, several (`AC`, `A, C`, a list), or a text.")
    letters: str = Field(default="ABCDE", min_length=2, description="The letters that may be chosen, in their order.")
    options: str | None = Field(
        default=None,
        description="Column with the options' texts, a list or a mapping by letter; a text may then be said in place "
        "of its letter, and may be what `key` holds.",
    )
    partial: bool = Field(
        default=False,
        description="Where several letters are right: the share of letters that are judged rightly, chosen or not.",
    )

    def judge(self, name: str) -> Reward:
        letters = self.letters.upper()

        async def judge(group: Group) -> list[float | None]:
            task = group[0].task
            texts = _texts(task, self.options, letters)
            right = _right(task, self.key, letters, texts)
            verdicts: list[float | None] = []
            for trajectory in group:
                said = self.said(trajectory) or frozenset()
                trajectory.metrics[f"reward/{name}/unread"] = float(not said)
                verdicts.append(self._worth(right, said, len(texts) or len(letters)))
            return verdicts

        return judge

    def said(self, trajectory: Trajectory) -> frozenset[str] | None:
        letters = self.letters.upper()
        texts = _texts(trajectory.task, self.options, letters)
        several = len(_right(trajectory.task, self.key, letters, texts)) > 1
        return frozenset(chosen(trajectory.completion, letters, texts, several)) or None

    def _worth(self, right: set[str], said: AbstractSet[str], count: int) -> float:
        if not self.partial or not said or len(right) == 1:
            return float(said == right)
        return max(0.0, 1 - len(right ^ said) / count)


class Matching(Config):
    """How many of the pairs, such as 1-C and 2-A, are the right ones; all or nothing unless partial.

    Logged as reward/<name>/unread: the share of completions in which no pair was found.
    """

    type: Literal["matching"] = "matching"
    key: str = Field(default="answer", description=KEY_HELP + " Pairs as text (`1-C, 2-A`) or a mapping.")
    partial: bool = Field(default=True, description="The share of the right pairs. false: 1 if all are right, else 0.")

    def judge(self, name: str) -> Reward:
        async def judge(group: Group) -> list[float | None]:
            right = _right_pairs(group[0].task, self.key)
            verdicts: list[float | None] = []
            for trajectory in group:
                said = pairs(trajectory.completion, set(right))
                trajectory.metrics[f"reward/{name}/unread"] = float(not said)
                share = sum(said.get(number) == letter for number, letter in right.items()) / len(right)
                verdicts.append(share if self.partial else float(share == 1))
            return verdicts

        return judge

    def said(self, trajectory: Trajectory) -> frozenset[tuple[str, str]] | None:
        numbers = set(_right_pairs(trajectory.task, self.key))
        return frozenset(pairs(trajectory.completion, numbers).items()) or None


def chosen(text: str, letters: str, texts: Mapping[str, str], several: bool = False) -> set[str]:
    """The letters that a text chooses, or those of the option whose text it says; empty where it chooses none.

    several: more than one letter may be right, so that "A, C" and "AC" are two.
    """
    place = _place(text)
    if place is not None:
        return _alone(place, letters, texts, several)
    for found in (
        _after(SAYS, text, letters, texts, several),
        _after(NAMES, text, letters, texts, several),
        _last(rf"\b([{letters}])\)? {RIGHTLY}", text),
        _last(rf"(?m)^[^\w\n]*+([{letters}])[^\w\n]*+$", text),
        _last(rf"[(\[]\s*([{letters}])\s*[)\]]", text),
        _last(rf"\A\W*([{letters}])\s*[.):](?!.*\b[{letters}][.):])", text),
        _last(rf"(?:[Tt]herefore|[Tt]hus|[Hh]ence|[Ss]o),? \(?([{letters}])\W*\Z", text),
    ):
        if found:
            return found
    return _alone(text, letters, texts, several)


def pairs(text: str, numbers: set[str]) -> dict[str, str]:
    """The letter that stands with each of the numbers; the last one, where a number has several."""
    place = _place(text)
    found = PAIR.findall(WRAPPING.sub(r"\1", text if place is None else place))
    return {number: letter.upper() for number, letter in found if number in numbers}


def _place(text: str) -> str | None:
    """What the last box or else the last <answer> tag holds; None where there is neither."""
    boxed, _ = last_box(text)
    return tagged(text) if boxed is None else boxed


def _alone(text: str, letters: str, texts: Mapping[str, str], several: bool) -> set[str]:
    """The choice in a text that is the choice and nothing else: (B), B., B) the text of it, or the text."""
    bare = WRAPPING.sub(r"\1", text).strip().strip("$*().[]: ").strip()
    if by_text := _by_text((text, bare), texts):
        return by_text
    if len(bare) == 1 and bare.upper() in letters:
        return {bare.upper()}
    if several:
        return _letters(bare, letters)
    match = re.match(rf"([{letters}])\s*(?:[.):]|\s-)\s(?!(?s:.*)\b[{letters}]\s*(?:[.):]|\Z))", bare)
    return {match[1]} if match else set()


def _by_text(said: Sequence[str], texts: Mapping[str, str]) -> set[str]:
    """The letter of the one option whose text is said; empty where it is none or more than one."""
    plain = {_plain(text) for text in said}
    found = {letter for letter, option in texts.items() if _plain(option) in plain}
    return found if len(found) == 1 else set()


def _after(marker: re.Pattern[str], text: str, letters: str, texts: Mapping[str, str], several: bool) -> set[str]:
    """The letters, or an option's text, behind the last marker that has some behind it."""
    upper, lower = f"[{letters}]", f"[{letters.lower()}]"
    listed = rf"(?![)\]*`\"']*(?:\s*[,;/&]\s*|\s+(?:and|or)\s+|\s+)\(?{upper}\b)"
    one = rf"{upper}{GOES_ON}{listed}|{lower}(?=\W*$|\s*[.,;)\]}}*])"
    many = rf"(?:both\s+)?(?:\(?{upper}\)?(?![\w'])\s*(?:,|;|&|and\b|та\b)?\s*)+|{upper}{{2,}}(?!\w)"
    longest = 2 * max(map(len, texts.values()), default=0)
    for says in reversed(list(marker.finditer(text))):
        found = re.compile(many if several else one, re.MULTILINE).match(text, says.end())
        if found and (letters_said := _letters(re.sub(r"^both\s+", "", found[0]).upper(), letters)):
            return letters_said
        rest = text[says.end() : says.end() + longest].partition("\n")[0]
        if by_text := _by_text((rest, rest.rstrip("*_$`\"'}) .")), texts):
            return by_text
    return set()


def _last(pattern: str, text: str) -> set[str]:
    return set(re.findall(pattern, text)[-1:])


def _letters(text: str, letters: str) -> set[str]:
    """Letters that stand alone with commas, "and", spaces or nothing between them; empty if anything else is there."""
    left = re.sub(r"\b(?:and|та)\b|[\s,;&().*$]", "", text, flags=re.IGNORECASE)
    return set(left) if left and set(left) <= set(letters) and len(set(left)) == len(left) else set()


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().strip(".").casefold()


def _texts(task: Task, column: str | None, letters: str) -> dict[str, str]:
    """The options by letter. Raises InputError where the column holds no options or more than there are letters."""
    if column is None:
        return {}
    held: Any = task.info.get(column)
    if isinstance(held, Mapping):
        texts = {str(letter).upper(): str(text) for letter, text in held.items() if text is not None}
        if texts and set(texts) <= set(letters):
            return texts
    elif isinstance(held, Sequence) and not isinstance(held, str) and 0 < len(held) <= len(letters):
        return dict(zip(letters, map(str, held), strict=False))
    raise InputError(
        f"task '{task.id}': column '{column}' holds {held!r}, and not the options that `options` names: a list of at "
        f"most {len(letters)} texts, or a mapping by the letters {letters}. Repair that row, or set `letters`."
    )


def _right(task: Task, key: str, letters: str, texts: Mapping[str, str]) -> set[str]:
    """The right letters. Raises InputError where the column holds neither letters nor the text of an option."""
    held: Any = task.info.get(key)
    listed = isinstance(held, Sequence) and not isinstance(held, str) and len(held) > 0
    said = ", ".join(map(str, held)) if listed else answer(task, key)
    right = _alone(said, letters, texts, several=False) or _letters(said.upper(), letters)
    if not right:
        raise InputError(
            f"task '{task.id}': column '{key}' holds {said!r}, which is none of the letters {letters} and no option's "
            "text. Repair that row, or set the reward's `letters` and `options`."
        )
    return right


def _right_pairs(task: Task, key: str) -> dict[str, str]:
    """The right pairs. Raises InputError where the column holds none."""
    held: Any = task.info.get(key)
    said = ", ".join(f"{number}-{letter}" for number, letter in held.items()) if isinstance(held, Mapping) else None
    text = said if said is not None else answer(task, key)
    found = {number: letter.upper() for number, letter in PAIR.findall(text)}
    if not found:
        raise InputError(
            f"task '{task.id}': column '{key}' holds {text!r}, in which there is no pair such as 1-C. Repair that row, "
            "or set the reward's `key` to the column that holds the pairs."
        )
    return found
