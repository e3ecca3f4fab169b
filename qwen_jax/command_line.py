"""What every command shares: logging, and short errors in place of tracebacks."""

import logging
import os
import sys
from collections.abc import Callable


def run(main: Callable[[], int | None]) -> None:
    """Runs an entry point; an expected error becomes one line on standard error and exit code 2.

    With QWEN_JAX_TRACEBACK=1 in the environment, the traceback is shown instead.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for noisy in ("absl", "jax", "orbax", "tensorflow", "apache_beam"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        sys.exit(main() or 0)
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("QWEN_JAX_TRACEBACK") == "1":
            raise
        # Gin appends which configurable was being called; the message itself says what to change.
        message = str(error).split("In call to configurable")[0]
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
