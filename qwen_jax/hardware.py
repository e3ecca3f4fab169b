"""Devices to compile for, with their public figures."""

import dataclasses
import importlib.util

GIB = 2**30
# These compile with libtpu 0.0.42. Other sizes of these families work in multiples of 2x2x1 chips, one host.
KNOWN_TOPOLOGIES = (
    "v4:2x2x1",
    "v4:4x4x4",
    "v5e:2x2",
    "v5e:2x4",
    "v5e:4x4",
    "v5e:4x8",
    "v5e:8x8",
    "v5e:8x16",
    "v5e:16x16",
    "v5p:2x2x1",
    "v5p:2x2x2",
    "v5p:2x2x4",
    "v5p:2x4x4",
    "v5p:4x4x4",
    "v5p:4x4x8",
    "v5p:4x8x8",
    "v5p:8x8x8",
    "v5p:8x8x16",
    "v6e:2x2",
    "v6e:2x4",
    "v6e:4x4",
    "v6e:4x8",
    "v6e:8x8",
    "v6e:8x16",
    "v6e:16x16",
    "tpu7x:2x2x1",
    "tpu7x:2x2x2",
    "tpu7x:4x4x4",
    "tpu7x:4x4x8",
)


@dataclasses.dataclass(frozen=True)
class HardwareConfig:
    """A kind of device and the number of devices; one file in `gin/hardware/` each.

    Figures are per JAX device, which is one chip, or half a chip of TPU v7.

    Attributes:
      name: shown in reports.
      hbm_gib: memory available to a program, in GiB.
      peak_tflops: bfloat16 operations per second of matrix products, in 10^12.
      hbm_gbps: main-memory bandwidth, in 10^9 bytes per second.
      link_gbps: bandwidth to its neighbors in a ring over all links of the torus, one way, in 10^9 bytes per second.
      clock_ghz: turns the TPU compiler's cycles into seconds; set so that a large product's cycles give the peak.
      topology: name in libtpu, such as "v5p:4x8x8"; None: programs compile only on a machine with these devices.
      wrap: whether each dimension has wrap-around links. Without them, gathers over all chips become all-reduces.
        libtpu 0.0.42 ignores it for several slices.
      slices: number of slices, joined by the data-center network.
      dcn_gbps: a device's share of that network, in 10^9 bytes per second; only for more than one slice.
      devices_per_chip: JAX devices that make one chip.
    """

    name: str
    hbm_gib: float
    peak_tflops: float
    hbm_gbps: float
    link_gbps: float
    clock_ghz: float | None = None
    topology: str | None = None
    wrap: tuple[bool, ...] | None = None
    slices: int = 1
    dcn_gbps: float | None = None
    devices_per_chip: int = 1

    def __post_init__(self):
        for field in ("hbm_gib", "peak_tflops", "hbm_gbps", "link_gbps", "clock_ghz", "dcn_gbps"):
            value = getattr(self, field)
            if value is None and field in ("clock_ghz", "dcn_gbps"):
                continue
            if not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"HardwareConfig.{field} must be a positive number, found {value!r}")
        for field in ("slices", "devices_per_chip"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"HardwareConfig.{field} must be an integer of at least 1, found {value!r}")

    @property
    def hbm_bytes(self) -> int:
        """Memory of one device, in bytes."""
        return int(self.hbm_gib * GIB)

    def devices(self) -> list:
        """Descriptions of the devices, which the compiler accepts in place of devices.

        Raises:
          ValueError: `topology` is None, libtpu is not installed, or libtpu does not know the topology.
        """
        if self.topology is None:
            raise ValueError(
                f"{self.name} can be compiled for only where it is: only of TPUs are there descriptions of absent "
                f"devices. Name another file of gin/hardware, or start the run itself on {self.name}"
            )
        from jax.experimental import topologies

        options: dict[str, object] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.wrap is not None:
            options["wrap"] = self.wrap
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=self.topology, **options).devices
        except Exception as error:  # from libtpu's loader and from the plugin, each of its own kind
            if importlib.util.find_spec("libtpu") is None:
                raise ValueError(
                    f'compiling for {self.topology} needs libtpu, which `pip install -c requirements.txt "jax[tpu]"` '
                    f"brings"
                ) from error
            message = str(error).splitlines()[0].rstrip(".")
            if "INVALID_ARGUMENT" not in message:  # no question of the name: another process may have the library
                raise ValueError(f"libtpu describes no {self.topology} now: {message}") from error
            raise ValueError(
                f"HardwareConfig.topology {self.topology!r}: {message}. Topologies that exist: "
                f"{', '.join(KNOWN_TOPOLOGIES)}, and other sizes of these families in multiples of 2x2x1"
            ) from error
