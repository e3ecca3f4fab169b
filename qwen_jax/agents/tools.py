"""Tools that a model may call: their definitions, the check of arguments, and calls that always end in one text.

Whatever goes wrong, the model gets a line that begins with `error:` and says what, so that it can try again: arguments
that are no JSON or do not fit the schema, an unknown tool, an exception, a call that takes too long, a result that is
too long. A tool runs in a thread of this process with all its rights: tools are code that a person chose. What nobody
has read belongs into `qwen_jax.sandbox`.
"""

import dataclasses
import importlib.util
import json
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import json5
import jsonschema
from referencing import Registry

from qwen_jax import files
from qwen_jax.data.conversations import tool_definition, tool_name

# JSON5 is parsed in Python: longer arguments must be JSON.
_LONGEST_JSON5 = 10_000
_LONGEST_ERROR = 300


class ToolError(ValueError):
    """A call that cannot be made; the message is for the model."""


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        definition: OpenAI's layout (`name`, `description`, `parameters` as a JSON schema, by itself or under
            `function`), or the released one (`name_for_model`, `description_for_model`, a list of parameters).
        function: called with the arguments by name, or with the text alone if `args_format` of the definition is
            "code". It returns text, or a value that becomes JSON.
    """

    definition: Mapping
    function: Callable[..., Any]

    def __post_init__(self):
        name, inner = tool_name(self.definition), tool_definition(self.definition)
        if not name or "parameters" not in inner:
            raise ValueError(f"a tool needs a name and parameters, found {name or 'no name'}: {sorted(inner)}")
        try:
            jsonschema.Draft202012Validator.check_schema(schema_of(inner["parameters"]))
        except jsonschema.SchemaError as error:
            raise ValueError(f"tool {name}: its parameters are no JSON schema: {error.message[:200]}") from error

    @property
    def name(self) -> str:
        """Name by which the model calls the tool."""
        return tool_name(self.definition)

    @property
    def takes_code(self) -> bool:
        """Whether the action input is code, not JSON."""
        return tool_definition(self.definition).get("args_format") == "code"

    def read(self, text: str) -> dict[str, Any]:
        """The arguments of an action input.

        Raises:
            ToolError: they are no JSON object, or do not fit the schema.
        """
        value = _json_object(text)
        schema = schema_of(tool_definition(self.definition)["parameters"])
        # An empty registry: a `$ref` to an address is an error, not a download.
        validator = jsonschema.Draft202012Validator(schema, registry=Registry())
        try:
            found = jsonschema.exceptions.best_match(validator.iter_errors(value))
        except Exception as error:  # a reference that leads nowhere, a pattern that is none
            raise ToolError(f"the schema of {self.name} cannot be applied: {error}") from error
        if found is not None:
            where = "".join(f"[{part!r}]" for part in found.absolute_path)
            raise ToolError(f"{where + ': ' if where else ''}{found.message}")
        return value


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call gave.

    Attributes:
        text: for the model.
        failed: whether it is an error.
    """

    text: str
    failed: bool = False


class Tools:
    """Tools by name.

    Attributes:
        definitions: for the prompt, in the order given.
    """

    def __init__(self, tools: Iterable[Tool], *, seconds: float | None = 30.0, longest: int = 4_000):
        """`seconds` that a call may take (None: any), and the largest number of characters of a result.

        Raises:
            ValueError: two tools have one name, or a limit is not above 0.
        """
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self._tools:
                raise ValueError(f"two tools are called {tool.name}: the model could not tell them apart")
            self._tools[tool.name] = tool
        if (seconds is not None and seconds <= 0) or longest < 1:
            raise ValueError(f"limits of tools must be above 0, found {seconds} seconds and {longest} characters")
        self._seconds, self._longest = seconds, longest

    @property
    def definitions(self) -> tuple[Mapping, ...]:
        """See the class."""
        return tuple(tool.definition for tool in self._tools.values())

    def call(self, name: str, text: str) -> Outcome:
        """Calls a tool with an action input; never raises but for an interrupt.

        A call that takes too long goes on in its thread, whose result nobody reads: Python cannot stop it.
        """
        tool = self._tools.get(name)
        if tool is None:
            return _error(f"there is no tool {_shown(name)}; the tools are {', '.join(self._tools) or 'none'}")
        try:
            call = _prepared(tool, text)
        except ToolError as error:
            return _error(f"arguments of {name}: {error}")
        done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

        def work() -> None:
            try:
                done.put(Outcome(self._cut(_as_text(call()))))
            except BaseException as error:  # of any kind: SystemExit would end the thread without a word
                done.put(_error(f"{name} failed: {type(error).__name__}: {error}"))

        threading.Thread(target=work, name=f"tool {name}", daemon=True).start()
        try:
            return done.get(timeout=self._seconds)
        except queue.Empty:
            return _error(f"{name} gave no result within {self._seconds:g} seconds")

    def _cut(self, text: str) -> str:
        if len(text) <= self._longest:
            return text
        return f"{text[: self._longest]} … (cut: {self._longest:,} of {len(text):,} characters)"


def schema_of(parameters: Any) -> Any:
    """The JSON schema of parameters, which the released examples give as a list of named ones."""
    if not isinstance(parameters, list):
        return parameters
    named = [one for one in parameters if isinstance(one, Mapping) and "name" in one]
    if len(named) != len(parameters):
        raise ValueError("a list of parameters needs a name in each")
    return {
        "type": "object",
        "properties": {one["name"]: one.get("schema", {}) for one in named},
        "required": [one["name"] for one in named if one.get("required")],
    }


def load_tools(path: str | Path, ask: Callable[[str, dict], str] | None = None) -> list[Tool]:
    """The tools of a file.

    A Python file has a list `TOOLS` of `Tool`; it is run with all rights of this process. A JSON file has a list of
    definitions, whose results somebody else knows.

    Args:
        ask: called with name and arguments, gives the result of a tool that a JSON file defines.

    Raises:
        OSError: no such file.
        ValueError: it is of another kind, fails, or has no such list.
    """
    path = files.as_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of tools")
    if path.suffix == ".json" and ask is not None:
        try:
            return [_asked(definition, ask) for definition in _list_of_objects(files.read_json(path))]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if path.suffix != ".py":
        raise ValueError(f"{path}: expected a .py with a list TOOLS, or a .json with a list of definitions")
    spec = importlib.util.spec_from_file_location("qwen_jax_tools_of_a_user", path)
    assert spec is not None and spec.loader is not None  # of a .py there are
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SystemExit as error:
        raise ValueError(f"{path}: it ends the process (sys.exit): {error}") from error
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    tools = getattr(module, "TOOLS", None)
    if not isinstance(tools, Sequence) or not tools or not all(isinstance(tool, Tool) for tool in tools):
        raise ValueError(f"{path}: expected a list TOOLS of qwen_jax.agents.tools.Tool, found {_shown(repr(tools))}")
    return list(tools)


def _list_of_objects(value: Any) -> list[Mapping]:
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        raise ValueError("expected a list of objects with name, description and parameters")
    return value


def _asked(definition: Mapping, ask: Callable[[str, dict], str]) -> Tool:
    name = tool_name(definition)
    return Tool(definition, lambda **arguments: ask(name, arguments))


def _prepared(tool: Tool, text: str) -> Callable[[], Any]:
    if tool.takes_code:
        return lambda: tool.function(text)
    arguments = tool.read(text)
    return lambda: tool.function(**arguments)


def _json_object(text: str) -> dict[str, Any]:
    """An object of JSON, or of JSON5, which models write as well."""
    try:
        try:
            value = json.loads(text)
        except ValueError as error:
            if len(text) > _LONGEST_JSON5:
                raise ToolError(f"not JSON: {error}") from error
            value = json5.loads(text)
        json.dumps(value, allow_nan=False)  # both readers take NaN and Infinity
    except ToolError:
        raise
    except RecursionError as error:
        raise ToolError("not JSON: it nests too deeply to be read") from error
    except Exception as error:  # json5 raises what its parser meets
        raise ToolError(f"not JSON: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ToolError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _as_text(result: Any) -> str:
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    # Half of a surrogate pair cannot be written to any file.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _error(message: str) -> Outcome:
    return Outcome(f"error: {_shown(message, _LONGEST_ERROR)}", failed=True)


def _shown(text: str, longest: int = 60) -> str:
    """Text on one line, cut, in characters that any file can hold."""
    text = " ".join(_as_text(text[: 2 * longest]).split())
    return text if len(text) <= longest else f"{text[:longest]}…"
