"""The form that a reply is constrained to: JSON, the JSON of a schema, a call of a tool, or one of the last two."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qwen_jax.agents.react import STOP
from qwen_jax.inference.constraints import Constraint, FreeText, Way
from qwen_jax.serving.errors import bad_request
from qwen_jax.serving.fields import shown
from qwen_jax.serving.prompts import ACTION, ACTION_INPUT, AUTO, FINAL_ANSWER, THOUGHT, Prompt, ToolChoice
from qwen_jax.serving.tools import MAX_PARTS, count_parts

if TYPE_CHECKING:
    from qwen_jax.inference.grammars import Grammars

_ANY_OBJECT = {"type": "object"}
# What the parser of replies looks for: a thought must not have it.
_MARKS = (ACTION, ACTION_INPUT, FINAL_ANSWER, STOP)


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
        ApiError: a schema has what no grammar can be made of.
    """
    if parameters and choice.mode != AUTO:
        return _call(prompt, parameters, grammars())
    if schema is None:
        return None
    made = grammars()
    try:
        if not parameters:
            return made.json_schema(schema, " " if prompt.opening else "")
        made.check(schema)
    except ValueError as error:
        raise bad_request("response_format", f"this server cannot follow its schema: {error}") from None
    return _call_or_content(prompt, parameters, schema, made)


def _call(prompt: Prompt, parameters: Mapping[str, Mapping[str, Any]], grammars: "Grammars") -> Constraint:
    """The rest of a call that `prompt.opening` begins. Words that are not known are left to the check of the call."""
    to_choose = prompt.opening.endswith(ACTION)
    ways = [
        Way(f" {name}{ACTION_INPUT} " if to_choose else " ", {"type": "object", **schema})
        for name, schema in parameters.items()
    ]
    try:
        return grammars.choice(ways, lenient=True)
    except ValueError as error:
        raise bad_request("tools", f"this server cannot follow the parameters of a tool: {error}") from None


def _call_or_content(
    prompt: Prompt, parameters: Mapping[str, Mapping[str, Any]], schema: Mapping[str, Any], grammars: "Grammars"
) -> Constraint:
    """A thought and a call, a thought and an answer, or, where no thought was begun, an answer at once.

    JSON has no line end within a text, so that none of the marks is found in a call or an answer.
    """

    def thought(end: str) -> FreeText:
        return FreeText("" if prompt.opening else THOUGHT, _MARKS, f"{end} ")

    ways = [Way("", schema, thought(FINAL_ANSWER))]
    if not prompt.opening:
        ways.append(Way("", schema))
    for name, given in parameters.items():
        kinds = given.get("type", "object")
        if kinds != "object" and "object" not in kinds:
            raise bad_request("tools", f"the parameters of {name!r} must be of type object, found {shown(kinds)}")
        ways.append(Way(f"{name}{ACTION_INPUT} ", {**given, "type": "object"}, thought(ACTION)))
    try:
        return grammars.choice(ways)
    except ValueError as error:
        message = f"with response_format, this server cannot follow the parameters of a tool: {error}"
        raise bad_request("tools", message) from None
