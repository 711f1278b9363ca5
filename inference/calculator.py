"""A calculator that a model may call: it reads numbers, + - * / % ^ ** and brackets, and nothing else. No expression,
be it ever so long or large, takes more than a moment.

    expression = term   {("+" | "-") term}
    term       = factor {("*" | "/" | "%") factor}
    factor     = ("+" | "-") factor | atom [("^" | "**") factor]
    atom       = number | "(" expression ")"
"""

import re
from fractions import Fraction

MAX_CHARACTERS = 256
MAX_DEPTH = 32
"""Brackets, signs and powers within each other."""
MAX_DIGITS = 100
"""Most digits of numerator and denominator of every number on the way."""
SIGNIFICANT_DIGITS = 12
"""Digits of results that are no whole numbers."""

_CALL = re.compile(r"\s*calculator\((.*)\)\s*", re.DOTALL)
_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|\*\*|[-+*/%^()])", re.ASCII)
_LIMIT = 10**MAX_DIGITS


class CalculatorError(ValueError):
    """An expression that has no result here; the message is the reason."""


def called_expression(message: str) -> str | None:
    """The expression in a message of the assistant that is a call, `calculator(EXPRESSION)`; None if it is none."""
    match = _CALL.fullmatch(message)
    return match and match[1]


def answer_call(expression: str) -> str:
    """What the tool says to a call: the result, or why there is none."""
    try:
        return calculate(expression)
    except CalculatorError as error:
        return f"error: {error}"


def calculate(expression: str) -> str:
    """The value of an expression: exact if it is a whole number, else rounded to `SIGNIFICANT_DIGITS`.

    Raises:
        CalculatorError: it is no expression, too long, too deep or too large, or divides by zero.
    """
    if len(expression) > MAX_CHARACTERS:
        raise CalculatorError(f"{len(expression)} characters, more than {MAX_CHARACTERS}")
    reader = _Reader(_tokens(expression))
    value = reader.expression(0)
    if reader.next is not None:
        raise CalculatorError(f"{reader.next!r} where the expression should end")
    return str(value) if value.denominator == 1 else f"{float(value):.{SIGNIFICANT_DIGITS}g}"


def _tokens(expression: str) -> list[str]:
    tokens, place = [], 0
    end = len(expression.rstrip())
    while place < end:
        match = _TOKEN.match(expression, place)
        if match is None:
            raise CalculatorError(f"{expression[place:].lstrip()[:20]!r} is no number, operator or bracket")
        tokens.append(match[1])
        place = match.end()
    return tokens


class _Reader:
    """Descends through the grammar above; each method reads what it is named after, and gives its value."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place = tokens, 0

    @property
    def next(self) -> str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def take(self) -> str | None:
        token = self.next
        self.place += 1
        return token

    def expression(self, depth: int) -> Fraction:
        value = self.term(depth)
        while self.next in ("+", "-"):
            value = _checked(value + (1 if self.take() == "+" else -1) * self.term(depth))
        return value

    def term(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while self.next in ("*", "/", "%"):
            operator, other = self.take(), self.factor(depth)
            if operator != "*" and other == 0:
                raise CalculatorError("division by zero")
            value = _checked(value * other if operator == "*" else value / other if operator == "/" else value % other)
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise CalculatorError(f"more than {MAX_DEPTH} brackets, signs and powers within each other")
        if self.next in ("+", "-"):
            return (1 if self.take() == "+" else -1) * self.factor(depth + 1)
        base = self.atom(depth)
        if self.next in ("^", "**"):
            self.take()
            return _power(base, self.factor(depth + 1))
        return base

    def atom(self, depth: int) -> Fraction:
        token = self.take()
        if token == "(":
            value = self.expression(depth + 1)
            if self.take() != ")":
                raise CalculatorError("a bracket is not closed")
            return value
        if token is None or not token[-1].isdigit():
            raise CalculatorError(f"{'the end' if token is None else repr(token)} where a number should be")
        if len(token) > MAX_DIGITS:
            raise CalculatorError(f"a number of {len(token)} digits, more than {MAX_DIGITS}")
        return Fraction(token)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """How large the result would be is known before it is computed."""
    if exponent.denominator != 1:
        raise CalculatorError("a power with an exponent that is no whole number")
    if base == 0 and exponent < 0:
        raise CalculatorError("division by zero")
    if abs(base) in (0, 1):  # any exponent will do, and has no more results than these
        return base ** min(abs(int(exponent)), 2 - int(exponent % 2))
    bits = max(abs(base.numerator), base.denominator).bit_length() - 1
    if bits * abs(exponent) > _LIMIT.bit_length():
        raise CalculatorError(f"a number of more than {MAX_DIGITS} digits")
    return _checked(base ** int(exponent))


def _checked(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= _LIMIT:
        raise CalculatorError(f"a number of more than {MAX_DIGITS} digits")
    return value
