"""Is a completion's final answer right? The reward of every RL script and the judge of every evaluation.

    verify(completion, gold) = equivalent(extract_answer(completion), gold); it never raises and never prints.

Policies
    extraction  The last \\boxed{} or \\fbox{} counts; an empty or unterminated last box is no answer. Without
                a box, what follows the last ####; else the last "answer is" or "answer:"; else the last
                number.
    no echo     Where the gold is a plain number (integer, decimal, a/b, mixed, a x 10^n), the answer must be
                one: 17 \\times 24 or 5! hands the question back.
    exact       A decimal equals a fraction only exactly: 0.3333 is not 1/3. No tolerance, no factor of 100.
    units       Missing units are right, conflicting units are wrong. A percent sign is a unit like any other.
    type        The number of answers and their type must match: (1,2) is not [1,2] or {1,2}, 52_8 is not 52.
                Lists and sets are unordered. "A or B", \\pm, several boxes never buy a second chance.
    relations   x > 2 equals (2, \\infty); 2x+3 answers the gold y = 2x+3; equations agree up to a factor.
    text        Case-insensitive: \\text{Even} is even, (C) is C; never by substring.

Safety: nothing in a completion is executed, compiled or handed to sympy as text. A tokenizer and a recursive
descent build sympy objects, unevaluated, out of a closed list of operations. Characters, tokens, depth, items
and digits, and the bits of powers, factorials and binomials, are bounded before anything is computed. What
cannot be read equals only the same text. No signals, threads, processes or global state: any thread will do.
"""

import math
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache, partial, reduce
from itertools import accumulate
from typing import Any, NamedTuple

import sympy as sp
from sympy import Add, E, I, Integer, Mul, Pow, Rational, Symbol, exp, log, oo, pi
from sympy.core.evalf import libmp  # mpmath's arithmetic, which comes with sympy

TAIL, MAX_CHARS = 2000, 1000  # what is searched for an answer if there is no box; of an answer
MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 400, 30, 64  # of an answer; of nested brackets; of a list or matrix
MAX_DIGITS = 400  # of a number as written
MAX_BITS = 1 << 15  # of a number as computed: 2^{2008} and 2004! fit, 9^{9^9} does not


def _require(condition) -> None:
    """What is no answer that this file reads, or exceeds the bounds, is given up."""
    if not condition:
        raise ValueError


# ---- Extraction -------------------------------------------------------------------------------------------

PHRASE = re.compile(r"answer(?:\s+is|[\s*]*:)[\s:*]*(?=\S)", re.I)
NUMBER = r"(?:(?<![\w.)])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]*\.?[0-9]+)(?:\.[0-9]+|/[0-9]+)?"


def extract_answer(completion: str) -> str | None:
    """The last box; else what follows the last ####; else "answer is" / "answer:"; else the last number."""
    start = max(completion.rfind("\\boxed"), completion.rfind("\\fbox"))
    if start >= 0:
        return _box(completion[start : start + MAX_CHARS + 20])
    tail = completion[-TAIL:]
    if "####" in tail:
        return tail.rpartition("####")[2].strip().partition("\n")[0].strip()[:MAX_CHARS] or None
    if phrases := list(PHRASE.finditer(tail)):  # and its sentence: "The answer is 3.14. I hope it is right."
        return re.split(r"\.\s|\.$|\n", tail[phrases[-1].end() :])[0].strip(" *")[:MAX_CHARS] or None
    return (re.findall(NUMBER, tail) or [None])[-1]


def _box(text: str) -> str | None:
    """The balanced braces of the box that starts `text`; None if it is empty, unterminated or overlong."""
    opening = re.match(r"\\[a-z]+\s*(\{|-?[0-9][0-9.,/]*)", text)
    if opening is None or opening[1] != "{":
        return opening and opening[1].rstrip(".,")  # \boxed 5
    depth = 1
    for mark in re.compile(r"\\.|[{}]", re.S).finditer(text, opening.end()):
        depth += (mark[0] == "{") - (mark[0] == "}")
        if depth == 0:
            return text[opening.end() : mark.start()].strip() or None
    return None


# ---- Tokens: numbers, letters, operators, \commands, and words that are no mathematics as '"word' ----------

UNICODE = r"""
    −=- –=- —=- ×=\times· ·=\cdot· ⋅=\cdot· ∗=* ÷=/ π=\pi· ∞=\infty· ≤=\le· ≥=\ge· ≠=\ne· ∪=\cup· ∈=\in·
    √=\sqrt· °=^\circ· ∅=\emptyset· ℝ=\mathbb{R} ±=\pm· θ=\theta· α=\alpha· β=\beta· γ=\gamma· φ=\phi·
    λ=\lambda· ⁰=^0 ¹=^1 ²=^2 ³=^3 ⁴=^4 ⁵=^5 ⁶=^6 ⁷=^7 ⁸=^8 ⁹=^9 ½=\frac12 ¼=\frac14
    ¾=\frac34 ’=' €=\text{euro} £=\text{sterling}"""
UNICODE = str.maketrans({pair[0]: pair[2:].replace("·", " ") for pair in UNICODE.split()})
DIGITS = r"(?:\{\s*([0-9]+)\s*\}|([0-9]))"  # an argument of \frac
# fmt: off
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\[vh]?phantom\s*(?:\{[^{}]*\}|\\?.)", " "),  # what is not seen is not said
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"(?<=[0-9])(?:\{,\}|,\\!\s*|\\[,!;:]\s*)(?=[0-9]{3}(?![0-9]))", ""),  # 10{,}000, 10,\!000
    (r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)", r"\\times "), (r"-\s*\\\$", r"\\$-"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))", "°"), (r"\\mathbb\s*(?:R\b|\{\s*R\s*\})", r"\\R "),
    (r"(?<!\\)(?:\$|\\[()\[\]])|^\s*\\approx", " "),  # the signs around mathematics
    (r"(?<=[0-9])\s*([aApP])\.?\s?[mM]\b\.?", r"\\text{\1m}"),  # 4 p.m.
    (rf"(?<![\w.^}}])([0-9]+)(?:\s|~|\\[ ,!])*\\[dtc]?frac\s*{DIGITS}\s*{DIGITS}", r"\1 \2\3/\4\5"),  # mixed
)]
# fmt: on
TOKEN = r"""
      \s+ | ~ | \\[,;:!>\ ] | \\(?:left|right|[bB]igg?[lrm]?|q?quad|displaystyle|textstyle|limits|rm|bf
              | math(?:bf|it|sf|tt|cal|bb)|boldsymbol|vec|hat|boxed|fbox)(?![A-Za-z])\.?  # not a token
    | \\(?:text(?:bf|rm|it|sf|normal)?|[mh]box|mathrm|operatorname)\s*\{(?P<text>[^{}]*)\}
    | (?P<thousands> [1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?:\ [0-9]{3})+)(?![ ,]?[0-9]|\s*/)(?:\.[0-9]+)? )
    | (?P<number> [0-9]+\s+[0-9]+/[0-9]+(?![0-9]) | [0-9]*\.[0-9]*\\(?:overline|bar|dot)\s*\{?[0-9]+\}?
              | (?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)? )  # 1 4/5, 0.1\overline{6}, 4.5e33
    | (?P<matrix> \\(?:begin|end) )\s*\{(?:[pbB]?(?:small)?matrix|array)\*?\}(?:\{[a-z|]*\})?
    | (?P<row> \\\\ )(?:\[-?[0-9.]+[a-z]+\])? | (?P<command> \\[A-Za-z]+ | \\[{}|%$] ) | (?P<word> [A-Za-z]+ )
    | (?P<sign> \*\* | \+/- | [<>]= | [-+*/^_=<>()\[\]{}|!,;:&'%°] )"""
TOKEN = re.compile(TOKEN, re.X)
ALIASES = r"""
    \leq=\le \leqslant=\le \geq=\ge \geqslant=\ge \neq=\ne \lt=< \gt=> \times=* \cdot=* \ast=* \div=/ \colon=:
    \lvert=| \rvert=| \vert=| \mid=| \lbrace=\{ \rbrace=\} \varnothing=\emptyset \backslash=\setminus \prime='
    \infinity=\infty \inf=\infty \oo=\infty \or=, \and=, \lor=, \land=, \arcsin=\asin \arccos=\acos
    \arctan=\atan \ln=\log \abs=\Abs \varphi=\phi \%="percent %="percent \$="dollar \degree=° \degrees=°
    <==\le >==\ge **=^ +/-=\pm \dfrac=\frac \tfrac=\frac \cfrac=\frac \dbinom=\binom \tbinom=\binom"""
ALIASES = dict(pair.rsplit("=", 1) for pair in ALIASES.split())
UNITS = """
    mm millimeter millimetre|cm centimeter centimetre|dm decimeter|m meter metre|km kilometer kilometre|
    in inch inche|ft foot feet|yd yard|mi mile|g gram|kg kilogram|mg milligram|lb pound|oz ounce|ton|acre|
    l liter litre|ml milliliter millilitre|gal gallon|s sec second|min minute|h hr hour|day|week|month|
    year yr|cent penny|dollar usd buck|euro eur|sterling gbp|percent pct|° degree deg|rad radian|c celsius|
    f fahrenheit|mi-per-h mph|km-per-h kph|am|pm|2 square sq squared|3 cubic cu cubed|per /|hz hertz"""
UNITS = {spelling: line.split()[0] for line in UNITS.split("|") for spelling in line.split()}
CURRENCY, FILLER = {'"dollar', '"euro', '"sterling'}, {"^", "{", "}", "unit", "of", "the", "a", "total"}
NAMES = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi
    chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell angle triangle
    pi frac binom sqrt lfloor lceil"""
FUNCTIONS = "sin cos tan asin acos atan cot sec csc exp log Abs".split()
KNOWN = {"\\" + name for name in [*NAMES.split(), *FUNCTIONS]}
LEVEL = dict.fromkeys(("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil", r"\begin"), 1)
LEVEL |= dict.fromkeys((")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil", r"\end"), -1)


def _tokens(text: str) -> list[str]:
    tokens, at, depth, brackets = [], 0, 0, 0
    while at < len(text):
        match = TOKEN.match(text, at)
        _require(match)
        at, kind = match.end(), match.lastgroup
        token = match[kind] if kind else ""
        if kind == "text":
            tokens += _text_tokens(token.strip(), match[0].startswith(r"\math"))
        elif kind == "word":
            tokens += _word_tokens(token)
        elif kind:
            if kind == "thousands" and brackets:  # (1,200) is a pair, 1,200 a number
                token = re.match("[0-9]+", token)[0]
            if token.isdigit() and r"\frac" in tokens[-2:] and tokens[-1] != "{":
                token = token[0]  # as in TeX, \frac12 has arguments of one digit
            at -= len(match[kind]) - len(token)
            token = re.sub("[ ,]", "", token) if kind == "thousands" else ALIASES.get(token, token)
            depth += LEVEL.get(token, 0)
            brackets += LEVEL.get(token, 0) * (token not in "{}")
            tokens.append(token)
        _require(depth <= MAX_DEPTH and len(tokens) <= MAX_TOKENS)
    return tokens


def _text_tokens(content: str, roman: bool) -> list[str]:
    """What a \\text{...} holds: words, separators, or mathematics that happens to stand in a text box."""
    if ALIASES.get("\\" + content, "\\" + content)[1:] in FUNCTIONS or (roman and content in ("e", "i")):
        return _word_tokens(content)
    if re.search("[0-9]", content) and not re.match(r".*[A-Za-z]{2}.*[0-9]", content):
        return _tokens(content)  # \textbf{42}
    words = re.findall(r"[^\W_]+|[,;/^%°]", content.lower().replace(".", ""))
    return ["," if word in ("and", "or", ",", ";") else ALIASES.get(word, '"' + word) for word in words]


def _word_tokens(word: str) -> list[str]:
    """A bare run of letters: a function, a constant, a separator, a unit, a longer word, or letters."""
    command = ALIASES.get("\\" + word.lower(), "\\" + word)
    if command in KNOWN or command in (",", r"\infty"):
        return [command]
    if len(word) > 3 or (len(word) > 1 and (word in UNITS or word.rstrip("s") in UNITS)):
        return ['"' + word.lower()]
    return list(word)


# ---- Mathematics: sympy objects, unevaluated but for rational numbers, each step within MAX_BITS ----------


def _fold(operation, *terms):
    """The sum or product: rational numbers are computed, anything else is written down beside them."""
    if len(terms) == 1:
        return terms[0]
    number, others = operation.identity, []
    for term in terms:
        if isinstance(term, int) or term.is_Rational:
            number = number + term if operation is Add else number * term
            _require(number.p.bit_length() + number.q.bit_length() <= MAX_BITS)
        else:
            others.append(term)
    if number != operation.identity or not others:
        others.append(number)
    return others[0] if len(others) == 1 else operation(*others, evaluate=False)


_add, _mul = partial(_fold, Add), partial(_fold, Mul)


def _div(a, b):
    return _mul(a, _pow(b, Integer(-1)))


def _pow(base, exponent):
    _require(base != 0 or (exponent.is_Rational and exponent.p > 0))
    if base.is_Rational and exponent.is_Integer:
        _require((base.p.bit_length() + base.q.bit_length()) * abs(exponent.p) <= MAX_BITS)
        return base**exponent
    return Pow(base, exponent, evaluate=False)


def _root(a, n):
    if a.is_Rational and a.p < 0 and n.is_Integer and n.p % 2:  # the real one: the cube root of -8 is -2
        return _mul(-1, _root(-a, n))
    return _pow(a, _div(1, n))


def _binomial(n, k):  # math.comb and math.factorial refuse negative numbers with a ValueError
    _require(n.is_Integer and k.is_Integer and min(k.p, abs(n.p - k.p)) * n.p.bit_length() <= MAX_BITS)
    return Integer(math.comb(n.p, k.p))


def _factorial(n):
    _require(n.is_Integer and n.p <= 2100)
    return Integer(math.factorial(n.p))


BUILDERS = {name: partial(getattr(sp, name), evaluate=False) for name in FUNCTIONS}
CONSTANTS = {"e": E, "i": I, r"\pi": pi}
BRACKETS = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
POLES = {sp.tan, sp.cot, sp.sec, sp.csc}
WRAPPERS = {"|": sp.Abs, r"\lfloor": sp.floor, r"\lceil": sp.ceiling}
ANGLES = {r"\sin", r"\cos", r"\tan", r"\cot", r"\sec", r"\csc"}


class Parser:
    """Recursive descent: sum > product > power > atom. Beside a sine, a degree sign is a factor."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.bars = [*tokens, ""], 0, 0
        self.degree = 1 if ANGLES.isdisjoint(tokens) else _div(pi, Integer(180))
        self.value = self.sum()
        _require(not self.peek())
        _magnitude(self.value)

    def peek(self) -> str:
        return self.tokens[self.at]

    def take(self, *expected) -> str:
        """The next token, or "" if it is none of the expected ones."""
        _require(expected or self.peek())
        taken = self.peek() if not expected or self.peek() in expected else ""
        self.at += taken != ""
        return taken

    def sum(self):
        terms = [self.product()]
        while self.peek() in ("+", "-"):
            terms.append(self.product())
        return _add(*terms)

    def product(self):
        factors = [self.signed(self.power)]
        while (operator := self.take("*", "/")) or self.juxtaposed():
            factor = self.signed(self.power)
            factors.append(_div(1, factor) if operator == "/" else factor)
        return _mul(*factors)

    def juxtaposed(self) -> bool:
        """Can the next token be a factor without a sign? No numeral can: neither "2 3" nor "x2" is one."""
        token = self.peek()
        if token == "|" or (token.isdigit() and self.tokens[self.at - 1] == "!"):
            return not self.bars
        return token in BRACKETS or token in KNOWN or token.isalpha()

    def signed(self, read):
        minus = False
        while sign := self.take("+", "-"):
            minus ^= sign == "-"
        return _mul(-1, read()) if minus else read()

    def power(self):
        base = self.atom()
        while operator := self.take("^", "!", "°"):
            if operator == "^":
                base = _pow(base, self.argument())
            else:
                base = _factorial(base) if operator == "!" else _mul(base, self.degree)
            _require(self.peek() != operator)  # neither 9^9^9 nor 5!! is clear
        return base

    def argument(self):
        """A group or one token, with its sign: x^{10}, x^10, x^-1."""
        return self.signed(self.atom)

    def atom(self):
        token = self.take()
        if token in BRACKETS:
            self.bars += token == "|"
            value = self.sum()
            _require(self.take(BRACKETS[token]))
            self.bars -= token == "|"
            return WRAPPERS[token](value, evaluate=False) if token in WRAPPERS else value
        if token in (r"\frac", r"\binom"):
            return (_div if token == r"\frac" else _binomial)(self.argument(), self.argument())
        if token == r"\sqrt":
            index = self.atom() if self.peek() == "[" else Integer(2)
            return _root(self.argument(), index)
        if token[1:] in BUILDERS:
            return self.function(token[1:])
        if token in CONSTANTS and self.peek() != "_":
            return CONSTANTS[token]
        return self.symbol(token) if token.isalpha() or token in KNOWN else _number(token)

    def symbol(self, name: str):
        """A letter with its subscript, as a name."""
        if self.take("_"):
            name += "_" + self.take()
            while name.count("{") > name.count("}"):
                name += self.take()
        return Symbol(re.sub(r"[\\{}]", "", name))

    def function(self, name: str):
        scripts = {}
        while script := self.take("_", "^"):
            scripts[script] = self.argument()
        if scripts.get("^") == -1:  # \sin^{-1}
            name, _ = "a" + name, scripts.pop("^")
        argument = self.atom() if (bracket := self.peek() in BRACKETS) else self.signed(self.power)
        # \sin 2x \cos x: without brackets, the argument ends at an operator, a bracket or the next function
        while not bracket and self.juxtaposed() and self.peek() != "(" and self.peek()[1:] not in BUILDERS:
            argument = _mul(argument, self.power())
        value = BUILDERS[name](argument)
        value = _div(value, log(scripts["_"], evaluate=False)) if "_" in scripts else value
        return _pow(value, scripts["^"]) if "^" in scripts else value


def _number(token: str):
    """A literal, exactly."""
    _require(len(token) <= MAX_DIGITS and not re.search("[eE][-+]?[0-9]{5}", token))
    if token.isdigit():
        return Integer(int(token))
    if match := re.fullmatch(r"([0-9]*\.([0-9]*))\\\D+([0-9]+)\}?", token):  # 0.1\overline{6}
        point, digits, period = match.groups()
        value = Fraction(point + "0") + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
    else:
        value = sum(map(Fraction, token.split()))  # 1 4/5
    return Rational(value.numerator, value.denominator)


def _magnitude(e) -> float:
    """A bound on |log2 |e||, letters being at most 4; what should not be evaluated is refused here."""
    if e.is_Rational or not e.args:
        return max(e.p.bit_length(), e.q.bit_length()) if e.is_Rational else 2
    sizes = [_magnitude(a) for a in e.args]
    if e.is_Pow:
        _require(sizes[1] <= (32 if e.exp.is_Integer else 1000))  # no towers of powers
        base = sizes[0] + 500 * e.base.is_Add  # a sum may be close to zero
        return base * (abs(float(e.exp)) if e.exp.is_Rational else 2.0 ** sizes[1]) + 1
    if e.is_Add or e.is_Mul:
        return sum(sizes) + 1
    _require(sizes[0] <= 1000)
    return 2.0 ** (sizes[0] + 5) if e.func is exp else sizes[0] + 500 * (e.func in POLES) + 1


# ---- Answers ---------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    # number, tuple or interval, list or set, union, matrix, ratio, base, relation, text, unread
    kind: str
    value: Any = None  # a number's sympy object; otherwise the form, such as the brackets of a tuple
    items: tuple = ()
    plain: bool = False  # written as a plain number
    unit: frozenset = frozenset()
    name: str = ""  # x of x = 5
    zero: Any = None  # a relation, as the difference of its sides and the operator
    text: str = ""


# Forms of plain numbers, n a numeral, t the numeral 10, f a \frac: integer, mixed, fraction, a x 10^n.
PLAIN = re.compile(r"[-+]?(?:f[-+]?[nt][-+]?[nt]|[nt](?:/[-+]?[nt])?|(?:[nt]\*)?t\^[-+]?[nt])")
FORMS = {"{": "", "}": "", "(": "", ")": "", "°": "", r"\frac": "f", "10": "t"}
MIRRORED = {"=": "=", "<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne", r"\in": ""}
# Names: x, x_1, f(x), (p,q), "area, AB, NO/BO
NAME = r"""(?:[a-zA-Z]'*|\\[a-z]+)(?:_(?:\w|\{\w+\}))?(?:\^\{?-1\}?)?(?:\((?:[a-z]|-?[0-9]+)(?:,[a-z])*\))?"""
NAME += (
    r"""|\([a-zA-Z](?:,[a-zA-Z])+\)|(?:"\w+)+|(?:\\(?:angle|triangle|overline|frac)|m(?=\\angle)|[A-Z{}/])+"""
)
FRACTION = re.compile(r"(-?)(?:\\[dtc]?frac\{([0-9]+)\}\{([0-9]+)\}|([0-9]+)(?:/([0-9]+))?)")
LOW, HIGH = Answer("number", -oo), Answer("number", oo)
RESERVED = (r"\infty", r"\R", *CONSTANTS)  # no names
FIXED = {(r"\R",): Answer("tuple", "()", (LOW, HIGH)), (r"\emptyset",): Answer("list"), ("-", r"\infty"): LOW}
FIXED |= {(r"\{", r"\}"): Answer("list"), (r"\infty",): HIGH, ("+", r"\infty"): HIGH}


def _split(tokens: list[str], separators) -> tuple[list[list[str]], list[str]]:
    """The parts between the separators outside all brackets, and these separators."""
    if {*separators}.isdisjoint(tokens):
        return [tokens], []
    depths = accumulate(LEVEL.get(token, 0) for token in tokens)
    at = [i for i, (depth, token) in enumerate(zip(depths, tokens)) if depth == 0 and token in separators]
    return [tokens[i + 1 : j] for i, j in zip([-1, *at], [*at, len(tokens)])], [tokens[i] for i in at]


def _enclosed(tokens: list[str]) -> bool:
    """Does the first bracket close at the last token?"""
    depths = accumulate(LEVEL.get(token, 0) for token in tokens)
    closed = len(tokens) > 1 and LEVEL.get(tokens[-1]) == -1
    return closed and [i for i, depth in enumerate(depths) if depth == 0] == [len(tokens) - 1]


def _items(tokens: list[str]) -> tuple[Answer, ...]:
    """The answers between commas; one with a plus-minus sign is two."""
    items = []
    for part in filter(None, _split(tokens, (",", ";"))[0]):
        double = part[0] != r"\{" and not {r"\pm", r"\mp"}.isdisjoint(part)
        for signs in ({r"\pm": "+", r"\mp": "-"}, {r"\pm": "-", r"\mp": "+"}) if double else ({},):
            items.append(_element([signs.get(token, token) for token in part]))
    _require(0 < len(items) <= MAX_ITEMS)
    return tuple(items)


def _element(tokens: list[str]) -> Answer:
    parts, operators = _split(tokens, MIRRORED)
    if not operators:
        return _object(tokens)
    names = ["".join(part) for part in parts]
    names = [re.sub("[{}]", "", n) if re.fullmatch(NAME, n) and n not in RESERVED else "" for n in names]
    if operators == [r"\in"]:
        return _object(parts[1])._replace(name=names[0])
    return (_equation if {*operators} == {"="} else _inequality)(parts, names, operators)


def _equation(parts, names, operators) -> Answer:
    """x = 5 and 5 = x are 5 with a name; 2 + 3 = 5 is 5, being true; x + y = 5 is a relation."""
    if len(parts) == 2 and names[1] and parts[0] and not names[0]:
        parts, names = parts[::-1], names[::-1]
    *others, answer = [_object(p) for p in (parts[1:] if names[0] or not parts[0] else parts)]
    numbers = all(a.kind == "number" for a in (*others, answer))
    if not others or (numbers and all(_equal(a.value, answer.value) for a in others)):
        zero = (_add(Symbol(names[0]), _mul(-1, answer.value)), "=") if names[0] and numbers else None
        return answer._replace(name=names[0], zero=zero, text="")
    _require(numbers and len(others) == 1)
    return Answer("relation", zero=(_add(others[0].value, _mul(-1, answer.value)), "="))


def _inequality(parts, names, operators) -> Answer:
    """x > 2 and 1 < x < 2 are intervals with a name, x \\ne 2 is two of them; anything else is a relation."""
    if operators[0] in (">", r"\ge"):
        parts, names, operators = parts[::-1], names[::-1], [MIRRORED[o] for o in operators[::-1]]
    sides = [Answer("number", Symbol(n)) if n else _object(p) for n, p in zip(names, parts)]
    _require(all(side.kind == "number" for side in sides) and len(sides) <= 3)
    zero = (_add(sides[0].value, _mul(-1, sides[1].value)), operators[0]) if len(sides) == 2 else None
    at = 1 if zero and names[0] else 2  # where the letter stands between -oo and oo
    low, _, high = [LOW, *sides, HIGH][at - 1 : at + 2]
    ends, name = ["<", *operators, "<"][at - 1 : at + 1], names[at - 1]
    if zero and (not name or low.value.free_symbols or high.value.free_symbols):
        return Answer("relation", zero=zero)
    if operators == [r"\ne"]:
        return _without([high if at == 1 else low])._replace(name=name, zero=zero)
    _require(name and {*ends} <= {"<", r"\le"})
    brackets = "(["[ends[0] == r"\le"] + ")]"[ends[1] == r"\le"]
    return Answer("tuple", brackets, (low, high), name=name, zero=zero)


def _without(points) -> Answer:
    """The real line without some points."""
    ends = [LOW, *sorted(points, key=lambda a: libmp.to_float(_value(a.value, {})[0])), HIGH]
    return Answer("union", items=tuple(Answer("tuple", "()", pair) for pair in zip(ends, ends[1:])))


def _object(tokens: list[str]) -> Answer:
    """One answer that is neither a bare list nor a relation."""
    _require(tokens)
    while _enclosed(tokens) and (tokens[0] == "{" or (tokens[1] == r"\begin" and _enclosed(tokens[1:-1]))):
        tokens = tokens[1:-1]
    inner = tokens[1:-1] if tokens[0] == "(" and _enclosed(tokens) else tokens
    text = "".join(inner).replace('"', "").lower() if any(t[0] == '"' or t.isalpha() for t in inner) else ""
    letters = [t.isalpha() for t in inner if t[0] != '"']
    if (inner[0][0] == '"' and tokens[0] not in CURRENCY) or (1 < len(letters) < len(inner) and all(letters)):
        return Answer("text", text=text)
    tokens, unit = _unit(tokens)
    answer = _container(tokens) or _expression(tokens)
    return answer._replace(unit=unit or answer.unit, text=text if text.isalpha() and not unit else "")


def _unit(tokens: list[str]) -> tuple[list[str], frozenset]:
    """Take the unit off: a currency in front, or words at the end."""
    if tokens[0] in CURRENCY:
        return tokens[1:], frozenset({tokens[0][1:]})
    start = next((i for i, t in enumerate(tokens) if t[0] == '"'), len(tokens))
    _require(all(t[0] == '"' or t in "^23{}/" or t.isalpha() for t in tokens[start:]))
    words = [w.strip('"') for w in tokens[start:]]
    words = " ".join(UNITS.get(w) or UNITS.get(w.rstrip("s")) or w.rstrip("s") for w in words)
    unit = set(words.replace("-", " ").split()) - FILLER
    return tokens[:start], frozenset(unit if unit - {"2", "3"} else ())


def _container(tokens: list[str]) -> Answer | None:
    if answer := FIXED.get(tuple(tokens)):
        return answer
    if tokens[:3] == [r"\R", r"\setminus", r"\{"]:
        return _without(_container(tokens[2:]).items)
    parts, found = _split(tokens, (r"\cup", ":"))
    if ":" in found:  # 4:30, 1:2
        return Answer("ratio", ":", tuple(map(_expression, parts)))
    if found:
        pieces = [_object(p) for p in parts]
        return Answer("union", items=sum((p.items if p.kind == "union" else (p,) for p in pieces), ()))
    if _enclosed(tokens):
        inner, opening = tokens[1:-1], tokens[0].replace(r"\langle", "(")
        if opening == r"\{":
            return Answer("list", items=_items(inner))
        if opening == r"\begin":
            return _matrix(inner)
        cells = _split(inner, (",", ";"))[0]
        if opening == "[" or (opening == "(" and len(cells) > 1):
            return Answer("tuple", opening + tokens[-1].replace(r"\rangle", ")"), tuple(map(_element, cells)))
    base = re.fullmatch(r"(-?)\(?0*(?=[A-Z]*[0-9])([0-9A-Z]+)\)?_\{?\(?([0-9]+)\)?\}?", "".join(tokens))
    return base and Answer("base", base.groups())  # 52_8


def _matrix(tokens: list[str]) -> Answer:
    rows = [_split(row, ("&",))[0] for row in _split(tokens, ("\\\\",))[0] if row]
    _require(len({len(row) for row in rows}) == 1 and len(rows) * len(rows[0]) <= MAX_ITEMS)
    return Answer("matrix", (len(rows), len(rows[0])), tuple(_object(cell) for row in rows for cell in row))


def _expression(tokens: list[str]) -> Answer:
    form = "".join(FORMS.get(t, "n" if t[0] in ".0123456789" else t) for t in tokens)
    unit = frozenset("°" if "°" in tokens and ANGLES.isdisjoint(tokens) else ())
    return Answer("number", Parser(tokens).value, plain=bool(PLAIN.fullmatch(form)), unit=unit)


@lru_cache(maxsize=4096)  # bounded; a group of rollouts repeats its gold and many of its answers
def _read(text: str) -> Answer:
    """The answer that a text stands for; of kind "unread" where it is none, equal only to the same text."""
    try:
        _require(len(text) <= MAX_CHARS)
        if match := FRACTION.fullmatch(text):  # the commonest answers, eight times as fast
            numerator, denominator = match[2] or match[4], match[3] or match[5] or "1"
            value = _div(_number(numerator), _number(denominator))
            return Answer("number", -value if match[1] else value, plain=True)
        cleaned = " ".join(text.split()).translate(UNICODE).strip(" *:~")
        for pattern, replacement in REWRITES:
            cleaned = pattern.sub(replacement, cleaned)
        items = _items(_tokens(cleaned.strip(" *:~").rstrip(" *:~.,;\\")))
        inequalities = all(i.kind in ("tuple", "union") and i.zero for i in items)  # x < 1 or x > 5
        return items[0] if len(items) == 1 else Answer("union" if inequalities else "list", items=items)
    except Exception:  # unreadable, 1/0, an index past the end, ...: nothing in a text may end a run
        return Answer("unread", text="".join(text[:MAX_CHARS].split()))


# ---- Equality --------------------------------------------------------------------------------------------

BITS, PRECISION = 133, 400  # equal to 40 digits; computed with 120, as parts of a term may cancel too
NUMERIC = "sin cos tan asin acos atan exp log floor".split()
NUMERIC = {getattr(sp, name): getattr(libmp, "mpc_" + name) for name in NUMERIC}
NUMERIC |= {Add: libmp.mpc_add, Mul: libmp.mpc_mul, Pow: libmp.mpc_pow, sp.ceiling: libmp.mpc_ceil}
NUMERIC[sp.Abs] = lambda z, p: (libmp.mpc_abs(z, p), libmp.fzero)
RECIPROCALS = {sp.cot: libmp.mpc_tan, sp.sec: libmp.mpc_cos, sp.csc: libmp.mpc_sin}
NUMERIC |= {f: lambda z, p, g=g: libmp.mpc_reciprocal(g(z, p), p) for f, g in RECIPROCALS.items()}
NUMBERS = {pi: (libmp.mpf_pi(PRECISION), libmp.fzero), E: (libmp.mpf_e(PRECISION), libmp.fzero)}
NUMBERS[I] = (libmp.fzero, libmp.fone)


def _value(e, point) -> tuple:
    """Real and imaginary part. Not by sympy's evalf: its work doubles with each nested root, and some of it
    runs at mpmath's process-wide precision, which threads share. libmp is told the precision at each step."""
    if e.is_Rational:
        return libmp.from_rational(e.p, e.q, PRECISION), libmp.fzero
    if not e.args:
        return NUMBERS.get(e) or point[e]
    first, operation = _value(e.args[0], point), NUMERIC.get(e.func)
    if e.is_Pow and e.exp.is_Integer:
        return libmp.mpc_pow_int(first, e.exp.p, PRECISION)
    if len(e.args) == 1:
        return operation(first, PRECISION)
    return reduce(lambda a, b: operation(a, _value(b, point), PRECISION), e.args[1:], first)


def _size(*numbers) -> float:
    """The binary exponent of the largest; -inf if all are zero."""
    _require(all(man or not exponent for _, man, exponent, _ in numbers))  # neither infinite nor undefined
    return max(exponent + bits if man else -math.inf for _, man, exponent, bits in numbers)


def _real(*values) -> bool:
    return all(_size(im) <= _size(re) - BITS for re, im in values)


def _samples(*expressions):
    """Their values at fixed points. At the last one some letters are negative, as sqrt(x^2) is not x; where a
    value is no real number, that point says nothing."""
    letters = sorted({s for e in expressions for s in e.free_symbols}, key=lambda s: s.name)
    for row in range(3 if letters else 1):
        at = [0.35 + 0.618033988749895 * (5 * i + row + 1) % 1 * 1.7 for i in range(len(letters))]
        signed = [-v if row == 2 and i % 2 == 0 else v for i, v in enumerate(at)]
        point = {s: (libmp.from_float(v), libmp.fzero) for s, v in zip(letters, signed)}
        values = [_value(e, point) for e in expressions]
        if row < 2 or _real(*values):
            yield values


def _parts(e, operation) -> list:
    return [part for arg in e.args for part in _parts(arg, operation)] if e.func is operation else [e]


def _equal(a, b) -> bool:
    """Is a - b zero? Exactly for rationals; otherwise to 40 digits of its largest term, at fixed points."""
    if a == b or (a.is_Rational and b.is_Rational) or {oo, -oo} & {a, b}:
        return a == b
    terms = Counter(_parts(a, Add))
    terms.subtract(_parts(b, Add))
    # what is rational is added up exactly; common terms go, so that 2^{2008} + \sqrt 2 is not 2^{2008}
    terms = _parts(_add(*(_mul(t, n) for t, n in terms.items() if n)), Add)
    for values in _samples(*terms):
        difference = reduce(lambda u, v: libmp.mpc_add(u, v, PRECISION), values)
        if _size(*difference) > _size(*(part for value in values for part in value)) - BITS:
            return False
    return True


def _cleared(f):
    """f times the denominators of its terms: y - 6/x becomes xy - 6."""
    factors = [factor for term in _parts(f, Add) for factor in _parts(term, Mul) if factor.free_symbols]
    return _mul(f, *{_div(1, p) for p in factors if p.is_Pow and p.exp.is_Integer and p.exp.p < 0})


def _same_relation(gold, pred) -> bool:
    """Are the differences proportional, for an inequality by a positive factor?"""
    (f, operator), (g, other) = gold, pred
    equation = operator in ("=", r"\ne")
    if operator != other or f.free_symbols != g.free_symbols or not f.free_symbols:
        return False
    samples = list(_samples(_cleared(f), _cleared(g)) if equation else _samples(f, g))
    if not all(_real(u, v) and libmp.fzero not in (u[0], v[0]) for u, v in samples):
        return False
    ratios = [libmp.mpf_div(u[0], v[0], PRECISION) for u, v in samples]
    same = all(_size(libmp.mpf_sub(r, ratios[0], PRECISION)) <= _size(r) - BITS for r in ratios)
    return same and (equation or not ratios[0][0])


def _conflict(a: frozenset, b: frozenset) -> bool:
    """5 m is not 5 cm. Words that are no known units conflict only if neither has all words of the other."""
    known = (a | b) & set(UNITS.values())
    return bool(a and b and a != b and (known or not (a <= b or b <= a)))


def _same(gold: Answer, pred: Answer) -> bool:
    if gold.zero and pred.zero:
        if _same_relation(gold.zero, pred.zero):
            return not _conflict(gold.unit, pred.unit)
        if ("(" in gold.name) == ("(" in pred.name):  # x = 5 is not y = 5, but f(x) = 5 is y = 5
            return False
    if {"text", "unread"} & {gold.kind, pred.kind}:
        return gold.text == pred.text != ""
    if gold.kind != pred.kind or gold.kind == "relation" or _conflict(gold.unit, pred.unit):
        return False
    if gold.kind == "number":
        echo, same_text = gold.plain and not pred.plain, gold.text == pred.text and len(gold.text) > 1
        return not echo and (same_text or _equal(gold.value, pred.value))
    if gold.value != pred.value or len(gold.items) != len(pred.items):
        return False
    if gold.kind not in ("list", "union"):
        return all(map(_same, gold.items, pred.items))
    rest = list(pred.items)
    for item in sorted(gold.items, key=lambda i: not i.plain):  # the pickiest first: it accepts no echo
        match = next((i for i, other in enumerate(rest) if _same(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


# ---- Interface -------------------------------------------------------------------------------------------


def equivalent(pred: str, gold: str) -> bool:
    """Is `pred` the same answer as `gold`? Never raises."""
    try:
        if all(type(s) is str and s.isascii() and s.isdigit() and len(s) <= MAX_DIGITS for s in (pred, gold)):
            return int(pred) == int(gold)  # most golds of most data sets
        return _same(_read(gold), _read(pred))
    except Exception:  # a reward function must not end a run
        return False


def verify(completion: str, gold: str) -> bool:
    """Does the completion's final answer equal the gold? Never raises, never prints."""
    answer = extract_answer(completion) if isinstance(completion, str) else None
    return answer is not None and equivalent(answer, gold)


def math_reward(completions: list[str], golds: list[str]) -> list[float]:
    """1.0 for a right answer, 0.0 for anything else. A gold may have several answers, one a line."""
    pairs = zip(completions, golds, strict=True)
    return [float(any(verify(c, line) for line in g.split("\n"))) for c, g in pairs]


def check_gold(gold: str) -> bool:
    """Is the gold read, and does it equal itself? A row where not should be dropped, and counted."""
    return isinstance(gold, str) and _read(gold).kind != "unread" and verify(f"\\boxed{{{gold}}}", gold)
