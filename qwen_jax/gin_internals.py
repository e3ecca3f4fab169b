"""Undocumented parts of gin: this file holds every use of them.

`tests/test_private_apis.py` fails and names this file where an upgrade of gin changes one of them.
"""

import copy
import dataclasses
import inspect
import io
import typing
from collections.abc import Mapping
from typing import Any

import gin
from gin import config_parser

MACRO = "gin.macro"

# (scope, selector, parameter) of a binding; of a macro: (its name, MACRO, "value").
Key = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Binding:
    """One `NAME = VALUE` of a gin file.

    Attributes:
      scope, selector, parameter: the name in its parts, as written; `parameter` is empty for a macro.
      value: its representation, references included.
      line: counted from 1.
    """

    scope: str
    selector: str
    parameter: str
    value: str
    line: int


@dataclasses.dataclass(frozen=True)
class Include:
    """One `include 'FILE'` of a gin file."""

    file: str
    line: int


class _NamesOnly(config_parser.ParserDelegate):
    """Reads references as their text, so that a file can be read before its imports are made."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return f"@{scoped_configurable_name}{'()' if evaluate else ''}"

    def macro(self, macro_name):
        return f"%{macro_name}"


class _NamedText(io.StringIO):
    """Text that gin's messages call by the name of its file."""

    def __init__(self, text: str, name: str):
        super().__init__(text)
        self.name = name


def statements(text: str, name: str) -> list[Binding | Include]:
    """The bindings and includes of a gin file, in order, without executing any.

    Raises:
      SyntaxError: naming file and line.
    """
    found = []
    for one in config_parser.ConfigParser(_NamedText(text, name), _NamesOnly()):
        if isinstance(one, config_parser.IncludeStatement):
            found.append(Include(one.filename, one.location.line_num))
        elif isinstance(one, config_parser.BindingStatement):
            found.append(Binding(one.scope, one.selector, one.arg_name, repr(one.value), one.location.line_num))
    return found


def execute(text: str, name: str) -> None:
    """Adds the bindings of a gin file without includes to gin's configuration.

    Raises:
      ValueError, SyntaxError, ImportError: gin cannot read the file.
    """
    gin.parse_config(_NamedText(text, name))


def key_of(scope: str, selector: str, parameter: str) -> Key:
    """The key of a binding, the same for all spellings of its name."""
    if not parameter:
        return f"{scope}/{selector}" if scope else selector, MACRO, "value"
    return gin.config.ParsedBindingKey.parse((scope, selector, parameter)).scope_selector_arg


def parse_value(text: str) -> Any:
    """The value of the right side of a binding.

    Raises:
      Exception: the text is no value; gin has no one class for this error.
    """
    return gin.config.parse_value(text)


def split_name(name: str) -> tuple[str, str, str]:
    """(scope, selector, parameter) of a name as written; `parameter` is empty for a macro."""
    return config_parser.parse_binding_key(name)


def bindings() -> Mapping[tuple[str, str], Mapping[str, Any]]:
    """(scope, selector) to parameters and values of everything that is bound, references unresolved."""
    return gin.config._CONFIG


def macros_in(value: Any) -> set[str]:
    """Names of the macros that a bound value refers to, however deep in lists and dicts."""
    references = gin.config.iterate_references({("", ""): {"value": value}})
    return {one.config_key[0] for one in references if one.selector == MACRO}


def is_required(value: Any) -> bool:
    """Whether a bound value is `%gin.REQUIRED`."""
    return repr(value) == "%gin.REQUIRED"


def resolve(value: Any) -> Any:
    """A bound value with its references called or looked up, as gin does before it calls a function."""
    return copy.deepcopy(value)


def configurable_names() -> list[str]:
    """Names of all functions and classes that gin can configure."""
    return [one.name for _, one in gin.config._REGISTRY.items()]


def wrapped(selector: str) -> Any:
    """The function or class behind a name, as it was before gin wrapped it."""
    return gin.config._REGISTRY.get_match(selector).wrapped


def annotation(selector: str, parameter: str) -> Any:
    """The type annotation of a parameter of a configurable function or class; None: it has none."""
    try:
        return typing.get_type_hints(wrapped(selector), include_extras=True).get(parameter)
    except (NameError, TypeError):  # names that are not imported where the function is
        return None


def parameters(selector: str) -> list[str]:
    """Names of the parameters of a configurable function or class."""
    return list(inspect.signature(wrapped(selector)).parameters)
