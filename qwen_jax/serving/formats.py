"""The form that a reply is constrained to: JSON, the JSON of a schema, or a call of a tool."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qwen_jax.inference.constraints import Constraint
from qwen_jax.serving.errors import bad_request
from qwen_jax.serving.fields import shown
from qwen_jax.serving.prompts import ACTION, ACTION_INPUT, AUTO, Prompt, ToolChoice
from qwen_jax.serving.tools import MAX_PARTS, count_parts

if TYPE_CHECKING:
    from qwen_jax.inference.grammars import Grammars

_ANY_OBJECT = {"type": "object"}


def read_format(body: Mapping) -> dict[str, Any] | None:
    """The JSON schema that the field `response_format` asks for; None: text.

    Raises:
        ApiError: it is none of {"type": "text"}, {"type": "json_object"} and {"type": "json_schema", "json_schema":
            {"schema": …}}, or its schema has more than `MAX_PARTS` values.
    """
    given = body.get("response_format")
    kind = given.get("type") if isinstance(given, dict) else given
    if kind is None or kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    described = given.get("json_schema") if isinstance(given, dict) and kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        expected = (
            '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {…}}}'
        )
        raise bad_request("response_format", f"must be {expected}, found {shown(given)}")
    if (parts := count_parts(schema)) > MAX_PARTS:
        raise bad_request("response_format", f"its schema may have {MAX_PARTS} values at most, found {parts}")
    return schema


def constraint_of(
    schema: Mapping[str, Any] | None,
    choice: ToolChoice,
    prompt: Prompt,
    parameters: Mapping[str, Mapping[str, Any]],
    grammars: Callable[[], "Grammars"],
) -> Constraint | None:
    """What the reply may be; None: anything.

    Args:
        schema: of `read_format`.
        choice, prompt: of the request.
        parameters: JSON schema of the parameters, by name, of the tools that the reply may call.
        grammars: gives those of the model, which cost something to make.

    Raises:
        ApiError: a schema has what no grammar can be made of, or comes with tools that the reply may or may not call.
    """
    if parameters and choice.mode != AUTO:
        return _call(prompt, parameters, grammars())
    if schema is None:
        return None
    if parameters:
        raise bad_request("response_format", 'does not go with tools that may be called: set tool_choice to "none"')
    try:
        return grammars().json_schema(schema, " " if prompt.opening else "")
    except ValueError as error:
        raise bad_request("response_format", f"this server cannot follow its schema: {error}") from None


def _call(prompt: Prompt, parameters: Mapping[str, Mapping[str, Any]], grammars: "Grammars") -> Constraint:
    """The rest of a call that `prompt.opening` begins. Words that are not known are left to the check of the call."""
    to_choose = prompt.opening.endswith(ACTION)
    ways = [
        (f" {name}{ACTION_INPUT} " if to_choose else " ", {"type": "object", **schema})
        for name, schema in parameters.items()
    ]
    try:
        return grammars.choice(ways, lenient=True)
    except ValueError as error:
        raise bad_request("tools", f"this server cannot follow the parameters of a tool: {error}") from None
