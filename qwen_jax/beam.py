"""Start of Apache Beam pipelines: in this process unless an option names a runner, with short errors, a quiet log.

`open_engine` runs independent pieces of work on a runner, as `qwen_jax.workers` does on this machine.
"""

import argparse
import builtins
import contextlib
import difflib
import functools
import importlib
import logging
import re
import threading
from collections.abc import Callable, Generator, Sequence

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

_PROGRESS_SECONDS = 10

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


@contextlib.contextmanager
def open_engine(options: Sequence[str]) -> Generator[Callable[[str, Callable, Sequence[tuple], Callable], None]]:
    """A runner for the stages of a run, each a pipeline of independent calls.

    These pipelines are `Create | Reshuffle | Map`, without side inputs and with one branch: every runner has these
    three. Dask's runner leaves out all branches but the last.

    Args:
      options: of Beam, with a `--runner`. Dask's runner without an address gets a cluster on this machine, a process
        for each core, which ends with the block.

    Yields:
      As `qwen_jax.workers.Workers`.

    Raises:
      ValueError: see `check_options` and `short_errors`; no runner is named.
    """
    check_options(options)
    runner = next((one.partition("=")[2].lower() for one in options if one.startswith("--runner=")), None)
    if runner is None:
        raise ValueError(f"Beam: {options[0]} is for a runner, and none is named: give --beam.runner=NAME, too")
    is_dask = runner == "daskrunner"
    with _dask_cluster(options) if is_dask else contextlib.nullcontext(list(options)) as options:

        def run(label: str, function: Callable, pieces: Sequence[tuple], done: Callable[[tuple], bool]) -> None:
            # Dask's runner otherwise puts 128 pieces into one task, and Reshuffle does nothing there.
            more = [f"--dask_npartitions={len(pieces)}"] if is_dask else []
            with _progress(label, pieces, done), open_pipeline([*options, *more]) as pipeline:
                call = functools.partial(_call, function)
                _ = pipeline | beam.Create(list(pieces)) | beam.Reshuffle() | beam.Map(call)

        yield run


def _call(function: Callable, piece: tuple) -> None:
    function(*piece)


@contextlib.contextmanager
def _dask_cluster(options: Sequence[str]) -> Generator[list[str]]:
    """The options with the address of a scheduler: theirs, or of a cluster that is started here."""
    distributed = importlib.import_module("distributed")
    if any(one.partition("=")[0] in ("--dask_client_address", "--dask_scheduler_file") for one in options):
        yield list(options)
        return
    with distributed.LocalCluster(threads_per_worker=1, dashboard_address=None) as cluster:
        logger.info("Dask: %d workers on this machine, %s", len(cluster.workers), cluster.scheduler_address)
        yield [*options, f"--dask_client_address={cluster.scheduler_address}"]


@contextlib.contextmanager
def _progress(label: str, pieces: Sequence[tuple], done: Callable[[tuple], bool]) -> Generator[None]:
    """Logs how many pieces are done, by their output: the log of distant workers is elsewhere."""
    stop = threading.Event()

    def watch() -> None:
        left = list(pieces)
        while not stop.wait(_PROGRESS_SECONDS):
            left = [piece for piece in left if not done(piece)]
            logger.info("%s: %d of %d pieces are done", label, len(pieces) - len(left), len(pieces))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
