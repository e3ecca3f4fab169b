"""Settings of malloc for programs of CPUs. Page faults themselves are counted in findings/."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_jax import host_memory
from qwen_jax.host_memory import has_huge_pages, keep_freed_memory, restart_with_huge_pages, return_freed_memory


@pytest.fixture
def settings(monkeypatch):
    """The settings that mallopt is called with; the process of the tests keeps its own."""
    found = {}

    class Library:
        def __init__(self, name):
            assert name is None

        @staticmethod
        def mallopt(name, value):
            found[name] = value
            return 1

    monkeypatch.setattr(ctypes, "CDLL", Library)
    return found


def test_one_heap_that_does_not_shrink(settings, monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert keep_freed_memory()
    # In the order of malloc.h: no trimming, room to grow, no mappings of single blocks, one arena.
    assert settings == {-1: 2**31 - 1, -2: 2**28, -4: 0, -8: 1}


@pytest.mark.parametrize(
    ("tunables", "kept"),
    [
        ("glibc.malloc.hugetlb=1", False),
        ("glibc.malloc.check=1:glibc.malloc.hugetlb=2", False),
        ("glibc.malloc.hugetlb=0", True),
        ("glibc.malloc.hugetlb=10", True),
        ("", True),
    ],
)
def test_with_huge_pages_nothing_is_kept(settings, monkeypatch, tunables, kept):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert keep_freed_memory() is kept and bool(settings) is kept


def test_accelerators_keep_the_defaults(settings, monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ["a plugin"])
    assert not keep_freed_memory() and not settings


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_glibc_has_mallopt():
    assert ctypes.CDLL(None).mallopt(-8, 0) == 1  # 0: the default


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_memory_goes_back_to_the_system(root):
    """Blocks below one that stays: malloc alone would keep them."""
    program = """
import ctypes, re
from qwen_jax.host_memory import return_freed_memory
library = ctypes.CDLL(None)
library.mallopt(-4, 0)  # no block is a mapping of its own
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
blocks = [library.malloc(2**20) for _ in range(100)]
for block in blocks:
    ctypes.memset(block, 1, 2**20)
library.malloc(2**20)
full = resident()
for block in blocks:
    library.free(block)
kept = resident()
assert return_freed_memory()
print(full - kept, full - resident())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    kept, given = map(int, done.stdout.split())
    assert kept < 10 and given > 90


def test_another_c_library_is_left_alone(monkeypatch):
    class Library:
        def __init__(self, name):
            pass

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert not return_freed_memory()


_RESTARTING = """
import os, sys
from qwen_jax.host_memory import restart_with_huge_pages
restart_with_huge_pages(on_cpus=True)
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("tunables", "found"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_command_starts_itself_again_with_huge_pages(root, tmp_path, monkeypatch, tunables, found):
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not pages.is_file() or "[never]" in pages.read_text() or platform.libc_ver()[0] != "glibc":
        pytest.skip("the system has no huge pages")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tunables is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    (tmp_path / "restarting.py").write_text(_RESTARTING)
    for program in ([str(tmp_path / "restarting.py")], ["-m", "restarting"]):
        command = subprocess.Popen(
            [sys.executable, *program, "an argument", "--and=another"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"},
        )
        output, _ = command.communicate()
        assert output == f"{command.pid} {found} an argument --and=another\n"


def test_a_program_that_runs_a_command_is_not_started_again(root, tmp_path):
    (tmp_path / "restarting.py").write_text(_RESTARTING)
    outer = "import runpy; print('outer'); runpy.run_module('restarting', run_name='__main__', alter_sys=True)"
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{tmp_path}"
    output = subprocess.run([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True, env=environment).stdout
    assert output.count("outer") == 1 and "None" in output


@pytest.mark.parametrize(("version", "known"), [("glibc 2.34", False), ("glibc 2.35", True), ("glibc 3.1", True)])
def test_older_libraries_have_no_huge_pages(settings, monkeypatch, version, known):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("os.confstr", lambda name: version)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert has_huge_pages() is known and keep_freed_memory() is not known


def test_no_restart_after_the_imports(monkeypatch):
    import numpy  # noqa: F401

    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("started again"))
    monkeypatch.setattr(host_memory, "_is_the_command", lambda: True)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    restart_with_huge_pages(on_cpus=True)


def test_work_for_accelerators_is_not_started_again(monkeypatch):
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("started again"))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ["a plugin"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for name in ("numpy", "jax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(host_memory, "_is_the_command", lambda: True)
    restart_with_huge_pages()
