"""Compiles a program of a run for a TPU pod, on a machine without one, and reports its memory and estimated time.

    python tools/compile_for_tpu.py --gin_file=gin/runs/pretrain_7b.gin --gin_file=gin/hardware/v5p_256.gin

By default it is the step that `python -m qwen_jax.train` runs with the same files, whatever its objective;
--program=prefill and --program=decode are those of `qwen_jax.inference`, for BATCH_SIZE rows of SEQUENCE_LENGTH tokens.
Nothing is allocated; it takes one to two minutes (of TPU v6e up to five) and 3 GB of memory. Needs libtpu
(`pip install -c requirements.txt "jax[tpu]"`). docs/reference/compile_report.md describes the fields of --json.

Exit code 1: the program does not fit (known before compiling, where parameters, optimizer state and gradients alone
are too large); 2: the arguments are wrong, or the compiler fails.

Operations, bytes and memory are read off the compiled program. Times are estimates, between a low and a high bound:
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from qwen_jax.programs import compiler_log, estimate

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# No device is opened, so there is nothing that two processes could take from each other.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
for _name, _value in compiler_log.ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax import files, train
from qwen_jax.batch_spec import is_packed, row_length, token_columns
from qwen_jax.command_line import path_argument, run
from qwen_jax.configuration import ROOT, ConfigurationError, parse_args
from qwen_jax.data.packing import has_segments
from qwen_jax.hardware import GIB, HardwareConfig
from qwen_jax.inference import programs
from qwen_jax.inference.sampling import RowSampling
from qwen_jax.models.attention import KVCache
from qwen_jax.models.decoding import DecodingCache
from qwen_jax.models.transformer import Qwen, abstract_params, parameter_count
from qwen_jax.programs.report import Work, describe, make_report
from qwen_jax.sharding import make_mesh, spec, tree_shardings
from qwen_jax.training.program import (
    TooLittleMemory,
    check_memory,
    check_run,
    compile_run,
    least_between_slices,
    least_collectives,
    memory_per_device,
    model_flops_per_token,
    shard_bytes,
)
from qwen_jax.training.step import batch_shapes


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A program that can be compiled.

    Attributes:
      compile: compiles the program.
      mesh: devices along each axis.
      state_bytes: bytes on one device of the state alone, by part.
      attention: the attention kernel; inference has only XLA's.
    """

    compile: Callable[[], jax.stages.Compiled]
    work: Work
    mesh: dict[str, int]
    state_bytes: dict[str, int]
    attention: str = "xla"


def prepare_train_step(hardware: HardwareConfig) -> Prepared:
    """The train step of `train.train`, as gin binds it.

    Raises:
      ValueError: lengths, batch, model, mesh or devices do not go together.
      TooLittleMemory: the state does not fit.
    """
    settings = gin.get_bindings("train")
    model, trainer, optimizer = settings["model"], settings["trainer"], settings["optimizer"]
    train.check_length(trainer, model)
    mesh = make_mesh(settings["mesh"], hardware.devices())
    accumulation = trainer.accumulation(mesh)
    columns = token_columns(trainer.sequence_length, packed=has_segments(settings.get("packing", "concat")))
    shape = {"batch_size": trainer.batch_size, "columns": columns, "accumulation": accumulation}
    state_bytes = check_run(Qwen(model), optimizer, trainer.train_steps, mesh, memory=hardware.hbm_bytes, **shape)
    attention = Qwen(model).attention(row_length(columns), is_packed(columns), mesh)

    def compile_step():
        return compile_run(
            Qwen(model),
            settings["objective"],
            optimizer,
            trainer.train_steps,
            mesh,
            seed=trainer.seed,
            compiler_options=settings.get("compiler_options"),
            **shape,
        )

    tokens = trainer.batch_size * trainer.sequence_length
    work = Work(
        parameters=parameter_count(model),
        tokens=tokens,
        flops_per_token=model_flops_per_token(model, trainer.sequence_length).total,
        flops_per_token_all_keys=model_flops_per_token(model, trainer.sequence_length, causal=False).total,
        least=least_collectives(model, mesh, tokens, accumulation),
        parts=accumulation,
        between_slices=least_between_slices(model, mesh, hardware.slices),
    )
    return Prepared(compile_step, work, dict(mesh.shape), state_bytes, attention)


def prepare_prefill(hardware: HardwareConfig) -> Prepared:
    """The program of `qwen_jax.inference` that reads BATCH_SIZE prompts of SEQUENCE_LENGTH tokens into a cache.

    Raises:
      ValueError: batch, model, mesh or devices do not go together.
      TooLittleMemory: weights and cache do not fit.
    """
    config, mesh, params, state_bytes, rows, length = _for_inference(hardware)
    tokens = _placed((rows, length), jnp.int32, mesh, "batch", None)
    lengths = _placed((rows,), jnp.int32, mesh, "batch")
    used = model_flops_per_token(config, length)
    head = 6.0 * config.vocab_size * config.hidden_size  # for the last token of a prompt alone
    matmuls = (used.matmuls - head + head / length) / 3
    work = Work(
        parameters=parameter_count(config),
        tokens=rows * length,
        flops_per_token=matmuls + used.attention / 3,
        flops_per_token_all_keys=matmuls + 2 * used.attention / 3,
        least={},
    )

    def compile_prefill():
        return programs.prefill.lower(mesh, config, params, tokens, lengths).compile()

    return Prepared(compile_prefill, work, dict(mesh.shape), state_bytes)


def prepare_decode(hardware: HardwareConfig) -> Prepared:
    """The program of `qwen_jax.inference` that generates for BATCH_SIZE rows with a cache of SEQUENCE_LENGTH slots.

    It is a loop that ends when rows do, so the report is that of one token of each row, with a full cache.

    Raises:
      ValueError, TooLittleMemory: as `prepare_prefill`.
    """
    config, mesh, params, state_bytes, rows, slots = _for_inference(hardware)

    def by_row(dtype):
        return _placed((rows,), dtype, mesh, "batch")

    entry = _placed((rows, config.num_kv_heads, slots, config.head_dim), config.compute_dtype, mesh, *_CACHE_AXES)
    cache = DecodingCache((KVCache(entry, entry),) * config.num_layers, by_row(jnp.float32))
    seen = _placed((rows, config.vocab_size), jnp.bool_, mesh, "batch", None)
    state = programs.BatchState(cache, by_row(jnp.int32), by_row(jnp.int32), seen)
    sampling = RowSampling(*(by_row(dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.uint32)))
    rules = programs.RowRules(sampling, _placed((rows, 1), jnp.int32, mesh, "batch", None), by_row(jnp.int32))
    count = _placed((), jnp.int32, mesh)
    used = model_flops_per_token(config, slots, causal=False)
    work = Work(
        parameters=parameter_count(config),
        tokens=rows,
        flops_per_token=used.total / 3,
        flops_per_token_all_keys=used.total / 3,
        least={},
    )

    def compile_decode():
        lowered = programs.generate.lower(mesh, config, params, state, by_row(jnp.bool_), rules, count, count, True)
        return lowered.compile()

    return Prepared(compile_decode, work, dict(mesh.shape), state_bytes)


_CACHE_AXES = ("batch", "kv_heads", None, None)


def _placed(shape, dtype, mesh: Mesh, *names: str | None) -> jax.ShapeDtypeStruct:
    """An array that does not exist, on the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(names)))


def _for_inference(hardware: HardwareConfig):
    """(model, mesh, weights as inference keeps them, bytes of weights and cache on a device, rows, length)."""
    settings = gin.get_bindings("train")
    config, trainer = settings["model"], settings["trainer"]
    mesh = make_mesh(settings["mesh"], hardware.devices())
    batch_shapes(mesh, trainer.batch_size, token_columns(trainer.sequence_length))
    boxed = abstract_params(Qwen(config))
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, config.compute_dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        tree_shardings(boxed, mesh),
    )

    def of_one_layer(leaf):
        sharding = NamedSharding(mesh, PartitionSpec(*leaf.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)

    params = {**params, "layers": (jax.tree.map(of_one_layer, params["layers"]),) * config.num_layers}
    shape = (config.num_layers * 2, trainer.batch_size, config.num_kv_heads, trainer.sequence_length, config.head_dim)
    cache = _placed(shape, config.compute_dtype, mesh, None, *_CACHE_AXES)
    needed = {"parameters": shard_bytes(params), "cache": shard_bytes(cache)}
    check_memory(needed, hardware.hbm_bytes, parameter_count(config), mesh)
    return config, mesh, params, needed, trainer.batch_size, trainer.sequence_length


PROGRAMS = {"train": prepare_train_step, "prefill": prepare_prefill, "decode": prepare_decode}


def bound_hardware() -> HardwareConfig:
    """The hardware of the gin files.

    Raises:
      ConfigurationError: the gin files name no hardware.
    """
    if "name" not in gin.get_bindings("HardwareConfig"):
        files = sorted((ROOT / "gin" / "hardware").glob("*.gin"))
        names = (f"gin/hardware/{file.name}" for file in files if "HardwareConfig.topology" in file.read_text())
        raise ConfigurationError(f"name the hardware to compile for with --gin_file: one of {', '.join(names)}")
    return gin.get_configurable("HardwareConfig")()


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
    report = make_report(text, prepared.work, hardware, prepared.mesh, memory_per_device(compiled), log)
    return {
        **report,
        "program": name,
        "attention_kernel": prepared.attention,
        "state_bytes": prepared.state_bytes,
        "compile_seconds": seconds,
        "compile_phases_seconds": phases.seconds,
    }, text


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{estimate.__doc__}", formatter_class=argparse.RawDescriptionHelpFormatter
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
        hardware = bound_hardware()
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


if __name__ == "__main__":
    run(main)
