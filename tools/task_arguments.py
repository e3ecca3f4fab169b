"""Parts that the tools on tasks share: the command line with gin and Beam options, and quiet imports.

Importing this module makes the repository importable when a tool is run as `python tools/NAME.py`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qwen_jax.command_line import quiet

_BEAM = "--beam."
# Those of qwen_jax/data/packing.py, which `--help` does not import.
PACKINGS = ("concat", "best_fit", "whole", "padded")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows `description` with its line breaks."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse(result: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Registers the tasks, parses the command line and loads the gin files and bindings that it names.

    Returns:
        The namespace, with `beam_options`: `--beam.runner=X` becomes `--runner=X`.

    Raises:
        ConfigurationError: see `qwen_jax.configuration.parse_args`.
        ValueError: see `qwen_jax.beam.check_options`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        result.parse_args(argv)  # does not wait for TensorFlow
    with quiet():
        import tasks  # noqa: F401  registers the tasks and what gin can configure of them
        from qwen_jax.configuration import parse_args
    arguments = parse_args(result, [one for one in argv if not one.startswith(_BEAM)])
    arguments.beam_options = ["--" + one.removeprefix(_BEAM) for one in argv if one.startswith(_BEAM)]
    if arguments.beam_options:
        with quiet():
            from qwen_jax.beam import check_options
        # Now, not when a pipeline starts: there may be nothing left to do, and a misspelled option would go unseen.
        check_options(arguments.beam_options)
    return arguments
