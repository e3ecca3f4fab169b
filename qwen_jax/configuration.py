"""Gin on the command line: `--gin_file=FILE` and `--gin.NAME=VALUE`, and short errors for what is wrong in them.

Only entry points and tools import this; models and training are plain functions and dataclasses.
"""

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gin

from qwen_jax.hardware import HardwareConfig
from qwen_jax.models.config import AttentionBlocks, ModelConfig
from qwen_jax.sharding import MeshConfig
from qwen_jax.training.objectives import next_token_loss
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.resilience import SkipConfig
from qwen_jax.training.trainer_config import TrainerConfig

ROOT = Path(__file__).resolve().parent.parent
_BINDING = "--gin."


class ConfigurationError(ValueError):
    """Something in the gin files or flags that cannot be run."""


def by_size(size: str, table: dict):
    """The entry of `table` for a model size: lets one gin file hold the report's hyperparameters of all sizes."""
    if size not in table:
        raise ConfigurationError(
            f"no value for MODEL_SIZE {size!r}; there are values for {', '.join(map(repr, table))}. Override the macro "
            f"that asks for it (PEAK_LEARNING_RATE, BATCH_SIZE, …) with --gin.NAME=VALUE"
        )
    return table[size]


gin.configurable(by_size)
for _configurable in (
    AttentionBlocks,
    ModelConfig,
    MeshConfig,
    HardwareConfig,
    OptimizerConfig,
    SkipConfig,
    TrainerConfig,
    next_token_loss,
):
    gin.external_configurable(_configurable, module="qwen_jax")


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line and loads the gin files and bindings that it names.

    Import the modules whose functions the gin files configure before calling this.

    Args:
      parser: gets `--gin_file` added; `--gin.NAME=VALUE` is taken out before it parses.

    Raises:
      ConfigurationError: a file is missing, a name is misspelt or unbound, a value cannot be read.
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
    """Stands in `--help` for the bindings, which are taken out before argparse sees them."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error("write --gin.NAME=VALUE, in one word")


def load_gin(files: Sequence[str], bindings: Sequence[str] = ()) -> None:
    """Replaces gin's configuration by that of `files`, then `bindings` of the form NAME=VALUE.

    A value that is no Python literal and no gin reference is taken as a string, so paths need no quotes.

    Raises:
      ConfigurationError: as `parse_args`.
    """
    gin.clear_config()
    for file in files:
        path = next((p for p in (Path(file), ROOT / file) if p.is_file()), None)
        if path is None:
            known = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "gin").glob("*/*.gin"))]
            raise ConfigurationError(f"--gin_file={file}: no such file, here or in {ROOT}.{_suggestion(file, known)}")
        _parse(lambda path=path: gin.parse_config_file(str(path)), str(path))
    names = []
    for binding in bindings:
        name, equals, value = binding.partition("=")
        if not equals:
            raise ConfigurationError(f"--gin.{binding}: expected --gin.NAME=VALUE")
        names.append(name.strip())
        _bind(name.strip(), value)
    _check_macros(names)


def _bind(name: str, value: str) -> None:
    try:
        gin.config.parse_value(value)
    except Exception:  # gin has no one class for a value that does not parse
        value = repr(value)
    _parse(lambda: gin.parse_config(f"{name} = {value}"), f"--gin.{name}")


def _parse(parse: Callable[[], None], where: str) -> None:
    try:
        parse()
    except (ValueError, SyntaxError, OSError, AttributeError) as error:
        message = str(error).splitlines()[0]
        wrong, known = "", ()
        if found := re.match(r"No configurable matching '(.+?)'", message):
            wrong, known = found[1], [made.name for _, made in gin.config._REGISTRY.items()]
        elif found := re.match(r"Configurable '(.+?)' doesn't have a parameter named '(.+?)'", message):
            wrong, known = found[2], inspect.signature(gin.config._REGISTRY.get_match(found[1]).wrapped).parameters
        raise ConfigurationError(f"{where}: {message}{_suggestion(wrong, known)}") from error


def _suggestion(wrong: str, known) -> str:
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _check_macros(from_flags: Sequence[str]) -> None:
    """Names macros that are used and not set, and flags that set a macro that nothing uses."""
    config = gin.config._CONFIG
    macros = {scope for scope, selector in config if selector == "gin.macro" and scope}
    references = gin.config.iterate_references(config)
    used = {reference.config_key[0] for reference in references if reference.selector == "gin.macro"}
    for name in from_flags:
        if "." not in name and name not in used:
            raise ConfigurationError(
                f"--gin.{name}: nothing in the gin files uses {name}.{_suggestion(name, used)} "
                f"Macros in use: {', '.join(sorted(used)) or 'none; was a --gin_file forgotten?'}"
            )
    for name in sorted(used):
        if name not in macros or repr(config[name, "gin.macro"].get("value")) == "%gin.REQUIRED":
            how = f"add --gin.{name}=VALUE, or the gin file that sets it"
            if name == "MODEL_SIZE":  # alone it is no model
                how = "add --gin_file=FILE with a file of gin/models"
            raise ConfigurationError(f"{name} is not set: {how}")
