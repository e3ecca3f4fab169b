"""Start of Apache Beam pipelines: in this process unless an option names a runner, with short errors, a quiet log."""

import argparse
import builtins
import contextlib
import difflib
import logging
import re
from collections.abc import Generator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

# In one process: Beam's other direct runners first try to download a program called Prism.
DEFAULT_RUNNER = "FnApiRunner"
# These runners ask a job server for options of its own, which Beam's classes do not know.
_WITH_JOB_SERVER = ("flinkrunner", "sparkrunner", "portablerunner")
# Errors that say what a user has to change: `command_line.run` shows their message and no traceback.
_EXPECTED = "|".join(
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, (ValueError, OSError, ArithmeticError))
)
# TensorFlow and Beam carry the errors of generators and workers as text.
_CARRIED = re.compile(rf"(?:^|[\s}}])(?:{_EXPECTED}): ([^\n]+)")
_STEP = re.compile(r"\s*\[while running '[^']*'\]")

logger = logging.getLogger(__name__)


def is_local(options: Sequence[str]) -> bool:
    """Whether these options name no runner, so that the pipeline runs in this process."""
    return not any(option.partition("=")[0] == "--runner" for option in options)


class _OneLineParser(_BeamArgumentParser):
    def error(self, message: str):
        raise ValueError(f"Beam: {message}")


def check_options(options: Sequence[str]) -> None:
    """Refuses pipeline options that are unknown to Beam, which would ignore them.

    An option that resembles no known one is left to a runner with a job server (Flink, Spark), which may know it.

    Raises:
      ValueError: an unknown option, with the known one that is nearest, or a value of the wrong type.
    """
    parser = _OneLineParser(allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False)
    for known in PipelineOptions.__subclasses__():
        known._add_argparse_args(parser)
    found, unknown = parser.parse_known_args(list(options))
    names = [name for action in parser._actions for name in action.option_strings]
    for option in unknown:
        name = option.partition("=")[0]
        close = difflib.get_close_matches(name, names, n=1)
        if not close and str(getattr(found, "runner", "")).lower() in _WITH_JOB_SERVER:
            logger.warning("Beam does not know the option %s: it is left to the job server", name)
            continue
        suggestion = f" Did you mean {close[0]}?" if close else " Write options as --NAME=VALUE."
        raise ValueError(f"Beam has no option {name}.{suggestion}")


@contextlib.contextmanager
def short_errors() -> Generator[None]:
    """Turns an error of a worker or of a TensorFlow generator into the original error of our code.

    Raises:
      ValueError: with the message of a ValueError, OSError or ArithmeticError that the text of another error carries.
        The original error is its cause. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if message := carried(error):
            raise ValueError(message) from error
        raise


def carried(error: BaseException) -> str | None:
    """The one-line message of the expected error that the text of `error` carries; None if it carries none."""
    text = str(error)
    found = _CARRIED.findall(text)
    if not found and isinstance(error, (ValueError, OSError, ArithmeticError)) and _STEP.search(text):
        found = [text.strip().partition("\n")[0]]
    return _STEP.sub("", found[-1]).strip() if found else None


@contextlib.contextmanager
def open_pipeline(options: Sequence[str]) -> Generator[beam.Pipeline]:
    """A pipeline that runs when the block ends.

    Args:
      options: options of Beam, such as "--runner=FlinkRunner". Without a runner, this process runs the pipeline.

    Raises:
      ValueError: see `check_options` and `short_errors`.
    """
    check_options(options)
    local = is_local(options)
    options = [*options, f"--runner={DEFAULT_RUNNER}"] if local else list(options)
    # SeqIO logs whole examples (documents of others, thousands of tokens each). Beam's local runner logs its internals,
    # and the traceback of each error that it raises afterwards.
    levels = {"absl": logging.WARNING} | ({"apache_beam": logging.CRITICAL} if local else {})
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        with short_errors(), beam.Pipeline(options=PipelineOptions(options)) as pipeline:
            yield pipeline
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
