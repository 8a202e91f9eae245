"""Writes cases.jsonl: texts, instructions, and what the published evaluation code says of them.

The texts are generated here, from a fixed seed; the verdicts, strict and loose, are those of lm-evaluation-harness
(lm_eval/tasks/ifeval/ in the package lm-eval, Apache 2.0), which carries the code of the paper's authors. Nothing of
rlft is imported. For every kind of instruction as many cases that follow it are kept as cases that do not.

    pip install --no-deps --target REFERENCE lm-eval==0.4.13 nltk==3.10.4 langdetect==1.0.9 immutabledict==4.3.1
    PYTHONPATH=REFERENCE NLTK_DATA=FOLDER_WITH_TOKENIZERS/PUNKT_TAB python make_cases.py REFERENCE

langdetect draws at random; its seed is 0 here, as in the newest version of the authors' own repository
(google-research/instruction_following_eval).
"""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

EACH = 12  # of either verdict, for every kind
TRIES = 4000

ENGLISH = [
    "Dr. Smith went to Washington on Jan. 5 and came back at 3 p.m. with a cold.",
    "The meeting, which nobody liked, ended at last!",
    "Is there any reason to believe that e.g. the moon is made of cheese?",
    "I paid $3.50 for it... and it broke the next day.",
    'She said, "We leave at dawn." He did not answer.',
    "NASA and ESA agreed on the plan; the US did not.",
    "You can read more at www.example.com or write to info@example.org.",
    "Mr. and Mrs. O'Neil don't eat meat (or fish).",
    "The U.S. economy grew by 2.5 percent in 1999.",
    "Please, do not feed the animals in the park.",
    "My answer is yes.",
    "A small boat crossed the wide river before the storm came.",
    "WHAT A DAY IT WAS FOR ALL OF US",
    "nothing in this sentence is written with a capital letter.",
    "The children played in the garden, and their parents talked about the weather.",
    "i.e. this is the end of St. Mary's story.",
    "First, mix the flour with water; second, wait for an hour; third, bake it.",
    "It's well-known that Prof. J. R. Brown works at I.B.M. in N.Y.",
    "We hope that you will enjoy your stay with us.",
    "The year 2020 was hard for most people around the world.",
]
FOREIGN = {
    "fr": "Le petit chat dort sur la chaise, et le chien mange dans la cuisine. Nous partirons demain matin.",
    "de": "Der Hund schläft unter dem Tisch, weil es draußen regnet. Morgen fahren wir nach Hause.",
    "es": "El perro duerme debajo de la mesa porque está lloviendo. Mañana volveremos a casa con los niños.",
    "it": "Il gatto dorme sulla sedia perché fuori piove. Domani torneremo a casa con la nostra famiglia.",
    "pt": "O cachorro dorme debaixo da mesa porque está chovendo. Amanhã voltaremos para casa, não é?",
    "ru": "Собака спит под столом, потому что на улице идёт дождь. Завтра мы поедем домой.",
    "hi": "कुत्ता मेज़ के नीचे सो रहा है क्योंकि बाहर बारिश हो रही है। कल हम घर जाएँगे।",
    "ja": "外は雨が降っているので、犬はテーブルの下で寝ています。明日、私たちは家に帰ります。",
    "ko": "밖에 비가 와서 개가 탁자 아래에서 자고 있어요. 내일 우리는 집에 갑니다.",
    "ar": "ينام الكلب تحت الطاولة لأن المطر يهطل في الخارج. غدا سنعود إلى البيت.",
    "fi": "Koira nukkuu pöydän alla, koska ulkona sataa. Huomenna me menemme kotiin.",
    "sw": "Mbwa analala chini ya meza kwa sababu mvua inanyesha nje. Kesho tutarudi nyumbani na watoto wetu.",
}
ODD = [
    "",
    " \n ",
    "12 34 56",
    "***",
    "******",
    "<<>>",
    "[]",
    '"',
    '""',
    "{}",
    "```\n```",
    "****",
    "P.S.",
    "* \n- ",
    ",",
    "?!",
]
WORDS = [
    "the",
    "river",
    "cat",
    "day",
    "plan",
    "ea",
    "US",
    "meat",
    "storm",
    "o",
    r"o'neil",
    "in",
    "cheese",
    "zebra",
    "a",
]
MARKS = ["P.S.", "P.P.S", "PS:", "Note:"]
PROMPTS = ["Write a poem about the sea.", "What is 7+5?", "Tell me, please, about\nyour day."]
ENDS = ["Is there anything else I can help with?", "the end.", "Any other questions?"]
JSONS = [
    '{"name": "Ann", "age": 3}',
    "[1, 2, 3]",
    '"text"',
    "{'name': 'Ann'}",
    '{"a": 1,}',
    "NaN",
    "12",
    '{"a": {"b": [null]}}',
]

Draw = random.Random


def sentence(rng: Draw) -> str:
    return rng.choice(ENGLISH)


def plain(rng: Draw) -> str:
    """One to three paragraphs."""
    paragraphs = [" ".join(sentence(rng) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    return rng.choice(["\n\n", "\n\n", "\n", "\n***\n", "\n\n\n\n", " *** "]).join(paragraphs)


def bullets(rng: Draw) -> str:
    marks = ["* ", "- ", "  * ", "*", "-", "** ", "1. ", "\t- "]
    return "\n".join(rng.choice(marks) + sentence(rng) for _ in range(rng.randint(0, 5)))


def highlighted(rng: Draw) -> str:
    forms = ["*{}*", "**{}**", "***{}***", "* {} *", "**", "****", "*{}\n{}*", "{}"]
    return " ".join(rng.choice(forms).replace("{}", rng.choice(WORDS)) for _ in range(rng.randint(1, 5)))


def sections(rng: Draw) -> str:
    heads = ["Section {}", "SECTION {}", "Section{}", "Section {}:", "Day {}", "section {}", "Section"]
    return "\n".join(
        rng.choice(heads).replace("{}", str(i + 1)) + "\n" + sentence(rng) for i in range(rng.randint(1, 4))
    )


def ended(rng: Draw) -> str:
    last = rng.choice(ENDS)
    forms = [last, last.upper(), f'"{last}"', f"{last} ", f"{last}\n", f"**{last}**", f"{last} Bye."]
    return sentence(rng) + " " + rng.choice(forms)


def noted(rng: Draw) -> str:
    mark = rng.choice([*MARKS, "p.s.", "P. S.", "P. P. S.", "P.P.S.", "ps:", "PS"])
    return sentence(rng) + rng.choice(["\n\n", " ", "\n"]) + mark + " " + sentence(rng)


def titled(rng: Draw) -> str:
    title = rng.choice(
        ["<<A day>>", "<< >>", "<<>>", "<A day>", "<<A\nday>>", "<<<A day>>>", "<<A>> and <<B>>", "<<a day>"]
    )
    return rng.choice([f"{title}\n", f"Here it is: {title} "]) + sentence(rng)


def quoted(rng: Draw) -> str:
    text = plain(rng)
    forms = ['"{}"', ' "{}"\n', '"{}', '{}"', "'{}'", "“{}”", '"{}" I said.', '""{}""', 'He said:\n"{}"']
    return rng.choice(forms).replace("{}", text)


def jsoned(rng: Draw) -> str:
    forms = [
        "{}",
        "```json\n{}\n```",
        "```\n{}\n```",
        "Here:\n{}",
        "```JSON\n{}```",
        "```python\n{}\n```",
        " {} ",
        "{}\nDone.",
    ]
    return rng.choice(forms).replace("{}", rng.choice(JSONS), 1)


def twofold(rng: Draw) -> str:
    one, two = sentence(rng), sentence(rng)
    forms = [
        "{1}\n******\n{2}",
        "{1}******{1}",
        "******\n{1}\n******\n{2}",
        "{1}\n******\n{2}\n******",
        "{1}\n*****\n{2}",
    ]
    forms += ["{1}******{2}******{1}", "{1}\n******\n******\n{2}", "{1}\n*******\n{2}", "{1} ****** {1} ", "******{1}"]
    return rng.choice(forms).replace("{1}", one).replace("{2}", two)


def divided(rng: Draw) -> str:
    parts = [sentence(rng) for _ in range(rng.randint(1, 4))]
    text = rng.choice(["\n***\n", "***", "\n\n***\n\n", "\n****\n", "\n*** ***\n"]).join(parts)
    return rng.choice(["{}", "***\n{}", "{}\n***", "***\n{}\n***\n", "***\n***\n{}"]).replace("{}", text)


def begun(rng: Draw) -> str:
    openers = ["The", '"The', "'the", "the,", "“The", "Weather", "weather.", "THE", "The's"]
    paragraphs = [rng.choice(openers) + " " + sentence(rng) for _ in range(rng.randint(1, 4))]
    text = rng.choice(["\n\n", "\n\n", "\n\n\n", "\n", "\n\n\n\n"]).join(paragraphs)
    return rng.choice(["{}", "{}", "\n\n{}", "{}\n\n"]).replace("{}", text)


def repeated(rng: Draw) -> str:
    prompt = rng.choice(PROMPTS)
    forms = [
        prompt,
        prompt.upper(),
        f" {prompt}",
        f"You asked: {prompt}",
        f'"{prompt}"',
        f"You asked:\n{prompt}",
        prompt[:-1],
    ]
    return rng.choice(forms) + rng.choice(["\n", " "]) + sentence(rng)


def cased(rng: Draw) -> str:
    text = rng.choice([plain(rng), rng.choice(list(FOREIGN.values()))])
    return rng.choice([str.upper, str.lower, str.upper, str.lower, str])(text)


def spoken(rng: Draw) -> str:
    one = rng.choice(list(FOREIGN.values()))
    return rng.choice(["{}", "{}", "Here is my answer:\n{}", "{}\n" + sentence(rng), sentence(rng)]).replace("{}", one)


def held(rng: Draw) -> str:
    forms = ["[name]", "[first name]", "[]", "[a\nb]", "[[x]]", "(name)", "[name"]
    return sentence(rng) + " " + " ".join(rng.choice(forms) for _ in range(rng.randint(0, 4)))


def opted(rng: Draw) -> str:
    answers = [
        "My answer is yes.",
        "My answer is no.",
        "My answer is maybe.",
        "my answer is no.",
        "My answer is no",
        "Yes.",
    ]
    return rng.choice(["", "", sentence(rng) + " "]) + rng.choice(answers) + rng.choice(["", " I think."])


def some_words(rng: Draw) -> list[str]:
    return rng.sample(WORDS, rng.randint(1, 2))


def related(number: str, most: int, relation: str = "relation") -> Callable[[Draw], dict[str, Any]]:
    return lambda rng: {number: rng.randint(1, most), relation: rng.choice(["less than", "at least"])}


def nothing(rng: Draw) -> dict[str, Any]:
    return {}


def nth(rng: Draw) -> dict[str, Any]:
    number = rng.randint(1, 4)
    return {
        "num_paragraphs": number,
        "nth_paragraph": rng.randint(1, number),
        "first_word": rng.choice(["the", "weather"]),
    }


# By kind: what draws its keywords, and what draws a text in which there is something to it.
KINDS: dict[str, tuple[Callable[[Draw], dict[str, Any]], Callable[[Draw], str]]] = {
    "keywords:existence": (lambda rng: {"keywords": some_words(rng)}, plain),
    "keywords:frequency": (lambda rng: {"keyword": rng.choice(WORDS)} | related("frequency", 4)(rng), plain),
    "keywords:forbidden_words": (lambda rng: {"forbidden_words": some_words(rng)}, plain),
    "keywords:letter_frequency": (
        lambda rng: {"letter": rng.choice("aeiouztX")} | related("let_frequency", 25, "let_relation")(rng),
        plain,
    ),
    "language:response_language": (lambda rng: {"language": rng.choice([*FOREIGN, "en"])}, spoken),
    "length_constraints:number_sentences": (related("num_sentences", 9), plain),
    "length_constraints:number_paragraphs": (lambda rng: {"num_paragraphs": rng.randint(1, 4)}, divided),
    "length_constraints:number_words": (related("num_words", 80), plain),
    "length_constraints:nth_paragraph_first_word": (nth, begun),
    "detectable_content:number_placeholders": (lambda rng: {"num_placeholders": rng.randint(1, 3)}, held),
    "detectable_content:postscript": (lambda rng: {"postscript_marker": rng.choice(MARKS)}, noted),
    "detectable_format:number_bullet_lists": (lambda rng: {"num_bullets": rng.randint(1, 4)}, bullets),
    "detectable_format:constrained_response": (nothing, opted),
    "detectable_format:number_highlighted_sections": (lambda rng: {"num_highlights": rng.randint(1, 4)}, highlighted),
    "detectable_format:multiple_sections": (
        lambda rng: {"section_spliter": rng.choice(["Section", "SECTION", "Day"]), "num_sections": rng.randint(1, 3)},
        sections,
    ),
    "detectable_format:json_format": (nothing, jsoned),
    "detectable_format:title": (nothing, titled),
    "combination:two_responses": (nothing, twofold),
    "combination:repeat_prompt": (lambda rng: {"prompt_to_repeat": rng.choice(PROMPTS)}, repeated),
    "startend:end_checker": (lambda rng: {"end_phrase": rng.choice(ENDS)}, ended),
    "startend:quotation": (nothing, quoted),
    "change_case:capital_word_frequency": (related("capital_frequency", 6, "capital_relation"), plain),
    "change_case:english_capital": (nothing, cased),
    "change_case:english_lowercase": (nothing, cased),
    "punctuation:no_comma": (nothing, plain),
}


def reference(folder: Path) -> ModuleType:
    """lm_eval.tasks.ifeval.utils, without the rest of lm_eval, whose requirements are large."""
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    return importlib.import_module("lm_eval.tasks.ifeval.utils")


def text_for(kind: str, rng: Draw) -> str:
    """Mostly a text of the kind's own, at times another's, an odd one, or with a line before or after it."""
    roll = rng.random()
    if roll < 0.06:
        return rng.choice(ODD)
    text = (KINDS[kind][1] if roll < 0.85 else rng.choice([make for _, make in KINDS.values()]))(rng)
    return rng.choice(["{}"] * 7 + ["Sure, here it is:\n{}", "{}\nI hope this helps.", "*{}*"]).replace("{}", text, 1)


def cases(kind: str, judge: ModuleType, rng: Draw) -> list[dict[str, Any]]:
    """As many that follow the instruction as ones that do not, all different."""
    kept: dict[bool, dict[str, dict[str, Any]]] = {True: {}, False: {}}
    for _ in range(TRIES):
        keywords, text = KINDS[kind][0](rng), text_for(kind, rng)
        asked = judge.InputExample(0, [kind], "", [keywords])
        (strict,) = judge.test_instruction_following_strict(asked, text).follow_instruction_list
        (loose,) = judge.test_instruction_following_loose(asked, text).follow_instruction_list
        case = {"kind": kind, "keywords": keywords, "text": text, "strict": strict, "loose": loose}
        if len(kept[strict]) < EACH:
            kept[strict].setdefault(json.dumps([keywords, text]), case)
        if all(len(some) == EACH for some in kept.values()):
            return [case for some in kept.values() for case in some.values()]
    raise SystemExit(f"{kind}: of {EACH} each, there are {len(kept[True])} and {len(kept[False])}")


def main(folder: str) -> None:
    judge = reference(Path(folder))
    importlib.import_module("langdetect").DetectorFactory.seed = 0
    rng = random.Random(0)
    lines = [json.dumps(case, ensure_ascii=False) for kind in KINDS for case in cases(kind, judge, rng)]
    Path(__file__).with_name("cases.jsonl").write_text("\n".join(lines) + "\n")
    print(len(lines), "cases")


if __name__ == "__main__":
    main(*sys.argv[1:])
