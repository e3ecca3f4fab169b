"""Estimated time of one run of a compiled TPU program, as a low and a high bound.

The bounds rank programs for one chip. No hardware has confirmed them as absolute times.

Assumptions:
  * high: every instruction takes the cycles that the TPU compiler wrote beside it. For large products these are about
    88% of peak; a plain elementwise addition is charged a third to a quarter of the memory bandwidth.
  * low: every instruction takes the longer of its operations at 90% of peak and its main-memory traffic at 85% of
    bandwidth.
  * hand-written kernels have no cycles. An attention kernel is known by its name, and half of the square of its
    operands is charged at 50% of peak, skipped blocks included; another kernel is charged its declared cost.
  * a collective within a slice takes its bytes on the wire over the bandwidth of all links of the chip, as if it used
    all of them. One that the schedule overlaps with nothing is added; the others cost only what exceeds all compute
    together.
  * traffic between slices is reported beside the bounds and is part of neither, because a program may hide it.
Not modeled: start-up of kernels and of collectives, memory and vector time that hidden collectives take from compute,
host transfers, loading of batches, stragglers.
"""

import dataclasses

from qwen_jax.hardware import HardwareConfig
from qwen_jax.programs.account import Account
from qwen_jax.programs.compiler_log import exposed_cycles

PRODUCT_EFFICIENCY, HBM_EFFICIENCY, KERNEL_EFFICIENCY = 0.9, 0.85, 0.5


@dataclasses.dataclass(frozen=True)
class TimeEstimate:
    """Seconds of one run on one device, by part and in all.

    Attributes:
      cycles: instructions by the compiler's cycle estimates; None where the backend writes none.
      roofline: the same instructions by peak operations and bandwidth.
      kernels: hand-written kernels (attention).
      synchronous, asynchronous: collectives that nothing overlaps, and the others.
      exposed: waiting time for asynchronous collectives as the compiler's scheduler reports it, if its log was given;
        part of neither bound.
    """

    cycles: float | None
    roofline: float
    kernels: float
    synchronous: float
    asynchronous: float
    exposed: float | None = None

    def _all(self, compute: float) -> float:
        return self.synchronous + max(compute + self.kernels, self.asynchronous)

    @property
    def low(self) -> float:
        """Lower bound in seconds, by the roofline."""
        return self._all(self.roofline)

    @property
    def high(self) -> float:
        """Upper bound in seconds, by the compiler's cycles; without cycles, by the roofline with no overlap."""
        if self.cycles is None:
            return self.roofline + self.kernels + self.synchronous + self.asynchronous
        return self._all(self.cycles)

    def to_dict(self) -> dict[str, float | None]:
        """JSON-ready dict, in seconds."""
        return {**dataclasses.asdict(self), "low": self.low, "high": self.high}


def estimate_time(account: Account, hardware: HardwareConfig, log: str | None = None) -> TimeEstimate:
    """Estimates the time of one run of the program with this account.

    Args:
      log: standard error of the TPU compiler under `compiler_log.ENVIRONMENT`.
    """
    peak, bandwidth = hardware.peak_tflops * 1e12, hardware.hbm_gbps * 1e9
    roofline = sum(
        max(flops / (peak * PRODUCT_EFFICIENCY), traffic / (bandwidth * HBM_EFFICIENCY)) * times
        for flops, traffic, times in account.steps
    )
    clock = hardware.clock_ghz * 1e9 if hardware.clock_ghz else None
    wire = sum(total.wire_bytes for total in account.collectives.values())
    synchronous = sum(total.synchronous_wire_bytes for total in account.collectives.values())
    exposed = None
    if log and clock and (found := exposed_cycles(log)):
        exposed = sum(cycles * account.times.get(name, 0) for name, (cycles, _) in found.items()) / clock
    return TimeEstimate(
        cycles=account.cycles / clock if clock and account.cycles else None,
        roofline=roofline,
        kernels=account.kernel_flops / (peak * KERNEL_EFFICIENCY),
        synchronous=synchronous / (hardware.link_gbps * 1e9),
        asynchronous=(wire - synchronous) / (hardware.link_gbps * 1e9),
        exposed=exposed,
    )
