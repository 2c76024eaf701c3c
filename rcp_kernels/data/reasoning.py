"""Questions that ask for reasoning step by step. The float model's answers are calibration text.

LAQuant (arXiv 2605.08755) calibrates on reasoning text, which is not published. Here templates make the questions,
without a download, and the model writes the answers (our choice).
"""

from __future__ import annotations

import random
from collections.abc import Callable

__all__ = ["reasoning_questions"]

_NAMES = "Ada Ben Chloe Dmitri Elena Farid Grace Hugo Ines Jonas Kira Leo Mina Noor Oskar Priya".split()
_THINGS = "apples books candles coins eggs keys marbles pencils shells stamps tickets tiles".split()
_ASKING = (
    "Think step by step and give the answer at the end.",
    "Explain every step of your reasoning.",
    "Show your work, then check the result.",
)


def _shopping(draw: random.Random) -> str:
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    count, price = draw.randint(3, 24), draw.randint(2, 19)
    paid = -(-count * price // 50) * 50
    return f"{name} buys {count} {thing} at {price} dollars each and pays with {paid} dollars. How much change is due?"


def _sharing(draw: random.Random) -> str:
    names = draw.sample(_NAMES, 3)
    have, times, more = draw.randint(4, 30), draw.randint(2, 5), draw.randint(2, 15)
    return (
        f"{names[0]} has {have} {draw.choice(_THINGS)}. {names[1]} has {times} times as many, and {names[2]} has "
        f"{more} more than {names[1]}. How many do the three have together?"
    )


def _travel(draw: random.Random) -> str:
    speeds, hours = draw.sample(range(35, 121, 5), 2), draw.randint(2, 6)
    return (
        f"Two trains leave the same station in opposite directions at {speeds[0]} and {speeds[1]} km/h. How far apart "
        f"are they after {hours} hours and {draw.choice((15, 30, 45))} minutes?"
    )


def _percent(draw: random.Random) -> str:
    price, off, tax = draw.randint(4, 60) * 5, draw.choice((10, 15, 20, 25, 40)), draw.choice((5, 8, 10, 20))
    return f"A coat costs {price} dollars. It is reduced by {off}%, then {tax}% tax is added. What is the final price?"


def _sequence(draw: random.Random) -> str:
    first, step, factor = draw.randint(1, 9), draw.randint(2, 9), draw.randint(2, 3)
    values = [first]
    for _ in range(4):
        values.append(values[-1] * factor + step)
    return f"What is the next number of the sequence {', '.join(map(str, values))}? Find the rule first."


def _order(draw: random.Random) -> str:
    a, b, c, d = draw.sample(_NAMES, 4)
    return (
        f"{a} is taller than {b}. {c} is shorter than {b} but taller than {d}. Who is the second shortest of the four, "
        f"and why?"
    )


def _code(draw: random.Random) -> str:
    stop, modulus, start = draw.randint(5, 12), draw.randint(2, 4), draw.randint(0, 9)
    return (
        f"What does this Python code print?\n\ntotal = {start}\nfor i in range({stop}):\n    if i % {modulus} == 0:\n"
        f"        total += i * i\n    else:\n        total -= i\nprint(total)"
    )


def _equation(draw: random.Random) -> str:
    x, a, b = draw.randint(2, 15), draw.randint(2, 9), draw.randint(1, 30)
    return f"Solve {a}x + {b} = {a * x + b} for x, and explain why each step is allowed."


_TEMPLATES: tuple[Callable[[random.Random], str], ...] = (
    _shopping,
    _sharing,
    _travel,
    _percent,
    _sequence,
    _order,
    _code,
    _equation,
)

# Draws in a row that may repeat earlier questions.
_MOST_REPEATED = 1000


def reasoning_questions(count: int, seed: int = 0) -> list[str]:
    """Different questions on sums, rates, sequences, orders, code and equations, alternating between these kinds.

    Args:
        count: at least 0.
        seed: of the numbers and names. The questions do not depend on the platform.

    Raises:
        ValueError: the templates hardly give that many different questions.
    """
    draw = random.Random(seed)
    questions: dict[str, None] = {}
    repeated = 0
    while len(questions) < count:
        # Alternate by draws, not by questions kept: the smallest kind has only 432 different questions.
        turn = len(questions) + repeated
        question = f"{_TEMPLATES[turn % len(_TEMPLATES)](draw)} {draw.choice(_ASKING)}"
        repeated = repeated + 1 if question in questions else 0
        if repeated > _MOST_REPEATED:
            raise ValueError(
                f"reasoning_questions: count must leave questions to be drawn, got {count} where the last "
                f"{_MOST_REPEATED} draws repeated some of {len(questions)}; ask for fewer"
            )
        questions.setdefault(question)
    return list(questions)
