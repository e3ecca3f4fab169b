"""Parts that all commands share: logging, short errors in place of tracebacks, quiet imports."""

import argparse
import atexit
import contextlib
import dataclasses
import gc
import logging
import os
import signal
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_jax import files
from qwen_jax.extras import missing_extra

if TYPE_CHECKING:
    from qwen_jax.sharding import MeshConfig

# Text that gin adds to the TypeError of a call without its arguments.
_UNSET = "No values supplied by Gin"
_INTERRUPTED = 128 + signal.SIGINT
_TENSORFLOW_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
# Other characters than these control a terminal or cannot be seen: escapes, direction marks, line separators.
_HARMLESS = {"\n", "\t"}
_ESCAPED_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def run(main: Callable[[], int | None]) -> None:
    """Runs an entry point; an expected error becomes one line on standard error and exit code 2, Ctrl-C code 130.

    With QWEN_JAX_TRACEBACK=1 in the environment, the traceback is shown instead. A process of a job of several skips
    JAX's shutdown, which would wait for the others.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("absl", "jax", "orbax", "tensorflow", "apache_beam"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # At its end Python looks for garbage among all modules: with TensorFlow 1.5 s of processor time for nothing.
    atexit.register(gc.freeze)
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt as error:
        if os.environ.get("QWEN_JAX_TRACEBACK") == "1":
            raise
        with contextlib.suppress(OSError):  # nobody may read it any more
            print(": ".join(["interrupted", *map(str, error.args)]), file=sys.stderr)
        if _in_a_job() or files.were_abandoned():
            _leave(_INTERRUPTED)
        sys.exit(_INTERRUPTED)
    except Exception as error:
        expected = isinstance(error, _expected()) or _UNSET in str(error)
        expected = expected or missing_extra(error) is not None
        if os.environ.get("QWEN_JAX_TRACEBACK") == "1" or not expected:
            if not _in_a_job():
                raise
            traceback.print_exc()
            _leave(1)
        print(f"error: {one_line(error)}", file=sys.stderr)
        if _in_a_job():
            _leave(2)
        sys.exit(2)


@contextlib.contextmanager
def quick_imports() -> Generator[None]:
    """Imports inside take three quarters of their time: Python looks for no garbage among modules, then or later."""
    if not gc.isenabled():  # inside another one
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    if (missing := missing_extra(error)) is not None:
        return missing
    # Gin appends which configurable was being called; the message itself says what to change.
    message = str(error).split("In call to configurable")[0]
    if isinstance(error, TypeError) and _UNSET in message:
        message = f"{message.split(_UNSET)[0].strip()}: name the gin file that sets them with --gin_file"
    return " ".join(message.split()) or type(error).__name__


def escape(text: str) -> str:
    """Text that is safe to print: characters that control a terminal, or are invisible, become `\\x1b`-like escapes."""
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _ESCAPED_CATEGORIES and char not in _HARMLESS
        else char
        for char in text
    )


def path_argument(text: str) -> Path:
    """`type` of an argparse flag that names a file or folder: see `files.as_path`."""
    return files.as_path(pattern_argument(text))


def pattern_argument(text: str) -> str:
    """`type` of an argparse flag that names a folder or glob: see `files.as_pattern`."""
    try:
        return files.as_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("path: ")) from error


def positive(text: str) -> int:
    """`type` of an argparse flag that is an integer of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def add_mesh(parser: argparse.ArgumentParser, otherwise: str = "one device works") -> None:
    """Adds `--mesh`, a `MeshConfig` or None; `otherwise` says what is without it."""
    parser.add_argument(
        "--mesh",
        type=_mesh,
        metavar="AXIS=N,…",
        help=f"arrangement of all devices of the job, such as data=2,tensor=4; without it, {otherwise}",
    )


def _mesh(text: str) -> "MeshConfig":
    from qwen_jax.sharding import MeshConfig  # here, as it loads JAX

    names = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        if name not in names or not equals or not size.removeprefix("-").isdigit():
            raise argparse.ArgumentTypeError(f"{part!r}: expected {' or '.join(f'{name}=N' for name in names)}")
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def _expected() -> tuple[type[Exception], ...]:
    """Errors whose message says what to change."""
    sandbox = sys.modules.get("qwen_jax.sandbox")  # commands that run no programs do not load it for this
    return (ValueError, OSError, ArithmeticError, *([] if sandbox is None else [sandbox.SandboxUnavailableError]))


def _in_a_job() -> bool:
    jax = sys.modules.get("jax")  # tools that need no JAX do not load it for this
    return jax is not None and jax.distributed.is_initialized()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Hides the output of TensorFlow's and Beam's libraries on import, unless the import fails."""
    sys.stderr.flush()
    screen = os.dup(2)
    logging.disable(logging.WARNING)
    # TensorFlow reads this once, when imported. As a warning it writes the traceback of each error that Python code in
    # a dataset raises, which reaches the user anyway. The compiler of JAX, which reads it too, keeps its warnings.
    level = os.environ.get(_TENSORFLOW_LEVEL)
    os.environ[_TENSORFLOW_LEVEL] = level if level in ("0", "3") else "2"  # importing JAX sets 1
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        except BaseException:
            written.seek(0)
            os.write(screen, written.read())
            raise
        finally:
            os.dup2(screen, 2)
            os.close(screen)
            logging.disable(logging.NOTSET)
            if level is None:
                del os.environ[_TENSORFLOW_LEVEL]
            else:
                os.environ[_TENSORFLOW_LEVEL] = level
