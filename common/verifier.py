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
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import sympy as sp
from sympy import Add, E, I, Integer, Mul, Pow, Rational, Symbol, exp, log, oo, pi
from sympy.core.evalf import libmp  # mpmath's arithmetic, which comes with sympy

TAIL = 2000  # without a box, the answer is looked for in the last TAIL characters only
MAX_CHARS = 1000  # of an answer; a longer one is no answer
MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 400, 30, 64  # of an answer; of nested brackets; of a list or matrix
MAX_DIGITS = 400  # of a number as written
MAX_BITS = 1 << 15  # of a number as computed: 2^{2008} and 2004! fit, 9^{9^9} does not

# ---- Extraction -------------------------------------------------------------------------------------------

PHRASE = re.compile(r"answer(?:\s+is|[\s*]*:)[\s:*]*(?=\S)", re.I)
LAST_NUMBER = re.compile(
    r"(?:(?<![\w.)])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]*\.?[0-9]+)(?:\.[0-9]+|/[0-9]+)?"
)


def extract_answer(completion: str) -> str | None:
    """The last box; else what follows the last ####; else "answer is" / "answer:"; else the last number."""
    start = max(completion.rfind("\\boxed"), completion.rfind("\\fbox"))
    if start >= 0:
        return _box(completion[start : start + MAX_CHARS + 20])
    tail = completion[-TAIL:]
    if "####" in tail:
        return tail.rpartition("####")[2].strip().partition("\n")[0].strip()[:MAX_CHARS] or None
    if phrases := list(
        PHRASE.finditer(tail)
    ):  # its first sentence: "The answer is 3.14. I hope it is correct."
        sentence = re.split(r"\.\s|\.$|\n", tail[phrases[-1].end() :])[0]
        return sentence.strip(" *")[:MAX_CHARS] or None
    return (LAST_NUMBER.findall(tail) or [None])[-1]


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


class Unreadable(ValueError):
    """The text is not an answer that this file reads, or it is larger than the bounds."""


def _require(condition) -> None:
    if not condition:
        raise Unreadable


UNICODE = r"""
    −=- –=- —=- ×=\times· ·=\cdot· ⋅=\cdot· ∗=* ÷=/ π=\pi· ∞=\infty· ≤=\le· ≥=\ge· ≠=\ne· ∪=\cup· ∈=\in·
    √=\sqrt· °=^\circ· ∅=\emptyset· ℝ=\mathbb{R} ±=\pm· θ=\theta· α=\alpha· β=\beta· γ=\gamma· φ=\phi·
    λ=\lambda· μ=\mu· ω=\omega· ⁰=^0 ¹=^1 ²=^2 ³=^3 ⁴=^4 ⁵=^5 ⁶=^6 ⁷=^7 ⁸=^8 ⁹=^9 ½=\frac12 ¼=\frac14
    ¾=\frac34 ’=' €=\text{euro} £=\text{sterling}"""
UNICODE = str.maketrans({pair[0]: pair[2:].replace("·", " ") for pair in UNICODE.split()})
REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\[vh]?phantom\s*(?:\{[^{}]*\}|\\?.)", " "),  # what is not seen is not said
        (r"\\[dtc](?=frac|binom)", r"\\"),
        (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\{([^{}]*)\\choose(?![a-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"(?<=[0-9])(?:\{,\}|,\\!\s*|\\[,!;:]\s*)(?=[0-9]{3}(?![0-9]))", ""),  # 10{,}000, 10,\!000
        (r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))|\\degrees?(?![a-z])", "°"),
        (r"\\mathbb\s*(?:R(?![A-Za-z])|\{\s*R\s*\})", r"\\R "),
        (r"\\(?:math(?:bf|it|sf|tt|cal|bb)|boldsymbol|vec|hat|boxed|fbox)(?![A-Za-z])|^\s*\\approx", " "),
        (r"(?<!\\)(?:\$|\\[()\[\]])", " "),  # the signs around mathematics
        (r"\+/-", r"\\pm "),
        (r"\*\*", "^"),
        (r"(?<=[0-9])\s*[aA]\.?\s?[mM]\b\.?", " am"),
        (r"(?<=[0-9])\s*[pP]\.?\s?[mM]\b\.?", " pm"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"-\s*\\\$", r"\\$-"),
    ]
]
NUMERAL = r"""(?:[0-9]+\s+[0-9]+/[0-9]+(?![0-9]) | [0-9]*\.[0-9]*\\(?:overline|bar|dot)\s*\{?[0-9]+\}?
              | (?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"""  # 1 4/5, 0.1\overline{6}, 4.5e33
TOKEN = re.compile(
    rf"""
      (?P<skip> \s+ | ~ | \\[,;:!>\ ]
              | \\(?:left|right|[bB]igg?[lrm]?|q?quad|displaystyle|textstyle|limits|rm|bf)(?![A-Za-z])\.? )
    | (?P<text> \\(?:text(?:bf|rm|it|sf|normal)?|[mh]box|mathrm|operatorname)\s*\{{(?P<content>[^{{}}]*)\}} )
    | (?P<thousands> [1-9][0-9]{{0,2}}(?:(?:,[0-9]{{3}})+|(?:\ [0-9]{{3}})+)(?![ ,]?[0-9]|\s*/)(?:\.[0-9]+)? )
    | (?P<number> {NUMERAL} )
    | (?P<matrix> \\(?:begin|end)\s*\{{(?:[pbB]?(?:small)?matrix|array)\*?\}}(?:\{{[a-z|]*\}})? )
    | (?P<row> \\\\(?:\[-?[0-9.]+[a-z]+\])? ) | (?P<command> \\[A-Za-z]+ | \\[{{}}|%$] )
    | (?P<word> [A-Za-z]+ )
    | (?P<sign> [-+*/^_=<>()\[\]{{}}|!,;:&'%°] )
    """,
    re.X,
)
IN_BRACKETS = re.compile(rf"(?P<number> {NUMERAL} )", re.X)
ALIASES = r"""
    \leq=\le \leqslant=\le \geq=\ge \geqslant=\ge \neq=\ne \lt=< \gt=> \times=* \cdot=* \ast=* \div=/ \colon=:
    \lvert=| \rvert=| \vert=| \mid=| \lbrace=\{ \rbrace=\} \varnothing=\emptyset \backslash=\setminus \prime='
    \infinity=\infty \inf=\infty \oo=\infty \or=, \and=, \lor=, \land=, \asin=\arcsin \acos=\arccos
    \atan=\arctan \varphi=\phi \%="percent %="percent \$="dollar"""
ALIASES = dict(pair.split("=") for pair in ALIASES.split())
LETTERS = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi
    chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell angle triangle"""
UNITS = """
    mm millimeter millimetre|cm centimeter centimetre|dm decimeter|m meter metre|km kilometer kilometre|
    in inch inche|ft foot feet|yd yard|mi mile|g gram|kg kilogram|mg milligram|lb pound|oz ounce|ton|acre|
    l liter litre|ml milliliter millilitre|gal gallon|s sec second|min minute|h hr hour|day|week|month|
    year yr|cent penny|dollar usd buck|euro eur|sterling gbp|percent pct|° degree deg|rad radian|c celsius|
    f fahrenheit|mph|kph|am|pm|2 square sq squared|3 cubic cu cubed|per /|hz hertz|n newton|j joule"""
UNITS = {spelling: line.split()[0] for line in UNITS.split("|") for spelling in line.split()}
LEVEL = dict.fromkeys(("(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil", r"\begin"), 1)
LEVEL |= dict.fromkeys((")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil", r"\end"), -1)
CURRENCY, FILLER = {'"dollar', '"euro', '"sterling'}, {"^", "{", "}", "unit", "of", "the", "a", "total"}


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    at = depth = brackets = 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match and match.lastgroup == "thousands" and brackets:  # (1,200) is a pair, 1,200 a number
            match = IN_BRACKETS.match(text, at)
        _require(match)
        at, kind, token = match.end(), match.lastgroup, match[0]
        if kind == "text":
            tokens += _text_tokens(match["content"].strip(), token.startswith(r"\math"))
        elif kind == "word":
            tokens += _word_tokens(token)
        elif kind != "skip":
            if kind == "number" and token.isdigit() and r"\frac" in tokens[-2:] and tokens[-1] != "{":
                token, at = token[0], match.start() + 1  # as in TeX, \frac12 has arguments of one digit
            tokens.append(
                token[:2]
                if kind == "row"
                else token.split("{")[0].strip()
                if kind == "matrix"
                else ALIASES.get(token, token)
            )
            level = LEVEL.get(tokens[-1], 0)
            depth += level
            brackets += level * (token not in "{}")
        _require(depth <= MAX_DEPTH and len(tokens) <= MAX_TOKENS)
    return tokens


def _text_tokens(content: str, roman: bool) -> list[str]:
    """What a \\text{...} holds: words, separators, or mathematics that happens to stand in a text box."""
    if content in FUNCTIONS or (roman and content in ("e", "i")):
        return _word_tokens(content)
    if re.search("[0-9]", content) and not re.match(r".*[A-Za-z]{2}.*[0-9]", content):
        return _tokens(content)  # \textbf{42}
    words = re.findall(r"[^\W_]+|[,;/^%°]", content.lower().replace(".", ""))
    return ["," if word in ("and", "or", ",", ";") else ALIASES.get(word, '"' + word) for word in words]


def _word_tokens(word: str) -> list[str]:
    """A bare run of letters: a function, a constant, a separator, a unit, a longer word, or letters."""
    command = ALIASES.get("\\" + word.lower(), "\\" + word)
    if command[1:] in KNOWN or command in (",", r"\infty"):
        return [command]
    if word[:-1] in KNOWN:  # sinx
        return ["\\" + word[:-1], word[-1]]
    if len(word) > 3 or (len(word) > 1 and (word in UNITS or word.rstrip("s") in UNITS)):
        return ['"' + word.lower()]
    return list(word)


# ---- Mathematics: sympy objects, unevaluated but for rational numbers, each step within MAX_BITS ----------


def _fold(operation, terms, neutral: int):
    number, others = Integer(neutral), []
    for term in terms:
        if isinstance(term, int) or term.is_Rational:
            number = number + term if operation is Add else number * term
            _require(number.p.bit_length() + number.q.bit_length() <= MAX_BITS)
        else:
            others.append(term)
    if not others or (number == 0 and operation is Mul):
        return number
    others += [number] if number != neutral else []
    return others[0] if len(others) == 1 else operation(*others, evaluate=False)


def _add(*terms):
    return _fold(Add, terms, 0)


def _mul(*factors):
    return _fold(Mul, factors, 1)


def _div(a, b):
    return _mul(a, _pow(b, Integer(-1)))


def _pow(base, exponent):
    if base == E:
        return exp(exponent, evaluate=False)
    _require(base != 0 or (exponent.is_Rational and exponent.p > 0))
    if base.is_Rational and exponent.is_Integer:
        _require((base.p.bit_length() + base.q.bit_length()) * abs(exponent.p) <= MAX_BITS)
        return base**exponent
    return Pow(base, exponent, evaluate=False)


REAL_ROOT = sp.Function("real_root")  # evaluated below; a * |a|^(1/n - 1) would double its argument


def _root(a, n):
    """The n-th root, for odd n the real one: the cube root of -8 is -2."""
    _require(n != 0)
    if n.is_Integer and n.p % 2 and not (a.is_Rational and a.p >= 0):
        return REAL_ROOT(a, n, evaluate=False)
    return _pow(a, _div(1, n))


def _binomial(n, k):
    _require(k.is_Integer and 0 <= k.p and (n.is_Integer or not n.is_number))
    if n.is_Integer:
        _require(0 <= n.p and min(k.p, abs(n.p - k.p)) * n.p.bit_length() <= MAX_BITS)
        return Integer(math.comb(n.p, k.p))
    _require(k.p <= 20)
    return _div(_mul(*(_add(n, -j) for j in range(k.p))), Integer(math.factorial(k.p)))


def _factorial(n):
    if n.free_symbols:
        return sp.factorial(n, evaluate=False)
    _require(n.is_Integer and 0 <= n.p <= 2100)
    return Integer(math.factorial(n.p))


def _unevaluated(function):
    return lambda z: function(z, evaluate=False)


FUNCTIONS = {name: _unevaluated(getattr(sp, name)) for name in "sin cos tan sinh cosh tanh exp log".split()}
FUNCTIONS |= {"arc" + name[1:]: _unevaluated(getattr(sp, name)) for name in ("asin", "acos", "atan")}
FUNCTIONS |= {
    "ln": FUNCTIONS["log"],
    "lg": lambda z: _div(log(z, evaluate=False), log(Integer(10), evaluate=False)),
    "abs": _unevaluated(sp.Abs),
    "cot": lambda z: _div(1, sp.tan(z, evaluate=False)),
    "sec": lambda z: _div(1, sp.cos(z, evaluate=False)),
    "csc": lambda z: _div(1, sp.sin(z, evaluate=False)),
    "cis": lambda z: exp(_mul(I, z), evaluate=False),
}
# After these a degree sign is a factor, elsewhere a unit.
ANGLES = ("sin", "cos", "tan", "cot", "sec", "csc", "cis")
KNOWN = set(LETTERS.split()) | FUNCTIONS.keys() | {"pi", "frac", "binom", "sqrt", "lfloor", "lceil"}
BRACKETS = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}


class Parser:
    """Recursive descent: sum > product > power > atom. `degrees`: was a degree sign a unit?"""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.bars, self.angles, self.degrees = [*tokens, ""], 0, 0, 0, False
        self.value = self.sum()
        _require(not self.peek())
        _magnitude(self.value)

    def peek(self) -> str:
        return self.tokens[self.at]

    def take(self, expected: str = "") -> str:
        token = self.peek()
        _require(token == expected if expected else token)
        self.at += 1
        return token

    def signed(self, read) -> list:
        """A factor, and -1 in front of it if it has a minus sign."""
        minus = False
        while self.peek() in ("+", "-"):
            minus ^= self.take() == "-"
        return [-1] * minus + [read()]

    def sum(self):
        terms = [self.product()]
        while self.peek() in ("+", "-"):
            terms.append(self.product())
        return _add(*terms) if len(terms) > 1 else terms[0]

    def product(self):
        factors = self.signed(self.power)
        while self.peek() in ("*", "/") or self.juxtaposed():
            operator = self.take() if self.peek() in ("*", "/") else "*"
            *minus, factor = self.signed(self.power)
            factors += [*minus, factor if operator == "*" else _div(1, factor)]
        return _mul(*factors) if len(factors) > 1 else factors[0]

    def juxtaposed(self) -> bool:
        """Can the next token be a factor without a sign? No numeral can: neither "2 3" nor "x2" is one."""
        token = self.peek()
        if token == "|":
            return not self.bars
        if self.tokens[self.at - 1] == "!" and token.isdigit():
            return True
        return token in BRACKETS or token.isalpha() or (token[:1] == "\\" and token[1:] in KNOWN)

    def power(self):
        base = self.atom()
        while self.peek() in ("^", "!", "°"):
            operator = self.take()
            if operator == "°" and self.angles:
                base = _mul(base, pi, Rational(1, 180))
            elif operator == "°":
                self.degrees = True
            else:
                base = _pow(base, self.argument()) if operator == "^" else _factorial(base)
                _require(self.peek() != operator)  # neither 9^9^9 nor 5!! is clear
        return base

    def argument(self):
        """A group or one token, with its sign: x^{10}, x^10, x^-1."""
        return _mul(*self.signed(self.atom))

    def atom(self):
        token = self.take()
        if token[0] in ".0123456789":
            return self.mixed(_number(token))
        if token in BRACKETS:
            self.bars += token == "|"
            value = self.sum()
            self.take(BRACKETS[token])
            self.bars -= token == "|"
            wrap = {"|": sp.Abs, r"\lfloor": sp.floor, r"\lceil": sp.ceiling}.get(token)
            return wrap(value, evaluate=False) if wrap else value
        if token.isalpha():
            return {"e": E, "i": I}.get(token) if token in "ei" and self.peek() != "_" else self.symbol(token)
        _require(token[0] == "\\" and token[1:] in KNOWN)
        name = token[1:]
        if name in ("frac", "binom"):
            return (_div if name == "frac" else _binomial)(self.argument(), self.argument())
        if name == "sqrt":
            index = Integer(2)
            if self.peek() == "[":
                self.take()
                index = self.sum()
                self.take("]")
            return _root(self.argument(), index)
        return self.function(name) if name in FUNCTIONS else pi if name == "pi" else self.symbol(name)

    def mixed(self, whole):
        """2\\frac{3}{4} is a mixed number."""
        if self.peek() != r"\frac" or not whole.is_Integer:
            return whole
        start, part = self.at, self.atom()
        written = "".join(self.tokens[start : self.at])
        literal = re.fullmatch(r"\\frac\{?[0-9]+\}?\{?[0-9]+\}?", written)
        return _add(whole, part) if literal else _mul(whole, part)

    def symbol(self, name: str):
        """A letter with its subscript, as a name."""
        if self.peek() == "_":
            name += self.take() + self.take()
            while name.count("{") > name.count("}"):
                name += self.take()
        return Symbol(name.replace("{", "").replace("}", ""))

    def function(self, name: str):
        base = exponent = None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.argument()
            else:
                exponent = self.argument()
        if exponent == -1 and "arc" + name in FUNCTIONS:  # \sin^{-1}
            name, exponent = "arc" + name, None
        self.angles += name in ANGLES
        if self.peek() in BRACKETS:
            argument = self.atom()
        else:  # \sin 2x \cos x: the argument ends at an operator, a bracket or the next function
            factors = self.signed(self.power)
            while self.juxtaposed() and self.peek() != "(" and self.peek()[1:] not in FUNCTIONS:
                factors.append(self.power())
            argument = _mul(*factors)
        self.angles -= name in ANGLES
        value = FUNCTIONS[name](argument)
        value = value if base is None else _div(value, log(base, evaluate=False))
        return value if exponent is None else _pow(value, exponent)


def _number(token: str):
    """A literal, exactly."""
    _require(len(token) <= MAX_DIGITS and not re.search("[eE][-+]?[0-9]{5}", token))
    if token.isdigit():
        return Integer(int(token))
    if "\\" in token:  # 0.1\overline{6}
        point, digits, period = re.fullmatch(r"([0-9]*\.([0-9]*))\D+([0-9]+)\}?", token).groups()
        value = Fraction(point + "0") + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
    elif "/" in token:  # 1 4/5
        whole, part = token.split(None, 1)
        value = int(whole) + Fraction(part)
    else:
        value = Fraction(token.replace(",", "").replace(" ", ""))
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
    _require(sizes[0] <= (16 if e.func is sp.factorial else 1000))
    if e.func in (exp, sp.sinh, sp.cosh, sp.factorial):
        return 20 * 2.0 ** sizes[0]
    return sizes[0] + (500 if e.func is sp.tan else 1)  # a tangent may be close to a pole


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
PLAIN = re.compile(r"[-+]?(?:[nt]?f[-+]?[nt][-+]?[nt]|[nt](?:/[-+]?[nt])?|(?:[nt]\*)?t\^[-+]?[nt])")
MIRRORED = {"=": "=", "<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne", r"\in": ""}
NAME = re.compile(  # x, x_1, f(x), (p,q), "area, AB, NO/BO
    r"""(?:[a-zA-Z]'*|\\[a-z]+)(?:_(?:\w|\{\w+\}))?(?:\^\{?-1\}?)?(?:\((?:[a-z]|-?[0-9]+)(?:,[a-z])*\))?"""
    r"""|\([a-zA-Z](?:,[a-zA-Z])+\)|(?:"\w+)+|(?:\\angle|\\triangle|\\overline|\\frac|m(?=\\angle)|[A-Z{}/])+"""
)
FRACTION = re.compile(r"(-?)(?:\\[dtc]?frac\{([0-9]+)\}\{([0-9]+)\}|([0-9]+)(?:/([0-9]+))?)")
CONSTANT_NAMES = (r"\infty", r"\pi", r"\R", "e", "i")
LOW, HIGH = Answer("number", -oo), Answer("number", oo)


def _split(tokens: list[str], separators) -> tuple[list[list[str]], list[str]]:
    """The parts between the separators outside all brackets, and these separators."""
    if not any(separator in tokens for separator in separators):
        return [tokens], []
    parts, found, depth = [[]], [], 0
    for token in tokens:
        depth += LEVEL.get(token, 0)
        if depth == 0 and token in separators:
            parts.append([])
            found.append(token)
        else:
            parts[-1].append(token)
    return parts, found


def _enclosed(tokens: list[str]) -> bool:
    """Does the first bracket close at the last token?"""
    depth, ends = 0, []
    for i, token in enumerate(tokens):
        depth += LEVEL.get(token, 0)
        ends += [i] * (depth == 0)
    return ends == [len(tokens) - 1] and len(tokens) > 1


def _items(tokens: list[str]) -> tuple[Answer, ...]:
    """The answers between commas; one with a plus-minus sign is two."""
    items = []
    for part in _split(tokens, (",", ";"))[0]:
        if part and part[0] != r"\{" and (r"\pm" in part or r"\mp" in part):
            items += [_element([{r"\pm": p, r"\mp": m}.get(t, t) for t in part]) for p, m in ("+-", "-+")]
        elif part and not re.fullmatch(r"[a-z]\\in\{?[ZN]\}?", "".join(part)):  # ..., k \in \mathbb{Z}
            items.append(_element(part))
    _require(0 < len(items) <= MAX_ITEMS)
    return tuple(items)


def _answer(tokens: list[str]) -> Answer:
    items = _items(tokens)
    inequalities = all(i.kind in ("tuple", "union") and i.zero for i in items)  # x < 1 or x > 5
    return items[0] if len(items) == 1 else Answer("union" if inequalities else "list", items=items)


def _element(tokens: list[str]) -> Answer:
    parts, operators = _split(tokens, MIRRORED)
    if not operators:
        return _object(tokens)
    names = ["".join(p) for p in parts]
    names = [re.sub("[{}]", "", n) if NAME.fullmatch(n) and n not in CONSTANT_NAMES else "" for n in names]
    if operators == [r"\in"]:
        return _object(parts[1])._replace(name=names[0])
    return (_equation if set(operators) == {"="} else _inequality)(parts, names, operators)


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
    sides = [Answer("number", Symbol(n)) if n else _object(p) for n, p in zip(names, parts, strict=True)]
    _require(all(side.kind == "number" for side in sides))
    if len(parts) == 3 and names[1]:
        if operators[0] in (">", r"\ge"):
            sides, operators = sides[::-1], [MIRRORED[o] for o in operators[::-1]]
        _require({*operators} <= {"<", r"\le"})
        brackets = "(["[operators[0] == r"\le"] + ")]"[operators[1] == r"\le"]
        return _interval(sides[0], sides[2], brackets, names[1])
    _require(len(parts) == 2)
    zero = (_add(sides[0].value, _mul(-1, sides[1].value)), operators[0])
    name, bound, operator = names[0], sides[1], operators[0]
    if names[1]:
        name, bound, operator = names[1], sides[0], MIRRORED[operator]
    if not name or bound.value.free_symbols:
        return Answer("relation", zero=zero)
    if operator == r"\ne":
        return _without([bound])._replace(name=name, zero=zero)
    if operator in (">", r"\ge"):
        return _interval(bound, HIGH, "(["[operator == r"\ge"] + ")", name, zero)
    return _interval(LOW, bound, "(" + ")]"[operator == r"\le"], name, zero)


def _interval(low: Answer, high: Answer, brackets: str = "()", name: str = "", zero=None) -> Answer:
    return Answer("tuple", brackets, (low, high), name=name, zero=zero)


def _without(points) -> Answer:
    """The real line without some points."""
    ends = [LOW, *sorted(points, key=lambda a: libmp.to_float(_value(a.value, {})[0])), HIGH]
    return Answer("union", items=tuple(map(_interval, ends, ends[1:])))


def _object(tokens: list[str]) -> Answer:
    """One answer that is neither a bare list nor a relation."""
    _require(tokens)
    while tokens[0] == "{" and _enclosed(tokens):
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
        _require(len(tokens) > 1)
        return tokens[1:], frozenset({tokens[0][1:]})
    start = next((i for i, t in enumerate(tokens) if t[0] == '"'), len(tokens))
    words = tokens[start:]
    _require(all(t[0] == '"' or t in "^23{}/" or t.isalpha() for t in words))
    words = [w.strip('"') for w in words]
    words = " ".join(UNITS.get(w) or UNITS.get(w.rstrip("s")) or w.rstrip("s") for w in words)
    unit = set(words.replace("mph", "mi per h").replace("kph", "km per h").split()) - FILLER
    return tokens[:start], frozenset(unit if unit - {"2", "3"} else ())


def _container(tokens: list[str]) -> Answer | None:
    if tokens == [r"\R"]:
        return _interval(LOW, HIGH)
    if tokens in ([r"\emptyset"], [r"\{", r"\}"]):
        return Answer("list")
    if tokens[-1] == r"\infty" and len(tokens) <= 2 and tokens[0] in ("+", "-", r"\infty"):
        return LOW if tokens[0] == "-" else HIGH
    parts, found = _split(tokens, (r"\cup", r"\setminus"))
    if found == [r"\setminus"]:
        whole, points = _object(parts[0]), _object(parts[1])
        _require(whole == _interval(LOW, HIGH) and points.kind == "list")
        return _without(points.items)
    if found:
        pieces = [_object(p) for p in parts]
        return Answer(
            "union", items=tuple(i for p in pieces for i in (p.items if p.kind == "union" else [p]))
        )
    if _enclosed(tokens):
        inner, opening = tokens[1:-1], tokens[0].replace(r"\langle", "(")
        if opening == r"\{":
            return Answer("list", items=_items(inner))
        if opening == r"\begin":
            return _matrix(inner)
        if _enclosed(inner) and inner[0] == r"\begin":  # an array between brackets of its own
            return _container(inner)
        cells = _split(inner, (",", ";"))[0]
        if opening == "[" or (opening == "(" and len(cells) > 1):
            return Answer("tuple", opening + tokens[-1].replace(r"\rangle", ")"), tuple(map(_element, cells)))
    parts, found = _split(tokens, (":",))
    if found:  # 4:30, 1:2
        return Answer("ratio", ":", tuple(map(_expression, parts)))
    base = re.fullmatch(r"(-?)\(?0*([0-9A-Z]+)\)?_\{?\(?([0-9]+)\)?\}?", "".join(tokens))
    return Answer("base", base.groups()) if base and re.search("[0-9]", base[2]) else None  # 52_8


def _matrix(tokens: list[str]) -> Answer:
    rows = [_split(row, ("&",))[0] for row in _split(tokens, ("\\\\",))[0] if row]
    _require(len({len(row) for row in rows}) == 1 and len(rows) * len(rows[0]) <= MAX_ITEMS)
    return Answer("matrix", (len(rows), len(rows[0])), tuple(_object(cell) for row in rows for cell in row))


def _expression(tokens: list[str]) -> Answer:
    forms = {"{": "", "}": "", "(": "", ")": "", "°": "", r"\frac": "f", "10": "t"}
    form = "".join(forms.get(t, "n" if t[0] in ".0123456789" else t) for t in tokens)
    parser = Parser(tokens)
    unit = frozenset("°" if parser.degrees else ())
    return Answer("number", parser.value, plain=bool(PLAIN.fullmatch(form)), unit=unit)


@lru_cache(maxsize=4096)  # bounded; a group of rollouts repeats its gold and many of its answers
def _read(text: str) -> Answer:
    """The answer that a text stands for; of kind "unread" where it is none, equal only to the same text."""
    try:
        _require(len(text) <= MAX_CHARS)
        if match := FRACTION.fullmatch(text):  # the commonest answers, eight times as fast
            sign, *numbers = match.groups()
            top, bottom = _number(numbers[0] or numbers[2]), _number(numbers[1] or numbers[3] or "1")
            return Answer("number", _mul(-1 if sign else 1, _div(top, bottom)), plain=True)
        cleaned = " ".join(text.split()).translate(UNICODE).strip(" *:~")
        for pattern, replacement in REWRITES:
            cleaned = pattern.sub(replacement, cleaned)
        return _answer(_tokens(cleaned.strip(" *:~").rstrip(" *:~.,;\\")))
    except (ValueError, ArithmeticError, TypeError, AttributeError, LookupError, RecursionError):
        return Answer("unread", text="".join(text[:MAX_CHARS].split()))


# ---- Equality --------------------------------------------------------------------------------------------

BITS, PRECISION = (
    133,
    400,
)  # terms must cancel to 40 digits; computed with 120, as parts of a term may cancel too
NUMERIC = {
    sp.sin: "sin",
    sp.cos: "cos",
    sp.tan: "tan",
    sp.sinh: "sinh",
    sp.cosh: "cosh",
    sp.tanh: "tanh",
    exp: "exp",
}
NUMERIC |= {
    log: "log",
    sp.asin: "asin",
    sp.acos: "acos",
    sp.atan: "atan",
    sp.floor: "floor",
    sp.ceiling: "ceil",
}
NUMERIC[sp.factorial] = "factorial"
NUMERIC = {function: getattr(libmp, "mpc_" + name) for function, name in NUMERIC.items()}
CONSTANTS = {I: (libmp.fzero, libmp.fone), E: (libmp.mpf_e(PRECISION), libmp.fzero)}
CONSTANTS[pi] = (libmp.mpf_pi(PRECISION), libmp.fzero)


def _points(*expressions):
    """Fixed values for the letters. At the last point some are negative (sqrt(x^2) is not x); where a side is
    no real number there, that point says nothing."""
    letters = sorted({s for e in expressions for s in e.free_symbols}, key=lambda s: s.name)
    for row in range(3 if letters else 1):
        values = [0.35 + 0.618033988749895 * (5 * i + row + 1) % 1 * 1.7 for i in range(len(letters))]
        if negative := row == 2:
            values[::2] = [-v for v in values[::2]]
        yield negative, {s: (libmp.from_float(v), libmp.fzero) for s, v in zip(letters, values, strict=True)}


def _value(e, point) -> tuple:
    """Real and imaginary part. Not by sympy's evalf: its work doubles with each nested root, and some of it
    runs at mpmath's process-wide precision, which threads share. libmp is told the precision at each step."""
    if e.is_Rational:
        return libmp.from_rational(e.p, e.q, PRECISION), libmp.fzero
    if not e.args:
        return CONSTANTS.get(e) or point[e]
    if e.is_Pow and e.exp.is_Integer:
        return libmp.mpc_pow_int(_value(e.base, point), e.exp.p, PRECISION)
    values = [_value(a, point) for a in e.args]
    if e.is_Add or e.is_Mul:
        operation = libmp.mpc_add if e.is_Add else libmp.mpc_mul
        return reduce(lambda a, b: operation(a, b, PRECISION), values)
    if e.is_Pow:
        return libmp.mpc_pow(*values, PRECISION)
    if isinstance(e, sp.Abs):
        return libmp.mpc_abs(values[0], PRECISION), libmp.fzero
    if e.func is REAL_ROOT:
        negative = values[0][0][0] and values[0][1] == libmp.fzero
        root = libmp.mpc_nthroot(libmp.mpc_neg(values[0]) if negative else values[0], e.args[1].p, PRECISION)
        return libmp.mpc_neg(root) if negative else root
    return NUMERIC[e.func](values[0], PRECISION)


def _size(*numbers) -> float:
    """The binary exponent of the largest; -inf if all are zero."""
    _require(all(man or not exponent for _, man, exponent, _ in numbers))  # neither infinite nor undefined
    return max(
        (exponent + bits if man else -math.inf for _, man, exponent, bits in numbers), default=-math.inf
    )


def _real(*values) -> bool:
    return all(im == libmp.fzero or _size(im) <= _size(re) - BITS for re, im in values)


def _parts(e, operation) -> list:
    return [part for arg in e.args for part in _parts(arg, operation)] if e.func is operation else [e]


def _equal(a, b) -> bool:
    """Is a - b zero? Exactly for rationals; otherwise to 40 digits of its largest term, at fixed points."""
    if a == b or (a.is_Rational and b.is_Rational) or {oo, -oo} & {a, b}:
        return a == b
    terms = Counter(_parts(a, Add))
    terms.subtract(_parts(b, Add))  # common terms go, so that 2^{2008} + \sqrt 2 is not 2^{2008}
    rational = sum((t * n for t, n in terms.items() if t.is_Rational), Integer(0))
    terms = [_mul(t, n) for t, n in terms.items() if n and not t.is_Rational] + [rational] * (rational != 0)
    for negative, point in _points(a, b) if terms else ():
        try:
            values = [_value(t, point) for t in terms]
            scale = max(_size(*v) for v in values)
        except (Unreadable, ArithmeticError):
            if negative:
                break
            raise
        if negative and not _real(*values):
            break
        if _size(*reduce(lambda u, v: libmp.mpc_add(u, v, PRECISION), values)) > scale - BITS:
            return False
    return True


def _cleared(f):
    """f times the denominators of its terms: y - 6/x becomes xy - 6."""
    powers: Counter = Counter()
    for factor in (factor for term in _parts(f, Add) for factor in _parts(term, Mul)):
        if factor.is_Pow and factor.exp.is_Integer and factor.exp.p < 0 and factor.free_symbols:
            powers[factor.base] = max(powers[factor.base], -factor.exp.p)
    return _mul(f, *(_pow(base, Integer(n)) for base, n in powers.items()))


def _same_relation(gold, pred) -> bool:
    """Are the differences proportional, for an inequality with the right sign?"""
    (f, operator), (g, other) = gold, pred
    equation, ratio = operator in ("=", r"\ne"), None
    if f.free_symbols != g.free_symbols or not f.free_symbols or (equation and operator != other):
        return False
    if equation:
        f, g = _cleared(f), _cleared(g)
    for negative, point in _points(f):
        u, v = _value(f, point), _value(g, point)
        if negative and not _real(u, v):
            continue
        if libmp.fzero in (u[0], v[0]) or not _real(u, v):
            return False
        quotient = libmp.mpf_div(u[0], v[0], PRECISION)
        if ratio and _size(libmp.mpf_sub(quotient, ratio, PRECISION)) > _size(ratio) - BITS:
            return False
        ratio = quotient
    return equation or other == (MIRRORED[operator] if ratio[0] else operator)


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
    if gold.plain:
        return pred.plain and gold.value == pred.value
    if gold.kind == "number":
        return (gold.text == pred.text and len(gold.text) > 1) or _equal(gold.value, pred.value)
    if gold.value != pred.value or len(gold.items) != len(pred.items):
        return False
    if gold.kind not in ("list", "union"):
        return all(map(_same, gold.items, pred.items))
    rest = list(pred.items)
    for item in sorted(
        gold.items, key=lambda i: not i.plain
    ):  # the pickiest first: a plain number accepts no echo
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
    try:
        answer = extract_answer(completion)
    except Exception:
        return False
    return answer is not None and equivalent(answer, gold)


def math_reward(completions: list[str], golds: list[str]) -> list[float]:
    """1.0 for a right answer, 0.0 for anything else: no partial credit."""
    return [float(verify(c, g)) for c, g in zip(completions, golds, strict=True)]


def check_gold(gold: str) -> bool:
    """Is the gold read, and does it equal itself? A row where not should be dropped, and counted."""
    try:
        return _read(gold).kind != "unread" and verify(f"\\boxed{{{gold}}}", gold)
    except Exception:
        return False


def evaluation(completions: list[str], right: list[float], levels: list) -> dict:
    """Scores of held-out questions, overall and for each level: greedy accuracy, pass@k; and counts of
    verdicts.

    completions and their verdicts `right`: the greedy answers to all Q questions first, then n rounds of
    samples, (1 + n) Q in all; levels: Q, None where there is none. pass@k = 1 - C(n - c, k) / C(n, k) is
    unbiased for c right among n samples (Chen et al., 2107.03374).
    """
    levels, size = [None if x is None else str(x) for x in levels], len(levels)
    n, scores = len(right) // size - 1, {}
    for level in [None, *sorted(set(levels) - {None})]:
        ids = [i for i in range(size) if level in (None, levels[i])]
        scores[level] = {"accuracy": sum(right[i] for i in ids) / len(ids)}
        for k in (2**j for j in range(n.bit_length())):
            missed = [math.comb(n - int(sum(right[i + size :: size])), k) / math.comb(n, k) for i in ids]
            scores[level][f"pass@{k}"] = 1 - sum(missed) / len(ids)
    none = sum(extract_answer(text) is None for text in completions)
    counts = {"right": int(sum(right)), "wrong": len(right) - int(sum(right)) - none, "no_answer": none}
    return scores.pop(None) | counts | {"levels": scores}
