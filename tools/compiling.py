"""Compiles a program of a run for devices that are not here: what compile_for_tpu.py and compile_for_gpu.py share."""

import argparse
import contextlib
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import gin
import jax
from abstract_programs import PROGRAMS

from qwen_jax import files, rlhf, train
from qwen_jax.command_line import path_argument
from qwen_jax.configuration import ROOT, ConfigurationError, parse_args
from qwen_jax.hardware import GIB, HardwareConfig
from qwen_jax.programs import compiler_log, estimate
from qwen_jax.programs.report import describe, make_report
from qwen_jax.training.program import TooLittleMemory, memory_per_device

_COMMON = """By default it is the step that `python -m qwen_jax.train` runs with the same files, whatever its objective;
--program=sft, reward (also of preference model pretraining) and dpo are that step, and refuse files of another stage;
--program=prefill and --program=decode are those of `qwen_jax.inference`, for BATCH_SIZE rows of SEQUENCE_LENGTH tokens;
--program=ppo_update and --program=ppo_rollout those of `python -m qwen_jax.rlhf`, all its models in memory.
Nothing is allocated. docs/reference/compile_report.md describes the fields of --json.

Exit code 1: the program does not fit (known before compiling, where parameters, optimizer state and gradients alone
are too large); 2: the arguments are wrong, or the compiler fails.

Operations, bytes and memory are read off the compiled program. Times are estimates, between a low and a high bound:
"""


def bound_hardware(of_gpus: bool) -> HardwareConfig:
    """The hardware of the gin files.

    Raises:
      ConfigurationError: the gin files name no hardware, or none of this kind.
    """
    kind = "GPUs" if of_gpus else "TPUs"
    if "name" in gin.get_bindings("HardwareConfig"):
        hardware = gin.get_configurable("HardwareConfig")()
        if hardware.topology is None or hardware.of_gpus == of_gpus:
            return hardware
        other = "tpu" if of_gpus else "gpu"
        raise ConfigurationError(f"{hardware.name} are no {kind}: tools/compile_for_{other}.py compiles for them")
    found = re.compile(r"HardwareConfig\.topology = '(cuda:)?")
    names = [
        f"gin/hardware/{file.name}"
        for file in sorted((ROOT / "gin" / "hardware").glob("*.gin"))
        if (topology := found.search(file.read_text())) and (topology[1] is not None) == of_gpus
    ]
    raise ConfigurationError(f"name the {kind} to compile for with --gin_file: one of {', '.join(names)}")


@contextlib.contextmanager
def progress(screen: TextIO, what: str, every: float = 15.0) -> Iterator[None]:
    """While open, prints the elapsed time on the screen."""
    ended, began = threading.Event(), time.perf_counter()

    def tell():
        while not ended.wait(every):
            print(f"{what}: {time.perf_counter() - began:.0f} s", file=screen)

    print(what, file=screen)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Phases:
    """Seconds of tracing, of lowering and of XLA, as JAX itself reports them."""

    _EVENTS = {
        "/jax/core/compile/jaxpr_trace_duration": "trace",
        "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
        "/jax/core/compile/backend_compile_duration": "xla",
    }

    def __init__(self):
        self.seconds = dict.fromkeys(self._EVENTS.values(), 0.0)
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_):
        if event in self._EVENTS:
            # Tracing of inner functions is part of that of the outer one, which ends last and takes longest.
            name = self._EVENTS[event]
            self.seconds[name] = max(self.seconds[name], seconds)


def compile_program(name: str, hardware: HardwareConfig, log_file: Path) -> tuple[dict, str]:
    """Compiles one of `PROGRAMS` for `hardware`.

    Returns:
      (report, the compiled program's text; empty if the compiler gave up because it does not fit)
    """
    with compiler_log.stderr_into(log_file) as screen:
        prepared, phases, began = PROGRAMS[name](hardware), Phases(), time.perf_counter()
        try:
            with progress(screen, f"compiling for {hardware.name}"):
                compiled = prepared.compile()
        except jax.errors.JaxRuntimeError as error:
            compiled, message = None, str(error)
    seconds = time.perf_counter() - began
    if compiled is None:
        needed = compiler_log.needed_when_too_large(message)
        if needed is None:
            raise ValueError(f"the compiler gave up: {message.splitlines()[0]} (--log=FILE keeps what it wrote)")
        return {
            "hardware": hardware.name,
            "program": name,
            "fits": False,
            "memory_limit_bytes": hardware.hbm_bytes,
            "memory_need_bytes": needed,
            "compile_seconds": seconds,
            "mesh": prepared.mesh,
            "state_bytes": prepared.state_bytes,
            "message": f"the compiler found no way below {needed / GIB:.2f} of {hardware.hbm_gib:.2f} GiB: choose "
            f"another ModelConfig.remat, fewer TOKENS_PER_DEVICE, or more devices",
        }, ""
    text = compiled.as_text()
    log = log_file.read_text(errors="replace")
    memory = memory_per_device(compiled)
    memory["arguments"] += prepared.resident_bytes
    memory["need"] += prepared.resident_bytes
    report = make_report(text, prepared.work, hardware, prepared.mesh, memory, log)
    return {
        **report,
        "program": name,
        "attention_kernel": prepared.attention,
        "state_bytes": prepared.state_bytes,
        "compile_seconds": seconds,
        "compile_phases_seconds": phases.seconds,
    }, text


def compile_for(about: str, of_gpus: bool, argv: list[str] | None) -> int:
    """Command line of both tools.

    Args:
      about: of the tool; what is common follows it.
    """
    parser = argparse.ArgumentParser(
        description=f"{about}\n{_COMMON}\n{estimate.__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--program", choices=PROGRAMS, default="train", help="program of the run (default: %(default)s)"
    )
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="also write the report to this file")
    parser.add_argument(
        "--hlo", type=path_argument, metavar="FILE", help="write the text of the compiled program to this file"
    )
    parser.add_argument(
        "--log", type=path_argument, metavar="FILE", help="write the standard error of the compiler to this file"
    )
    gin.configurable(train.train)
    gin.configurable(rlhf.rlhf)
    # A run must say where it goes; a compilation goes nowhere. The long name of the macro needs no file that uses it.
    given = sys.argv[1:] if argv is None else argv
    arguments = parse_args(parser, [*given, "--gin.OUTPUT_DIR/gin.macro.value=none"])
    if "model" not in gin.get_bindings("train"):
        raise ConfigurationError("name a run and the hardware with --gin_file; see the example in --help")
    for file in (arguments.json, arguments.hlo, arguments.log):
        if file:  # before the minutes of compiling
            file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        log_file = arguments.log or Path(folder) / "compiler.log"
        hardware = bound_hardware(of_gpus)
        try:
            report, text = compile_program(arguments.program, hardware, log_file)
        except TooLittleMemory as error:
            report, text = (
                {
                    "hardware": hardware.name,
                    "program": arguments.program,
                    "fits": False,
                    "memory_limit_bytes": hardware.hbm_bytes,
                    "message": str(error),
                },
                "",
            )
    if arguments.json:
        files.write_text(arguments.json, json.dumps(report, indent=1) + "\n")
    if arguments.hlo and text:
        files.write_text(arguments.hlo, text)
    print(describe(report) if text else f"DOES NOT FIT: {report['message']}")
    return 0 if report["fits"] else 1
