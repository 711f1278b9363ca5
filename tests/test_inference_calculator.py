"""The calculator: what it computes is what Python computes, and what is hostile is refused at once."""

import random
import time
from fractions import Fraction

import pytest

from dataset_loading import get_task
from inference.calculator import CalculatorError, answer_call, calculate, called_expression


def random_expression(rng, depth=0):
    """An expression, and the same in Python with each number as a fraction."""
    kind = rng.randrange(4) if depth < 4 else 0
    if kind == 0:
        number = rng.choice([str(rng.randrange(100)), f"{rng.randrange(10)}.{rng.randrange(100)}"])
        return number, f"Fraction('{number}')"
    if kind == 1:
        (number, python), sign, exponent = random_expression(rng, 4), rng.choice("+-"), rng.randrange(3)
        return f"{sign}{number}{rng.choice(['^', '**'])}{exponent}", f"{sign}{python}**{exponent}"
    (left, ours), (right, theirs) = random_expression(rng, depth + 1), random_expression(rng, depth + 1)
    if kind == 2:
        return f"({left})", f"({ours})"
    operator, blank = rng.choice("+-*/%"), rng.choice(["", " "])
    return f"{left}{blank}{operator}{right}", f"{ours}{operator}{theirs}"


def test_results_are_those_of_python():
    rng, compared = random.Random(0), 0
    for _ in range(3000):
        expression, python = random_expression(rng)
        try:
            value = eval(python, {"Fraction": Fraction})
        except ZeroDivisionError:
            with pytest.raises(CalculatorError, match="division by zero"):
                calculate(expression)
            continue
        result = calculate(expression)
        assert float(result) == pytest.approx(float(value), rel=1e-11)
        assert value.denominator != 1 or result == str(value)
        compared += 1
    assert compared > 2000


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        (" 38*45 + 7 ", "1717"),
        ("-2^2", "-4"),
        ("2^3^2", "512"),
        ("2**-2", "0.25"),
        ("1/3", "0.333333333333"),
        ("7%4*2", "6"),
        ("0.1+0.2", "0.3"),
        ("99999999999999999999*3", "299999999999999999997"),
        ("0^0+(-1)^999999999+1^(10^90)", "1"),
    ],
)
def test_results_computed_by_hand(expression, result):
    assert calculate(expression) == result


HOSTILE = {
    "import": ("__import__('os').system('true')", "is no number, operator or bracket"),
    "name": ("x+1", "'x\\+1' is no number"),
    "attribute": ("(1).__class__", "is no number"),
    "power tower": ("9**9**9**9**9", "more than 100 digits"),
    "small base, endless exponent": ("1.0000001^(10^99)", "more than 100 digits"),
    "negative power tower": ("9^-(9^9^9)", "more than 100 digits"),
    "root": ("2^0.5", "no whole number"),
    "megabyte of digits": ("9" * 2**20, "1048576 characters, more than 256"),
    "many digits": ("9" * 101, "a number of 101 digits"),
    "large product": ("*".join(["9" * 60] * 2), "more than 100 digits"),
    "brackets": ("(" * 200, "more than 32 brackets"),
    "megabyte of brackets": ("(" * 2**20, "characters, more than 256"),
    "signs": ("-" * 200 + "1", "more than 32 brackets, signs"),
    "open bracket": ("(1+2", "a bracket is not closed"),
    "nothing": ("", "the end where a number should be"),
    "two numbers": ("1 2", "'2' where the expression should end"),
    "floor": ("7//2", "'/' where a number should be"),
    "other digits": ("\u0663+1", "is no number"),
    "exponent of a float": ("1e9", "is no number"),
    "zero": ("1/(2-2)", "division by zero"),
    "power of zero": ("0^-1", "division by zero"),
    "line break": ("1\n+\x00", "is no number"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_calls_are_refused_at_once(name):
    expression, reason = HOSTILE[name]
    start = time.process_time()
    with pytest.raises(CalculatorError, match=reason):
        calculate(expression)
    assert time.process_time() - start < 1
    assert answer_call(expression).startswith("error: ")


def test_nothing_that_fits_takes_long():
    """The largest numbers, in as many operations as there is room for."""
    rng = random.Random(0)
    start = time.process_time()
    for _ in range(200):
        answer_call("".join(rng.choice("0123456789**/%^()-+..") for _ in range(256)))
        answer_call(f"{'9' * 50}^1.0" + "".join(f"{rng.choice('+-/%*')}{rng.randrange(10**9)}" for _ in range(19)))
    assert time.process_time() - start < 40  # a tenth of a second each; they take a thousandth


def test_a_message_is_a_call_if_it_is_nothing_else():
    assert called_expression("calculator(38*(4+5))") == "38*(4+5)"
    assert called_expression(" calculator(1+1)\n") == "1+1"
    assert called_expression("It is calculator(1+1)") is None and called_expression("calculator 1+1") is None
    replies = get_task("calculator").replies({"prompt": "What is 3*4-5?", "answer": "7"})
    assert answer_call(called_expression(replies[0]["content"])) == replies[1]["content"] == "7"
