"""Decide whether a completion's final answer is right: the reward of every RL script and the judge of every
evaluation.

First version: extraction, exact rational numbers, and equality of the normalised text for everything else. It
never executes, compiles or evaluates any part of a completion, and it never raises.
"""

import re
from fractions import Fraction

TAIL = 2000  # without a box, the answer is looked for in the last TAIL characters only
MAX_ANSWER = 1000  # a longer answer is no answer


def extract_answer(completion: str) -> str | None:
    """The last \\boxed{}; else the last ####; else "answer is" / "answer:"; else the last number."""
    start = max(completion.rfind("\\boxed"), completion.rfind("\\fbox"))
    if start >= 0:
        return _box(completion, start)
    tail = completion[-TAIL:]
    if "####" in tail:
        return tail.rpartition("####")[2].strip().split("\n")[0].strip()[:MAX_ANSWER] or None
    phrases = re.findall(r"(?i)answer(?:\s+is|\s*:)[\s:*]*([^\n]+)", tail)
    if phrases and (answer := phrases[-1].strip().strip("*$").rstrip(". ")):
        return answer[:MAX_ANSWER]
    numbers = re.findall(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?", tail)
    return numbers[-1] if numbers else None


def _box(text: str, start: int) -> str | None:
    """The balanced braces of the box at `start`; None if empty, unterminated or overlong."""
    brace = text.find("{", start, start + 10)
    depth = 0
    for i in range(brace, min(len(text), brace + MAX_ANSWER)) if brace >= 0 else ():
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[brace + 1 : i].strip() or None
    return None


def _normalise(answer: str) -> str:
    answer = re.sub(r"\\(?:left|right|!|,|;|:|\$|%)|\^\{?\\circ\}?|[$\s%]", "", answer)
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
    answer = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", answer)
    answer = re.sub(r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}", answer)
    return answer.rstrip(".").replace("{,}", ",").lower()


def _number(answer: str) -> Fraction | None:
    """A plain integer, decimal or fraction, exactly."""
    answer = re.sub(r"^(-?)\\frac\{(-?[0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3", answer)
    if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", answer):
        answer = answer.replace(",", "")
    if re.fullmatch(
        r"[-+]?([0-9]{1,400}(\.[0-9]{0,400})?|\.[0-9]{1,400}|[0-9]{1,400}/0*[1-9][0-9]{0,400})", answer
    ):
        return Fraction(answer)
    return None


def equivalent(pred: str, gold: str) -> bool:
    """Is `pred` the same answer as `gold`?"""
    if max(len(pred), len(gold)) > MAX_ANSWER:
        return False
    pred, gold = _normalise(pred), _normalise(gold)
    a, b = _number(pred), _number(gold)
    return a == b if a is not None and b is not None else bool(pred) and pred == gold


def verify(completion: str, gold: str) -> bool:
    """Does the completion's final answer equal the gold? Never raises, never prints."""
    answer = extract_answer(completion)
    return answer is not None and equivalent(answer, gold)


def math_reward(completions: list[str], golds: list[str]) -> list[float]:
    """1.0 for a right answer, 0.0 for anything else."""
    return [float(verify(c, g)) for c, g in zip(completions, golds, strict=True)]


def check_gold(gold: str) -> bool:
    """Can the gold be judged at all: is there one, and does it equal itself?"""
    return bool(gold.strip()) and equivalent(gold, gold)
