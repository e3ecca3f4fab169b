"""Settings of malloc for programs of CPUs. Page faults themselves are counted in findings/."""

import ctypes
import platform

import pytest

from qwen_jax.host_memory import keep_freed_memory


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


def test_accelerators_keep_the_defaults(settings, monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ["a plugin"])
    assert not keep_freed_memory() and not settings


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_glibc_has_mallopt():
    assert ctypes.CDLL(None).mallopt(-8, 0) == 1  # 0: the default
