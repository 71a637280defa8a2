"""The verifier: every example with a known verdict, every policy, hostile input, threads, and properties."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import mpmath
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common import verifier
from common.verifier import check_gold, equivalent, extract_answer, math_reward, verify

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parent.parent


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


# ---- Examples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["verifier_examples.jsonl", "verifier_real_completions.jsonl", "verifier_peer_cases.jsonl"]
)
def test_examples(name):
    wrong = [r["id"] for r in rows(name) if verify(r["completion"], r["gold"]) != r["expected"]]
    assert wrong == []


def test_cases_of_every_kind():
    wrong = [
        (row["gold"], answer, verdict)
        for row in rows("verifier_cases.jsonl")
        for verdict in ("right", "wrong")
        for answer in row[verdict]
        if equivalent(answer, row["gold"]) != (verdict == "right")
    ]
    assert wrong == []


def test_golds_of_the_cases_are_read():
    assert [r["gold"] for r in rows("verifier_cases.jsonl") if not check_gold(r["gold"])] == []


def test_published_solutions_earn_their_own_gold():
    assert [r["id"] for r in rows("verifier_math500.jsonl") if not verify(r["completion"], r["gold"])] == []


def test_unreadable_golds_are_few():
    unread = [r["gold"] for r in rows("verifier_math_golds.jsonl") if not check_gold(r["gold"])]
    assert unread == ["None", "None", r"0.56 = 56\%"]  # an equation that is not true


# ---- Extraction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{5} and then \boxed{6}.", "6"),
        (r"\boxed{5} or \fbox{6}", "6"),
        (r"\boxed{\boxed{4} \boxed{5}}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\boxed 7.", "7"),
        (r"\boxed{5}, no: \boxed{}", None),  # an empty last box does not fall back to an earlier one
        (r"\boxed{5}, no: \boxed{ }", None),
        (r"\boxed{5}, no: \boxed{6", None),  # nor does an unterminated one
        (r"I put it in \boxed", None),
        (r"The answer is 5. \boxed{6}", "6"),
        ("#### 3\nWait.\n#### 5", "5"),
        ("The answer is 4.\n#### 1,250", "1,250"),
        ("#### 5\nThat is all.", "5"),
        ("5 ####", None),
        ("The answer is 3. No, the answer is 4.", "4"),
        ("The answer is 3.14. I hope it is correct.", "3.14"),
        ("**Answer:** $6$", "$6$"),
        ("Final answer: x = 3", "x = 3"),
        ("The final answer is:\n12", "12"),
        ("First 12, then 15, and finally 27", "27"),
        ("a total of 1,250 dollars.", "1,250"),
        ("so we get 3/4", "3/4"),
        ("the sum is -0.5", "-0.5"),
        ("5-3", "3"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_extraction(completion, answer):
    assert extract_answer(completion) == answer


def test_only_the_tail_is_searched_without_a_box():
    assert extract_answer("#### 5" + " ." * 2000) is None
    assert extract_answer(r"\boxed{5}" + " ." * 2000) == "5"


# ---- Policies: right and wrong answers for a gold --------------------------------------------------------

POLICIES = {
    "no echo": (
        "408",
        ["408", "408.0", "816/2", r"4.08 \times 10^2"],
        [r"17 \times 24", "400 + 8", r"\sqrt{166464}"],
    ),
    "echo of an expression": (r"\frac{5!}{7}", [r"\frac{120}{7}", r"17\frac17"], [r"\frac{5}{7}"]),
    "exact decimals": (
        r"\frac13",
        [r"0.\overline{3}", "2/6"],
        ["0.3333", "0.33333333333333333333", r"33.3\%"],
    ),
    "no factor of 100": ("12", [r"12\%"], ["0.12", "1200", r"0.12\%"]),
    "units optional": (
        r"5 \text{ cm}",
        ["5", "5 cm", "5 centimeters"],
        [r"5 \text{ m}", r"\$5", r"5 \text{ cm}^2"],
    ),
    "percent is a unit": (r"20\%", ["20", "20 percent"], ["0.2", r"20 \text{ cm}"]),
    "degrees": (r"90^\circ", ["90", "90°", "90 degrees"], [r"\frac{\pi}{2}", r"90 \text{ radians}"]),
    "text": (r"\text{Even}", ["even", "EVEN", r"\textbf{even}"], ["odd", "evenodd", "even or odd", "eve"]),
    "choice": (r"\text{(C)}", ["C", "(C)", r"\textbf{(C)}", "c"], ["A", "C, D", "A or C"]),
    "interval": (
        r"(2, \infty)",
        ["x > 2", "2 < x", r"(2, +\infty)"],
        [r"x \ge 2", r"[2, \infty)", "x < 2", "2"],
    ),
    "union": (r"(-\infty,1) \cup (2,\infty)", [r"x < 1 \text{ or } x > 2"], ["(1, 2)", r"(-\infty,1)"]),
    "difference": (
        r"(-\infty,1) \cup (1,\infty)",
        [r"x \ne 1", r"\mathbb{R} \setminus \{1\}"],
        [r"\mathbb{R}"],
    ),
    "right-hand side": (
        "y = 2x+3",
        ["2x+3", "y - 2x = 3", "f(x) = 2x+3"],
        ["2x", "y = 3x+2", "x = 2y+3", "3"],
    ),
    "equations up to a factor": ("2x+4y-3=0", [r"y = -\frac12 x + \frac34", "3 - 2x = 4y"], ["0", "2x+4y=0"]),
    "cleared denominators": (r"y = \frac6x", ["xy = 6"], ["xy = 5", "y = 6x"]),
    "inequality": ("x < 1", ["1 > x", "-x > -1", "2x < 2"], ["x > 1", "-x < -1", r"x \le 1", "y < 1"]),
    "list": ("1, 2, 3", ["3, 2, 1", r"\{1,2,3\}", "1, 2 and 3"], ["(1,2,3)", "1,2", "1,2,3,3", "6"]),
    "tuple": ("(1, 2)", ["(1,2)", r"\langle 1, 2\rangle"], ["(2,1)", "[1,2]", "1,2", r"\{1,2\}"]),
    "plus-minus": (r"1 \pm \sqrt2", [r"1-\sqrt2, 1+\sqrt2"], [r"1+\sqrt2", r"\pm\sqrt2"]),
    "one answer": (
        "4",
        ["4", "x = 4", "4 = x"],
        [r"\pm 4", "4 or 5", "4, 4", r"\{4\}", "[4,4]", "(4)(1)", "x^2 = 4"],
    ),
    "base": ("52_8", ["52_{8}"], ["52", "42", "52_9"]),
    "zero": ("0", ["0.0", "-0"], ["x^2 - 1 = 0", r"10^{-9}", "1 - 1", ""]),
    "big integers": ("12345678901234567890", ["12,345,678,901,234,567,890"], ["12345678901234567891"]),
    "tiny numbers": (r"\frac{1}{2004!}", [r"1/2004!"], [r"\frac{1}{2006!}", "0"]),
    "common terms": (r"2^{2008} + \sqrt2", [r"\sqrt2 + 2^{2008}"], [r"2^{2008}", r"2^{2008} + \sqrt3"]),
    "sign": ("|x|", [r"\sqrt{x^2}"], ["x", "-x"]),
    "real root": (r"\sqrt2 \sqrt[3]{-8}", [r"-2\sqrt2"], [r"2\sqrt2"]),
    "numerals do not glue": ("12", ["12"], ["1 2", "{1}{2}", r"1\phantom{5}2", "1, 2", r"\$1,2\$"]),
    "thousands": ("1234567", ["1,234,567", r"1{,}234{,}567", r"1,\!234,\!567"], ["1,234,56", "(1,234,567)"]),
    "several letters": ("xy", ["yx", r"x \cdot y"], ["x+y", "xz"]),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policy(name):
    gold, right, wrong = POLICIES[name]
    assert check_gold(gold)
    assert [a for a in right if not equivalent(a, gold)] == []
    assert [a for a in wrong if equivalent(a, gold)] == []


def test_boxes_buy_no_second_chance():
    assert not verify(r"\boxed{5} \boxed{6}", "5")
    assert verify(r"\boxed{5} \boxed{6}", "6")
    assert not verify(r"\boxed{5}, that is \boxed{", "5")
    assert not verify(r"\boxed{\text{The answer is } 5}", "5")


def test_rewards_are_one_or_zero_and_lengths_must_match():
    assert math_reward([r"\boxed{4}", "#### 5", "nothing"], ["4", "4", "4"]) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError):
        math_reward(["4"], ["4", "5"])


@pytest.mark.parametrize(
    "gold", ["", "?", r"\frac{1}{0}", "{", "}", r"\begin{pmatrix}1", "9^{9^{9^9}}", r"\foo{1}"]
)
def test_golds_that_cannot_be_judged(gold):
    assert not check_gold(gold)


def test_an_unreadable_gold_makes_no_answer_right():
    """Such a row is dropped; were it not, a reward of 1 for anything would be the worst way to judge it."""
    for gold in ("", "?", r"\frac{1}{0}", "{", r"\begin{pmatrix}1", r"\foo{1}"):
        assert math_reward([r"\boxed{5}", "x", r"The answer is \frac12"], [gold] * 3) == [0.0] * 3


# ---- Faults that users of other graders met, kind by kind ------------------------------------------------

FAULTS = sorted({row["kind"] for row in rows("verifier_faults.jsonl")})


@pytest.mark.parametrize("kind", FAULTS)
def test_fault(kind):
    for row in rows("verifier_faults.jsonl"):
        if row["kind"] == kind:
            gold = row["gold"]
            assert check_gold(gold), gold
            assert [a for a in row["right"] if not verify(rf"\boxed{{{a}}}", gold)] == [], gold
            assert [a for a in row["wrong"] if verify(rf"\boxed{{{a}}}", gold)] == [], gold


# Row 4 and row 18: texts without a box; what they say, and what they do not.
WITHOUT_A_BOX = [
    (r"So the probability is $\frac{2}{5}$.", "2/5", "5"),
    (r"so \(\frac{3}{4}\) of them.", "3/4", "4"),
    (r"thus \[ x = \frac{7}{2} \]", "3.5", "2"),
    (r"It equals $\sqrt{3}$.", r"\sqrt3", "3"),
    (r"It equals $2^{10}$.", r"2^{10}", "10"),
    (r"The volume is $12\pi$", r"12\pi", "12"),
    (r"The point is $(2,3)$.", "(2,3)", "3"),
    (r"It is $5 \cdot 3 = 15$ apples.", "15", "3"),
    (r"hence \frac{2}{5}.", "2/5", "5"),
    ("He pays $18 for 3 and gets $5 back.", "5", "3"),
    ("Answer: The total is 34 dollars.", "34", "3"),
    ("Answer: She has 34 apples left.", "34", "4"),
    ("Answer: It does not equal 34.", "35", "34"),
    (r"Answer: The probability that it rains is $\frac{1}{2}$.", "1/2", "2"),
    ("The answer is: the total equals 34.", "34", "4"),
    ("答案：每份应该是 (\\frac{2}{5}) 吨。", "2/5", "5"),
    ("34</s>", "34", "3"),
    ("The answer is 34<|im_end|>", "34", "3"),
]


@pytest.mark.parametrize(("completion", "said", "unsaid"), WITHOUT_A_BOX)
def test_without_a_box(completion, said, unsaid):
    assert verify(completion, said) == ("not" not in completion)
    assert not verify(completion, unsaid)


def test_thoughts_are_not_searched_when_a_text_follows_them():
    assert verify(r"<think>\boxed{5}</think> The answer is 6.", "6")
    assert not verify(r"<think>\boxed{5}</think> The answer is 6.", "5")
    assert not verify(r"<think>\boxed{5}</think> I do not know.", "5")
    assert verify("<think>\\boxed{5}</think>\n", "5")  # nothing follows
    assert verify(r"<think>\boxed{5}", "5")


NOBODY_EARNS = r"""proof|\text{proof}|Proof.|notfound|not found|None|nan|NaN|null|N/A|n/a|see above|
see solution|See the solution.|unknown|omitted"""


@pytest.mark.parametrize("gold", NOBODY_EARNS.replace("\n", "").split("|"))
def test_golds_that_nobody_can_earn_are_refused(gold):
    assert not check_gold(gold)


def test_words_that_are_answers_are_no_such_golds():
    for gold in (
        r"\text{None}",
        r"\text{no}",
        r"\text{no solution}",
        "undefined",
        r"\text{even}",
        "Prove",
        "Nanette",
    ):
        assert check_gold(gold), gold


# ---- Hostile input ---------------------------------------------------------------------------------------

CODE = [
    "__import__('os').system('touch pwned')",
    r"\text{__import__('os').system('touch pwned')}",
    "exec('1')",
    "open('pwned', 'w')",
    "().__class__.__base__.__subclasses__()",
    "(lambda: 8)()",
    'f(\'__import__("os").system("touch pwned")\')',
    'x*(\'__import__("os").system("touch pwned")\', 1)',
    "S('8')",
    "8 if 1 else 0",
    "not 0",
    "True",
]
HUGE = {
    "power": "9**9**9",
    "tower": "9^{9^9}",
    "tall tower": "9^{9^{9^{9^9}}}",
    "letters in a tower": "x^{x^{x^{x^{x^x}}}}",
    "tower of e": r"e^{e^{e^{e^{e^{100}}}}}",
    "exponent": "x^{10^{300}} + 7",
    "factorial": "1000000!",
    "factorials": "2000!" * 190,
    "factorial of factorial": "((4!)!)!",
    "binomial": r"\binom{10^6}{5\cdot10^5}",
    "product": "*".join(["2^{16000}"] * 60),
    "exponent of ten": "7e99999999",
    "braces": "{" * 2000 + "7" + "}" * 2000,
    "parentheses": "(" * 100 + "7" + ")" * 100,
    "nested roots": r"\sqrt[3]{1+" * 28 + "7" + "}" * 28,
    "nested functions": r"\cot(" * 28 + "x" + ")" * 28,
    "chained roots": r"\sqrt" * 190 + "7",
    "nested fractions": r"\frac{1}{1+" * 28 + "7" + "}" * 28,
    "digits": "7" * 100_000,
    "digits under the cap": "7" * 999,
    "megabyte": "x" * 1_000_000,
    "megabyte of braces": "{" * 1_000_000,
    "megabyte of spaces": " " * 1_000_000 + "x",
    "sine": r"\sin(10^{9000})",
    "floor": r"\lfloor 10^{9000} \pi \rfloor",
    "sine of a large cosine": r"\sin(\cosh(10^{9}))",
    "symbolic factorial": "((x!)!)!",
    "list": ",".join(rf"\sqrt{{{i}}}" for i in range(80)),
    "union": r"\cup".join(["[0,1]"] * 60),
    "sum": "1+" * 500 + "1",
    "letters": "abcdefghijklmnopqrstuvwxyz" * 7,
    "points": "7." * 490 + "x",
    "answers": "answer" + " " * 900 + "x",
    "full-width digit": "７",
    "Arabic digit": "٧",
    "surrogate": "\ud800",
    "surrogate after a digit": "7\udfff",
    "NUL": "7\x008",
    "combining marks": "7" + "\u0301" * 500,
    "division by zero": r"\frac{7}{1-1}",
    "0/0": "0/0",
    "infinity minus infinity": r"\infty - \infty",
    "nan": "nan",
}


@pytest.mark.parametrize("gold", ["7", r"\sqrt{2}", "x^2+1", "2x+4y-3=0", "(1, 2)", r"\text{even}"])
def test_hostile_input_is_wrong_fast_and_leaves_no_state(gold):
    state = (sys.getrecursionlimit(), mpmath.mp.prec, sys.get_int_max_str_digits())
    for name, answer in [*HUGE.items(), *((code, code) for code in CODE)]:
        start = time.process_time()
        assert not verify(f"\\boxed{{{answer}}}", gold), name
        seconds = time.process_time() - start
        assert seconds < 0.25, (name, seconds)  # 50 ms on an idle core; room for a busy one
        verify(answer, gold)  # whatever the verdict: no exception
        assert (sys.getrecursionlimit(), mpmath.mp.prec, sys.get_int_max_str_digits()) == state, name
        assert verify(r"\boxed{\sqrt{8}}", r"2\sqrt2") and not verify(r"\boxed{\sqrt{8}}", "2")


def test_a_thousand_boxes():
    completion = " ".join(f"\\boxed{{{i}}}" for i in range(1000))
    assert verify(completion, "999") and not verify(completion, "57")


def test_nothing_is_executed_or_compiled(tmp_path):
    script = """
import json, sys
from common.verifier import verify, check_gold
answers = json.loads(sys.stdin.read())
verify("\\\\boxed{x+1}", "1+x")
events = []
quiet = ("compile", "exec", "open", "import", "os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn",
         "subprocess.Popen", "socket.", "ctypes.", "shutil.", "code.__new__", "builtins.", "pty.", "signal.")
sys.addaudithook(lambda event, args: events.append(event) if event.startswith(quiet) else None)
for answer in answers:
    for gold in ("7", "x+1", "(1,2)", answer):
        verify(answer, gold), verify("\\\\boxed{" + answer + "}", gold), check_gold(answer)
found = list(events)
compile("1", "proof that the hook listens", "eval")
assert events != found
print(json.dumps(found))
"""
    answers = json.dumps([*CODE, *(a for a in HUGE.values() if len(a) < 10_000)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", script],
        input=answers,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [] and run.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_any_thread():
    cases = [r for r in rows("verifier_examples.jsonl") for _ in range(2)]
    results: list = [None] * 4

    def work(i):
        results[i] = [verify(r["completion"], r["gold"]) for r in cases[i::4]]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[r["expected"] for r in cases[i::4]] for i in range(4)]
    assert mpmath.mp.prec == 53


# ---- Properties ------------------------------------------------------------------------------------------

properties = settings(derandomize=True, deadline=None, max_examples=150)
integers = st.integers(-(10**6), 10**6)
positive = st.integers(1, 10**6)
atoms = st.one_of(
    positive.map(str),
    st.tuples(positive, positive).map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
    st.integers(2, 99).map(lambda n: rf"\sqrt{{{n}}}"),
    st.sampled_from(
        ["x", "y", r"\pi", "a_1", r"\theta", r"\sin x", "e^{2x}", r"\log_2 y", "|x|", r"\left(x+1\right)"]
    ),
)
expressions = st.recursive(
    atoms,
    lambda e: st.one_of(
        st.tuples(e, st.sampled_from([" + ", " - ", r" \cdot "]), e).map("".join),
        st.tuples(e, e).map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
        e.map(lambda s: rf"\left({s}\right)^2"),
    ),
    max_leaves=5,
)
answers = st.one_of(
    expressions,
    st.lists(expressions, min_size=2, max_size=3).map(lambda x: rf"\left({', '.join(x)}\right)"),
    st.lists(expressions, min_size=2, max_size=3).map(lambda x: rf"\{{{', '.join(x)}\}}"),
)


@properties
@given(answers)
def test_reflexive_on_what_is_read(answer):
    assert check_gold(answer) or re.search(r"(\S+) - \1", answer)  # may divide by zero
    assert equivalent(answer, answer)


@properties
@given(expressions, expressions)
def test_symmetric_where_no_side_is_a_plain_number(a, b):
    a, b = a + r" + \sqrt{7}", b + r" + \sqrt{7}"
    assert equivalent(a, b) == equivalent(b, a)


@properties
@given(answers)
def test_invariant_under_notation(answer):
    assume(check_gold(answer))
    assert equivalent(answer.replace(r"\left", "").replace(r"\right", ""), answer)
    assert equivalent(answer.replace(r"\frac", r"\dfrac"), answer)
    assert equivalent(answer.replace(" ", "  ").replace("{", "{ "), answer)
    assert equivalent(answer.replace("+", r"\,+\;"), answer)
    assert verify(f"The answer is ${answer}$.", answer)


@properties
@given(expressions)
def test_trailing_units(answer):
    assume(check_gold(answer))
    for unit in (r"\text{ cm}", r"\text{ square inches}", r"\%", r"\text{ units}", " dollars"):
        assert equivalent(answer + unit, answer) and equivalent(answer, answer + unit)
    assert not equivalent(answer + r"\text{ cm}", answer + r"\text{ km}")


@properties
@given(expressions, expressions)
def test_a_list_is_neither_its_first_answer_nor_a_tuple(a, b):
    assume(check_gold(a) and check_gold(b))
    assert not equivalent(f"{a}, {b}", a)
    assert not equivalent(f"({a}, {b})", f"{a}, {b}")
    assert equivalent(f"{b}, {a}", f"{a}, {b}")


@properties
@given(integers)
def test_integers(n):
    for text in (
        f"{n}",
        f"{n:,}",
        f"{n}.0",
        f"{n:,}".replace(",", "{,}"),
        f"{2 * n}/2",
        rf"{n} \text{{ cm}}",
        f"x={n}",
    ):
        assert equivalent(text, str(n)), text
    for text in (
        f"{n + 1}",
        f"{-n or 1}",
        f"{n}x",
        f"{n}, {n}",
        f"{n}/100" if n else "1",
        f"{n} + 0",
        f"{n}.01",
    ):
        assert not equivalent(text, str(n)), text


@properties
@given(integers, positive)
def test_fractions(a, b):
    for text in (
        f"{a}/{b}",
        rf"\dfrac{{{a}}}{{{b}}}",
        rf"\frac{{{3 * a}}}{{{3 * b}}}",
        rf"-\frac{{{-a}}}{{{b}}}",
    ):
        assert equivalent(text, rf"\frac{{{a}}}{{{b}}}"), text
    assert not equivalent(f"{a + 1}/{b}", rf"\frac{{{a}}}{{{b}}}")


@properties
@given(
    st.text(max_size=300)
    | st.text(r"\{}()[]^_$&%,.;:|!+-*/=<> 0159xyei" + "frac sqrt text boxed", max_size=80)
)
def test_no_exception_on_any_text(text):
    for completion in (text, rf"\boxed{{{text}}}", f"answer is {text}", f"#### {text}"):
        assert verify(completion, "7") in (True, False)
        assert verify(completion, text) in (True, False)
    assert check_gold(text) in (True, False)


@pytest.mark.parametrize("bad", [None, 5, b"5", ["5"]])
def test_other_types_are_wrong(bad):
    assert not verify(bad, "5") and not equivalent(bad, "5") and not verify("5", bad) and not check_gold(bad)


# ---- The error bound: no size of terms buys a verdict ----------------------------------------------------

HOLE = [
    r"\sqrt{10^{90}+1}-10^{45}",
    r"\sqrt{4^{200}+1}-2^{200}",
    r"\sqrt{10^{900}+1}-10^{450}",
    r"\sqrt{10^{4000}+1}-10^{2000}",
    r"\pi 10^{50}-10^{50}\pi+3",
    r"e^{500}-e^{500}",
    r"\pi^{300}-\pi^{300}",
    r"e^{1000}x-xe^{1000}",
    r"x10^{60}-10^{60}x",
    r"\sqrt{10^{90}+x}-10^{45}",
    r"10^{300}(\sqrt2-\sqrt2)",
    r"\sin(10^{50})-\sin(10^{50})",
    r"\log(10^{300}+1)-\log(10^{300})",
    r"\cosh(100)-\cosh(100)",
    r"2^{30000}\sqrt2-\sqrt2 2^{30000}",
    r"\lfloor\sqrt{10^{90}+1}\rfloor-10^{45}",
    r"\frac{1}{\sqrt{10^{90}+1}-10^{45}}",
    r"e^{e^{10}}-e^{e^{10}}",
    r"\arcsin(1-10^{-300})-\frac{\pi}{2}",
    r"\tan(\frac{\pi}{2}+10^{-60})",
    r"y=\sqrt{10^{90}+1}-10^{45}",
    r"(\sqrt{10^{90}+1}-10^{45},\sqrt{10^{90}+1}-10^{45})",
    r"\sqrt{10^{90}+1}-10^{45}, \sqrt{10^{90}+1}-10^{45}",
    r"\sqrt{10^{90}+1}-10^{45}\le x",
]


def some_golds(count):
    """Distinct golds of many public sets that are no plain numbers and mostly no prose."""
    golds = sorted({r["gold"] for r in rows("verifier_golds.jsonl") if r["dataset"] != "college_math"})
    golds = [gold for gold in golds if re.search(r"[\\a-z(]", gold) and check_gold(gold)]
    return golds[:: max(1, len(golds) // count)]


def test_the_hole_is_closed():
    golds = some_golds(300) + [r["gold"] for r in rows("verifier_math500.jsonl")][::4]
    assert [(h, g) for h in HOLE for g in golds if equivalent(h, g)] == []


UNRELATED = r"""\pi|\sqrt2|x+1|y=2x+3|\frac{\sqrt3}{2}|1+\sqrt5|2^{100}-2|x|\text{B}|B|e|i|(1,\sqrt2)|
\ln 2|\sin x|\lfloor n/2\rfloor|x<1|[0,\pi]|\binom{n}{2}"""
UNRELATED = UNRELATED.replace("\n", "").split("|")
sizes = st.integers(1, 4000)
large = st.one_of(
    sizes.map(lambda k: f"10^{{{k}}}"),
    sizes.map(lambda k: f"e^{{{k}}}"),
    sizes.map(lambda k: rf"\pi^{{{k}}}"),
    sizes.map(lambda k: rf"\sqrt{{2}}\cdot3^{{{k}}}"),
    sizes.map(lambda k: f"x^{{{k}}}"),
)
cancelling = st.one_of(
    sizes.map(lambda k: rf"\sqrt{{10^{{{2 * k}}}+1}}-10^{{{k}}}"),
    sizes.map(lambda k: rf"\sqrt[3]{{10^{{{3 * k}}}+1}}-10^{{{k}}}"),
    sizes.map(lambda k: rf"\sqrt{{10^{{{k}}}+1}}-\sqrt{{10^{{{k}}}}}"),
    st.tuples(large, large).map(lambda t: f"{t[0]}+{t[1]}-{t[0]}-{t[1]}"),
    st.tuples(large, st.integers(2, 9)).map(lambda t: f"{t[0]}\\cdot {t[1]}-{t[0]}\\cdot {t[1]}+{t[1]}"),
    st.tuples(large, large).map(lambda t: f"({t[0]}+{t[1]})-({t[1]}+{t[0]})"),
)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(cancelling)
def test_terms_of_any_size_that_cancel_equal_no_unrelated_gold(answer):
    assert [gold for gold in UNRELATED if equivalent(answer, gold)] == []


def test_what_is_nearly_equal_is_not_equal():
    """The numbers themselves say how many bits it takes to see the difference."""
    for near, gold in (
        (r"2^{1006}\sqrt{2^{2010}+2}-2^{2011}", "2"),
        (r"\pi^{300}-\pi^{300}+1", r"1+\frac{1}{2^{2020}}"),
        (r"\sqrt{2+10^{-100}}", r"\sqrt2"),
        (r"\sqrt2+10^{-500}", r"\sqrt2"),
        (r"2^{2008}+\sqrt2", "2^{2008}"),
        (r"\frac{\sqrt2}{2004!}", r"\frac{\sqrt2}{2006!}"),
    ):
        assert not equivalent(near, gold) and not equivalent(gold, near), near
    assert equivalent(r"\sqrt{10^{90}+1}", r"\sqrt{1+10^{90}}")
    assert equivalent(r"\sqrt{10^{90}+1}-10^{45}", r"\frac{1}{\sqrt{10^{90}+1}+10^{45}}")  # as it is


@properties
@given(expressions, st.integers(0, 3))
def test_the_bound_holds(text, row):
    """A value at 400 bits lies within its bound of the value at 2000 bits."""
    value = verifier.core(verifier._read(text))
    assume(isinstance(value, verifier.Number))
    traits = verifier.Traits(value.expr)
    point, _ = list(traits.points())[row % len(list(traits.points()))]
    try:
        coarse = verifier.ball(verifier.Sample(point, 400).value(value.expr), 400)
        fine = verifier.ball(verifier.Sample(point, 2000).value(value.expr), 2000)
    except (verifier.Undefined, verifier.Undecided):
        return
    distance = verifier.libmp.mpc_sub(coarse.value, fine.value, 2000)
    assert verifier.size(distance) - 1 <= coarse.error
    assert coarse.error < verifier.size(coarse.value) - 250 or coarse.value == verifier.libmp.mpc_zero


def test_sample_points_are_in_general_position():
    """No letter's value is a small combination of the values of two others, at two points at once."""
    letters = [f"{c}" for c in "abcdfghjklmn"]
    for a in letters:
        for b in letters:
            sums = [f"{a}+{b}", f"2{a}-{b}", f"{a}-{b}", f"{a} {b}", rf"\frac{{{a}}}{{{b}}}", f"3{a}-2{b}"]
            assert [(s, c) for s in sums for c in letters if c not in (a, b) and equivalent(s, c)] == []


def test_golds_of_many_sets():
    """Refused golds are few where the sets hold answers; pairs of golds that are equal are listed."""
    prose = {"college_math", "deepmind-mathematics"}  # solutions in words; numbers without commas
    golds = [r["gold"] for r in rows("verifier_golds.jsonl") if r["dataset"] not in prose]
    refused = [gold for gold in golds if not check_gold(gold)]
    assert len(refused) <= 30, refused
    golds = some_golds(110)
    pairs = {
        (a, b) for i, a in enumerate(golds) for b in golds[i + 1 :] if equivalent(a, b) or equivalent(b, a)
    }
    assert pairs == EQUAL_GOLDS


EQUAL_GOLDS: set = set()
