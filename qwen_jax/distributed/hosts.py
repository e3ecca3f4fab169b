"""The processes of one job: joining it, comparison before the start, and actions of one process for all.

Everything rests on JAX's coordination service, a server inside process 0. Its key-value store has no public interface
that works without the devices, so `_client` reaches for the private one: the only such place of the project.
"""

import argparse
import dataclasses
import difflib
import functools
import hashlib
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jaxlib

import qwen_jax

log = logging.getLogger(__name__)

# Exit code where a lost process or a hang ends the job: "try again" of sysexits.h. Schedulers may restart on it; 2 is
# an error that would come again.
TRY_AGAIN = 75
# Seconds between two looks at the other processes, at most.
POLL_SECONDS = 5.0
_WAITING_SECONDS = 30.0
# Timers below Python hold no more, some of them not even that in milliseconds.
_LONGEST_SECONDS = 1e6
# Seconds that process 0 gives the others to read the reason why it ends, at most.
_READING_SECONDS = 30.0
_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """How this process joins its job. Give all of the first three, or none where JAX can detect them.

    Attributes:
      coordinator_address: HOST:PORT of process 0, reachable from all.
      num_processes, process_id: of the job, and of this process in it.
      heartbeat_timeout: seconds without a sign of life after which a process counts as lost.
      hang_timeout: seconds without progress after which a process dumps its stacks and ends; 0 sets no limit.
      join_timeout: seconds that the processes wait for each other at the start.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_timeout: float = 60.0
    hang_timeout: float = 0.0
    join_timeout: float = 300.0

    @property
    def poll_seconds(self) -> float:
        """Seconds between two signs of life, and between two looks at the others."""
        return min(POLL_SECONDS, self.heartbeat_timeout / 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `JobConfig`."""
    group = parser.add_argument_group("several hosts: the same command on each")
    group.add_argument(
        "--coordinator_address",
        metavar="HOST:PORT",
        help="where process 0 listens. JAX detects this and the next two on TPU slices and under Slurm and MPI",
    )
    group.add_argument(
        "--num_processes", type=int, metavar="N", help="of the job; 1: this process alone, without a coordinator"
    )
    group.add_argument("--process_id", type=int, metavar="I", help="of this process, in [0, N)")
    group.add_argument(
        "--heartbeat_timeout",
        type=float,
        default=JobConfig.heartbeat_timeout,
        metavar="SECONDS",
        help="a process without a sign of life for so long is lost, and the job ends (default: %(default)s)",
    )
    group.add_argument(
        "--hang_timeout",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="without a finished step or other progress for so long, a process writes the stacks of its threads and "
        "ends; four times as long for reading and writing the state; 0 sets no limit (default: %(default)s)",
    )
    group.add_argument(
        "--join_timeout",
        type=float,
        default=JobConfig.join_timeout,
        metavar="SECONDS",
        help="how long the processes wait for each other at the start (default: %(default)s)",
    )


def job_config(arguments: argparse.Namespace) -> JobConfig:
    """The JobConfig of parsed arguments.

    Raises:
      ValueError: some of the flags without the others, or out of range.
    """
    names = ("coordinator_address", "num_processes", "process_id")
    config = JobConfig(
        *(getattr(arguments, name) for name in names),
        arguments.heartbeat_timeout,
        arguments.hang_timeout,
        arguments.join_timeout,
    )
    given = [name for name in names if getattr(config, name) is not None]
    for name in ("heartbeat_timeout", "join_timeout", "hang_timeout"):
        seconds, least = getattr(config, name), "at least 0" if name == "hang_timeout" else "positive"
        if not 0 <= seconds <= _LONGEST_SECONDS or (seconds == 0 and least == "positive"):
            raise ValueError(f"--{name} must be {least} and at most {_LONGEST_SECONDS:g}, found {seconds:g}")
    if given and config.num_processes != 1:
        missing = [f"--{name}" for name in names if name not in given]
        if missing:
            raise ValueError(f"--{given[0]} needs {' and '.join(missing)} too; or give none of them")
        address, count, index = config.coordinator_address, config.num_processes, config.process_id
        assert address is not None and count is not None and index is not None  # none is missing
        if not 0 <= index < count:
            raise ValueError(f"--process_id must be in [0, {count}), found {index}")
        if not address.rpartition(":")[2].isdigit():
            raise ValueError(f"--coordinator_address must be HOST:PORT, found {address!r}")
    return config


def connect(config: JobConfig) -> None:
    """Joins the job, if this process is part of one. Must come before the first use of a device.

    Raises:
      ValueError: the job cannot be joined.
    """
    if config.num_processes == 1:
        return
    # JAX's own limits are the second line of defense: they abort the process, and ours name the missing process.
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=int(3 * config.heartbeat_timeout) + 30,
        shutdown_timeout_seconds=60,
        initialization_timeout=int(config.join_timeout) + 60,
    )
    try:
        if config.coordinator_address is None:
            initialize()
        else:
            # One process may hold several devices: detection would give it only one of them under Slurm.
            initialize(
                config.coordinator_address,
                config.num_processes,
                config.process_id,
                cluster_detection_method="deactivate",
            )
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        log.debug("no cluster found: one process")
    except RuntimeError as error:
        if config.coordinator_address is None and "must be called before" in str(error):
            # Called from a program that has used its devices already, as tests do.
            if jax.default_backend() == "cpu":
                return
            raise
        job = "the job that this cluster's environment describes"
        if config.coordinator_address is not None:
            job = f"the job of {config.num_processes} processes at {config.coordinator_address}"
        raise ValueError(
            f"cannot join {job}: {error}. Is process 0 running, and its address reachable from here?"
        ) from error


def _state():
    from jax._src import distributed  # private: see the top of this file

    return distributed.global_state


def _client():
    return _state().client


def coordinator_address() -> str | None:
    """HOST:PORT of the coordination service, or None without one."""
    return _state().coordinator_address


def process_index() -> int:
    """Index of this process in its job; unlike `jax.process_index` it may be asked before devices are used."""
    return _state().process_id if _state().client is not None else 0


def process_count() -> int:
    """Number of processes of the job; may be asked before devices are used."""
    return _state().num_processes if _state().client is not None else 1


def log_on_main(text: str, *values) -> None:
    """Logs in process 0 alone, for messages that are the same in all processes."""
    if process_index() == 0:
        log.info(text, *values)


def put(key: str, value) -> None:
    """Sets a key of the job's store to a JSON-ready value, in place of the one before."""
    _client().key_value_set(f"qwen_jax/{key}", json.dumps(value), allow_overwrite=True)


def peek(key: str):
    """The value of a key of the job's store, or None."""
    try:
        return json.loads(_client().key_value_try_get(f"qwen_jax/{key}"))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def peek_all(folder: str) -> dict[int, Any]:
    """The values of the keys `folder`/0, `folder`/1, … of those processes that have set theirs."""
    found = _client().key_value_dir_get(f"qwen_jax/{folder}/")
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


def wait_for(key: str, what: str, limit: float | None = None):
    """Waits for a key of the job's store and returns its value; logs every 30 seconds that it waits.

    Raises:
      TimeoutError: not there after `limit` seconds.
    """
    began = told = time.monotonic()
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(f"qwen_jax/{key}", 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        now = time.monotonic()
        if limit is not None and now - began > limit:
            raise TimeoutError(f"no answer for {limit:.0f} s: waited for {what}")
        if now - told > _WAITING_SECONDS:
            told = now
            log.info("process %d: waiting for %s, %.0f s so far", process_index(), what, now - began)


def name_of(process: int, facts: dict) -> str:
    """Name of a process in errors: its number, host and pid."""
    return f"process {process} ({facts['host']}, pid {facts['pid']})"


def facts_of_this_process(configuration: str) -> dict:
    """Versions, sources and configuration, which all processes must share, and host and pid of this process."""
    sources = hashlib.sha256()
    for file in sorted(Path(qwen_jax.__file__).parent.rglob("*.py")):
        sources.update(file.read_bytes())
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "same": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "qwen_jax sources": sources.hexdigest()[:12],
            "configuration": configuration,
        },
    }


def _difference(name: str, first: str, other: str) -> str:
    if name != "configuration":
        return f"{name} {other}, not {first}"
    lines = difflib.ndiff(first.splitlines(), other.splitlines())
    changed = [line for line in lines if line[:1] in "+-" and line[1:].strip()][:4]
    return f"another configuration ({'; '.join(line[:1] + line[1:].strip() for line in changed)})"


def let_all_read(key: str, limit: float) -> None:
    """Confirms that this process has read the reason why the job ends; process 0, which holds the store, waits for all.

    Args:
      key: folder of the store for the confirmations.
      limit: seconds to wait for them.
    """
    process, count = process_index(), process_count()
    put(f"{key}/{process}", True)
    if process:
        return
    deadline = time.monotonic() + limit
    while len(peek_all(key)) < count:
        if time.monotonic() > deadline:
            return
        time.sleep(0.1)
    # JAX aborts a process that still runs when the store closes: the others need a moment to end.
    time.sleep(1)


def handshake(configuration: str, limit: float = JobConfig.join_timeout) -> dict[int, dict]:
    """Compares versions, sources and configuration over all processes of the job before any of them computes.

    Args:
      configuration: text that must be the same everywhere.
      limit: seconds to wait for another process.

    Returns:
      Facts of the processes: of all in process 0, else of process 0 and of this one. Empty for a process alone.

    Raises:
      ValueError: in every process, naming the hosts that differ from process 0 and in what.
      TimeoutError: a process did not answer.
    """
    process, count = process_index(), process_count()
    if count == 1:
        return {}
    mine = facts_of_this_process(configuration)
    put(f"facts/{process}", mine)
    if process:
        verdict = wait_for("handshake", "process 0 to compare the versions of all processes", limit)
        facts = {0: verdict["first"], process: mine}
    else:
        facts = {0: mine}
        for other in range(1, count):
            facts[other] = wait_for(f"facts/{other}", f"process {other} of {count} to start", limit)
        differing = [
            f"{name_of(other, theirs)} has {_difference(name, mine['same'][name], value)}"
            for other, theirs in facts.items()
            for name, value in theirs["same"].items()
            if value != mine["same"].get(name)
        ]
        shown = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
        verdict = {"first": {"host": mine["host"], "pid": mine["pid"]}, "differing": shown}
        put("handshake", verdict)
    if verdict["differing"]:
        let_all_read("refused", _READING_SECONDS)
        raise ValueError(
            f"the processes of this job are not the same: {verdict['differing']} as {name_of(0, facts[0])}. Start the "
            f"same command, with the same environment and checkout, on every host"
        )
    return facts


def run_on_main(key: str, what: str, action: Callable[[], _Value]) -> _Value:
    """Runs `action` in process 0 while the others wait, and gives its JSON-ready result to all.

    An error in process 0 is not passed on here: `watchdog.Job` tells the others of any process that ends.

    Args:
      key: unique within the job.
      what: name of the action, for the log of the others.
    """
    process, count = process_index(), process_count()
    if count == 1:
        return action()
    if process:
        return wait_for(f"done/{key}", what)["result"]
    result = action()
    put(f"done/{key}", {"result": result})
    return result


def agree(key: str, what: str, problem: str | None) -> dict[int, str]:
    """Problems of all processes with one action, by process; empty where no process has one.

    Args:
      key: unique within the job.
      what: name of the action, for the log.
      problem: of this process, or None.
    """
    process, count = process_index(), process_count()
    if count == 1:
        return {} if problem is None else {0: problem}
    put(f"{key}/{process}", problem)

    def collect():
        return {other: wait_for(f"{key}/{other}", f"process {other} and {what}") for other in range(count)}

    found = run_on_main(f"agree/{key}", what, collect)
    return {int(other): text for other, text in found.items() if text is not None}
