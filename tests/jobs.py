"""Jobs of several processes on this machine, each of which runs the same program."""

import contextlib
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.warm_python import python

ROOT = Path(__file__).resolve().parents[1]


def free_port(start: int = 0, stop: int = 1) -> int:
    """The first port of a range that nobody listens on; without one, any that the system has."""
    for port in range(start, stop):
        with contextlib.closing(socket.socket()) as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return one.getsockname()[1]
    raise OSError(f"no free port in [{start}, {stop})")


def start_job(
    program: str, environment: Mapping[str, str], arguments: Sequence[Sequence] = ((), ()), devices: int = 1
) -> list[subprocess.Popen]:
    """The processes of a job; each gets the coordinator's address, its index and its own `arguments`."""
    address = f"localhost:{free_port()}"
    return [
        subprocess.Popen(
            [python(), "-c", program, address, str(index), *map(str, own)],
            cwd=ROOT,
            env={**environment, "JAX_NUM_CPU_DEVICES": str(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, own in enumerate(arguments)
    ]


def outputs_of_job(processes: Sequence[subprocess.Popen]) -> list[str]:
    """What each process has written to its output, once all have ended well."""
    found = [process.communicate() for process in processes]
    assert not any(process.returncode for process in processes), "\n\n".join(errors[-4000:] for _, errors in found)
    return [output for output, _ in found]
