"""The log of the TPU compiler on standard error: capture, and facts about a program in it."""

import contextlib
import faulthandler
import os
import re
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TextIO

# Environment variables that turn the log on; libtpu reads them when it is loaded.
ENVIRONMENT = {
    "TPU_STDERR_LOG_LEVEL": "0",
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_VMODULE": "latency_hiding_scheduler=1",
}
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@contextlib.contextmanager
def stderr_into(file: Path) -> Generator[TextIO]:
    """Redirects standard error of this process to `file` while open; yields a stream to the screen.

    The traceback of a crash still goes to the screen.
    """
    sys.stderr.flush()
    screen = os.dup(2)
    with open(file, "wb") as log:
        os.dup2(log.fileno(), 2)
    faulthandler.enable(file=screen)
    with open(screen, "w", buffering=1) as stream:
        try:
            yield stream
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            faulthandler.disable()


def program_hbm_bytes(log: str) -> int | None:
    """Bytes of temporaries, fragmentation and code, without arguments; None if the log does not say."""
    found = re.findall(r"Program hbm requirement ([\d.]+)([KMGB]?)", log)
    return int(float(found[-1][0]) * _UNITS[found[-1][1]]) if found else None


def unsupported_options(log: str) -> list[str]:
    """Warnings about options that the compiler accepts but does not support on this chip, without repeats."""
    return sorted(set(re.findall(r"\] (.*not supported/recommended on platforms.*)", log)))


def needed_when_too_large(message: str) -> int | None:
    """Bytes that a program needs at least, from the compiler's error for lack of memory; None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGB]) of [\d.]+[KMGB] hbm", message) or re.search(
        r"required for HLO temporaries \(([\d.]+)([KMGB])\) exceeds available HBM", message
    )
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def exposed_cycles(log: str) -> dict[str, tuple[float, dict[str, float]]]:
    """Cycles in which a computation waits for collectives and copies, as the compiler's scheduler reports.

    Returns:
      Name of a computation to (total, cycles by kind), from the last statistics after scheduling.
    """
    found: dict[str, tuple[float, dict[str, float]]] = {}
    after, name = False, None
    for line in log.splitlines():
        if "Statistics before scheduling" in line:
            after = False
        elif "Statistics after scheduling" in line:
            after = True
        elif after and (header := re.search(r"For computation: ([^,\s]+)", line)):
            name = header[1]
            found[name] = (0.0, {})
        elif after and name is not None:
            if wasted := re.search(r"Total wasted cycles: ([\d.e+]+)", line):
                found[name] = (float(wasted[1]), found[name][1])
            elif kind := re.search(r"Wasted cycles for ([\w -]+): ([\d.e+]+)", line):
                found[name][1][kind[1]] = float(kind[2])
    return found
