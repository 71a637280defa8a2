r"""Is a completion's final answer correct?

The reward of grpo.py, prefix_rft.py and luffy.py, and the judge of every evaluation:

    verify(completion, gold) = equivalent(extract_answer(completion), gold)

It never raises and never prints. A text is read in five steps, each in its own part of this file:

    extract   the part of a completion that is its answer
    lex       that text as typed tokens, from one table
    read      one grammar, from the top down: list > relation > union > quantity > sum > product >
              power > atom. It returns small values (Number, Quantity, Tuple, Set, ...) that hold
              sympy expressions
    evaluate  an expression at a point: exactly, or as a value with a bound of its error
    same      are two values the same answer?

Policies; docs/verifier.md has an example of each

    last box      The last \boxed{} or \fbox{} counts; an empty or unterminated one is no answer.
                  Without a box: what follows the last ####; else the last "answer is" or
                  "answer:"; else the last formula or number. A <think> block is not searched
                  when a text follows it, as there a model tries answers that it gives up.
    one answer    "A or B", \pm and several boxes buy no second chance: the number of answers
                  must match. 2 and 6 in two boxes are not the gold 2, 6.
    no echo       Where the gold is a plain number (integer, decimal, a/b, mixed, a x 10^n), the
                  answer must be one: 17 \times 24 or 5! hands the question back.
    exact         A decimal equals a fraction only exactly: neither 0.3333 nor 3.3333333333 is a
                  number of thirds. A tolerance would be a prize for being near, and nobody could
                  say where it ends. A percent sign is no factor of 100.
    error bound   Other expressions are evaluated with a bound of the error. They are equal if the
                  difference may be 0 and its bound is small beside both. What the bounds cannot
                  decide is not equal, so that no size of terms that cancel buys a verdict.
    sample points Letters get fixed values. Where a floor, an absolute value or a root may change
                  branch, large, negative and integer values are among them. Letters under
                  (-1)^n, n! or \binom are integers, under a floor those named i to n, p and q.
    units         A missing unit is correct, a conflicting one is not. Words that assert or scale
                  are no unit: "5 million" is 5000000, and "5 is wrong" is nothing.
    brackets      (1,2) is not [1,2] or {1,2}. An open interval is written, and read, like a pair.
    order         Lists and sets have none, so {1,2} is 1, 2. Tuples, matrices and ratios have one.
                  6:8 is not 3:4, as 6:08 is not 3:04. A comma is never a decimal point, as 4,5
                  are two answers.
    bases         52_8 equals only 52_8: a question about base 8 asks for its digits.
    names         x = 5, a+b = 5 and |AB| = 5 are 5 with a name. x = 5 is not y = 5, but f(x) = 5
                  may be. With numerals (x+3 = 7) or as a gold in x, y, z it is an equation.
    approximation a \approx b stands for a, x \approx 5 for 5. A gold a \approx b accepts either.
    relations     Equations agree up to a factor, inequalities up to a positive one. x > 2 is
                  (2, \infty).
    text          As a whole, in any case: \text{Even} is even. Bare letters are variables, so c is
                  not C, and neither is +c the same as +C.
    choice        The gold (B) 12 accepts B, 12 or both. The gold B accepts (B) 12 and "option B",
                  but no sentence about B.
    logarithms    \log is the natural one, as in most of mathematics; \log_{10} is another.
    unreadable    What cannot be read equals only the same tokens. check_gold refuses such a gold,
                  and one that nobody can earn (proof, None, N/A): drop the row, and count it.

Safety: nothing of a text is executed, compiled or handed to sympy as text. Characters, tokens,
depth, items and digits, and the bits of powers, factorials and binomials, are bounded before
anything is computed. There are no signals, threads, processes or global state, and every
precision is an argument: any thread will do.
"""

import math
import re
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate
from typing import NamedTuple

import sympy as sp
from sympy import Add, E, I, Integer, Mul, Pow, Rational, Symbol, oo, pi
from sympy.core.evalf import libmp  # mpmath's arithmetic, which comes with sympy

TAIL = 2000  # characters that are searched for an answer if there is no box
MAX_CHARS = 1000  # of an answer
MAX_TOKENS = 400
MAX_DEPTH = 30  # of nested brackets
MAX_ITEMS = 64  # of a list or a matrix
MAX_DIGITS = 400  # of a number as written
MAX_BITS = 1 << 16  # of a number as computed: 2013^{4025} and 2004! fit, 9^{9^9} does not
MAX_FACTORIAL = 2100


def require(condition) -> None:
    """What this file cannot read, or what exceeds the bounds, is given up."""
    if not condition:
        raise ValueError


# ---- Extract: the part of a completion that is its answer ------------------------------------

# Marks that end a text, or an answer in it.
MARKS = re.compile(r"<(?:\|[a-z_]{1,30}\||/?(?:s|answer|eos))>")
PHRASE = re.compile(r"answer(?:\s+is|[\s*]*:)[\s:：*]*(?=\S)", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.\s|\.$|\n|。")
COPULA = re.compile(r"(?is).*(?:\b(?:is|are|equals?)\b|是|为)[\s:：]*(?=\S)")
NUMBER = re.compile(
    r"(?:(?<![\w.)])-)?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]*\.?[0-9]+)"
    r"(?:\.[0-9]+|/[0-9]+)?"
)
# A word that is neither a command nor in a \text{}.
PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
DENIALS = {"not", "never", "neither", "nor", "either", "cannot"}
BARE_LATEX = re.compile(r"(\S*\\(?:[dtc]?frac|sqrt|binom)\S*?)[\s.,;:!?*。]*$")


def extract_answer(completion: str) -> str | None:
    """The last box; else what follows ####; else "answer is"; else the last formula or number."""
    start = last_box(completion)
    thoughts = completion.rfind("</think>", max(start, 0))  # the box may follow them
    if thoughts >= 0 and (rest := completion[thoughts + len("</think>") :].strip()):
        completion, start = rest, -1
    if start >= 0:
        return box(completion[start : start + MAX_CHARS + 20])
    tail = MARKS.sub("\n", completion[-TAIL:].replace("答案", " answer:"))
    if "####" in tail:
        first_line = tail.rpartition("####")[2].strip().partition("\n")[0]
        return first_line.strip()[:MAX_CHARS] or None
    if phrases := list(PHRASE.finditer(tail)):
        # the phrase's own sentence: "The answer is 3.14. I hope it is correct."
        sentence = SENTENCE_END.split(tail[phrases[-1].end() :], maxsplit=1)[0].strip(" *")
        return stated(sentence)[:MAX_CHARS] or None
    return last_value(tail)


def last_box(text: str) -> int:
    r"""Where the last \boxed or \fbox starts; -1 if there is none."""
    if "\\" not in text:
        return -1
    start = text.rfind(r"\boxed")
    return max(start, text.rfind(r"\fbox", max(start, 0)))


BOX = re.compile(r"\\[a-z]+\s*(\{|-?[0-9][0-9.,/]*)")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def box(text: str) -> str | None:
    """The braces of the box that starts `text`; None if it is empty, unterminated or overlong."""
    opening = BOX.match(text)
    if opening is None or opening[1] != "{":
        return opening and opening[1].rstrip(".,")  # \boxed 5
    depth = 1
    for mark in BRACES.finditer(text, opening.end()):
        depth += (mark[0] == "{") - (mark[0] == "}")
        if depth == 0:
            return text[opening.end() : mark.start()].strip() or None
    return None


def stated(sentence: str) -> str:
    """Of "The total is 34 dollars", what it says of the total; of other prose, its last value.

    A short text stays whole, as "October 30" does; so does a sentence that denies something.
    """
    words = [word.lower() for word in PROSE.findall(sentence)]
    if not words and sentence.isascii():
        return sentence
    if not DENIALS.isdisjoint(words):
        return sentence
    match = COPULA.match(sentence)
    if match and re.search(r"[0-9\\$]", said := sentence[match.end() :]):
        return said
    if len(words) > 2 and sentence[0].isalpha():
        return last_value(sentence) or sentence
    return sentence


def last_value(text: str) -> str | None:
    r"""The last number, or the formula around it: of $\frac{2}{5}$ the 5 is no answer."""
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    if formula := formula_around(text, last.start(), last.end()):
        # of $2 + 3 = 5 = x$ the last side that has a number
        sides = re.split(r"(?<![<>!\\])=", formula)
        side = [side for side in sides if re.search("[0-9]", side)][-1].strip()
        is_whole = side.count("{") == side.count("}") and r"\end" not in side
        return side if is_whole else last[0]
    if bare := BARE_LATEX.search(text):
        return re.split(r"(?<![<>!\\])=", bare[1])[-1]
    word = re.search(r"\S*$", text[: last.start()])[0]
    # what stands inside of a command is no answer
    return None if re.search(r"\\[a-z]+\{", word) else last[0]


def formula_around(text: str, start: int, end: int) -> str | None:
    """What stands between dollar signs or brackets, if it is more than a number and no prose."""
    for left, right in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        before, after = text.rfind(left, 0, start + 1), text.find(right, end)
        if before < 0 or after < 0:
            continue
        formula = text[before + len(left) : after]
        is_more = re.search(r"[\\^(\[,A-Za-z]", formula) is not None
        if is_more and right not in formula and not PROSE.search(formula):
            return formula
    return None


# ---- Lex: a text as typed tokens -------------------------------------------------------------


class Token(NamedTuple):
    kind: str  # number letter word function command sign relation separator open close
    text: str  # the canonical spelling: \leqslant and <= are both \le
    spaced: bool = False  # is there a space in front of it?


# Characters that stand for others. A full-width digit stays what it is: no number of this file.
CHARACTERS = r"""
    −- –- —- ×\times ·\cdot ⋅\cdot ∙\cdot •\cdot ∗* ÷/ ⁄/ π\pi ∞\infty ≤\le ≥\ge ⩽\le ⩾\ge
    ≠\ne ≈\approx ∪\cup ∩\cap ∈\in √\sqrt °^\circ ˚^\circ º^\circ ∶: ∅\emptyset ∖\setminus
    ±\pm ∓\mp ∠\angle △\triangle ∣| ∥\| →\to α\alpha β\beta γ\gamma δ\delta ε\epsilon ζ\zeta
    η\eta θ\theta κ\kappa λ\lambda μ\mu µ\mu ν\nu ξ\xi ρ\rho σ\sigma τ\tau φ\phi ϕ\phi χ\chi
    ψ\psi ω\omega Γ\Gamma Δ\Delta ∆\Delta Θ\Theta Λ\Lambda Σ\Sigma Φ\Phi Ψ\Psi Ω\Omega ħ\hbar
    ℏ\hbar ℓ\ell ℝ\mathbb{R} ½\frac12 ⅓\frac13 ⅔\frac23 ¼\frac14 ¾\frac34 ⅕\frac15 ⅖\frac25
    ⅗\frac35 ⅘\frac45 ⅙\frac16 ⅚\frac56 ⅐\frac17 ⅛\frac18 ⅜\frac38 ⅝\frac58 ⅞\frac78 ⅑\frac19
    ’' ′' ‘' ″'' （( ）) ［[ ］] ｛\{ ｝\} ，, 、, ；; ：: ＝= ＋+ －- ／/ ＜< ＞> ％% ｜| 。. ～~ ⌊\lfloor
    ⌋\rfloor ⌈\lceil ⌉\rceil ⟨\langle ⟩\rangle 〈\langle 〉\rangle €\text{euro} £\text{sterling}"""
CHARACTERS = {pair[0]: pair[1:] + " " * pair[-1].isalpha() for pair in CHARACTERS.split()}
CHARACTERS = str.maketrans(CHARACTERS)
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉", "0123456789+-n0123456789")

# The table of tokens. Of two rules that match at a place, the first one counts.
TOKENS = {
    "row": r"\\\\ (?:\[-?[0-9.]+[a-z]+\])?",
    "reals": r"\\mathbb\s*(?:R\b|\{\s*R\s*\})",
    "degree": r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z])) | \\degrees?(?![a-z])",
    "clock": r"(?<=[0-9])\s*(?P<half>[aApP])\.?\s?[mM]\b\.?",  # 4 p.m.
    "times": r"(?<=[0-9])\s*[xX]\s*(?=10\s*[\^⁰¹²³⁴⁵⁶⁷⁸⁹⁻])",  # 1.1 x 10^4
    "skip": r"""
        \s+ | ~ | \$ | \\[,;:!>\ ()\[\]] | (?<=[A-Za-z])\.
        | \\[vh]?phantom\s*(?:\{[^{}]*\}|\\?.)  # what is not seen is not said
        | \\(?:left|right|[bB]igg?[lrm]?|q?quad|(?:display|text)style|limits|rm|bf|it
          |math(?:bf|it|sf|tt|cal|bb|frak|scr)|boldsymbol|bm|vec|hat|widehat|overrightarrow
          |boxed|fbox)(?![A-Za-z])\.?""",
    "text": r"""
        \\(?P<font>text(?:bf|rm|it|sf|tt|up|normal)?|emph|[mh]box|mathrm|operatorname)\*?\s*
        \{(?P<content>(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}""",
    # 10{,}000 and 1\,234 can be no list; 1,234 and 1 234 are numbers only outside of brackets
    "marked": r"[0-9]+(?:(?:\{,\}|,\\!\s*|\\[,!;:]\s*)[0-9]{3}(?![0-9]))+(?:\.[0-9]+)?",
    "thousands": r"""[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?:\ [0-9]{3})+)
        (?![ ,]?[0-9]|\s*/)(?:\.[0-9]+)?""",
    "number": r"""
        [0-9]+\s+[0-9]+/[0-9]+(?![0-9])  # 1 4/5
        | [0-9]*\.[0-9]*\\(?:overline|bar|dot)\s*\{?[0-9]+\}?  # 0.1\overline{6}
        | (?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?  # 4.5e33""",
    "raised": r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+",
    "lowered": r"[₀₁₂₃₄₅₆₇₈₉]+",
    "matrix": r"""
        \\(?P<edge>begin|end)\s*\{(?:[pbB]?(?:small)?matrix|array)\*?\}(?:\{[a-z|\ ]*\})?""",
    "block": r"\\(?P<side>begin|end)\s*\{[A-Za-z]+\*?\}",  # any other: only as a whole
    "command": r"\\[A-Za-z]+ | \\[{}|%$]",
    "word": r"[A-Za-z]+",
    "letters": r"[^\W\d_]+",
    "sign": r"\*\* | \+/- | != | [<>]= | [-+*/^_=<>()\[\]{}|!,;:&'%]",
}
TOKEN = "|".join(f"(?P<{kind}> {rule}\n)" for kind, rule in TOKENS.items())
TOKEN = re.compile(TOKEN, re.VERBOSE)

SPELLINGS = r"""
    \leq=\le \leqslant=\le \leqq=\le \geq=\ge \geqslant=\ge \geqq=\ge \neq=\ne \lt=< \gt=>
    <==\le >==\ge !==\ne \approxeq=\approx \simeq=\approx
    \times=* \cdot=* \ast=* **=^ \div=/ \colon=: +/-=\pm
    \lvert=| \rvert=| \vert=| \mid=| \lbrace=\{ \rbrace=\} \prime=' \backslash=\setminus
    \varnothing=\emptyset \infinity=\infty \inf=\infty \oo=\infty
    \or=, \and=, \lor=, \land=, ;=,
    \arcsin=\asin \arccos=\acos \arctan=\atan \ln=\log \abs=\Abs
    \varphi=\phi \varepsilon=\epsilon
    \dfrac=\frac \tfrac=\frac \cfrac=\frac \dbinom=\binom \tbinom=\binom \overline=\bar
    \widetilde=\tilde"""
SPELLINGS = dict(pair.rsplit("=", 1) for pair in SPELLINGS.split())
FUNCTIONS = "sin cos tan asin acos atan cot sec csc sinh cosh tanh exp log Abs".split()
NAMES = """
    alpha beta gamma delta epsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho
    sigma tau upsilon phi chi psi omega
    Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega
    ell hbar angle triangle"""
KINDS = {"\\" + name: "letter" for name in NAMES.split()}
KINDS |= {"\\" + name: "function" for name in FUNCTIONS}
STRUCTURE = r"""
    \pi \frac \binom \sqrt \bar \tilde \infty \R \emptyset \cup \cap \setminus \pm \mp \over \choose
    \dot \to \lim \sum \int"""
KINDS |= dict.fromkeys(STRUCTURE.split(), "command")
INCLUSIONS = set(r"\in \notin \subset \subseteq \supset \supseteq".split())
KINDS |= dict.fromkeys([*r"= < > \le \ge \ne \approx".split(), *INCLUSIONS], "relation")
KINDS |= dict.fromkeys([*r"( [ { \{ \langle \lfloor \lceil \begin \begin?".split()], "open")
KINDS |= dict.fromkeys([*r") ] } \} \rangle \rfloor \rceil \end \end?".split()], "close")
KINDS |= {",": "separator"}
COMMANDS = {name for name in [*KINDS, *SPELLINGS] if name[0] == "\\" and name[1:].isalpha()}
LEVEL = {text: (kind == "open") - (kind == "close") for text, kind in KINDS.items()}

UNITS = """
    mm millimeter millimetre|cm centimeter centimetre|dm decimeter|m meter metre|km kilometer
    kilometre|in inch inche|ft foot feet|yd yard|mi mile|g gram|kg kilogram|mg milligram|lb pound|
    oz ounce|ton|acre|l liter litre|ml milliliter millilitre|gal gallon|s sec second|min minute|
    h hr hour|day|week|month|year yr|cent penny|dollar usd buck|euro eur|sterling gbp|percent pct|
    ° degree deg|rad radian|c celsius|f fahrenheit|mi-per-h mph|km-per-h kph|am|pm|per /|hz hertz|
    2 square sq squared|3 cubic cu cubed|men"""
UNITS = {spelling: line.split()[0] for line in UNITS.split("|") for spelling in line.split()}
CURRENCY = {"dollar", "euro", "sterling"}
FILLER = set("unit of the a total".split())  # they say nothing beside a number
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
SCALES["trillion"] = 10**12
# Words that assert, deny, compare or choose: what they stand in is a sentence and no unit.
ASSERTIONS = """
    is are was were be not no nor neither none never either or if when where whether but than
    instead except almost nearly wrong true false correct incorrect answer because since so thus
    hence plus minus divided half double twice rather maybe perhaps"""
ASSERTIONS = set(ASSERTIONS.split())


def lex(text: str) -> list[Token]:
    """The tokens of a text; what no rule of the table matches makes it unreadable."""
    tokens, at, depth, brackets, spaced = [], 0, 0, 0, False
    while at < len(text):
        match = TOKEN.match(text, at)
        require(match)
        kind, written, at = match.lastgroup, match[0], match.end()
        if kind == "skip":
            spaced = True
            continue
        if kind == "thousands" and brackets:  # (1,200) is a pair, 1,200 a number
            kind, written = "number", re.match("[0-9]+", written)[0]
            at = match.start() + len(written)
        elif kind == "command" and written not in COMMANDS:
            written = unglued(written)
            at = match.start() + len(written)
        new = CANONICAL.get(written) or RULES[kind](written, match, text[at : at + 1])
        for piece in new:
            tokens.append(Token(*piece, spaced))
            spaced = False
            if piece[0] == "open" or piece[0] == "close":
                level = LEVEL[piece[1]]
                depth += level
                brackets += level * (piece[1] not in "{}")
        require(depth <= MAX_DEPTH and len(tokens) <= MAX_TOKENS)
    return tokens


def unglued(command: str) -> str:
    r"""Where spaces got lost, as in \piR and \leqslantx: the longest command that starts it."""
    for length in range(len(command) - 1, max(2, len(command) - 4), -1):
        if command[:length] in COMMANDS:
            return command[:length]
    return command


def scripted(written: str) -> list[tuple[str, str]]:
    """Raised and lowered digits as a script in braces: x⁻² is x^{-2}."""
    characters = written.translate(RAISED)
    pieces = re.findall("[0-9]+|.", characters)
    kinds = ["number" if c[0].isdigit() else "letter" if c == "n" else "sign" for c in pieces]
    script = "_" if written[0] in "₀₁₂₃₄₅₆₇₈₉" else "^"
    return [("sign", script), ("open", "{"), *zip(kinds, pieces), ("close", "}")]


# What the rules of the table make of what they match: pairs of a kind and a canonical spelling.
CANONICAL = {text: [(kind, text)] for text, kind in KINDS.items()}
CANONICAL |= {text: [(KINDS.get(to, "sign"), to)] for text, to in SPELLINGS.items()}
CANONICAL |= dict.fromkeys(("%", r"\%"), [("word", "percent")])
CANONICAL |= {r"\$": [("word", "dollar")]}
RULES = {
    "row": lambda *_: [("sign", r"\\")],
    "reals": lambda *_: [("command", r"\R")],
    "degree": lambda *_: [("sign", "°")],
    "clock": lambda _, match, __: [("word", match["half"].lower() + "m")],
    "times": lambda *_: [("sign", "*")],
    "text": lambda _, match, __: texted(match["content"].strip().rstrip("\\"), match["font"]),
    "marked": lambda written, *_: [("number", re.sub("[^0-9.]", "", written))],
    "thousands": lambda written, *_: [("number", re.sub("[ ,]", "", written))],
    "number": lambda written, *_: [("number", written)],
    "raised": lambda written, *_: scripted(written),
    "lowered": lambda written, *_: scripted(written),
    "matrix": lambda _, match, __: CANONICAL["\\" + match["edge"]],
    "block": lambda _, match, __: CANONICAL["\\" + match["side"] + "?"],
    "command": lambda written, *_: [("command", written)],
    "word": lambda written, _, following: spelled(written, following),
    "letters": lambda written, *_: [("word", written.lower())],
    "sign": lambda written, *_: [("sign", written)],
}


SPOKEN = {text for text, kind in KINDS.items() if kind in ("letter", "function", "separator")}
SPOKEN |= {r"\pi", r"\infty", r"\frac", r"\binom", r"\sqrt", r"\lfloor", r"\lceil"}


def spelled(word: str, following: str = "") -> list[tuple[str, str]]:
    """A run of letters: a function, a constant, a separator, a unit, a word, or single letters."""
    if following == "{" and word in ("bar", "overline", "tilde"):
        return [("command", SPELLINGS.get("\\" + word, "\\" + word))]
    command = SPELLINGS.get("\\" + word.lower(), "\\" + word)
    if command in SPOKEN:
        return [(KINDS[command], command)]
    if word.lower() in ("am", "pm"):
        return [("word", word.lower())]
    if len(word) > 3 or (len(word) > 1 and (word in UNITS or word.rstrip("s") in UNITS)):
        return [("word", word.lower())]
    return [("letter", letter) for letter in word]


def texted(content: str, font: str) -> list[tuple[str, str]]:
    r"""What a \text{...} holds: words, separators, or mathematics that happens to stand there."""
    function = SPELLINGS.get("\\" + content, "\\" + content)
    is_constant = content in ("e", "i") and font in ("mathrm", "operatorname")
    if KINDS.get(function) == "function" or is_constant:
        return spelled(content)
    has_digits = re.search("[0-9]", content) and not re.match(r".*[A-Za-z]{2}.*[0-9]", content)
    if has_digits or re.search(r"[\\${]", content):
        return [(token.kind, token.text) for token in lex(content)]  # \textbf{42}
    tokens = []
    for word in re.findall(r"[^\W_]+|[,;/^%°()-]", content.lower().replace(".", "")):
        if word in ("and", "or", ",", ";"):
            tokens.append(("separator", ","))
        elif word in "()":
            tokens.append(("open" if word == "(" else "close", word))
        elif word in "/^-°":
            tokens.append(("sign", word))
        else:
            tokens.append(("word", "percent" if word == "%" else word))
    return tokens


# ---- Algebra: sympy objects, unevaluated but for rational numbers, each step within MAX_BITS -


def _fold(operation, *terms):
    """The sum or product: rational numbers are computed, the rest is written down beside them."""
    if len(terms) == 1:
        return terms[0]
    number, others = operation.identity, []
    for term in terms:
        if isinstance(term, int) or term.is_Rational:
            number = number + term if operation is Add else number * term
            require(number.p.bit_length() + number.q.bit_length() <= MAX_BITS)
        else:
            others.append(term)
    if number != operation.identity or not others:
        others.append(number)
    return others[0] if len(others) == 1 else operation(*others, evaluate=False)


add, mul = partial(_fold, Add), partial(_fold, Mul)


def div(a, b):
    return mul(a, power(b, Integer(-1)))


def power(base, exponent):
    require(base != 0 or (exponent.is_Rational and exponent.p > 0) or exponent.free_symbols)
    if base.is_Rational and exponent.is_Integer:
        require((base.p.bit_length() + base.q.bit_length()) * abs(exponent.p) <= MAX_BITS)
        return base**exponent
    return Pow(base, exponent, evaluate=False)


def root(a, n):
    # the real one: the cube root of -8 is -2
    if a.is_Rational and a.p < 0 and n.is_Integer and n.p % 2:
        return mul(-1, root(-a, n))
    return power(a, div(Integer(1), n))


def binomial(n, k):
    if not (n.is_Integer and k.is_Integer):
        return sp.binomial(n, k, evaluate=False)
    require(min(k.p, abs(n.p - k.p)) * n.p.bit_length() <= MAX_BITS)
    return Integer(math.comb(n.p, k.p))  # refuses negative numbers with a ValueError


def factorial(n):
    if not n.is_Rational:
        return sp.factorial(n, evaluate=False)
    require(n.is_Integer and n.p <= MAX_FACTORIAL)
    return Integer(math.factorial(n.p))


REPEATING = re.compile(r"([0-9]*\.([0-9]*))\\\D+([0-9]+)\}?")  # 0.1\overline{6}
LARGE_EXPONENT = re.compile("[eE][-+]?[0-9]{5}")


def literal(text: str):
    """A number as it is written, exactly."""
    require(len(text) <= MAX_DIGITS)
    if text.isdigit():
        return Integer(int(text))
    require(not LARGE_EXPONENT.search(text))
    if match := REPEATING.fullmatch(text):
        point, digits, period = match.groups()
        value = Fraction(point + "0")
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
    else:
        value = sum(map(Fraction, text.split()))  # 1 4/5
    return Rational(value.numerator, value.denominator)


# ---- Read, lower half: sum > product > power > atom ------------------------------------------

CONSTANTS = {"e": E, "i": I, r"\pi": pi}
BRACKETS = {"(": ")", "[": "]", "{": "}", "|": "|"}
BRACKETS |= {r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
WRAPPERS = {"|": sp.Abs, r"\lfloor": sp.floor, r"\lceil": sp.ceiling}
BUILDERS = {"\\" + name: partial(getattr(sp, name), evaluate=False) for name in FUNCTIONS}
ANGLES = {r"\sin", r"\cos", r"\tan", r"\cot", r"\sec", r"\csc"}
STARTS = {*BRACKETS, r"\frac", r"\binom", r"\sqrt", r"\bar", r"\tilde", r"\pi"}
END = Token("end", "")


class Expression:
    """Recursive descent over the tokens of one expression; `value` is its sympy object.

    Beside a sine, a degree sign is a factor of pi / 180; elsewhere it is a unit.
    """

    def __init__(self, tokens: list[Token]):
        self.tokens, self.at, self.bars = [*tokens, END], 0, 0
        self.degree = 1 if ANGLES.isdisjoint(t.text for t in tokens) else div(pi, Integer(180))
        self.value = self.over()
        require(self.peek() is END)

    def peek(self) -> Token:
        return self.tokens[self.at]

    def take(self, *expected: str) -> str:
        """The next token's text, or "" if it is none of the expected ones."""
        text = self.tokens[self.at].text
        if expected and text not in expected:
            return ""
        require(text)
        self.at += 1
        return text

    def over(self):
        r"""A sum; or two with \over or \choose between them, as in {5 \over 8}."""
        value = self.sum()
        if operator := self.take(r"\over", r"\choose"):
            value = (div if operator == r"\over" else binomial)(value, self.sum())
        return value

    def sum(self):
        terms = [self.product()]
        while self.peek().text in ("+", "-"):
            terms.append(self.product())
        return add(*terms)

    def product(self):
        factors = [self.signed(self.power)]
        while (operator := self.take("*", "/")) or self.juxtaposed():
            factor = self.signed(self.power)
            factors.append(div(Integer(1), factor) if operator == "/" else factor)
        return mul(*factors)

    def signed(self, read):
        minus = False
        while sign := self.take("+", "-"):
            minus ^= sign == "-"
        return mul(-1, read()) if minus else read()

    def juxtaposed(self) -> bool:
        """Can the next token be a factor without a sign?

        A numeral can where nothing else is meant: 2^6 3^5, n 2^n and (n-2)180 are products,
        but neither 2 3 nor x2 is.
        """
        token, last = self.peek(), self.tokens[self.at - 1]
        if token.text == "|":
            return not self.bars
        if token.kind != "number":
            return token.kind in ("letter", "function") or token.text in STARTS
        if last.kind == "close" or last.text == "!":
            return True
        if last.kind == "number":
            return token.spaced and self.at > 1 and self.tokens[self.at - 2].text == "^"
        return self.tokens[self.at + 1].text == "^"

    def power(self):
        """An atom with what stands behind it: exponents, factorials, a degree sign."""
        base = self.mixed() or self.atom()
        while operator := self.take("^", "!", "°"):
            if operator == "^" and base.is_Symbol:
                exponent = self.exponent()
                if self.peek().text == "_":  # v^2_0 is v_0^2
                    base = self.symbol(base.name)
                base = power(base, exponent)
            elif operator == "^":
                base = power(base, self.argument())
            else:
                base = factorial(base) if operator == "!" else mul(base, self.degree)
            require(self.peek().text != operator)  # neither 9^9^9 nor 5!! is clear
        return base

    def mixed(self):
        r"""Mixed numbers: 1\frac{4}{5} is 9/5. An integer, and a fraction of two numerals."""
        number = self.peek()
        if not (number.text.isdigit() and self.tokens[self.at + 1].text == r"\frac"):
            return None
        start, self.at = self.at, self.at + 2
        first, second = self.numeral(), self.numeral()
        if first and second:
            return add(literal(number.text), div(literal(first), literal(second)))
        self.at = start
        return None

    def numeral(self) -> str:
        """An argument of a fraction that is an integer, or ""."""
        if self.peek().text == "{":
            inner = self.tokens[self.at + 1 : self.at + 3]
            if inner[0].text.isdigit() and inner[-1].text == "}":
                self.at += 3
                return inner[0].text
            return ""
        return self.digit() if self.peek().text.isdigit() else ""

    def digit(self) -> str:
        r"""As in TeX, an argument without braces is one digit: \frac12 is a half."""
        kind, text, spaced = self.peek()
        if len(text) > 1:
            self.tokens[self.at] = Token(kind, text[1:], True)
            return text[0]
        self.at += 1
        return text

    def exponent(self):
        """As in TeX, a letter without braces is all of it: in x^n_0 the index belongs to x."""
        if self.peek().kind == "letter" and self.peek().text not in CONSTANTS:
            return Symbol(self.take().strip("\\"))
        return self.argument()

    def argument(self):
        """A group or one token, with its sign: x^{10}, x^10, x^-1."""
        return self.signed(self.atom)

    def part(self):
        """An argument of a fraction or a binomial coefficient."""
        if self.peek().kind == "number" and self.peek().text.isdigit():
            return literal(self.digit())
        return self.argument()

    def atom(self):
        token = self.peek()
        text = self.take()
        if token.kind == "number":
            return literal(text)
        if text in BRACKETS:
            return self.group(text)
        if text == r"\frac":
            return div(self.part(), self.part())
        if text == r"\binom":
            return binomial(self.part(), self.part())
        if text == r"\sqrt":
            index = self.atom() if self.peek().text == "[" else Integer(2)
            return root(self.argument(), index)
        if token.kind == "function":
            return self.function(text)
        if text in (r"\bar", r"\tilde"):
            return self.symbol(text[1:] + " " + self.name())
        if text in CONSTANTS and self.peek().text != "_":
            return CONSTANTS[text]
        require(token.kind == "letter")
        return self.symbol(text.strip("\\"))

    def group(self, opening: str):
        self.bars += opening == "|"
        value = self.over() if opening == "{" else self.sum()
        require(self.take(BRACKETS[opening]))
        self.bars -= opening == "|"
        return WRAPPERS[opening](value, evaluate=False) if opening in WRAPPERS else value

    def name(self) -> str:
        """One token, or all of a group of braces, as a part of a name."""
        text = self.take()
        while text.count("{") > text.count("}"):
            text += self.take()
        return re.sub(r"[\\{}]", "", text)

    def symbol(self, name: str):
        r"""A letter with its subscript and primes: a_1, x_{\text{max}}, f', y^{\prime}."""
        while True:
            following = [t.text for t in self.tokens[self.at : self.at + 4]]
            if following[0] == "_" and "_" not in name:
                self.at += 1
                name += "_" + self.name()
            elif following[0] == "'":
                self.at += 1
                name += "'"
            elif following[:2] == ["^", "'"]:
                self.at += 2
                name += "'"
            elif following[:3] == ["^", "{", "'"]:
                self.at += 1
                name += self.name()
            else:
                return Symbol(name)

    def function(self, name: str):
        scripts = {}
        while script := self.take("_", "^"):
            scripts[script] = self.argument()
        if scripts.get("^") == -1:  # \sin^{-1}
            name, _ = r"\a" + name[1:], scripts.pop("^")
            require(name in BUILDERS)
        bracket = self.peek().text in BRACKETS
        argument = self.atom() if bracket else self.signed(self.power)
        # \sin 2x \cos x: without brackets, it ends at an operator, a bracket or the next function
        while not bracket and self.juxtaposed():
            if self.peek().kind in ("function", "number") or self.peek().text == "(":
                break
            argument = mul(argument, self.power())
        value = BUILDERS[name](argument)
        if "_" in scripts:
            value = div(value, sp.log(scripts["_"], evaluate=False))
        return power(value, scripts["^"]) if "^" in scripts else value


# ---- Values: what an answer can be -----------------------------------------------------------


class Number(NamedTuple):
    """2x+1; `plain` if written as a plain number, with a `spelling` if it may be a word."""

    expr: sp.Expr
    plain: bool = False
    spelling: str = ""


class Quantity(NamedTuple):
    """5 cm: a value with the words of its unit."""

    value: NamedTuple
    unit: frozenset


class Tuple(NamedTuple):
    """(1, 2), a pair or an open interval, and [1, 2): `brackets` are the outer characters."""

    brackets: str
    items: tuple


class Set(NamedTuple):
    r"""1, 2 and \{1, 2\}: answers without an order."""

    items: tuple


class Union(NamedTuple):
    r"""[0,1] \cup (2,3)."""

    pieces: tuple


class Combined(NamedTuple):
    r"""A \cap B and A \setminus B."""

    operator: str
    parts: tuple


class Matrix(NamedTuple):
    rows: tuple


class Ratio(NamedTuple):
    """1:2, and 4:30."""

    parts: tuple


class Based(NamedTuple):
    """52_8, as it is written."""

    sign: str
    digits: str
    base: str


class Text(NamedTuple):
    words: str


class Unread(NamedTuple):
    """What the grammar does not know; equal only to the same tokens."""

    text: str


class Relation(NamedTuple):
    """x + y = 5, 1 < x <= y: sides, and the operators between them."""

    sides: tuple
    operators: tuple


class Named(NamedTuple):
    """x = 5, and, if both sides are expressions, the same as a relation."""

    name: str
    value: NamedTuple
    relation: Relation | None = None
    is_curve: bool = False  # x + y = 5 may be a line as well


class Approximate(NamedTuple):
    """10/3, about 3.33: as an answer the exact value, as a gold either."""

    exact: NamedTuple
    decimal: NamedTuple


class Choice(NamedTuple):
    """(B) 12: as a gold the letter, the value, or both."""

    letter: str
    value: NamedTuple


# ---- Read, upper half: list > relation > union > tuple, set, matrix, quantity ----------------

INFINITY = Number(oo)
MINUS_INFINITY = Number(-oo)
REALS = Tuple("()", (MINUS_INFINITY, INFINITY))
FIXED = {
    (r"\R",): REALS,
    (r"\infty",): INFINITY,
    ("+", r"\infty"): INFINITY,
    ("-", r"\infty"): MINUS_INFINITY,
    (r"\emptyset",): Set(()),
    (r"\{", r"\}"): Set(()),
    ("{", "}"): Set(()),
}
SET_OPERATIONS = (r"\cup", r"\cap", r"\setminus")  # the loosest first
ORDERS = {"<", ">", r"\le", r"\ge"}
MIRRORED = {"=": "=", r"\ne": r"\ne", "<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def split(tokens: list[Token], marks) -> tuple[list[list[Token]], list[str]]:
    """The parts between the marks outside of all brackets, and these marks."""
    if not any(token.text in marks for token in tokens):
        return [tokens], []
    depths = accumulate(LEVEL.get(token.text, 0) for token in tokens)
    at = [i for i, depth in enumerate(depths) if depth == 0 and tokens[i].text in marks]
    parts = [tokens[i + 1 : j] for i, j in zip([-1, *at], [*at, len(tokens)])]
    return parts, [tokens[i].text for i in at]


def enclosed(tokens: list[Token]) -> bool:
    """Does the first bracket close at the last token?"""
    if len(tokens) < 2 or tokens[0].kind != "open" or tokens[-1].kind != "close":
        return False
    depths = list(accumulate(LEVEL.get(token.text, 0) for token in tokens))
    return depths.index(0) == len(tokens) - 1 if 0 in depths else False


def spell(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


LABELS = set("solution answer result is the final set".split())
# What an expression alone does not have; words are no part of it either.
UPPER = r", : _ | ( ) [ \{ \begin \begin? \langle \cup \cap \setminus \pm \mp \R \infty \emptyset °"
UPPER = set(UPPER.split())
UPPER |= {text for text, kind in KINDS.items() if kind == "relation"}


def listed(tokens: list[Token]):
    """List: the values between commas. x < 1 or x > 5 is a union."""
    if len(tokens) > 2 and not any(t.text in UPPER or t.kind == "word" for t in tokens):
        return number(tokens)  # most answers, twice as fast
    label, colon = split(tokens, (":",))
    if colon and all(token.text in LABELS for token in label[0]):  # Solution is: x = 4
        tokens = tokens[len(label[0]) + 1 :]
    return united(items_of(tokens))


def united(items: tuple):
    """x < 1 or x > 5 is a union; x > 1 and x < 5 overlap, and mean (1, 5); the rest are lists."""
    if len(items) == 1:
        return items[0]
    if not all(isinstance(i, Named) and isinstance(i.value, (Tuple, Union)) for i in items):
        return Set(items)
    if not all(i.relation for i in items):  # x in (1, 2), x in (3, 4)
        return Set(items)
    if len({i.name for i in items}) > 1:
        return Union(items)
    name, values = items[0].name, [i.value for i in items]
    if all(i.relation.operators == (r"\ne",) for i in items):
        return Named(name, without([value.pieces[0].items[1] for value in values]))
    if len(items) == 2 and (common := overlap(*values) or overlap(*values[::-1])):
        return Named(name, common)
    return Union(items)


def overlap(above, below):
    """Of x > a and x < b what is between, if anything is."""
    if not (isinstance(above, Tuple) and isinstance(below, Tuple)):
        return None
    (a, top), (bottom, b) = above.items, below.items
    if top != INFINITY or bottom != MINUS_INFINITY or a == bottom or b == top:
        return None
    if as_float(a.expr) >= as_float(b.expr):
        return None
    return Tuple(above.brackets[0] + below.brackets[1], (a, b))


def items_of(tokens: list[Token]) -> tuple:
    """One answer for each part between commas; a part with a plus-minus sign is two."""
    items = []
    for part in split(tokens, (",",))[0]:
        texts = [token.text for token in part]
        if not part:
            continue
        if part[0].text == r"\{" or {r"\pm", r"\mp"}.isdisjoint(texts):
            items.append(statement(part))
            continue
        for signs in ({r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"}):
            signed = [token._replace(text=signs.get(token.text, token.text)) for token in part]
            items.append(statement(signed))
    if len(items) > 1:  # x = y = 4, z = 2 are three values
        counts = [1 + i.name.count(" = ") if isinstance(i, Named) else 1 for i in items]
        items = [i for i, count in zip(items, counts) for _ in range(count)]
    require(0 < len(items) <= MAX_ITEMS)
    return tuple(items)


def statement(tokens: list[Token]):
    """Relation: sides between =, <, \\in and so on; one side alone is a value."""
    if all(token.kind != "relation" for token in tokens):
        return value_of(tokens)
    while enclosed(tokens) and tokens[0].text == "{":
        tokens = tokens[1:-1]
    pieces, _ = split(tokens, (r"\cup",))
    if len(pieces) > 1 and all(any(t.text in ORDERS for t in piece) for piece in pieces):
        return Union(tuple(map(statement, pieces)))  # x < 1 \cup x > 5
    (exact, *rest), _ = split(tokens, (r"\approx",))
    if rest and not exact:
        return statement(rest[0])  # about 42
    if rest and name_of(exact):
        return equation([exact, rest[0]])
    if rest:
        return approximate(statement(exact), rest[0])
    sides, operators = split(tokens, {*MIRRORED, *INCLUSIONS})
    if not operators:
        return value_of(tokens)
    if operators == [r"\in"] and (name := name_of(sides[0])):
        return Named(name, value_of(sides[1]))
    if not INCLUSIONS.isdisjoint(operators):  # 2 \in M says something of M
        return Relation(tuple(map(operand, sides)), tuple(operators))
    return equation(sides) if {*operators} == {"="} else inequality(sides, operators)


def approximate(exact, rest: list[Token]):
    """Both sides of an approximation; x = 10/3, about 3.33, is one with a name."""
    if isinstance(exact, Named):
        return exact._replace(value=approximate(exact.value, rest))
    return Approximate(exact, value_of(rest))


def equation(sides: list[list[Token]]):
    """x = 5 and 5 = x are 5 with a name; 2 + 3 = 5 is true, and 5; x + 3 = 7 is a relation."""
    if not sides[0]:  # = 5
        sides = sides[1:]
    require(all(sides))
    if len(sides) == 1:
        return value_of(sides[0])
    if len(sides) == 2 and name_of(sides[1]) and not name_of(sides[0]):
        sides = sides[::-1]
    first, *middle, last = sides
    value = value_of(last)
    right = core(value).expr if isinstance(core(value), Number) else None
    steps = [attempt(Expression, side) for side in middle if not name_of(side)]
    # x = 2 + 3 = 5: an unreadable step may be anything, but what can be read must be true
    require(right is None or all(step is None or equal(step.value, right) for step in steps))

    def named(name: str, left, **more):
        if right is None:
            return Named(name, value)
        return Named(name, value, Relation((Number(left), Number(right)), ("=",)), **more)

    left = core(attempt(value_of, first))
    left = left.expr if isinstance(left, Number) else None
    names = [name for name in map(name_of, [first, *middle]) if name]  # x = y = 4
    if name_of(first):
        is_letter = left is not None and "(" not in names[0] and not is_capitals(first)
        return named(" = ".join(names), left if is_letter else Symbol(names[0]))
    if left is None:  # whatever \lim or \bmod ask for, the right-hand side says what it is
        require(is_operation(first))
        return named(spell(first), Symbol(spell(first)))
    require(right is not None)
    if equal(left, right):
        return value
    require(left.free_symbols or right.free_symbols)  # 3 = 7
    if is_asked_for(first) and not right.free_symbols:
        return named(spell(first), left, is_curve=is_coordinates(first))
    require(not middle)
    return Relation((Number(left), Number(right)), ("=",))


def attempt(read, tokens):
    """What `read` makes of the tokens, or None."""
    try:
        return read(tokens) if tokens else None
    except (ValueError, ZeroDivisionError):
        return None


def core(value):
    """A value without its unit, and an approximation's exact side."""
    while isinstance(value, (Quantity, Approximate)):
        value = value[0]
    return value


def name_of(tokens: list[Token]) -> str:
    """The spelling of a name, or "": x, a_1, f(x), f^{-1}(x), P(A), (p,q), AB, |AB|, area."""
    if enclosed(tokens) and tokens[0].text == "{":
        return name_of(tokens[1:-1])
    if not tokens or tokens[0].text == r"\pi":
        return ""
    if len(tokens) == 1 and tokens[0].text in CONSTANTS:
        return ""
    kinds = {token.kind for token in tokens}
    if kinds == {"word"}:
        return spell(tokens)
    if tokens[0].text == "|" and tokens[-1].text == "|":
        inner = tokens[1:-1]
        return spell(tokens) if len(inner) > 1 and is_capitals(inner) else ""
    if is_capitals(tokens):
        return spell(tokens)
    if enclosed(tokens) and tokens[0].text == "(":  # (p, q)
        letters = split(tokens[1:-1], (",",))[0]
        return spell(tokens) if len(letters) > 1 and all(map(name_of, letters)) else ""
    return applied_name(tokens)


def is_capitals(tokens: list[Token]) -> bool:
    r"""The name of a segment, an angle or a quotient of them: AB, m\angle ABC, NO/BO."""
    marks = {r"\angle", r"\triangle", r"\bar", r"\frac", "{", "}", "/"}
    if len(tokens) > 1 and tokens[0].text == "m" and tokens[1].text == r"\angle":
        tokens = tokens[1:]
    rest = [token.text for token in tokens if token.text not in marks]
    return all(len(text) == 1 and text.isupper() for text in rest) and len(rest) > 1


def applied_name(tokens: list[Token]) -> str:
    """A letter with subscripts and primes, and with arguments if it is a function."""
    head, at = tokens[0], 1
    if head.text in (r"\bar", r"\tilde", r"\angle"):
        at = group_end(tokens, 1)
    elif head.kind not in ("letter", "word"):
        return ""
    while at < len(tokens) and tokens[at].text in ("'", "_", "^"):
        mark, at = tokens[at].text, at + 1
        script = spell(tokens[at : at + 4]).strip("{").partition("}")[0]
        if mark == "^" and script != "*" and not script.startswith(("-1", "'")):
            return ""  # of the powers only f^{-1}, y^{\prime} and x^* are names
        if mark != "'":
            at = group_end(tokens, at + script.startswith("-") * (tokens[at].text == "-"))
    rest = tokens[at:]
    if rest and not (rest[0].text == "(" and enclosed(rest) and are_arguments(head, rest[1:-1])):
        return ""
    return re.sub("[{}]", "", spell(tokens)).strip("\\")


def are_arguments(head: Token, tokens: list[Token]) -> bool:
    """f(x+1) and P(A|B) have any arguments; of other letters, x(t) has one and x(x+1) has none."""
    if head.kind == "word" or head.text in "fgh" or not head.text.islower():
        return True
    return len(tokens) > 0 and all(len(part) == 1 for part in split(tokens, (",",))[0])


def group_end(tokens: list[Token], at: int) -> int:
    """Where the group of braces, or the one token, that starts at `at` ends."""
    depth = 0
    while at < len(tokens):
        depth += (tokens[at].text == "{") - (tokens[at].text == "}")
        at += 1
        if depth == 0:
            break
    return at


def is_operation(tokens: list[Token]) -> bool:
    r"""Do words name it, or does a command that no rule knows stand there: \lim, \max, \bmod?"""
    if {token.kind for token in tokens} <= {"word", "letter"}:
        return True
    if len(split(tokens, (":",))[0]) > 1:  # S_1 : S_2 = 3 : 4
        return is_asked_for(tokens)
    words = {token.text for token in tokens if token.kind == "word"}
    unknown = {r"\lim", r"\sum", r"\int", r"\begin?"}
    return words <= OPERATORS and any(
        token.text in unknown
        or token.text in OPERATORS
        or (token.kind == "command" and token.text not in KINDS)
        for token in tokens
    )


OPERATORS = "lcm max min gcd det lim mod rank arg deg proj grad curl limit prob area cov corr"
OPERATORS = set(OPERATORS.split())


def is_asked_for(tokens: list[Token]) -> bool:
    """Letters alone, as in a+b = 5 and P(A)+f(2) = 5? With other numerals it is an equation."""
    depth = 0  # in subscripts, and in arguments of functions
    for before, token in zip([END, *tokens], tokens):
        if token.kind == "number" and before.text != "_" and not depth:
            return False
        is_function = before.kind == "letter" and are_arguments(before, [])
        opens = is_function if token.text == "(" else before.text == "_" and token.text == "{"
        if depth or opens:
            depth += LEVEL.get(token.text, 0)
    return any(token.kind == "letter" for token in tokens)


def is_coordinates(tokens: list[Token]) -> bool:
    letters = {token.text for token in tokens if token.kind == "letter"}
    return len(letters) > 1 and letters <= {"x", "y", "z"}


def inequality(sides: list[list[Token]], operators: list[str]):
    r"""x > 2 and 1 < x < 2 are named intervals, x \ne 2 is two of them; the rest are relations."""
    if operators[0] in (">", r"\ge"):
        sides, operators = sides[::-1], [MIRRORED[o] for o in operators[::-1]]
    names = [name_of(side) for side in sides]
    values = [core(value_of(side)) if not n else Number(Symbol(n)) for n, side in zip(names, sides)]
    require(all(isinstance(value, Number) for value in values))
    relation = Relation(tuple(values), tuple(operators))
    if len(sides) == 2:
        at = 1 if names[0] else 2  # where the letter stands between -oo and oo
        around = [MINUS_INFINITY, *values, INFINITY]
        ends = ["<", *operators, "<"]
        low, high = around[at - 1], around[at + 1]
        name = names[at - 1]
        if not name or low.expr.free_symbols or high.expr.free_symbols:
            return relation
        if operators == [r"\ne"]:
            point = high if at == 1 else low
            return Named(name, without([point]), relation)
        return Named(name, interval(low, high, *ends[at - 1 : at + 1]), relation)
    if len(sides) == 3 and names[1] and {*operators} <= {"<", r"\le"}:
        return Named(names[1], interval(values[0], values[2], *operators), relation)
    return relation


def interval(low: Number, high: Number, left: str, right: str) -> Tuple:
    """The values between two ends; an operator \\le takes its end in."""
    return Tuple("(["[left == r"\le"] + ")]"[right == r"\le"], (low, high))


def without(points) -> Union:
    """The real line without some points."""
    require(all(isinstance(point, Number) for point in points))
    ends = [MINUS_INFINITY, *sorted(points, key=lambda p: as_float(p.expr)), INFINITY]
    return Union(tuple(Tuple("()", pair) for pair in zip(ends, ends[1:])))


def value_of(tokens: list[Token]):
    """Union, ratio, tuple, set, matrix, text or quantity: one answer without a relation."""
    require(tokens)
    if len(tokens) < 3 and (fixed := FIXED.get(tuple(token.text for token in tokens))):
        return fixed
    while enclosed(tokens) and tokens[0].text in ("{", "(", "["):
        inner = tokens[1:-1]
        require(inner)
        if tokens[0].text == "{" and len(split(inner, (",",))[0]) > 1:
            return brace_set(inner)
        is_value = enclosed(inner) and inner[0].text in (r"\begin", r"\{")
        if tokens[0].text != "{" and not is_value and not split(inner, SET_OPERATIONS)[1]:
            break
        tokens = inner
    if choice := choice_of(tokens):
        return choice
    if is_text(tokens):
        return Text(spell(bare(tokens)).lower())
    tokens, unit, scale = unit_of(tokens)
    value = container(tokens) or number(tokens)
    if isinstance(value, Quantity):
        value, unit = value.value, unit or value.unit
    if scale > 1:
        require(isinstance(value, Number) and value.plain)
        value = Number(mul(value.expr, Integer(scale)), plain=True)
    return Quantity(value, unit) if unit else value


def operand(tokens: list[Token]):
    """A side of a set operation: there {2} is a set, whose backslashes got lost."""
    if enclosed(tokens) and tokens[0].text == "{" and not enclosed(tokens[1:-1]):
        return Set(items_of(tokens[1:-1]))
    return value_of(tokens)


def brace_set(inner: list[Token]) -> Set:
    """{1,2,3}, whose backslashes got lost; in it, {1} is a set as well."""
    parts = split(inner, (",",))[0]
    if all(enclosed(part) and part[0].text == "{" for part in parts):
        return Set(tuple(Set(items_of(part[1:-1])) for part in parts))
    return Set(items_of(inner))


def choice_of(tokens: list[Token]):
    """(B) 12, B) 12 and option B. A second letter in parentheses would be a second answer."""
    if tokens[0].text in ("option", "choice") and len(tokens) == 2 and is_label(tokens[1]):
        return Text(tokens[1].text.lower())
    at = 1 if tokens[0].text == "(" else 0
    if len(tokens) < at + 2 or not is_label(tokens[at]) or tokens[at + 1].text != ")":
        return None
    label, rest = tokens[at], tokens[at + 2 :]
    if not rest:
        return Text(label.text.lower())
    # (B)-3 may be a difference; in \\text{(B)} the letter is a word
    signs = ("^", "+", "*", "/") if label.kind == "word" else ("^", "+", "*", "/", "-")
    if rest[0].text in signs:
        return None
    if any(left.text == "(" and is_label(t) for left, t in zip(rest, rest[1:])):
        return None
    return Choice(label.text.lower(), value_of(rest))


def is_label(token: Token) -> bool:
    letters = "abcdefgh" if token.kind == "word" else "ABCDEFGH"
    return len(token.text) == 1 and token.text in letters


def is_text(tokens: list[Token]) -> bool:
    """Words first, or letters among words, as in "A function of x": no mathematics."""
    inner = bare(tokens)
    if inner[0].kind == "word":
        return tokens[0].text not in CURRENCY
    kinds = [token.kind for token in inner]
    several = kinds.count("letter") > 1 or kinds.count("word") > 2
    return {*kinds} == {"word", "letter"} and several


def bare(tokens: list[Token]) -> list[Token]:
    """Without the parentheses around them."""
    while enclosed(tokens) and tokens[0].text == "(":
        tokens = tokens[1:-1]
        require(tokens)
    return tokens


def unit_of(tokens: list[Token]) -> tuple[list[Token], frozenset, int]:
    """Take the unit off: a currency in front, or words at the end, as in 5 cm and 9 (apples)."""
    sign = tokens[:1] if tokens[0].text == "-" else []
    if tokens[len(sign)].text in CURRENCY and tokens[len(sign)].kind == "word":
        rest, unit, scale = unit_of(sign + tokens[len(sign) + 1 :])
        return rest, unit | {tokens[len(sign)].text}, scale
    start = unit_start(tokens)
    if start == len(tokens):
        return tokens, frozenset(), 1
    words = tokens[start:]
    if words[0].text == "(":
        words = words[1:-1]
    require(start and all(t.kind in ("word", "letter") or t.text in UNIT_SIGNS for t in words))
    scale = SCALES.get(words[0].text, 1)
    unit = unit_words([token.text for token in words[scale > 1 :]])
    return tokens[:start], unit, scale


UNIT_SIGNS = ("^", "2", "3", "{", "}", "/", "-")


def unit_start(tokens: list[Token]) -> int:
    """The first word in no bracket and no subscript; or the parentheses around the last words."""
    depth, opening = 0, 0
    for i, token in enumerate(tokens):
        if token.kind == "word" and depth == 0 and (i == 0 or tokens[i - 1].text != "_"):
            return i
        if depth == 0 and token.kind == "open":
            opening = i
        depth += LEVEL.get(token.text, 0)
    last = tokens[opening:]
    if last[0].text == "(" and enclosed(last) and any(t.kind == "word" for t in last):
        return opening
    return len(tokens)


def unit_words(words: list[str]) -> frozenset:
    """The words of a unit in one spelling: centimeters are cm, and square cm are cm^2."""
    require(ASSERTIONS.isdisjoint(words) and SCALES.keys().isdisjoint(words))
    one = [UNITS.get(w) or UNITS.get(w.rstrip("s")) or w.rstrip("s") for w in words]
    unit = set(" ".join(one).replace("-", " ").split()) - FILLER - {"^", "{", "}"}
    return frozenset(unit if unit - {"2", "3"} else ())


def container(tokens: list[Token]):
    """A union, ratio, set, matrix, tuple or numeral with a base, or None."""
    require(tokens)
    if fixed := FIXED.get(tuple(token.text for token in tokens)):
        return fixed
    if [t.text for t in tokens[:3]] == [r"\R", r"\setminus", r"\{"]:
        return without(container(tokens[2:]).items)
    for operator in SET_OPERATIONS:
        pieces, marks = split(tokens, (operator,))
        if not marks:
            continue
        values = list(map(operand, pieces))
        if operator != r"\cup":
            return Combined(operator, tuple(values))
        pieces = [v.pieces if isinstance(v, Union) else (v,) for v in values]
        return Union(sum(pieces, ()))
    parts, _ = split(tokens, (":",))
    if len(parts) > 1:  # 4:30, 1:2
        return Ratio(tuple(number(part) for part in parts))
    if enclosed(tokens):
        inner, opening = tokens[1:-1], tokens[0].text
        if opening == r"\{":
            return built_set(inner) or Set(items_of(inner))
        if opening == r"\begin":
            return matrix(inner)
        cells = split(inner, (",",))[0]
        if opening == "[" or (opening in ("(", r"\langle") and len(cells) > 1):
            round_ones = {r"\langle": "(", r"\rangle": ")"}
            edges = [round_ones.get(t.text, t.text) for t in (tokens[0], tokens[-1])]
            return Tuple("".join(edges), tuple(map(statement, cells)))
    return based(tokens)


def built_set(inner: list[Token]):
    r"""\{x \mid 2 < x < 3\}, or with a colon: what the condition makes of x."""
    for mark in ("|", ":"):
        parts, marks = split(inner, (mark,))
        condition = inner[len(parts[0]) + 1 :]
        if not marks or not name_of(split(parts[0], (r"\in",))[0][0]):
            continue
        if any(token.kind == "relation" for token in condition):
            # "x is real" says nothing beside other conditions
            conditions = [c for c in split(condition, (",",))[0] if spell(c[-2:]) != r"\in\R"]
            value = united(tuple(map(statement, conditions)))
            return value.value if isinstance(value, Named) else value
    return None


def matrix(tokens: list[Token]) -> Matrix:
    rows = [split(row, ("&",))[0] for row in split(tokens, (r"\\",))[0] if row]
    require(len({len(row) for row in rows}) == 1 and len(rows) * len(rows[0]) <= MAX_ITEMS)
    return Matrix(tuple(tuple(value_of(cell) for cell in row) for row in rows))


BASED = re.compile(r"(-?)\(?0*(?=[A-Z]*[0-9])([0-9A-Z]+)\)?_\{?\(?([0-9]+)\)?\}?")


def based(tokens: list[Token]):
    """A numeral with its base, 52_8: digits and capital letters, as they are written."""
    if tokens[-1].text not in ("}", ")") and tokens[-1].kind != "number":
        return None
    match = BASED.fullmatch(spell(tokens))
    return Based(*match.groups()) if match else None


# Forms of plain numbers: integer, mixed, fraction, a x 10^n. An n is a numeral, a t the numeral
# 10, an f a \frac.
PLAIN = re.compile(
    r"[-+]?(?:f[-+]?[nt][-+]?[nt]?|[nt]f[nt][nt]?|[nt](?:/[-+]?[nt])?|(?:[nt]\*)?t\^[-+]?[nt])"
)
FORMS = {"{": "", "}": "", "(": "", ")": "", "°": "", r"\frac": "f", r"\over": "/", "10": "t"}


def number(tokens: list[Token]):
    """An expression; a degree sign that is no factor is its unit."""
    form = "".join(FORMS.get(t.text, "n" if t.kind == "number" else t.text) for t in tokens)
    letters = "".join(t.text for t in tokens if t.text not in ("(", ")", "{", "}"))
    spelling = letters.lower() if letters.isalpha() else ""
    value = Number(Expression(tokens).value, PLAIN.fullmatch(form) is not None, spelling)
    texts = {token.text for token in tokens}
    has_degrees = "°" in texts and ANGLES.isdisjoint(texts)
    return Quantity(value, frozenset("°")) if has_degrees else value


FRACTION = re.compile(r"(-?)(?:\\[dtc]?frac\{([0-9]+)\}\{([0-9]+)\}|([0-9]+)(?:/([0-9]+))?)")
EDGES = " *:~"
ENDS = re.compile(r"(?:[\s*:~.,;。\\]|(?<!\\)\$|\\[)\]])+$")


@lru_cache(maxsize=4096)  # bounded; a group of rollouts repeats its gold and many answers
def _read(text: str):
    """The value that a text stands for; Unread where it stands for none."""
    try:
        require(len(text) <= MAX_CHARS)
        if match := FRACTION.fullmatch(text):  # the commonest answers, eight times as fast
            numerator, denominator = match[2] or match[4], match[3] or match[5] or "1"
            value = div(literal(numerator), literal(denominator))
            return Number(-value if match[1] else value, plain=True)
        start = text.rfind(r"\boxed")
        if start >= 0:  # a gold with a box in it is that box
            text = box(text[start:])
        text = " ".join(text.translate(CHARACTERS).split()).strip(EDGES)
        tokens = lex(ENDS.sub("", text))
    except Exception:  # no token of this file
        return Unread("".join(str(text)[:MAX_CHARS].split()))
    try:
        return listed(tokens)
    except Exception:  # unreadable, 1/0, an index past the end: nothing in a text may end a run
        return Unread(tokenwise(tokens))


def tokenwise(tokens: list[Token]) -> str:
    """The tokens in their canonical spelling; braces around a single one say nothing."""
    texts = [token.text for token in tokens]
    for i in range(len(texts) - 2):
        if texts[i] == "{" and texts[i + 2] == "}":
            texts[i] = texts[i + 2] = ""
    return " ".join(filter(None, texts))


# ---- Evaluate: an exact fraction, or a ball --------------------------------------------------
#
# Not by sympy's evalf: its work doubles with each nested root, and some of it runs at mpmath's
# process-wide precision, which threads share. libmp is told the precision, in bits, at each step.


class Undefined(Exception):
    """No value at this point, as 1/0: the point says nothing."""


class Undecided(Exception):
    """The bounds do not settle a sign, a branch or an integer; or a number is too large."""


class Ball(NamedTuple):
    """A computed number: its value, and log2 of a bound of its error.

    Numbers that are exact are an int or a Fraction instead.
    """

    value: tuple  # real and imaginary part, as libmp has them
    error: float
    real: bool  # is it real without any doubt?


EXACT_BITS = 1 << 14  # a fraction with more of them goes on as a ball
TOO_LARGE = 1 << 20  # bits in front of the point


def size(z: tuple) -> float:
    """log2 of |z|: it lies between size - 1 and size + 1/2; -inf for 0."""
    (_, man_re, exp_re, bits_re), (_, man_im, exp_im, bits_im) = z
    if (exp_re and not man_re) or (exp_im and not man_im):  # infinite or undefined
        raise Undefined
    real = exp_re + bits_re if man_re else -math.inf
    return max(real, exp_im + bits_im if man_im else -math.inf)


def ball(x, bits: int) -> Ball:
    if isinstance(x, Ball):
        return x
    value = libmp.from_rational(x.numerator, x.denominator, bits), libmp.fzero
    return Ball(value, size(value) - bits, True)


def rounded(value: tuple, errors, bits: int, real: bool) -> Ball:
    """The result of an operation: the errors that it inherits, and the rounding of its own."""
    worst = max(*errors, size(value) + 3 - bits)
    return Ball(value, worst + math.log2(len(errors) + 1), real and value[1] == libmp.fzero)


def plus(a, b, bits: int):
    if not (isinstance(a, Ball) or isinstance(b, Ball)):
        return a + b
    a, b = ball(a, bits), ball(b, bits)
    value = libmp.mpc_add(a.value, b.value, bits)
    return rounded(value, (a.error, b.error), bits, a.real and b.real)


def times(a, b, bits: int):
    if not (isinstance(a, Ball) or isinstance(b, Ball)):
        return a * b
    if a == 0 or b == 0:
        return 0
    a, b = ball(a, bits), ball(b, bits)
    errors = size(a.value) + b.error + 1, size(b.value) + a.error + 1, a.error + b.error
    return rounded(libmp.mpc_mul(a.value, b.value, bits), errors, bits, a.real and b.real)


def away_from_zero(a: Ball) -> float:
    """log2 of the relative error, if the ball stays well away from 0."""
    relative = a.error - (size(a.value) - 1)
    if not relative < -4:
        raise Undecided
    return relative


def inverse(a, bits: int):
    if not isinstance(a, Ball):
        if a == 0:
            raise Undefined
        return Fraction(a.denominator, a.numerator)
    relative = away_from_zero(a)
    value = libmp.mpc_reciprocal(a.value, bits)
    return rounded(value, (size(value) + relative + 1,), bits, a.real)


def to_integer(a, n: int, bits: int):
    """a^n"""
    if not isinstance(a, Ball):
        if a == 0 and n <= 0:
            raise Undefined
        if (a.numerator.bit_length() + a.denominator.bit_length()) * abs(n) <= EXACT_BITS:
            return a**n if n >= 0 else Fraction(a) ** n
        a = ball(a, bits)
    relative = away_from_zero(a) + math.log2(max(1, abs(n)))
    if relative > -4 or abs(size(a.value)) * abs(n) > TOO_LARGE:
        raise Undecided
    value = libmp.mpc_pow_int(a.value, n, bits + 20)
    return rounded(value, (size(value) + relative + 2,), bits, a.real)


def exact_root(a: Fraction, n: int) -> Fraction | None:
    """The n-th root, if it is a fraction as well."""
    if a < 0 or n > 12 or a.numerator.bit_length() + a.denominator.bit_length() > 4096:
        return None
    roots = [sp.integer_nthroot(x, n) for x in (a.numerator, a.denominator)]
    return Fraction(roots[0][0], roots[1][0]) if roots[0][1] and roots[1][1] else None


def to_power(a, b, bits: int):
    """a^b: exact if it can be, else by a root, the rest as e^(b log a)."""
    if not isinstance(b, Ball):
        if b.denominator == 1:
            return to_integer(a, b.numerator, bits)
        if not isinstance(a, Ball):
            if a == 0:
                return to_integer(a, 1 if b > 0 else -1, bits)
            if (exact := exact_root(a, b.denominator)) is not None:
                return to_integer(exact, b.numerator, bits)
        if b.denominator <= 12 and (nth := nth_root(ball(a, bits), b.denominator, bits)):
            return to_integer(nth, b.numerator, bits)
    if a == 0:
        raise Undefined
    return exponential(times(b, logarithm(a, bits), bits), bits)


def cut_is_clear(a: Ball) -> None:
    """Roots and logarithms jump at the negative axis: on which side of it is the ball?"""
    if not a.real and a.value[0][0] and size((a.value[1], libmp.fzero)) - 1 <= a.error:
        raise Undecided


def nth_root(a: Ball, n: int, bits: int) -> Ball | None:
    """The root of a positive number, and the square root of any; other roots are left to e^(b log a)."""
    cut_is_clear(a)
    relative = away_from_zero(a)
    if a.real and not a.value[0][0]:
        value = libmp.mpf_nthroot(a.value[0], n, bits + 10), libmp.fzero
    elif n == 2:
        value = libmp.mpc_sqrt(a.value, bits)
    else:
        return None
    return rounded(value, (size(value) + relative,), bits, a.real)


def logarithm(a, bits: int):
    if a == 0:
        raise Undefined
    if a == 1:
        return 0
    a = ball(a, bits)
    cut_is_clear(a)
    relative = away_from_zero(a)
    return rounded(libmp.mpc_log(a.value, bits), (relative + 1,), bits, a.real)


def exponential(a, bits: int):
    if a == 0:
        return 1
    a = ball(a, bits)
    if size(a.value) > 20 or a.error > -1:
        raise Undecided
    value = libmp.mpc_exp(a.value, bits)
    return rounded(value, (size(value) + a.error + 1,), bits, a.real)


def entire(function):
    """sin, cos, sinh and cosh: from z to z + d by at most |d| e^(|z|+1), a real sine by |d|."""

    def evaluate(a, bits: int):
        a = ball(a, bits)
        if a.error > -1 or size(a.value) > 1000:
            raise Undecided
        slope = 0.0
        if not a.real or function in (libmp.mpc_sinh, libmp.mpc_cosh):
            if size(a.value) > 10:
                raise Undecided
            slope = 1.5 * (2.0 ** (size(a.value) + 0.5) + 1)
        value = function(a.value, bits)
        return rounded(value, (a.error + slope,), bits, a.real)

    return evaluate


def inverse_sine(function):
    """asin and acos change by at most 3 sqrt|d|, also at 1, where their slope is infinite."""

    def evaluate(a, bits: int):
        a = ball(a, bits)
        if a.error > -8 or (not a.real and size((a.value[1], libmp.fzero)) - 1 <= a.error):
            raise Undecided
        value = function(a.value, bits)
        return rounded(value, (a.error / 2 + 2,), bits, a.real)

    return evaluate


def arc_tangent(a, bits: int):
    a = ball(a, bits)
    if not a.real or a.error > -1:
        raise Undecided
    return rounded(libmp.mpc_atan(a.value, bits), (a.error,), bits, True)


def absolute(a, bits: int):
    if not isinstance(a, Ball):
        return abs(a)
    value = libmp.mpc_abs(a.value, bits), libmp.fzero
    return rounded(value, (a.error,), bits, True)


def whole(rounding):
    """Floor and ceiling, where the ball holds no integer."""

    def evaluate(a, bits: int):
        if not isinstance(a, Ball):
            return rounding(a)
        if not a.real:
            raise Undefined
        if size(a.value) > MAX_BITS or a.error > -2:
            raise Undecided
        man, exponent = libmp.to_man_exp(a.value[0])
        value = Fraction(man) * Fraction(2) ** exponent
        margin = Fraction(2) ** math.ceil(a.error)
        if rounding(value - margin) != rounding(value + margin):
            raise Undecided
        return rounding(value)

    return evaluate


def counted(function):
    """Factorial and binomial coefficient, of integers that are not negative."""

    def evaluate(*arguments):
        *numbers, _ = arguments
        if any(isinstance(n, Ball) or n.denominator != 1 or n < 0 for n in numbers):
            raise Undefined
        if any(n > MAX_FACTORIAL for n in numbers):
            raise Undecided
        return function(*(n.numerator for n in numbers))

    return evaluate


sine, cosine = entire(libmp.mpc_sin), entire(libmp.mpc_cos)
hyperbolic_sine, hyperbolic_cosine = entire(libmp.mpc_sinh), entire(libmp.mpc_cosh)


def quotient(f, g, a, bits: int):
    return times(f(a, bits), inverse(g(a, bits), bits), bits)


OPERATIONS = {
    Add: plus,
    Mul: times,
    Pow: to_power,
    sp.exp: exponential,
    sp.log: logarithm,
    sp.sin: sine,
    sp.cos: cosine,
    sp.tan: lambda a, bits: quotient(sine, cosine, a, bits),
    sp.cot: lambda a, bits: quotient(cosine, sine, a, bits),
    sp.sec: lambda a, bits: inverse(cosine(a, bits), bits),
    sp.csc: lambda a, bits: inverse(sine(a, bits), bits),
    sp.sinh: hyperbolic_sine,
    sp.cosh: hyperbolic_cosine,
    sp.tanh: lambda a, bits: quotient(hyperbolic_sine, hyperbolic_cosine, a, bits),
    sp.asin: inverse_sine(libmp.mpc_asin),
    sp.acos: inverse_sine(libmp.mpc_acos),
    sp.atan: arc_tangent,
    sp.Abs: absolute,
    sp.floor: whole(math.floor),
    sp.ceiling: whole(math.ceil),
    sp.factorial: counted(math.factorial),
    sp.binomial: counted(math.comb),
}
AT_ZERO = dict.fromkeys((sp.sin, sp.tan, sp.asin, sp.atan, sp.sinh, sp.tanh), 0)
AT_ZERO |= dict.fromkeys((sp.cos, sp.sec, sp.cosh), 1)


class Sample:
    """The values of expressions at one point; `in_domain` until one leaves the real numbers.

    `needed` are the bits with which an equality counts.
    """

    def __init__(self, point: dict, bits: int, needed: int = 0):
        self.point, self.bits, self.needed, self.in_domain = point, bits, needed, True

    def value(self, e):
        """An int, a Fraction or a Ball."""
        if not e.args:
            return self.leaf(e)
        kind, bits = e.func, self.bits
        operation = OPERATIONS.get(kind)
        if operation is None:
            raise Undecided
        if kind is Pow and e.base is E:
            return self.checked(exponential(self.value(e.exp), bits))
        first, *others = values = [self.value(a) for a in e.args]
        if kind is Add or kind is Mul:
            for other in others:
                first = operation(first, other, bits)
            return self.checked(first)
        if first == 0 and kind in AT_ZERO:
            return AT_ZERO[kind]
        result = operation(*values, bits)
        if isinstance(result, Ball) and not result.real:  # out of real numbers?
            self.in_domain &= any(isinstance(v, Ball) and not v.real for v in values)
        return self.checked(result)

    def leaf(self, e):
        if e.is_Rational:
            return e.p if e.q == 1 else Fraction(e.p, e.q)
        if e.is_Symbol:
            return self.point[e]
        if e is I:
            return Ball((libmp.fzero, libmp.fone), -math.inf, False)
        if e is pi or e is E:
            constant = libmp.mpf_pi if e is pi else libmp.mpf_e
            return Ball((constant(self.bits), libmp.fzero), 3.0 - self.bits, True)
        raise Undecided

    def checked(self, value):
        """Within the bounds: an exact number of too many digits goes on as a ball."""
        if isinstance(value, Ball):
            if value.error > TOO_LARGE:
                raise Undecided
        elif value.numerator.bit_length() + value.denominator.bit_length() > EXACT_BITS:
            return ball(value, self.bits)
        return value


def as_float(e) -> float:
    value = Sample({}, BITS).value(e)
    return libmp.to_float(value.value[0]) if isinstance(value, Ball) else float(value)


# ---- Equal: two expressions at sample points -------------------------------------------------

CLOSE = -133  # log2 of the bound of a difference, beside either side and beside 1: 40 digits
BITS = 400  # of a first try
MAX_PRECISION = 4800  # of a second try, for what large terms that cancel have left undecided


# libmp keeps its constants. Computed in advance, no thread replaces them while another reads them.
for constant in (libmp.mpf_pi, libmp.mpf_e, libmp.mpf_ln2):
    constant(2 * MAX_PRECISION)


class Traits:
    """What a walk over expressions finds, and sample points that suit it."""

    def __init__(self, *expressions):
        self.letters, self.literals, self.bits = set(), set(), 0
        self.bends = self.jumps = self.counts = False
        self.is_rational = True
        for e in expressions:
            self.walk(e)
        self.letters = sorted(self.letters, key=lambda s: s.name)

    def walk(self, e) -> None:
        kind = e.func
        if not e.args:
            if e.is_Symbol:
                self.letters.add(e)
            elif e.is_Rational:
                self.bits = max(self.bits, e.p.bit_length(), e.q.bit_length())
                if 1 < max(abs(e.p), e.q) < 10**9:
                    self.literals.add(Fraction(abs(e.p), e.q))
            return
        if kind is Pow:
            self.walk_power(e.base, e.exp)
        elif kind is not Add and kind is not Mul:
            self.is_rational = False
            self.jumps |= kind in (sp.floor, sp.ceiling)
            self.counts |= kind in (sp.factorial, sp.binomial)
            self.bends |= kind is sp.Abs or (kind is sp.log and not e.args[0].is_Rational)
        for argument in e.args:
            self.walk(argument)

    def walk_power(self, base, exponent) -> None:
        """Roots can change branch, a negative base tells even exponents from odd ones."""
        if exponent.is_Integer:
            return
        self.is_rational = False
        self.bends |= exponent.is_Rational and not base.is_Rational
        self.counts |= base.is_Rational and base.p < 0 and not exponent.is_Rational

    def points(self):
        """Fixed points, and whether all of their values are positive."""
        for row in self.rows():
            yield dict(zip(self.letters, row)), all(x > 0 for x in row)

    def rows(self):
        n = range(len(self.letters))
        if not self.letters:
            yield ()
            return
        if self.counts:
            yield from self.integer_rows()
            return
        # Two points in general position, below and above 1: analytic functions that agree there by
        # accident are not written by accident. Powers in a prime field know no simple relation, as
        # equal steps would: then 2b - a would be c. Quotients of polynomials do with integers.
        below = [101 + pow(5, 3 * i + 4, 907) for i in n]
        above = [1110 + pow(7, 3 * i + 5, 1499) for i in n]
        for row in (below, above):
            yield row if self.is_rational else [Fraction(x, 1013) for x in row]
        if self.bends or self.jumps:
            # some letters negative, as sqrt(x^2 y^2) is not xy
            mixed = [(-1) ** (i + 1) * (307 + pow(11, 3 * i + 2, 887)) for i in n]
            yield [Fraction(x, 1019) for x in mixed]
            yield from self.far_rows()
        if self.jumps:
            # floor(x + 1/2) jumps at halves
            for corner in sorted({x % 1 for x in self.literals})[:4]:
                for x in (corner, -corner):
                    yield [x + (-1) ** i * (3 + i) for i in n]
            yield from self.integer_rows()

    def far_rows(self):
        """Large values, and values between the numbers at which |x - 5| may bend."""
        n = range(len(self.letters))
        large = 3 * max(self.literals, default=1) + 40
        corners = [Fraction(0), *sorted(self.literals)[:4]]
        between = [(low + high) / 2 for low, high in zip(corners, corners[1:])]
        for x in [large, 2 * large, *between]:
            for sign in (1, -1):
                yield [sign * x * (1 + Fraction(4 * i + 1, 97)) for i in n]

    def integer_rows(self):
        """Small integers of either parity, in either order, negative and large ones."""
        integers = 4, 3, 7, 2, 5, 8, 6, 1, 9, 12, -3, -4, 30, 0, 11, 101
        count, n = len(integers), range(len(self.letters))
        for row in range(count):
            yield [integers[(row + (2 * row + 3) * i) % count] for i in n]


INTEGER_NAMES = "ijklmnpq"  # under a floor, a letter with such a name is an integer


def difference(a, b, sample: Sample) -> bool:
    """Is a - b zero? Then its bound holds 0 and is small beside both sides."""
    if not (isinstance(a, Ball) or isinstance(b, Ball)):
        return a == b
    bits = sample.bits
    a, b = ball(a, bits), ball(b, bits)
    value = libmp.mpc_sub(a.value, b.value, bits)
    error = rounded(value, (a.error, b.error), bits, True).error
    if size(value) - 1 > error:
        return False
    small = CLOSE + min(size(a.value) - 1, size(b.value) - 1, 0)
    if bits < sample.needed or max(size(value), error) + 1 > small:
        raise Undecided
    return True


def at_point(a, b, point: dict, traits: Traits, same) -> tuple[bool, bool]:
    """The verdict of `same` on two values at a precision that settles it, and whether it is real.

    2^{1006} \\sqrt{2^{2010}+2} - 2^{2011} is not 2, but so nearly that it takes twice the bits of
    its numbers to see it. With fewer bits a "different" counts, but an "equal" does not.
    """
    needed = BITS + 2 * traits.bits * (traits.bits > 64)
    ladder = (BITS, min(max(needed, 4 * BITS), MAX_PRECISION))
    for bits in ladder:
        sample = Sample(point, bits, needed)
        try:
            return same(sample.value(a), sample.value(b), sample), sample.in_domain
        except Undecided:
            continue
    raise Undecided


def equal(a, b) -> bool:
    """Do two expressions agree: exactly if both are rational, else at all sample points?"""
    if a == b or (a.is_Rational and b.is_Rational) or {oo, -oo} & {a, b}:
        return a == b
    traits = Traits(a, b)
    if traits.jumps and all(s.name[0] in INTEGER_NAMES for s in traits.letters):
        traits.counts = True
    inside, outside = 0, []
    try:
        for point, positive in traits.points():
            try:
                verdict, in_domain = at_point(a, b, point, traits, difference)
            except Undefined:
                continue
            if in_domain or not point:
                if not verdict:
                    return False
                inside += 1
            elif positive:
                outside.append(verdict)
    except Undecided:
        return False
    # ln(x-1) - ln(x-2) is not real at small x: such points count only where there are no others
    enough = 2 if traits.letters else 1
    return inside >= enough or (inside + len(outside) >= enough and all(outside))


# ---- Same: one case for each policy ----------------------------------------------------------


def same(gold, answer) -> bool:
    """Is the answer the gold's? Not symmetric: what a gold leaves open, an answer may say."""
    match gold, answer:
        # approximation: an answer stands for its exact side, a gold for either
        case _, Approximate():
            if isinstance(gold, Approximate):
                gold = gold.exact
            return same(gold, answer.exact)
        case Approximate(), _:
            return same(gold.exact, answer) or same(gold.decimal, answer)
        # choice: the letter, the value, or both
        case Choice(), Choice():
            return gold.letter == answer.letter and same(gold.value, answer.value)
        case Choice(), _:
            return letter_of(answer) == gold.letter or same(gold.value, answer)
        case _, Choice():
            return letter_of(gold) == answer.letter
        # relations and names
        case Named() | Relation(), Named() | Relation():
            return same_statement(gold, answer)
        case Named(), _:
            return not gold.is_curve and same(gold.value, answer)
        case _, Named():
            return same(gold, answer.value)
        # units: a missing one is correct, a conflicting one is not
        case Quantity(), Quantity():
            return not conflict(gold.unit, answer.unit) and same(gold.value, answer.value)
        case Quantity(), _:
            return same(gold.value, answer)
        case _, Quantity():
            return same(gold, answer.value)
        # text: as a whole, in any case; letters that a number is made of may be a word
        case Text(), _:
            return gold.words == words_of(answer) != ""
        case _, Text():
            return answer.words == words_of(gold) != ""
        # no echo, exact, error bound, sample points
        case Number(), Number():
            if gold.plain and not answer.plain:
                return False
            spelled_alike = gold.spelling == answer.spelling and len(gold.spelling) > 1
            return spelled_alike or equal(gold.expr, answer.expr)
        # brackets and order
        case Tuple(), Tuple():
            return gold.brackets == answer.brackets and in_order(gold.items, answer.items)
        case (Set(), Set()) | (Union(), Union()):
            return in_any_order(gold[0], answer[0])
        case Combined(), Combined():
            return gold.operator == answer.operator and in_order(gold.parts, answer.parts)
        case Matrix(), Matrix():
            return in_order(gold.rows, answer.rows, in_order)
        case Ratio(), Ratio():
            return in_order(gold.parts, answer.parts)
        case (Based(), Based()) | (Unread(), Unread()):
            return gold == answer and gold[0] + gold[-1] != ""
    return False


def letter_of(value) -> str:
    """The label that a text or a variable may be."""
    words = words_of(value)
    return words if len(words) == 1 else ""


def words_of(value) -> str:
    match value:
        case Text():
            return value.words
        case Number():
            return value.spelling
    return ""


def conflict(a: frozenset, b: frozenset) -> bool:
    """5 m is not 5 cm. Words that are no known units conflict if neither has all of the other's."""
    known = (a | b) & set(UNITS.values())
    return a != b and bool(known or not (a <= b or b <= a))


def in_order(golds, answers, same=same) -> bool:
    return len(golds) == len(answers) and all(map(same, golds, answers))


def in_any_order(golds, answers) -> bool:
    """Is there an answer for each gold, and none left? Plain golds first: they are pickier."""
    if len(golds) != len(answers):
        return False
    rest = list(answers)
    for gold in sorted(golds, key=lambda g: not getattr(core(g), "plain", False)):
        match = next((i for i, answer in enumerate(rest) if same(gold, answer)), None)
        if match is None:
            return False
        del rest[match]
    return True


def same_statement(gold, answer) -> bool:
    """Two that are named or related: by name and value, or as equations and inequalities."""
    both_named = isinstance(gold, Named) and isinstance(answer, Named)
    if both_named and gold.name == answer.name and same(gold.value, answer.value):
        return True
    g, a = (s.relation if isinstance(s, Named) else s for s in (gold, answer))
    if g and a and same_relation(g, a):
        units = [unit_in(gold), unit_in(answer)]
        return not (all(units) and conflict(*units))
    if not both_named or (":" in gold.name and ":" in answer.name):  # S_1:S_2 is not S_2:S_1
        return False
    is_short = g and a and len(g.sides) == len(a.sides) == 2
    if is_short and not same_name(gold.name, answer.name):  # x = 5 is not y = 5
        return False
    return same(gold.value, answer.value)


def unit_in(named) -> frozenset:
    value = getattr(named, "value", None)
    return value.unit if isinstance(value, Quantity) else frozenset()


def same_name(a: str, b: str) -> bool:
    """x is not y; but f(x) = ... may be written as y = ..., and A(r) = ... as A = ..."""
    for function, variable in ((a, b), (b, a)):
        head, bracket, _ = function.partition("(")
        if bracket and variable in ("y", head):
            return True
    return False


def same_relation(gold: Relation, answer: Relation) -> bool:
    """The same sides; or, if there are two, proportional differences of them."""
    gold, answer = upward(gold), upward(answer)
    if gold.operators != answer.operators:
        return False
    if len(gold.operators) > 1 or gold.operators[0] in INCLUSIONS:
        return in_order(gold.sides, answer.sides)
    sides = [[side.expr for side in relation.sides] for relation in (gold, answer)]
    if all(map(equal, *sides)):
        return True
    symmetric = {*gold.operators} <= {"=", r"\ne"}
    if symmetric and all(map(equal, sides[0], sides[1][::-1])):
        return True
    f, g = (add(left, mul(-1, right)) for left, right in sides)
    return proportional(f, g, symmetric)


def upward(relation: Relation) -> Relation:
    """x > 2 as 2 < x."""
    if relation.operators[0] not in (">", r"\ge"):
        return relation
    return Relation(relation.sides[::-1], tuple(MIRRORED[o] for o in relation.operators[::-1]))


def parts(e, operation) -> list:
    if e.func is not operation:
        return [e]
    return [part for arg in e.args for part in parts(arg, operation)]


def cleared(f):
    """f times the denominators of its terms: y - 6/x becomes xy - 6."""
    factors = [x for term in parts(f, Add) for x in parts(term, Mul) if x.free_symbols]
    quotients = {x for x in factors if x.is_Pow and x.exp.is_Integer and x.exp.p < 0}
    return mul(f, *(div(Integer(1), x) for x in sorted(quotients, key=str)))


def proportional(f, g, symmetric: bool) -> bool:
    """Is f a multiple of g, for an inequality a positive one?"""
    if f.free_symbols != g.free_symbols or not f.free_symbols:
        return False
    if symmetric:
        f, g = cleared(f), cleared(g)
    traits, first, found = Traits(f, g), None, 0

    def same_ratio(u, v, sample):
        nonlocal first
        bits = sample.bits
        if u == 0 or v == 0:
            if u == v:
                raise Undefined
            return False
        ratio = times(u, inverse(v, bits), bits)
        if first is None:
            first = ratio
        if not symmetric and ball(ratio, bits).value[0][0]:  # its sign
            return False
        return difference(ratio, first, sample)

    try:
        for point, _ in traits.points():
            try:
                verdict, _ = at_point(f, g, point, traits, same_ratio)
            except Undefined:
                continue
            if not verdict:
                return False
            found += 1
    except Undecided:
        return False
    return found >= 2


# ---- Interface -------------------------------------------------------------------------------

# Golds that say that there is none: nobody can earn them, or everybody who writes nothing.
NO_GOLD = re.compile(
    r"(?:see|refer to|shown in|as) (?:the )?"
    r"(?:above|below|solution|explanation|proof|text|answer|figure|attached).*"
    r"|(?:the )?(?:proof|solution|answer)s?(?: (?:omitted|above|below|not found|not available))?"
    r"|omitted|not ?found|not available|unavailable|missing|not provided|no answer(?: given)?"
    r"|n/?a|nan|null|nil|tbd|todo|error|invalid|unknown"
)


def is_integer(text) -> bool:
    return type(text) is str and text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS


def equivalent(pred: str, gold: str) -> bool:
    """Is `pred` the same answer as `gold`? Never raises."""
    try:
        if is_integer(pred) and is_integer(gold):  # most golds of most data sets
            return int(pred) == int(gold)
        return same(_read(gold), _read(pred))
    except Exception:  # a reward function must not end a run
        return False


def verify(completion: str, gold: str) -> bool:
    """Does the completion's final answer equal the gold? Never raises, never prints."""
    answer = extract_answer(completion) if isinstance(completion, str) else None
    return answer is not None and equivalent(answer, gold)


def math_reward(completions: list[str], golds: list[str]) -> list[float]:
    """1.0 for a correct answer, 0.0 for anything else. A gold may have several answers, one a line."""
    rewards = []
    for completion, gold in zip(completions, golds, strict=True):
        correct = any(verify(completion, answer) for answer in gold.split("\n"))
        rewards.append(float(correct))
    return rewards


def check_gold(gold: str) -> bool:
    """Can an answer earn this gold? A row where not should be dropped, and counted.

    It must be read, equal itself, and be an answer: not "proof", "None", "N/A" or "see above".
    """
    if not isinstance(gold, str) or is_no_gold(gold):
        return False
    return not isinstance(_read(gold), Unread) and verify(f"\\boxed{{{gold}}}", gold)


def is_no_gold(gold: str) -> bool:
    r"""Does it say that there is no gold? A bare None is Python's; \text{None} is an answer."""
    words = re.sub(r"\\text\w*\s*\{([^{}]*)\}", r"\1", gold).strip(" $*.:()[]{}\n").lower()
    return NO_GOLD.fullmatch(words) is not None or gold.strip(" .").lower() == "none"
