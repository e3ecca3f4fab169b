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
from apache_beam.runners.runner import PipelineResult

# In one process: Beam's other direct runners first try to download a program called Prism.
DEFAULT_RUNNER = "FnApiRunner"
# Beam knows this runner by its full name alone.
_DASK, _DASK_NAME = "daskrunner", "apache_beam.runners.dask.dask_runner.DaskRunner"
# These runners ask a job server for options of its own, which Beam's classes do not know.
_WITH_JOB_SERVER = ("flinkrunner", "sparkrunner", "portablerunner")
# Errors that say what a user has to change: `command_line.run` shows their message and no traceback.
_EXPECTED = "|".join(
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, (ValueError, OSError, ArithmeticError))
)
# TensorFlow and Beam carry the errors of generators and workers as text.
_CARRIED = re.compile(rf"(?:^|[\s}}])({_EXPECTED}): ([^\n]+)")
_STEP = re.compile(r"\s*\[while running '[^']*'\]")

_PROGRESS_SECONDS = 10

logger = logging.getLogger(__name__)


def is_local(options: Sequence[str]) -> bool:
    """Whether these options name no runner, so that the pipeline runs in this process."""
    return not any(option.partition("=")[0] == "--runner" for option in options)


def _runner(options: Sequence[str]) -> str | None:
    """The runner that the options name, in lower case, without its module."""
    found = [option.partition("=")[2] for option in options if option.startswith("--runner=")]
    return found[-1].lower().rpartition(".")[2] if found else None


class _OneLineParser(_BeamArgumentParser):
    def error(self, message: str):
        raise ValueError(f"Beam: {message}")


def check_options(options: Sequence[str]) -> None:
    """Refuses pipeline options that are unknown to Beam, which would ignore them.

    An option that resembles no known one is left to a runner with a job server (Flink, Spark), which may know it.

    Raises:
      ValueError: an unknown option, with the known one that is nearest, or a value of the wrong type.
    """
    if _runner(options) == _DASK:
        importlib.import_module("distributed")  # named in the error, if it is missing
        importlib.import_module("apache_beam.runners.dask.dask_runner")  # its options are known once it is imported
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
      ValueError, OSError: with the message of a ValueError or ArithmeticError, or of an OSError, that the text of
        another error carries. The original error is its cause. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if (short := carried(error)) is not None:
            raise short from error
        raise


def carried(error: BaseException) -> ValueError | OSError | None:
    """The expected error that the text of `error` carries, with its message in one line; None if it carries none."""
    text = str(error)
    if found := _CARRIED.findall(text):
        name, message = found[-1]
        of_system = issubclass(getattr(builtins, name), OSError)
    elif isinstance(error, (ValueError, OSError, ArithmeticError)) and _STEP.search(text):
        message, of_system = text.strip().partition("\n")[0], isinstance(error, OSError)
    else:
        return None
    message = _STEP.sub("", message).strip()
    # Told apart, since a full disk is no fault of the corpus.
    return OSError(message) if of_system else ValueError(message)


@contextlib.contextmanager
def open_pipeline(options: Sequence[str]) -> Generator[beam.Pipeline]:
    """A pipeline that runs when the block ends.

    Dask's runner leaves out, without a word, all branches of a pipeline but the last, and its Reshuffle does nothing:
    give it one branch, which begins with the elements that are to be spread.

    Args:
      options: options of Beam, such as "--runner=FlinkRunner". Without a runner, this process runs the pipeline.

    Raises:
      ValueError, OSError: see `check_options` and `short_errors`.
    """
    check_options(options)
    local, is_dask = is_local(options), _runner(options) == _DASK
    options = [*options, f"--runner={DEFAULT_RUNNER}"] if local else list(options)
    if is_dask:
        options = [*(one for one in options if not one.startswith("--runner=")), f"--runner={_DASK_NAME}"]
        if not any(one.startswith(("--dask_partition_size", "--dask_npartitions")) for one in options):
            options.append("--dask_partition_size=1")  # by default 128 elements are one task
    # SeqIO logs whole examples (documents of others, thousands of tokens each). Beam's local runner logs its internals,
    # and the traceback of each error that it raises afterwards. Dask logs each step of its start and end.
    levels = {"absl": logging.WARNING, "distributed": logging.WARNING}
    levels |= {"apache_beam": logging.CRITICAL} if local else {}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    pipeline = None
    try:
        with short_errors(), beam.Pipeline(options=PipelineOptions(options)) as pipeline:
            yield pipeline
    finally:
        if is_dask and isinstance(result := getattr(pipeline, "result", None), PipelineResult):
            result.client.close()  # the runner leaves it open
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def open_engine(options: Sequence[str]) -> Generator[Callable[[str, Callable, Sequence[tuple], Callable], None]]:
    """A runner for the stages of a run, each a pipeline of independent calls.

    Args:
      options: of Beam, with a `--runner`. Dask's runner without an address gets a cluster on this machine, a process
        for each core, which ends with the block.

    Yields:
      As `qwen_jax.workers.Workers`.

    Raises:
      ValueError, OSError: see `check_options` and `short_errors`; no runner is named.
    """
    check_options(options)
    if _runner(options) is None:
        raise ValueError(f"Beam: {options[0]} is for a runner, and none is named: give --beam.runner=NAME, too")
    with _with_cluster(options) as options:

        def run(label: str, function: Callable, pieces: Sequence[tuple], done: Callable) -> None:
            with _progress(label, pieces, done), open_pipeline(options) as pipeline:
                # What every runner can do: no side inputs, no state, one branch.
                call = functools.partial(_call, function)
                _ = pipeline | beam.Create(list(pieces)) | beam.Reshuffle() | label >> beam.Map(call)

        yield run


def _call(function: Callable, piece: tuple) -> None:
    function(*piece)


@contextlib.contextmanager
def _with_cluster(options: Sequence[str]) -> Generator[list[str]]:
    """The options, for Dask with the address of a scheduler: theirs, or of a cluster that is started here."""
    addresses = ("--dask_client_address", "--dask_scheduler_file")
    if _runner(options) != _DASK or any(one.partition("=")[0] in addresses for one in options):
        yield list(options)
        return
    distributed = importlib.import_module("distributed")  # of an extra that few need
    logging.getLogger("distributed").setLevel(logging.WARNING)
    with distributed.LocalCluster(threads_per_worker=1, dashboard_address=None) as cluster:
        logger.info("Dask: %d workers on this machine, %s", len(cluster.workers), cluster.scheduler_address)
        yield [*options, f"--dask_client_address={cluster.scheduler_address}"]


@contextlib.contextmanager
def _progress(label: str, pieces: Sequence[tuple], done: Callable[[Sequence[tuple]], list[bool]]) -> Generator[None]:
    """Logs how many pieces are done, by their output: the log of distant workers is elsewhere."""
    stop = threading.Event()

    def watch() -> None:
        left = list(pieces)
        while not stop.wait(_PROGRESS_SECONDS):
            left = [piece for piece, is_done in zip(left, done(left), strict=True) if not is_done]
            logger.info("%s: %d of %d pieces are done", label, len(pieces) - len(left), len(pieces))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
