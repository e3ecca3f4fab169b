"""Gin on the command line: `--gin_file=FILE` and `--gin.NAME=VALUE`, with short errors for mistakes in them.

Only entry points and tools import this; models and training are plain functions and dataclasses.
"""

import argparse
import contextvars
import dataclasses
import difflib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import gin

from qwen_jax import gin_internals
from qwen_jax.alignment.dpo import direct_preference
from qwen_jax.alignment.grpo import GRPOConfig
from qwen_jax.alignment.ppo import PPOConfig
from qwen_jax.alignment.preferences import pairwise_preference
from qwen_jax.alignment.rewards import exact_answer, match_count, matches_format, near_length
from qwen_jax.alignment.rollouts import RolloutConfig
from qwen_jax.command_line import quiet
from qwen_jax.data import task_configuration
from qwen_jax.files import PathLike, as_path, is_path_type
from qwen_jax.hardware import GpuDescription, HardwareConfig
from qwen_jax.models.build import parameter_count
from qwen_jax.models.config import AttentionBlocks, ModelConfig
from qwen_jax.models.lora import LoraConfig
from qwen_jax.models.vision.config import VisionConfig
from qwen_jax.reference_column import ReferenceModel
from qwen_jax.sharding import MeshConfig
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.parameter_groups import ParameterGroup, ScheduleConfig
from qwen_jax.training.resilience import SkipConfig
from qwen_jax.training.trainer_config import TrainerConfig

ROOT = Path(__file__).resolve().parent.parent
_BINDING = "--gin."


class ConfigurationError(ValueError):
    """A mistake in the gin files or flags."""


# Whether `by_parameters` is counting: a model asks for its own remat policy while it is counted.
_counting = contextvars.ContextVar("_counting", default=False)


@gin.configurable
def by_parameters(billions: Mapping[float, Any], beyond: Any) -> Any:
    """A setting that depends on the size of the model that gin configures: lets one hardware file serve all sizes.

    Args:
      billions: number of parameters in billions to the setting for models of at most so many.
      beyond: the setting for larger models.

    Returns:
      The setting of the smallest limit that the model does not exceed.

    Raises:
      ConfigurationError: no model is configured.
    """
    if _counting.get():
        return beyond  # any setting does: the number of parameters does not depend on it
    token = _counting.set(True)
    try:
        with gin.config_scope(None):
            count = parameter_count(_configured_model())
    finally:
        _counting.reset(token)
    return next((billions[limit] for limit in sorted(billions) if count <= limit * 1e9), beyond)


def _configured_model() -> ModelConfig:
    """The model of the run or, without a run, that of a file of gin/models."""
    for (scope, selector), values in gin_internals.bindings().items():
        if not scope and selector.rpartition(".")[2] == "train" and "model" in values:
            return gin_internals.resolve(values["model"])
    if "hidden_size" not in gin.get_bindings(ModelConfig, resolve_references=False):
        raise ConfigurationError("no model is configured: add --gin_file=FILE with a file of gin/models or gin/runs")
    return gin.get_configurable(ModelConfig)()


@gin.configurable
def checkpoint_config(path: PathLike) -> ModelConfig:
    """The configuration of an existing model in any known format, with the fields of `ModelConfig` that gin sets.

    So `train.model = @checkpoint_config()` trains it without a gin file of its sizes, and
    `--gin.ModelConfig.context_length=8192` means the same as for a model of gin/models.

    Raises:
      FileNotFoundError, ValueError: the message names the file and the wrong field.
    """
    from qwen_jax.conversion.load import read_model_config  # most runs do not need it

    return dataclasses.replace(read_model_config(path), **gin.get_bindings(ModelConfig))


for _configurable in (
    AttentionBlocks,
    ModelConfig,
    MeshConfig,
    GpuDescription,
    HardwareConfig,
    LoraConfig,
    OptimizerConfig,
    ParameterGroup,
    ReferenceModel,
    ScheduleConfig,
    SkipConfig,
    TrainerConfig,
    VisionConfig,
    direct_preference,
    next_token_prediction,
    pairwise_preference,
    PPOConfig,
    GRPOConfig,
    RolloutConfig,
    exact_answer,
    match_count,
    matches_format,
    near_length,
):
    gin.external_configurable(_configurable, module="qwen_jax")


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line and loads the gin files and bindings that it names.

    Import the modules whose functions the gin files configure before calling this.

    Args:
      parser: gets `--gin_file` added; `--gin.NAME=VALUE` is taken out before it parses.

    Raises:
      ConfigurationError: a file is missing, a name is misspelled or unbound, or a value cannot be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    bindings = [arg[len(_BINDING) :] for arg in argv if arg.startswith(_BINDING)]
    group = parser.add_argument_group("configuration")
    group.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="may be given several times")
    group.add_argument(
        "--gin.NAME=VALUE",
        dest="gin_binding",
        nargs=0,
        action=_Unreachable,
        help="set a macro (--gin.TRAIN_STEPS=100) or a parameter (--gin.OptimizerConfig.beta2=0.99)",
    )
    args = parser.parse_args([arg for arg in argv if not arg.startswith(_BINDING)])
    load_gin(args.gin_file, bindings)
    return args


class _Unreachable(argparse.Action):
    """Stands in `--help` for the bindings, which `parse_args` removes before argparse parses."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error("write --gin.NAME=VALUE, in one word")


def load_gin(files: Sequence[str], bindings: Sequence[str] = ()) -> None:
    """Replaces gin's configuration by that of `files`, then `bindings` of the form NAME=VALUE.

    The order of `files` does not matter. A file overrides those that it includes, wherever the `include` stands in it.
    Two files of which neither includes the other may not set a name to different values; `bindings` override both.
    Each file is read once. `include` looks beside the file that it stands in, then in the repository, then in the
    working directory.

    A value of `bindings` that is no Python literal and no gin reference is a string. A value for a path parameter
    (annotated `files.PathLike`), or for a macro that sets one, is a path even if it looks like a number. So paths need
    no quotes.

    Raises:
      ConfigurationError: as `parse_args`.
    """
    gin.clear_config()
    reader = _FileReader()
    task_configuration.declare_configurables()
    for file in files:
        path = _existing(as_path(file, "--gin_file"), ROOT / file)
        if path is None:
            known = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "gin").glob("*/*.gin"))]
            raise ConfigurationError(f"--gin_file={file}: no such file, here or in {ROOT}.{_suggestion(file, known)}")
        reader.read(path)
    names, keys = [], set()
    for binding in bindings:
        name, equals, value = (part.strip() for part in binding.partition("="))
        if not equals:
            raise ConfigurationError(f"--gin.{binding}: expected --gin.NAME=VALUE")
        names.append(name)
        keys.add(_bind(name, value))
    reader.refuse_conflicts(keys)
    _check_macros(names, reader)


def check_recipe(name: str, function: Callable) -> None:
    """Looks whether gin sets what the function of a command needs.

    Args:
      name: of the function in gin files.

    Raises:
      ConfigurationError: it does not, as where the files are of a model and of hardware alone.
    """
    parameters = inspect.signature(function).parameters.values()
    bound = gin.get_bindings(name, resolve_references=False)
    unset = [one.name for one in parameters if one.default is one.empty and one.name not in bound]
    if unset:
        raise ConfigurationError(
            f"the gin files set no {', '.join(unset[:-1])}{' and ' * (len(unset) > 1)}{unset[-1]} of {name}: name a "
            f"recipe of gin/runs for python -m qwen_jax.{name} with --gin_file"
        )


def files_read(files: Sequence[str]) -> list[Path]:
    """The gin files that `load_gin(files)` reads, each after those that it includes; absent files are left out."""
    reader = _FileReader()
    for file in files:
        if (path := _existing(as_path(file, "--gin_file"), ROOT / file)) is not None:
            reader.scan(path)
    return list(reader.included)


def _existing(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


class _FileReader:
    """Reads gin files, each once, and remembers their settings.

    Attributes:
      included: every file read, to all files that it includes, directly or not.
    """

    def __init__(self):
        self.included: dict[Path, set[Path]] = {}
        self._settings: dict[gin_internals.Key, list[tuple[Path, int, str]]] = {}
        self._open: list[Path] = []
        self._referred_to: set[str] = set()

    def read(self, path: Path) -> None:
        """Reads a file and its includes into gin's configuration."""
        self._visit(path, self._execute)

    def scan(self, path: Path) -> None:
        """Finds the includes of a file without changing gin's configuration."""
        self._visit(path, lambda *_: None)

    def _visit(self, path: Path, act: Callable[[Path, str, list], None]) -> None:
        real = path.resolve()
        if real in self._open:
            raise ConfigurationError(f"{path} includes itself: remove the include, or that of a file between")
        if real in self.included:
            return
        text = _parse(lambda: path.read_text(encoding="utf-8"), str(path))
        found = _parse(lambda: gin_internals.statements(text, str(path)), str(path))
        self._open.append(real)
        below, lines = set(), text.splitlines()
        for one in found:
            if isinstance(one, gin_internals.Include):
                other = _existing(path.parent / one.file, ROOT / one.file, Path(one.file))
                if other is None:
                    raise ConfigurationError(
                        f"{path}, line {one.line}: include {one.file!r}: no such file beside it, in {ROOT} or here"
                    )
                self._visit(other, act)
                below |= {other.resolve(), *self.included[other.resolve()]}
                lines[one.line - 1] = ""
        self._open.pop()
        self.included[real] = below
        act(path, "\n".join(lines) + "\n", found)

    def _execute(self, path: Path, text: str, found: list) -> None:
        _parse(lambda: gin_internals.execute(text, str(path)), str(path))
        for one in found:
            if isinstance(one, gin_internals.Binding):
                key = gin_internals.key_of(one.scope, one.selector, one.parameter)
                self._settings.setdefault(key, []).append((path, one.line, one.value))
                self._referred_to.update(re.findall(r"%([\w./]+)", one.value))

    def refuse_conflicts(self, overridden: Iterable[gin_internals.Key]) -> None:
        """Refuses names that two files set differently, of which neither includes the other.

        Args:
          overridden: keys that flags set, for which the files do not matter.

        Raises:
          ConfigurationError: the message has the name, both files and both values.
        """
        for key in self._settings.keys() - set(overridden):
            last_of = {path.resolve(): (path, line, value) for path, line, value in self._settings[key]}
            deciding = [
                one for real, one in last_of.items() if not any(real in self.included[other] for other in last_of)
            ]
            (first, first_line, value), *others = deciding
            for path, line, other in others:
                if other != value:
                    raise ConfigurationError(
                        f"{first}, line {first_line}, sets {_shown(key)} to {value}, and {path}, line {line}, to "
                        f"{other}, and neither file includes the other: remove one, include one in the other, or "
                        f"choose with --gin.{_shown(key)}=VALUE"
                    )

    def refuse_idle(self, used: set[str]) -> None:
        """Refuses macros that files set and nothing uses, as a misspelled name is.

        A macro may have been in use until another file or a flag set what used it. Those that the repository's files
        set are for the files that have a use for them.

        Args:
          used: macros in use.

        Raises:
          ConfigurationError: the message has the name and the file.
        """
        for (name, selector, _), places in self._settings.items():
            ours = any(path.resolve().is_relative_to(ROOT / "gin") for path, *_ in places)
            if selector == gin_internals.MACRO and name not in used | self._referred_to and not ours:
                path, line, _ = places[-1]
                raise ConfigurationError(
                    f"{path}, line {line}, sets {name}, which nothing uses.{_suggestion(name, used)}"
                )


def _shown(key: gin_internals.Key) -> str:
    """The name of a setting as users write it."""
    scope, selector, parameter = key
    if selector == gin_internals.MACRO:
        return scope
    return f"{scope}/" * bool(scope) + f"{selector.rpartition('.')[2]}.{parameter}"


def _bind(name: str, value: str) -> gin_internals.Key:
    key = _parse(lambda: gin_internals.key_of(*gin_internals.split_name(name)), f"--gin.{name}")
    annotations = _annotations(key)
    try:
        parsed = gin_internals.parse_value(value)
        as_written = not _is_path(value, parsed, annotations)
    except Exception:  # gin has no one class for a value that does not parse
        parsed, as_written = value, False
    if isinstance(parsed, str) and annotations and all(map(_is_flag, annotations)):
        # A text would count as true, false included.
        raise ConfigurationError(f"--gin.{name} must be True or False, found {value!r}")
    text = value if as_written else repr(value)
    _parse(lambda: gin.parse_config(f"{name} = {text}"), f"--gin.{name}")
    return key


def _is_path(text: str, parsed: Any, annotations: list) -> bool:
    """Whether a text that parses as `parsed` is nevertheless a path: 2024_11_29, 1e5, None."""
    if isinstance(parsed, str) or text.startswith(("@", "%")) or not any(map(is_path_type, annotations)):
        return False
    if parsed is None:
        return not all(types.NoneType in get_args(one) for one in annotations)
    several = isinstance(parsed, list | tuple | dict) and any(map(_takes_several, annotations))
    return not several


def _is_flag(annotation: Any) -> bool:
    return annotation is bool or set(get_args(annotation)) == {bool, types.NoneType}


def _takes_several(annotation: Any) -> bool:
    origin = get_origin(annotation)
    return isinstance(origin, type) and issubclass(origin, Sequence) or any(map(_takes_several, get_args(annotation)))


def _annotations(key: gin_internals.Key) -> list:
    """Types of the parameter that a key sets; for a macro, of all parameters that it sets, directly or not."""
    scope, selector, parameter = key
    if selector != gin_internals.MACRO:
        return [gin_internals.annotation(selector, parameter)]
    users = [
        (user_scope, user, name)
        for (user_scope, user), values in gin_internals.bindings().items()
        for name, value in values.items()
        if scope in gin_internals.macros_in(value) and (user_scope, user) != (scope, selector)
    ]
    return [one for user in users for one in _annotations(user)]


def _parse(parse: Callable[[], Any], where: str) -> Any:
    try:
        return parse()
    except (ValueError, SyntaxError, OSError, AttributeError, ImportError) as error:
        message, *rest = str(error).splitlines()
        if message.startswith("No configurable") and _imported_tasks():
            return _parse(parse, where)
        if line := re.search(r"line (\d+)$", "\n".join(rest), re.MULTILINE):
            where += f", line {line[1]}"
        wrong, known = "", ()
        if found := re.match(r"No configurable matching '(.+?)'", message):
            wrong, known = found[1], gin_internals.configurable_names()
        elif found := re.match(r"Configurable '(.+?)' doesn't have a parameter named '(.+?)'", message):
            wrong, known = found[2], gin_internals.parameters(found[1])
        hint = " It is a recipe of python -m qwen_jax.rlhf" if wrong == "rlhf" else _suggestion(wrong, known)
        raise ConfigurationError(f"{where}: {message}{hint}") from error


def _imported_tasks() -> bool:
    with quiet():
        return task_configuration.import_tasks()


def _suggestion(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _check_macros(from_flags: Sequence[str], reader: _FileReader) -> None:
    """Refuses macros that are used and not set, and that are set, by flags or files, and nothing uses."""
    bound = gin_internals.bindings()
    macros = {
        scope: values.get("value") for (scope, selector), values in bound.items() if selector == gin_internals.MACRO
    }
    used = {name for values in bound.values() for value in values.values() for name in gin_internals.macros_in(value)}
    for name in from_flags:
        if "." not in name and name not in used:
            raise ConfigurationError(
                f"--gin.{name}: nothing in the gin files uses {name}.{_suggestion(name, used)} "
                f"Macros in use: {', '.join(sorted(used)) or 'none; was a --gin_file forgotten?'}"
            )
    if used:  # without a recipe, nothing uses what the other files set for one
        reader.refuse_idle(used)
    unset = sorted(name for name in used if name not in macros or gin_internals.is_required(macros[name]))
    if len(unset) == 1:
        raise ConfigurationError(f"{unset[0]} is not set: add --gin.{unset[0]}=VALUE, or the gin file that sets it")
    if unset:
        raise ConfigurationError(
            f"{', '.join(unset[:-1])} and {unset[-1]} are not set: add the gin file that sets them (gin/runs has one "
            f"for each recipe and size), or --gin.NAME=VALUE for each"
        )
