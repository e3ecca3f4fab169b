"""A few tools that can do no harm, to begin with: a calculator, a small table, and a date that is given."""

import ast
import datetime
import operator
from collections.abc import Callable

from qwen_jax.agents.tools import Tool

# Population in millions and capital; rounded, of 2023.
COUNTRIES = {
    "china": ("Beijing", 1411),
    "france": ("Paris", 68),
    "germany": ("Berlin", 84),
    "india": ("New Delhi", 1438),
    "italy": ("Rome", 59),
    "japan": ("Tokyo", 124),
    "kenya": ("Nairobi", 55),
    "mexico": ("Mexico City", 130),
    "norway": ("Oslo", 5),
    "peru": ("Lima", 34),
}
_LONGEST = 200  # characters of an expression
_LARGEST_POWER = 1_000
_BINARY: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, which is parsed and never run.

    Raises:
        ValueError: it is too long, or anything else than numbers, brackets, + - * / // % and ** with a small exponent.
        ZeroDivisionError: it divides by zero.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"the expression has {len(expression):,} characters, {_LONGEST} are allowed")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an arithmetic expression: {expression}") from error
    return f"{_value(tree.body):.12g}"


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and type(node.value) is not bool:
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            if abs(right) > _LARGEST_POWER:
                raise ValueError(f"an exponent of {right:g}: at most {_LARGEST_POWER} is allowed")
            left = float(left)  # powers of integers could fill the memory
        return _BINARY[type(node.op)](left, right)
    raise ValueError(f"{ast.unparse(node)} is no number, bracket or sign of arithmetic")


def country(name: str) -> dict:
    """Capital and population of a country of the table.

    Raises:
        ValueError: it is not in it.
    """
    if name.strip().lower() not in COUNTRIES:
        raise ValueError(f"no country {name} in the table; it has {', '.join(COUNTRIES)}")
    capital, millions = COUNTRIES[name.strip().lower()]
    return {"capital": capital, "population_in_millions": millions}


def builtin_tools(date: datetime.date | None = None) -> list[Tool]:
    """The tools `calculator` and `country`, and `date` if one is given."""
    tools = [
        _tool("calculator", "Calculates an arithmetic expression such as (3+4)*2.", calculate, "expression"),
        _tool("country", "Gives capital and population of a country.", country, "name"),
    ]
    if date is not None:
        told = f"{date.isoformat()}, {date.strftime('%A')}"
        tools.append(_tool("date", "Gives the date of today.", lambda: told))
    return tools


def _tool(name: str, description: str, function: Callable, *arguments: str) -> Tool:
    schema = {
        "type": "object",
        "properties": {argument: {"type": "string"} for argument in arguments},
        "required": list(arguments),
        "additionalProperties": False,
    }
    return Tool({"name": name, "description": description, "parameters": schema}, function)
