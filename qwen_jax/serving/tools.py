"""Tools of a request: their definitions, and whether the arguments of a call fit them.

Both the schema and the arguments come from outside. Nothing is fetched for them, no regular expression of theirs is run
(it could take for ever), and the comparison has a bounded number of steps.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema
import referencing

from qwen_jax.serving.errors import bad_request
from qwen_jax.serving.fields import shown
from qwen_jax.serving.prompts import AUTO, NAMED, NONE, REQUIRED, ToolChoice

MAX_TOOLS, MAX_NAME = 128, 64
# Values in the JSON of all tools: that they are schemas is found out in two seconds.
MAX_PARTS = 10_000
# Looks at one word of a schema, or at one entry of it or of the arguments: about a second.
MAX_STEPS = 50_000
# Not `check_schema`, which compiles every regular expression.
_META_SCHEMA = jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA)
_NO_PARAMETERS = {"type": "object", "properties": {}}


def read_tools(body: Mapping) -> tuple[dict[str, Any], ...]:
    """The field `tools`: functions with name, description and parameters, and nothing else.

    Raises:
        ApiError: it is no list of functions, there are more than `MAX_TOOLS` or of `MAX_PARTS`, two have one name, or
            the parameters are no JSON schema.
    """
    given = body.get("tools")
    given = [] if given is None else given
    if not isinstance(given, list):
        raise bad_request("tools", f"must be a list of functions, found {shown(given)}")
    if len(given) > MAX_TOOLS:
        raise bad_request("tools", f"there may be {MAX_TOOLS} tools at most, found {len(given)}")
    if (parts := count_parts(given)) > MAX_PARTS:
        raise bad_request("tools", f"all of them may have {MAX_PARTS} values in their JSON at most, found {parts}")
    tools = tuple(_tool(one, f"tools[{index}]") for index, one in enumerate(given))
    names = [tool["function"]["name"] for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise bad_request("tools", f"two tools have the name {name!r}")
    return tools


def count_parts(value: object) -> int:
    """Number of values in JSON, which is not nested deeply."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(count_parts, inner))


def _tool(given: object, where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or given.get("type", "function") != "function":
        raise bad_request(where, f'must be an object of type "function", found {shown(given)}')
    function = given.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise bad_request(where, 'must have a "function" with a text "name"')
    # The name stands in a line of its own in the prompt and in the reply.
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name != name.strip() or "," in name:
        raise bad_request(
            f"{where}.function.name",
            f"must have 1 to {MAX_NAME} printable characters, no comma and no blank at either end, found {shown(name)}",
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise bad_request(f"{where}.function.description", f"must be text, found {shown(description)}")
    parameters = function.get("parameters")
    parameters = _NO_PARAMETERS if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise bad_request(f"{where}.function.parameters", f"must be a JSON schema, found {shown(parameters)}")
    try:
        error = jsonschema.exceptions.best_match(_META_SCHEMA.iter_errors(parameters))
        message = error.message if error is not None else ""
    except RecursionError:
        message = "it is nested too deeply"
    if message:
        raise bad_request(f"{where}.function.parameters", f"is no JSON schema: {message[:200]}")
    function = {"name": name, "description": description or "", "parameters": parameters}
    return {"type": "function", "function": function}


def read_choice(body: Mapping, tools: tuple[dict[str, Any], ...]) -> ToolChoice:
    """The field `tool_choice`.

    Raises:
        ApiError: it is none of "none", "auto", "required" and {"type": "function", "function": {"name": …}}, or names a
            tool that is not given.
    """
    given = body.get("tool_choice")
    if given in (None, AUTO, NONE):
        return ToolChoice(given or AUTO)
    names = [tool["function"]["name"] for tool in tools]
    if given == REQUIRED:
        if not names:
            raise bad_request("tool_choice", '"required" needs tools')
        return ToolChoice(REQUIRED)
    function = given.get("function") if isinstance(given, dict) and given.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        expected = '"none", "auto", "required" or {"type": "function", "function": {"name": …}}'
        raise bad_request("tool_choice", f"must be {expected}, found {shown(given)}")
    if name not in names:
        raise bad_request("tool_choice", f"the tool {shown(name)} is not among `tools`")
    return ToolChoice(NAMED, name)


def fits(arguments: str, schema: Mapping[str, Any]) -> bool:
    """Whether the text of arguments is a JSON object that a schema allows.

    `pattern`, `patternProperties` and the `unevaluated…` words are not looked at, `format` neither. Arguments whose
    comparison takes more than `MAX_STEPS` fit no schema.
    """
    try:
        value = json.loads(arguments)
        return isinstance(value, dict) and _validator(schema).is_valid(value)
    except Exception:
        # No JSON, a comparison that would take too long, or a reference to what is no schema, for which jsonschema
        # raises anything.
        return False


class _TooCostly(Exception):
    pass


def _validator(schema: Mapping[str, Any]):
    base = jsonschema.Draft202012Validator
    steps = 0

    def limited(compare: Callable) -> Callable:
        def counted(validator, value, instance, schema):
            nonlocal steps
            steps += 1 + sum(len(one) for one in (value, instance) if isinstance(one, list | dict))
            if steps > MAX_STEPS:
                raise _TooCostly
            yield from compare(validator, value, instance, schema) or ()

        return counted

    def additional(validator, value, instance, schema):
        # It would run the expressions of patternProperties.
        if "patternProperties" not in schema:
            yield from base.VALIDATORS["additionalProperties"](validator, value, instance, schema) or ()

    def unique(validator, value, instance, schema):
        # jsonschema compares every two items that cannot be sorted.
        if value and isinstance(instance, list):
            if len({json.dumps(one, sort_keys=True) for one in instance}) < len(instance):
                yield jsonschema.ValidationError("items are not unique")

    def allow(*_):
        return ()

    own: dict[str, Callable] = {"additionalProperties": additional, "uniqueItems": unique}
    own |= dict.fromkeys(("pattern", "patternProperties", "unevaluatedProperties", "unevaluatedItems"), allow)
    keywords = {keyword: limited(compare) for keyword, compare in ({**base.VALIDATORS, **own}).items()}
    # A registry of its own: the default one fetches what a $ref names.
    return jsonschema.validators.extend(base, keywords)(schema, registry=referencing.Registry())
