"""The 25 kinds of instruction that a program can check, of Zhou et al., Instruction-Following Evaluation for Large
Language Models (arXiv:2311.07911), under the names and keywords of the published data set.

They are rules of thumb that models are compared by, so the verdicts are those of the published evaluation code, its
oddities included: a keyword is a regular expression and is found inside a longer word; a text in which no language is
to be found counts as written in the one asked for; ***both*** counts as two highlights. Where that code draws a
missing or impossible keyword at random, this refuses it: nobody asked the policy for what a die says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, validate_call

from rlft.rewards.language import known_to_langdetect, langdetected
from rlft.rewards.sentences import sentences, words

Check = Callable[[str], bool]
Relation = Literal["less than", "at least"]
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, StringConstraints(min_length=1)]
Bare = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n){2,}")
FENCES = ("```json", "```Json", "```JSON", "```")

KINDS: dict[str, Callable[..., Check]] = {}


def check(kind: str, keywords: Mapping[str, Any]) -> Check:
    """What says whether a text follows the instruction. Keywords that are None, as the data set fills up with, are
    left out. Raises ValueError where there is no such kind, or it cannot be had with these keywords.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind of instruction '{kind}'; there is: {', '.join(KINDS)}")
    try:
        return KINDS[kind](**{key: value for key, value in keywords.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"'{kind}': {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except re.error as error:
        raise ValueError(
            f"'{kind}': {error.pattern!r} is read as a regular expression, and is none: {error}"
        ) from error


def strictly(follows: Check, text: str) -> bool:
    """Whether the text follows the instruction as it stands. An empty one follows none."""
    return bool(text.strip()) and follows(text)


def loosely(follows: Check, text: str) -> bool:
    """Whether it does so as it stands, or without its first line, its last or both, or any of these without asterisks.

    The paper's second measure: an introduction ("Sure, here it is:") or markdown is no reason to fail.
    """
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(strictly(follows, one) for one in (*cut, *(one.replace("*", "") for one in cut)))


def _kind(name: str) -> Callable[[Callable[..., Check]], Callable[..., Check]]:
    def enter(make: Callable[..., Check]) -> Callable[..., Check]:
        KINDS[name] = validate_call(make)
        return make

    return enter


def _compare(count: Callable[[str], int], relation: Relation, number: int) -> Check:
    return lambda text: (count(text) < number) if relation == "less than" else (count(text) >= number)


@_kind("keywords:existence")
def _existence(*, keywords: Annotated[list[Text], Field(min_length=1)]) -> Check:
    patterns = [re.compile(keyword, re.IGNORECASE) for keyword in keywords]
    return lambda text: all(pattern.search(text) for pattern in patterns)


@_kind("keywords:frequency")
def _frequency(*, keyword: Bare, frequency: Count, relation: Relation) -> Check:
    pattern = re.compile(keyword, re.IGNORECASE)
    return _compare(lambda text: len(pattern.findall(text)), relation, frequency)


@_kind("keywords:forbidden_words")
def _forbidden(*, forbidden_words: Annotated[list[Text], Field(min_length=1)]) -> Check:
    patterns = [re.compile(rf"\b{word}\b", re.IGNORECASE) for word in forbidden_words]
    return lambda text: not any(pattern.search(text) for pattern in patterns)


@_kind("keywords:letter_frequency")
def _letter(
    *, letter: Annotated[Bare, StringConstraints(max_length=1)], let_frequency: Count, let_relation: Relation
) -> Check:
    return _compare(lambda text: text.lower().count(letter.lower()), let_relation, let_frequency)


@_kind("language:response_language")
def _language(*, language: Text) -> Check:
    if language not in known_to_langdetect():
        raise ValueError(
            f"'language:response_language': langdetect knows no language '{language}'; it knows "
            f"{', '.join(known_to_langdetect())}"
        )
    return lambda text: langdetected(text) in (language, None)


@_kind("length_constraints:number_sentences")
def _sentences(*, num_sentences: Count, relation: Relation) -> Check:
    return _compare(lambda text: len(sentences(text)), relation, num_sentences)


@_kind("length_constraints:number_paragraphs")
def _paragraphs(*, num_paragraphs: Count) -> Check:
    def follows(text: str) -> bool:
        first, *between = re.split(r"\s?\*\*\*\s?", text)
        last = [between.pop()] if between else []
        # A divider may stand before the first paragraph and after the last, but not two of them in the middle.
        if not all(map(str.strip, between)):
            return False
        return len(between) + sum(bool(end.strip()) for end in (first, *last)) == num_paragraphs

    return follows


@_kind("length_constraints:number_words")
def _words(*, num_words: Count, relation: Relation) -> Check:
    return _compare(lambda text: len(re.findall(r"\w+", text)), relation, num_words)


@_kind("length_constraints:nth_paragraph_first_word")
def _nth_paragraph(*, num_paragraphs: Count, nth_paragraph: Annotated[int, Field(ge=1)], first_word: Text) -> Check:
    if nth_paragraph > num_paragraphs:
        raise ValueError(f"of {num_paragraphs} paragraphs there is no number {nth_paragraph}")

    def follows(text: str) -> bool:
        paragraphs = text.split("\n\n")
        if sum(bool(paragraph.strip()) for paragraph in paragraphs) != num_paragraphs:
            return False
        parts = paragraphs[nth_paragraph - 1].split()  # empty paragraphs are counted here, though not above
        if not parts:
            return False
        said = parts[0].lstrip("'").lstrip('"')
        return re.split(r"[.,?!'\"]", said)[0].lower() == first_word.lower()

    return follows


@_kind("detectable_content:number_placeholders")
def _placeholders(*, num_placeholders: Count) -> Check:
    return _compare(lambda text: sum(map(_bracketed, text.split("\n"))), "at least", num_placeholders)


def _bracketed(line: str) -> int:
    """How many times \\[.*?\\] is found in it, in one pass: the expression takes for ever over a row of brackets."""
    count, end = 0, -1
    while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start)) >= 0:
        count += 1
    return count


@_kind("detectable_content:postscript")
def _postscript(*, postscript_marker: Bare) -> Check:
    pattern = re.compile(POSTSCRIPTS.get(postscript_marker, postscript_marker.lower()))
    return lambda text: bool(pattern.search(text.lower()))


@_kind("detectable_format:number_bullet_lists")
def _bullets(*, num_bullets: Count) -> Check:
    stars, dashes = (re.compile(rf"^\s*{mark}.*$", re.MULTILINE) for mark in (r"\*[^*]", "-"))

    def follows(text: str) -> bool:
        text = BLANK_LINES.sub("\n\n", text)  # which the expressions would try anew from each
        return len(stars.findall(text)) + len(dashes.findall(text)) == num_bullets

    return follows


@_kind("detectable_format:constrained_response")
def _options() -> Check:
    return lambda text: any(option in text for option in OPTIONS)


@_kind("detectable_format:number_highlighted_sections")
def _highlights(*, num_highlights: Count) -> Check:
    marks = [re.compile(rf"{mark}([^\n*]*){mark}") for mark in (r"\*", r"\*\*")]

    def count(text: str) -> int:
        return sum(bool(inside.strip()) for mark in marks for inside in mark.findall(text))

    return _compare(count, "at least", num_highlights)


@_kind("detectable_format:multiple_sections")
def _sections(*, section_spliter: Bare, num_sections: Count) -> Check:
    pattern = re.compile(rf"\s?{section_spliter}\s?\d+\s?")
    return lambda text: len(pattern.split(text)) - 1 >= num_sections


@_kind("detectable_format:json_format")
def _json() -> Check:
    def follows(text: str) -> bool:
        text = text.strip()
        for fence in FENCES:
            text = text.removeprefix(fence)
        try:
            json.loads(text.removesuffix("```").strip())
        except (ValueError, RecursionError):
            return False
        return True

    return follows


@_kind("detectable_format:title")
def _title() -> Check:
    return lambda text: any(map(_titled, text.split("\n")))


def _titled(line: str) -> bool:
    """Whether <<[^\\n]+>> is found in it, with something inside."""
    start, end = line.find("<<"), line.rfind(">>")
    return 0 <= start < end - 2 and bool(line[start : end + 2].lstrip("<").rstrip(">").strip())


@_kind("combination:two_responses")
def _two_responses() -> Check:
    def follows(text: str) -> bool:
        parts = [part.strip() for part in text.split("******")]
        said = [part for part in parts if part]
        return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]

    return follows


@_kind("combination:repeat_prompt")
def _repeat(*, prompt_to_repeat: Text) -> Check:
    return lambda text: text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_kind("startend:end_checker")
def _end(*, end_phrase: Bare) -> Check:
    return lambda text: text.strip().strip('"').lower().endswith(end_phrase.lower())


@_kind("startend:quotation")
def _quotation() -> Check:
    def follows(text: str) -> bool:
        text = text.strip()
        return len(text) > 1 and text[0] == text[-1] == '"'

    return follows


@_kind("change_case:capital_word_frequency")
def _capital_words(*, capital_frequency: Count, capital_relation: Relation) -> Check:
    return _compare(lambda text: sum(map(str.isupper, words(text))), capital_relation, capital_frequency)


@_kind("change_case:english_capital")
def _capital() -> Check:
    return lambda text: text.isupper() and langdetected(text) in ("en", None)


@_kind("change_case:english_lowercase")
def _lowercase() -> Check:
    return lambda text: text.islower() and langdetected(text) in ("en", None)


@_kind("punctuation:no_comma")
def _no_comma() -> Check:
    return lambda text: "," not in text
