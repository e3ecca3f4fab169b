"""What the tools on tasks share: the command line with gin and Beam options, and quiet imports.

Importing this module makes the repository importable when a tool is run as `python tools/NAME.py`.
"""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Or TensorFlow would take the memory of a GPU that something else is training on.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

_BEAM = "--beam."


def parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows `description` as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse(result: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Registers the tasks, parses the command line and loads the gin files and bindings that it names.

    Returns:
        The namespace, with `beam_options`: `--beam.runner=X` becomes `--runner=X`.

    Raises:
        ConfigurationError: see `qwen_jax.configuration.parse_args`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        result.parse_args(argv)  # does not wait for TensorFlow
    with quiet():
        import tasks  # noqa: F401  registers the tasks and what gin can configure of them
        from qwen_jax.configuration import parse_args
    arguments = parse_args(result, [one for one in argv if not one.startswith(_BEAM)])
    arguments.beam_options = ["--" + one.removeprefix(_BEAM) for one in argv if one.startswith(_BEAM)]
    return arguments


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what TensorFlow's and Beam's libraries write on import off the screen, unless the import fails."""
    sys.stderr.flush()
    screen = os.dup(2)
    logging.disable(logging.WARNING)
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


def run(main: Callable[[], int | None]) -> None:
    """Calls `main` as a program; see `qwen_jax.command_line.run`."""
    from qwen_jax.command_line import run as run_program

    run_program(main)
