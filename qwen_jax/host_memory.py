"""Memory of the host, where it is the memory of the devices too: programs for CPUs take their buffers from malloc."""

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages(*, on_cpus: bool | None = None) -> None:
    """Starts this command anew in the same process, with pages of 2 MiB for malloc; returns where nothing is to do.

    glibc reads `GLIBC_TUNABLES` when a program starts. Call it before anything large is imported, for the restart
    imports it again. With pages of 4 KiB the system hands out buffers one page at a time, filled with zeros, again and
    again.

    It returns where huge pages are on or refused by the variable, where the system has none, where the C library is not
    glibc 2.35 or newer, where JAX or numpy are imported already, and where another program runs this one's module.

    Args:
      on_cpus: whether the work is done by CPUs; None: where JAX finds no accelerator.
    """
    known = os.environ.get(_TUNABLES, "")
    if "hugetlb" in known or not sys.platform.startswith("linux") or {"numpy", "jax"} & sys.modules.keys():
        return
    try:
        offered = "[never]" not in _HUGE_PAGES.read_text()
    except OSError:
        return
    if not (offered and _glibc_knows() and _is_the_command()):
        return
    if not (has_no_accelerator() if on_cpus is None else on_cpus):
        return
    os.environ[_TUNABLES] = ":".join(filter(None, [known, "glibc.malloc.hugetlb=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _glibc_knows() -> bool:
    """Whether the C library is a glibc that has the setting, 2.35 or newer."""
    try:
        version = re.fullmatch(r"glibc (\d+)\.(\d+).*", os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (OSError, ValueError):
        return False
    return version is not None and (int(version[1]), int(version[2])) >= (2, 35)


def _is_the_command() -> bool:
    """Whether this process was started for the module or file that runs: another program may run it (runpy)."""
    arguments = sys.argv[1:]
    rest = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    if sys.orig_argv[len(rest) :] != arguments or len(rest) < 2:
        return False
    return rest[-1] == sys.argv[0] or Path(sys.argv[0]).as_posix().endswith(f"/{rest[-1].replace('.', '/')}.py")


def has_no_accelerator() -> bool:
    """Whether no plugin is installed by which JAX would find a GPU or a TPU."""
    return not importlib.metadata.entry_points(group="jax_plugins") and not importlib.util.find_spec("libtpu")


def has_huge_pages() -> bool:
    """Whether this process was started with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, for malloc with pages of 2 MiB.

    Linux gives them where /sys/kernel/mm/transparent_hugepage/enabled is `madvise` or `always`. glibc reads the
    variable when a process starts; nothing turns them on later.
    """
    known = os.environ.get(_TUNABLES, "")
    return re.search(r"(^|:)glibc\.malloc\.hugetlb=[12](:|$)", known) is not None and _glibc_knows()


def keep_freed_memory() -> bool:
    """Makes malloc keep freed memory for the next step, where programs run on CPUs and the C library is glibc.

    XLA allocates the buffers of a program at each call and frees them after it. By default glibc returns them to the
    system, which hands them out again page by page, filled with zeros: a step of the tiny model cost 112,000 page
    faults and a fourth of its CPU time; with one heap that does not shrink, 12,000. Call it before JAX starts its
    threads, each of which would make a heap of its own. It was so in all of 4 runs of training; of small programs about
    half kept their faults (findings/jax_cpu_programs_fault_in_their_memory_again.sh).

    The heap gets holes in which the largest buffer of a program does not fit, so that a step may take twice its memory.
    With huge pages there are few faults, and nothing is kept: the same speed with a half to three quarters of the
    memory (benchmarks/RESULTS.md).

    Returns:
      Whether the C library took the settings; False too where JAX has an accelerator to run on, or malloc huge pages.
    """
    if has_huge_pages() or not has_no_accelerator():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return False
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**28}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def return_freed_memory() -> bool:
    """Gives memory that malloc has kept back to the system, once: for what compiling and loading leave behind.

    They take more than a step of a small model does. What a step needs of it comes back page by page with the next one.

    Returns:
      Whether there was any; False too where the C library is not glibc.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return False
