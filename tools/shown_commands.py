"""Commands that a tool runs one after the other, each printed as one would type it."""

import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def title(text: str) -> None:
    """Announces a step."""
    print(f"\n== {text}", flush=True)


def show(arguments: list) -> list[str]:
    """The command for these arguments, after printing it as one would type it."""
    words = [str(argument) for argument in arguments]
    print(f"$ python {shlex.join(words)}", flush=True)
    return [sys.executable, *words]


def call(*arguments) -> None:
    """Runs a command to its end.

    Raises:
      subprocess.CalledProcessError: it fails.
    """
    subprocess.run(show(list(arguments)), cwd=ROOT, check=True)
