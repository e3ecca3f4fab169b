"""Environment variables under which the tests, and the commands that they start, compile quickly."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile

VIRTUAL_DEVICES = "--xla_force_host_platform_device_count=8"
# Tests compile hundreds of small programs and run each a few times: to optimize them would take most of the time.
QUICK_COMPILATION = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# XLA ends the process at a flag that it does not know: releases after JAX 0.10 have no other way to emit fusions.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")


def set_up() -> None:
    """Sets the variables in this process, which must not have imported JAX yet.

    The processes of a session share a folder of compiled programs, which goes with the session. To keep the programs
    for the next session, name a folder in JAX_COMPILATION_CACHE_DIR.
    """
    # Some containers forbid Python to keep what it compiles: each of some hundred commands would do it anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), VIRTUAL_DEVICES, *QUICK_COMPILATION])
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # Programs do not say which line of which file each of their operations came from, which takes time to find out.
    # With `collect_garbage_rarely`, a small model is initialized, differentiated and compiled in 1.87 s, not 2.02.
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
    # pytest-xdist's workers inherit the folder of the process that starts them.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="compiled-for-tests-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def collect_garbage_rarely() -> None:
    """Makes this process, and its forks, look for garbage less often than Python does.

    JAX and TensorFlow leave millions of objects that stay, and tracing makes many more: by default Python walks through
    them often.
    """
    gc.set_threshold(20_000, 20, 50)


def one_device() -> dict[str, str]:
    """Environment of a command that sees one CPU device, as on a user's computer."""
    return os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace(VIRTUAL_DEVICES, "")}


def for_compilers() -> dict[str, str]:
    """Environment of a command that compiles for other devices, whose programs must be those of a user."""
    ours = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_TRACEBACK_IN_LOCATIONS_LIMIT")
    return {name: value for name, value in os.environ.items() if name not in ours}
