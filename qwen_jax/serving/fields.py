"""Reads the fields of a request's JSON body, and refuses bodies that would cost more to read than they may."""

import json
from collections.abc import Mapping
from typing import Any

from qwen_jax.serving.errors import bad_request

MAX_DEPTH = 64
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256


def read_body(data: bytes) -> dict[str, Any]:
    """The object of a JSON body.

    Raises:
        ApiError: it is no JSON (NaN and Infinity are none), no object, or nested deeper than `MAX_DEPTH`.
    """
    try:
        body = json.loads(data, parse_constant=_no_number)
    except RecursionError:
        raise bad_request(None, f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise bad_request(None, f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise bad_request(None, f"expected a JSON object, found {type(body).__name__}")
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        values = [value for one in level for value in (one.values() if isinstance(one, dict) else one)]
        level = [value for value in values if isinstance(value, dict | list)]
        if not level:
            return body
    raise bad_request(None, f"the body is nested deeper than {MAX_DEPTH} levels")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def integer(body: Mapping, name: str, lowest: int, highest: int | None = None) -> int | None:
    """An integer field; None where it is absent or null.

    Raises:
        ApiError: it is something else, or out of range.
    """
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or value < lowest or (highest is not None and value > highest):
        limits = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise bad_request(name, f"must be an integer, {limits}, found {shown(value)}")
    return value


def number(body: Mapping, name: str, default: float) -> float:
    """A number field; `default` where it is absent or null.

    Raises:
        ApiError: it is something else.
    """
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float):
        raise bad_request(name, f"must be a number, found {shown(value)}")
    return value


def flag(body: Mapping, name: str) -> bool:
    """A field that is true or false; False where it is absent or null.

    Raises:
        ApiError: it is something else.
    """
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(name, f"must be true or false, found {shown(value)}")
    return bool(value)


def stop_strings(body: Mapping) -> tuple[str, ...]:
    """The field `stop`: null, a string, or a list of strings.

    Raises:
        ApiError: it is something else, has an empty string, or more or longer ones than are searched for.
    """
    value = body.get("stop")
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise bad_request("stop", f"must be a string or a list of strings that are not empty, found {shown(value)}")
    if len(found) > MAX_STOP_STRINGS or any(len(one) > MAX_STOP_LENGTH for one in found):
        raise bad_request(
            "stop", f"at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters, found {len(found)}"
        )
    return tuple(found)


def shown(value: object) -> str:
    """A value in an error: its beginning."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
