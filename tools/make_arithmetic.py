"""Writes arithmetic made by rule in the style of Math401, to train on and to evaluate on.

    python tools/make_arithmetic.py --output runs/arithmetic --count 20000 --held_out 500 --levels 1 2

`train.jsonl` and `test.jsonl` hold lines of `question` ("12+7="), `answer` ("19"), `kind` and `level`. The task
`math_instructions` trains on the first, the benchmark `arithmetic` reads the second. No calculation of one file is in
the other, however it is written: 3+4 and 4+3 are one, and so are 3*4, 3×4 and 4×3.

Kinds are the groups of Math401 (Yuan et al. 2023, README of the publisher); level 4 has its sizes of numbers, lower
levels have smaller ones. As there, answers that need not be whole have four decimals. With --worked, those of
`train.jsonl` show their working: a small model learns it from far fewer calculations.
"""

import argparse
import collections
import json
import math
import random
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worked_sums import worked

from qwen_jax import files
from qwen_jax.command_line import path_argument, run

# (key of the calculation, question, answer)
Made = tuple[tuple, str, str]
LEVELS = (1, 2, 3, 4)
# This many draws of one kind and level that give nothing new: it has no more calculations.
_PATIENCE = 2000


def _decimals(value: Fraction | float) -> str:
    """Four decimals, as Math401 writes them; a fraction is rounded exactly, half to even."""
    if isinstance(value, float):
        return f"{value:.4f}".replace("-0.0000", "0.0000")
    scaled = round(value * 10_000)
    whole, part = divmod(abs(scaled), 10_000)
    return f"{'-' if scaled < 0 else ''}{whole}.{part:04d}"


def _signed(text: str) -> str:
    return f"({text})" if text.startswith("-") else text


def _sum(
    draw: random.Random, first: Fraction | int, second: Fraction | int, texts: tuple[str, str], whole: bool
) -> Made:
    plus = draw.random() < 0.5
    result = Fraction(first + second if plus else first - second)
    key = ("+", *sorted((first, second))) if plus else ("-", first, second)
    question = f"{texts[0]}{'+' if plus else '-'}{_signed(texts[1])}="
    return key, question, str(result) if whole else _decimals(result)


def _product(
    draw: random.Random, first: Fraction | int, second: Fraction | int, texts: tuple[str, str], whole: bool
) -> Made:
    result = Fraction(first * second)
    question = f"{texts[0]}{draw.choice('*×')}{texts[1]}="
    return ("*", *sorted((first, second))), question, str(result) if whole else _decimals(result)


def _decimal(draw: random.Random, limit: int, signed: bool) -> tuple[Fraction, str]:
    """A number of one or two significant digits below `limit`, in Math401's way of writing: 39.0, 0.07, -22.0."""
    digits, places = draw.randint(1, 99), draw.choice((0, 1, 2))
    value = Fraction(digits, 10**places)
    while value >= limit:
        value, places = value / 10, places + 1
    value = -value if signed and draw.random() < 0.5 else value
    return value, f"{float(value):.{max(places, 1)}f}"


def add(draw: random.Random, level: int) -> Made:
    """Sum or difference of two integers within 10, 100, 1,000 or 1,000,000,000,000."""
    limit = (10, 100, 1_000, 1_000_000_000_000)[level - 1]
    numbers = draw.randint(0, limit), draw.randint(0, limit)
    return _sum(draw, *numbers, (str(numbers[0]), str(numbers[1])), True)


def negative(draw: random.Random, level: int) -> Made:
    """Sum or difference of two integers of any sign, of at most 3, 5, 8 or 10."""
    limit = (3, 5, 8, 10)[level - 1]
    numbers = draw.randint(-limit, limit), draw.randint(-limit, limit)
    return _sum(draw, *numbers, (str(numbers[0]), str(numbers[1])), True)


def decimal(draw: random.Random, level: int) -> Made:
    """Sum or difference of two decimals of any sign, below 1, 10, 50 or 100."""
    (first, left), (second, right) = (_decimal(draw, (1, 10, 50, 100)[level - 1], True) for _ in range(2))
    return _sum(draw, first, second, (left, right), False)


def multiply(draw: random.Random, level: int) -> Made:
    """Product of two integers within 10, 30, 100 or 100,000."""
    limit = (10, 30, 100, 100_000)[level - 1]
    numbers = draw.randint(1, limit), draw.randint(1, limit)
    return _product(draw, *numbers, (str(numbers[0]), str(numbers[1])), True)


def multiply_decimals(draw: random.Random, level: int) -> Made:
    """Product of two decimals below 1, 2, 5 or 10."""
    (first, left), (second, right) = (_decimal(draw, (1, 2, 5, 10)[level - 1], False) for _ in range(2))
    return _product(draw, first, second, (left, right), False)


def divide(draw: random.Random, level: int) -> Made:
    """Quotient of two integers within 10, 20, 50 or 100, to four decimals."""
    limit = (10, 20, 50, 100)[level - 1]
    first, second = draw.randint(1, limit), draw.randint(1, limit)
    return ("/", first, second), f"{first}{draw.choice('/÷')}{second}=", _decimals(Fraction(first, second))


def power(draw: random.Random, level: int) -> Made:
    """Integer of at most 5, 10, 15 or 20 to the power of 2 to 4."""
    base, exponent = draw.randint(0, (5, 10, 15, 20)[level - 1]), draw.randint(2, 4)
    return ("^", base, exponent), f"{base}{draw.choice(('^', '**'))}{exponent}=", str(base**exponent)


def power_decimals(draw: random.Random, level: int) -> Made:
    """Decimal below 2, 4, 7 or 10, of 1 to 4 places, to a power between 2 and 4 of as many places."""
    places = level
    base = round(draw.uniform(1, (2, 4, 7, 10)[level - 1]), places)
    exponent = round(draw.uniform(2, 4), places)
    question = f"{base}{draw.choice(('^', '**'))}{exponent}="
    return ("^", base, exponent), question, _decimals(base**exponent)


def irrational(draw: random.Random, level: int) -> Made:
    """Sum, difference or product of an integer within 3, 5, 8 or 10 with e or pi."""
    number, operation = draw.randint(0, (3, 5, 8, 10)[level - 1]), draw.choice("+-*")
    name, value = draw.choice((("e", math.e), ("pi", math.pi), ("π", math.pi)))
    result = {"+": number + value, "-": number - value, "*": number * value}[operation]
    return (operation, number, value), f"{number}{operation}{name}=", _decimals(result)


def expression(draw: random.Random, level: int) -> Made:
    """Three to six integers within 10, 20, 50 or 100 with brackets and the four operations, to four decimals."""
    text, value = _tree(draw, level + 2, (10, 20, 50, 100)[level - 1])
    return ("=", text), f"{text}=", _decimals(value)


def _tree(draw: random.Random, leaves: int, limit: int) -> tuple[str, Fraction]:
    if leaves == 1:
        number = draw.randint(1, limit)
        return str(number), Fraction(number)
    split = draw.randint(1, leaves - 1)
    (left, first), (right, second) = _tree(draw, split, limit), _tree(draw, leaves - split, limit)
    operation = draw.choice("+-*/" if second else "+-*")
    left, right = (f"({side})" if any(sign in side for sign in "+-*/") else side for side in (left, right))
    value = {
        "+": lambda: first + second,
        "-": lambda: first - second,
        "*": lambda: first * second,
        "/": lambda: first / second,
    }[operation]()
    return f"{left}{operation}{right}", value


def trigonometry(draw: random.Random, level: int) -> Made:
    """Sine, cosine or tangent of whole degrees or of hundredths of pi, of at most 90, 180, 270 or 360 degrees."""
    name = draw.choice(("sin", "cos", "tan"))
    degrees = draw.choice((True, False))
    largest = (90, 180, 270, 360)[level - 1]
    number = draw.randint(-largest, largest) if degrees else draw.randint(-largest, largest) * 100 // 180
    angle = math.radians(number) if degrees else number / 100 * math.pi
    if name == "tan" and abs(math.cos(angle)) < 1e-9:
        return trigonometry(draw, level)
    text = f"{number}°" if degrees else f"{number / 100}π"
    result = {"sin": math.sin, "cos": math.cos, "tan": math.tan}[name](angle)
    return (name, Fraction(number, 180 if degrees else 100)), f"{name}({text})=", _decimals(result)


def logarithm(draw: random.Random, level: int) -> Made:
    """Logarithm of an integer within 10, 100, 500 or 1,000 to the base 2, e or 10."""
    number = draw.randint(1, (10, 100, 500, 1_000)[level - 1])
    name, function = draw.choice((("log2", math.log2), ("ln", math.log), ("log10", math.log10)))
    return (name, number), f"{name}({number})=", _decimals(function(number))


KINDS: dict[str, Callable[[random.Random, int], Made]] = {
    one.__name__: one
    for one in (
        add,
        negative,
        decimal,
        multiply,
        multiply_decimals,
        divide,
        power,
        power_decimals,
        irrational,
        expression,
        trigonometry,
        logarithm,
    )
}


def make(
    count: int, held_out: int, *, kinds: list[str], levels: list[int], seed: int
) -> tuple[list[dict], list[dict], list[str]]:
    """Lines for training and for evaluation; each calculation stands in at most one of them, and once.

    Kinds and levels come with equal probability, until one of them has no new calculation.

    Returns:
        Training lines, held-out lines, and the kinds with level that were exhausted.

    Raises:
        ValueError: there are not that many calculations of these kinds and levels.
    """
    draw = random.Random(seed)
    open_groups = [(kind, level) for kind in kinds for level in levels]
    exhausted: list[str] = []
    seen: set[tuple] = set()
    misses: collections.Counter = collections.Counter()
    rows: list[dict] = []
    while len(rows) < held_out + count:
        if not open_groups:
            raise ValueError(
                f"{', '.join(kinds)} at the levels {', '.join(map(str, levels))}: only {len(rows):,} calculations, and "
                f"--count and --held_out ask for {count + held_out:,}: ask for fewer, other kinds or more levels"
            )
        kind, level = group = draw.choice(open_groups)
        key, question, answer = KINDS[kind](draw, level)
        if key in seen:
            misses[group] += 1
            if misses[group] == _PATIENCE:
                open_groups.remove(group)
                exhausted.append(f"{kind} at level {level}")
            continue
        misses[group] = 0
        seen.add(key)
        rows.append({"question": question, "answer": answer, "kind": kind, "level": level})
    return rows[held_out:], rows[:held_out], exhausted


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path_argument, required=True, metavar="FOLDER", help="folder for both files")
    parser.add_argument("--count", type=int, default=20_000, help="lines of train.jsonl (default: %(default)s)")
    parser.add_argument("--held_out", type=int, default=500, help="lines of test.jsonl (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--levels", nargs="+", type=int, choices=LEVELS, default=list(LEVELS), metavar="LEVEL")
    parser.add_argument("--seed", type=int, default=0, help="seed for the calculations (default: %(default)s)")
    parser.add_argument(
        "--worked",
        action="store_true",
        help="show the working in answers of train.jsonl (tools/worked_sums.py)",
    )
    arguments = parser.parse_args(argv)
    if arguments.count < 0 or arguments.held_out < 0 or arguments.count + arguments.held_out < 1:
        raise ValueError("--count and --held_out are numbers of lines: at least 0, and not both 0")
    if arguments.worked and arguments.kinds != [add.__name__]:
        raise ValueError("--worked knows sums and differences of whole numbers alone: give --kinds add with it")
    train, test, exhausted = make(
        arguments.count, arguments.held_out, kinds=arguments.kinds, levels=arguments.levels, seed=arguments.seed
    )
    if arguments.worked:
        train = [row | {"answer": worked(row["question"])} for row in train]
    for name, rows in (("train.jsonl", train), ("test.jsonl", test)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_text(arguments.output / name, lines)
        print(f"wrote {arguments.output / name}: {len(rows):,} calculations")
    if exhausted:
        print(f"all calculations are used of {', '.join(exhausted)}")


if __name__ == "__main__":
    run(main)
