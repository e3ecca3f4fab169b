"""Devices to compile for, with their public figures."""

import dataclasses
import importlib.metadata
import importlib.util
import re

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
class GpuDescription:
    """What the compiler asks of an NVIDIA GPU that is not here, besides memory and bandwidth.

    Attributes:
      compute_capability: (major, minor).
      multiprocessors: their number.
      clock_ghz: boost clock.
      l2_mib: size of the second-level cache, in MiB.
      lanes: float32 units of a multiprocessor; by default those of H100 and H200, as below.
      shared_memory_kib: of a multiprocessor; one block can use 1 KiB less.
      cudnn: the version that programs are compiled for.
    """

    compute_capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    l2_mib: int
    lanes: int = 128
    shared_memory_kib: int = 228
    cudnn: tuple[int, int, int] = (9, 10, 0)

    def target_config(self, name: str, hbm_bytes: int, hbm_gbps: float) -> str:
        """The same as text of XLA's message `GpuTargetConfigProto`, with the limits that A100, H100 and H200 share."""
        shared = self.shared_memory_kib * 1024
        device = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "threads_per_core_limit": 2048,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
            "core_count": self.multiprocessors,
            "fpus_per_core": self.lanes,
            "shared_memory_per_block": 48 * 1024,
            "shared_memory_per_block_optin": shared - 1024,
            "shared_memory_per_core": shared,
            "l2_cache_size": self.l2_mib * 2**20,
            "clock_rate_ghz": self.clock_ghz,
            "memory_bandwidth": int(hbm_gbps * 1e9),
            "device_memory_size": hbm_bytes,
        }
        fields = " ".join(f"{field}: {value}" for field, value in device.items())
        capability = "cuda_compute_capability {{ major: {} minor: {} }}".format(*self.compute_capability)
        cudnn = "dnn_version_info {{ major: {} minor: {} patch: {} }}".format(*self.cudnn)
        named = f'platform_name: "CUDA" device_description_str: "{name}"'
        return f"gpu_device_info {{ {fields} {capability} }} {cudnn} {named}"


_GPU_PREFIX = "cuda:"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


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
      topology: name in libtpu, such as "v5p:4x8x8"; of GPUs "cuda:1xMACHINESxGPUS", with the GPUs of one machine; None:
        programs compile only on a machine with these devices.
      wrap: whether each dimension has wrap-around links. Without them, gathers over all chips become all-reduces.
        libtpu 0.0.42 ignores it for several slices.
      slices: number of slices, joined by the data-center network.
      dcn_gbps: a device's share of that network, in 10^9 bytes per second; only for more than one slice.
      devices_per_chip: JAX devices that make one chip.
      gpu: what else the compiler asks; for a topology of GPUs.
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
    gpu: GpuDescription | None = None

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

    @property
    def of_gpus(self) -> bool:
        """Whether `topology` is one of GPUs."""
        return (self.topology or "").startswith(_GPU_PREFIX)

    def devices(self) -> list:
        """Descriptions of the devices, which the compiler accepts in place of devices.

        Raises:
          ValueError: `topology` is None, the compiler for these devices is not installed, or it does not know the
            topology.
        """
        if self.topology is None:
            raise ValueError(
                f"{self.name} can be compiled for only where it is: its file has no HardwareConfig.topology. Name "
                f"another file of gin/hardware, or start the run itself on {self.name}"
            )
        return self._gpus(self.topology) if self.of_gpus else self._tpus(self.topology)

    def _gpus(self, topology: str) -> list:
        from jax.experimental import topologies

        shape = topology.removeprefix(_GPU_PREFIX)
        if self.gpu is None or not re.fullmatch(r"1x[1-9]\d*x[1-9]\d*", shape):
            raise ValueError(
                f"HardwareConfig.topology {topology!r}: expected cuda:1xMACHINESxGPUS, such as cuda:1x1x8, and a "
                f"HardwareConfig.gpu, as gin/hardware/options/h200.gin has it"
            )
        if not (_installed("jax_cuda13_plugin") and _installed("nvidia.cudnn")):
            version = importlib.metadata.version("jax")
            raise ValueError(
                f"compiling for {self.name} needs JAX's plugin for CUDA and cuDNN, though no GPU: pip install "
                f"--no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} nvidia-cudnn-cu13 "
                f"(docs/how_to/gpu_clusters.md)"
            )
        target = self.gpu.target_config(self.name, self.hbm_bytes, self.hbm_gbps)
        try:
            # The name has no meaning; the options say it all.
            return topologies.get_topology_desc("gpus", "cuda", topology=shape, target_config=target).devices
        except Exception as error:  # of the plugin, each of its own kind
            message = str(error).splitlines()[0].rstrip(".")
            raise ValueError(f"JAX's plugin for CUDA describes no {topology}: {message}") from error

    def _tpus(self, topology: str) -> list:
        from jax.experimental import topologies

        options: dict[str, object] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.wrap is not None:
            options["wrap"] = self.wrap
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
        except Exception as error:  # from libtpu's loader and from the plugin, each of its own kind
            if importlib.util.find_spec("libtpu") is None:
                raise ValueError(
                    f'compiling for {topology} needs libtpu, which `pip install -c requirements.txt "jax[tpu]"` brings'
                ) from error
            message = str(error).splitlines()[0].rstrip(".")
            if "INVALID_ARGUMENT" not in message:  # no question of the name: another process may have the library
                raise ValueError(f"libtpu describes no {topology} now: {message}") from error
            raise ValueError(
                f"HardwareConfig.topology {topology!r}: {message}. Topologies that exist: "
                f"{', '.join(KNOWN_TOPOLOGIES)}, and other sizes of these families in multiples of 2x2x1"
            ) from error
