"""The process in which math-verify judges, one line of JSON in, one word out. Started by `math`; never imported.

Its time limit is the kernel's: a timer of processor time whose signal nobody catches, so it ends the process wherever
it is, also inside C code, also when the run that asked is gone. Its memory is limited too, lest a tower of powers take
the machine's. It stands on its own: nothing but math-verify, its sympy and the standard library is imported.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import resource
import signal
import sys
from dataclasses import replace
from typing import Any

ALONE = re.compile(r"\$[^$\n]*\$(?: percent)?")  # no prose around it
MEMORY = 2 << 30  # bytes of address space; judging takes some 60 MB


def main(seconds: float) -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a parser prints is no reply
    logging.disable(logging.CRITICAL)  # math-verify warns that its own time limit is off
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        in_two_stages()
        Judge().verdict([["$1$", "$1$"]])  # imports, and compiles the patterns, outside the time limit
        print("ready", file=replies, flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=replies, flush=True)
        return
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        word, full = "different", False
        try:
            word = judge_by(**request["options"]).verdict(request["pairs"])
        except MemoryError:
            full = True
        except Exception:  # what the libraries cannot compare is not equal
            pass
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(word, file=replies, flush=True)
        if full:  # another process takes the next question
            return


class Judge:
    """Compares by one set of options. extract: what math-verify looks for. boxed: its priority of boxes, where the
    text has not been cut to one already. sets: whether a set may answer an inequality. The others are those of the
    reward `math`."""

    def __init__(
        self,
        extract: tuple[str, ...] = ("latex", "expression"),
        boxed: int = 0,
        strict: bool = True,
        rounding: int = 6,
        sets: bool = False,
        percent: str = "either",
    ) -> None:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig

        # In prose math-verify looks for units; an answer that was cut out has lost its own.
        prose = LatexExtractionConfig(boxed_match_priority=boxed)
        alone = replace(prose, normalization_config=replace(prose.normalization_config, units=False))
        kinds = {"latex": prose, "expression": ExprExtractionConfig()}
        self._targets = [kinds[name] for name in extract]
        self._alone = [alone if target is prose else target for target in self._targets]
        self._compare = {"float_rounding": rounding, "strict": strict, "allow_set_relation_comp": sets}
        self._small = min(10.0 ** (3 - rounding), 0.001)
        self._percent = percent
        self._known = functools.lru_cache(maxsize=1024)(self._read)

    def verdict(self, pairs: list[list[str]]) -> str:
        """`equal` if a pair is, else `different`; `unreadable` where no mathematics is found in the first gold answer,
        `nothing` where none is in the first answer."""
        for gold, said in pairs:
            right = self._known(gold)
            if not right:
                return "unreadable"
            read = self._known(said)
            if not read and (gold, said) == tuple(pairs[0]):
                return "nothing"
            if any(self._equal(one, other) for one, other in self._forms(right, read)):
                return "equal"
        return "different"

    def _read(self, text: str) -> list[Any]:
        from math_verify import parse

        targets = self._alone if ALONE.fullmatch(text) else self._targets
        return _complex(parse(text, targets, parsing_timeout=None))  # pyright: ignore[reportArgumentType]

    def _forms(self, right: list[Any], read: list[Any]) -> list[tuple[Any, Any]]:
        """What to compare with what. Of two percentages the numbers; one of them is its hundredth, or, where either
        will do, its number too."""
        shares = [_share(right), _share(read)]
        if shares == [None, None]:
            return [(right, read)]
        plain = ([shares[0] or right[0]], [shares[1] or read[0]]) if right and read else (right, read)
        if None not in shares:
            return [plain]
        worth = ([plain[0][0] / 100] if shares[0] else right, [plain[1][0] / 100] if shares[1] else read)
        return [worth, plain] if self._percent == "either" else [worth]

    def _equal(self, right: list[Any], read: list[Any]) -> bool:
        from math_verify import verify

        return verify(right, read, timeout_seconds=None, **self._compare) and not self._drowned(right, read)

    def _drowned(self, right: list[Any], read: list[Any]) -> bool:
        """Whether two numbers are equal for no other reason than that both are small."""
        numbers = [side[0] for side in (right, read) if side and getattr(side[0], "is_number", False)]
        if len(numbers) < 2:
            return False
        try:
            gold, said = (float(number) for number in numbers)
        except (TypeError, ValueError, OverflowError):
            return False
        return abs(gold) < self._small and abs(gold - said) > abs(gold) / 1000


def in_two_stages() -> None:
    """Let ANTLR predict without context first, and with it only where that fails: the same parse in less time.

    What its authors advise where a grammar allows it (Parr, The Definitive ANTLR 4 Reference, 13.7). A version of the
    libraries that has other names is left as it is.
    """
    try:
        from antlr4.atn.ParserATNSimulator import ParserATNSimulator
        from antlr4.atn.PredictionMode import PredictionMode
        from math_verify import parser as reader

        thorough, begin = reader.latex2sympy, ParserATNSimulator.__init__
    except (ImportError, AttributeError):
        return
    mode = PredictionMode.LL

    def begins(simulator: Any, *given: Any, **named: Any) -> None:
        begin(simulator, *given, **named)
        simulator.predictionMode = mode

    def read(*given: Any, **named: Any) -> Any:
        nonlocal mode
        mode = PredictionMode.SLL
        try:
            return thorough(*given, **named)
        except Exception:  # a syntax error, which the other stage may not find
            mode = PredictionMode.LL
            return thorough(*given, **named)

    ParserATNSimulator.__init__ = begins  # pyright: ignore[reportAttributeAccessIssue]
    reader.latex2sympy = read


def _complex(read: list[Any]) -> list[Any]:
    """With the imaginary unit where math-verify has read a variable named i, and no other."""
    from sympy import Basic, I

    first: Any = read[0] if read else None
    symbols = first.free_symbols if isinstance(first, Basic) else ()
    if {str(one) for one in symbols} != {"i"}:
        return read
    with contextlib.suppress(Exception):  # i > 0, and others that have no meaning for a complex number
        return [first.subs(dict.fromkeys(symbols, I)), *read[1:]]
    return read


def _share(read: list[Any]) -> Any:
    """The number before the percent sign, if math-verify has read a percentage: a product with a hundredth."""
    from sympy import Mul, Rational, UnevaluatedExpr

    first: Any = read[0] if read else None
    hundredth = isinstance(first, Mul) and len(first.args) == 2 and first.args[1] == UnevaluatedExpr(Rational(1, 100))
    return first.args[0] if hundredth else None


@functools.cache
def _by(options: str) -> Judge:
    return Judge(**json.loads(options))


def judge_by(**options: Any) -> Judge:
    """The judge with these options; the same one each time, for it remembers what it has read."""
    return _by(json.dumps(options, sort_keys=True))


if __name__ == "__main__":
    main(float(sys.argv[1]))
