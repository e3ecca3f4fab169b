"""Report on a compiled program: memory, operations and time per device, as JSON and as text."""

import dataclasses

from qwen_jax.hardware import GIB, HardwareConfig
from qwen_jax.programs.account import Account, CollectiveTotal, account
from qwen_jax.programs.compiler_log import program_hbm_bytes, unsupported_options
from qwen_jax.programs.estimate import TimeEstimate, estimate_time
from qwen_jax.programs.hlo import Program

MEMORY_FROM_LOG = "arguments and the compiler's log"
MEMORY_FROM_ANALYSIS = "memory analysis, an upper bound: it counts fragmentation twice"


@dataclasses.dataclass(frozen=True)
class Work:
    """Size of the model and of the batch that one run of a program processes.

    Attributes:
      parameters: number of parameters of the model.
      tokens: number of tokens over all devices.
      flops_per_token: operations of the model per token, counting visible keys only.
      flops_per_token_all_keys: the same in the usual convention, which counts masked keys too.
      least: collectives that this layout needs at least, per device.
      between_slices: bytes that a device must send to another slice.
      parts: number of parts of a batch (gradient accumulation).
    """

    parameters: int
    tokens: int
    flops_per_token: float
    flops_per_token_all_keys: float
    least: dict[str, CollectiveTotal]
    between_slices: float = 0.0
    parts: int = 1


def make_report(
    text: str, work: Work, hardware: HardwareConfig, mesh: dict[str, int], memory: dict[str, int], log: str = ""
) -> dict:
    """Reads a compiled program.

    Args:
      text: text of the program.
      mesh: number of devices along each axis.
      memory: bytes on one device: "arguments", "outputs", "aliased", "temporaries" and "need", their sum.
      log: standard error of the TPU compiler under `compiler_log.ENVIRONMENT`, if available.

    Returns:
      A JSON-ready dict, per device unless a name says otherwise, in bytes, seconds and operations.
    """
    found = account(Program(text))
    devices = 1
    for size in mesh.values():
        devices *= size
    time = estimate_time(found, hardware, log)
    program_bytes = program_hbm_bytes(log)
    need, source = memory["need"], MEMORY_FROM_ANALYSIS
    if program_bytes is not None:
        need = program_bytes + memory["arguments"] + memory["outputs"] - memory["aliased"]
        source = MEMORY_FROM_LOG
    return {
        "hardware": hardware.name,
        "topology": hardware.topology,
        "slices": hardware.slices,
        "devices": devices,
        "devices_per_chip": hardware.devices_per_chip,
        "mesh": dict(mesh),
        "parameters": work.parameters,
        "tokens_per_step": work.tokens,
        "parts": work.parts,
        "memory_bytes": memory,
        "memory_need_bytes": need,
        "memory_source": source,
        "memory_limit_bytes": hardware.hbm_bytes,
        "fits": need <= hardware.hbm_bytes,
        **_operations(found, work, hardware, devices, time),
        "seconds": time.to_dict(),
        **_collectives(found, work),
        "between_slices_bytes": work.between_slices,
        "between_slices_seconds": work.between_slices / (hardware.dcn_gbps * 1e9) if hardware.dcn_gbps else 0.0,
        "kernels": {name: dataclasses.asdict(total) for name, total in found.kernels.items()},
        "cycles_by_op": dict(sorted(found.cycles_by_op.items(), key=lambda item: -item[1])),
        "hbm_traffic_bytes": found.hbm_bytes,
        "warnings": [*found.warnings, *unsupported_options(log)],
    }


def _operations(
    found: Account, work: Work, hardware: HardwareConfig, devices: int, time: TimeEstimate
) -> dict[str, object]:
    model = work.flops_per_token * work.tokens / devices
    peak = hardware.peak_tflops * 1e12
    per_chip = work.tokens / devices * hardware.devices_per_chip
    bounds = {"low": time.high, "high": time.low}  # the slow bound gives the low speed
    return {
        "model_flops_per_token": work.flops_per_token,
        "model_flops_per_token_all_keys": work.flops_per_token_all_keys,
        "model_flops": model,
        "model_flops_all_keys": work.flops_per_token_all_keys * work.tokens / devices,
        "executed_flops": found.flops,
        "seconds_at_peak": model / peak,
        "tokens_per_second_per_chip": {bound: per_chip / seconds for bound, seconds in bounds.items() if seconds},
        "chip_hours_per_trillion_tokens": {
            bound: 1e12 / 3600 * seconds / per_chip for bound, seconds in (("low", time.low), ("high", time.high))
        },
        "mfu": {bound: model / peak / seconds for bound, seconds in bounds.items() if seconds},
        "mfu_all_keys": {
            bound: work.flops_per_token_all_keys * work.tokens / devices / peak / seconds
            for bound, seconds in bounds.items()
            if seconds
        },
    }


def _collectives(found: Account, work: Work) -> dict[str, object]:
    wire = sum(total.wire_bytes for total in found.collectives.values())
    least = sum(total.wire_bytes for total in work.least.values())
    return {
        "collectives": {kind: dataclasses.asdict(total) for kind, total in found.collectives.items()},
        "least_collectives": {
            kind: {"payload_bytes": total.payload_bytes, "wire_bytes": total.wire_bytes}
            for kind, total in work.least.items()
        },
        "wire_bytes": wire,
        "least_wire_bytes": least,
    }


def describe(report: dict) -> str:
    """The report as lines for a person."""
    lines = [
        f"{report['parameters']:,} parameters on {report['devices']} devices ({report['hardware']}), mesh "
        + " ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
        + f", {report['tokens_per_step']:,} tokens a step in {report['parts']} part(s), attention by "
        f"{report['attention_kernel']}; compiled in {report['compile_seconds']:.0f} s",
        _describe_memory(report),
        *_describe_operations(report),
        *_describe_time(report["seconds"]),
        *_describe_collectives(report),
        *(f"warning: {warning}" for warning in report["warnings"]),
    ]
    return "\n".join(lines)


def _describe_memory(report: dict) -> str:
    memory, need, limit = report["memory_bytes"], report["memory_need_bytes"], report["memory_limit_bytes"]
    verdict, copied = "fits" if report["fits"] else "DOES NOT FIT", memory["outputs"] - memory["aliased"]
    return (
        f"memory per device   {need / GIB:.2f} of {limit / GIB:.2f} GiB: {verdict} (arguments "
        f"{memory['arguments'] / GIB:.2f}, outputs that do not take their place {copied / GIB:.2f}; by "
        f"{report['memory_source']})"
    )


def _describe_operations(report: dict) -> list[str]:
    executed, model = report["executed_flops"], report["model_flops"]
    return [
        f"model operations    {report['model_flops_per_token'] / 1e9:.2f} GFLOP per token with causal attention "
        f"counted once ({report['model_flops_per_token_all_keys'] / 1e9:.2f} counting masked keys); per device "
        f"{model / 1e12:.4g} TFLOP, {report['seconds_at_peak']:.4g} s at peak",
        f"executed            {executed / 1e12:.4g} TFLOP per device, {executed / model:.2f} of the model's",
    ]


def _describe_time(seconds: dict) -> list[str]:
    parts = f"roofline {seconds['roofline']:.4g}"
    if seconds["cycles"] is not None:
        parts += f", compiler's cycles {seconds['cycles']:.4g}"
    parts += (
        f", attention and other kernels {seconds['kernels']:.4g}, collectives {seconds['synchronous']:.4g} alone and "
        f"{seconds['asynchronous']:.4g} beside compute"
    )
    if seconds["exposed"] is not None:
        believable = seconds["exposed"] <= seconds["high"]  # libtpu 0.0.42 counts hundreds of seconds for TPU v7
        parts += f", of which the scheduler sees {seconds['exposed']:.4g} exposed" if believable else ""
    return [f"step                {seconds['low']:.4g} to {seconds['high']:.4g} s, an estimate ({parts})"]


def describe_speed(report: dict) -> str:
    """Tokens per second, time per token and MFU, in one line."""
    speed, mfu, usual = report["tokens_per_second_per_chip"], report["mfu"], report["mfu_all_keys"]
    hours = report["chip_hours_per_trillion_tokens"]
    return (
        f"speed               {speed['low']:,.0f} to {speed['high']:,.0f} tokens/s per chip, {hours['low']:,.0f} to "
        f"{hours['high']:,.0f} chip-hours per trillion tokens; MFU "
        f"{100 * mfu['low']:.0f} to {100 * mfu['high']:.0f}% "
        f"({100 * usual['low']:.0f} to {100 * usual['high']:.0f}% counting masked keys)"
    )


def _describe_collectives(report: dict) -> list[str]:
    lines = [describe_speed(report), "collectives         GiB per device and step: payload, on the wire, of it alone"]
    for kind, total in sorted(report["collectives"].items()):
        lines.append(
            f"  {kind:<20}{total['count']:>6} x {total['payload_bytes'] / GIB:9.3f} {total['wire_bytes'] / GIB:9.3f} "
            f"{total['synchronous_wire_bytes'] / GIB:9.3f}"
        )
    for kind, total in sorted(report["least_collectives"].items()):
        lines.append(f"  least {kind:<17}{total['payload_bytes'] / GIB:12.3f} {total['wire_bytes'] / GIB:9.3f}")
    if least := report["least_wire_bytes"]:
        lines.append(f"  on the wire {report['wire_bytes'] / least:.2f} of the least")
    if between := report["between_slices_bytes"]:
        lines.append(
            f"between slices      {between / GIB:.3f} GiB per device at least, "
            f"{report['between_slices_seconds']:.4g} s where nothing hides them"
        )
    return lines
