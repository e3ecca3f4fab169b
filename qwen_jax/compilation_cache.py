"""A cache of compiled programs, in the folder of a run or shared by all commands of a user."""

import contextlib
import dataclasses
import hashlib
import os
import platform
import re
from collections.abc import Generator
from pathlib import Path

import jax

_HIT, _MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_SHARED_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class CompilationCache:
    """A folder of compiled programs, for later starts.

    Attributes:
      folder: the folder; None: no cache.
      max_bytes: largest size of the folder; the least recently used programs go first. None: no limit.
    """

    folder: Path | None
    max_bytes: int | None = None

    @contextlib.contextmanager
    def compiling(self) -> Generator[dict[str, int]]:
        """While open, programs come from the cache or are put there; yields the numbers of "hits" and "misses"."""
        counts = {"hits": 0, "misses": 0}
        if self.folder is None:
            yield counts
            return

        def listen(event, **_):
            counts["hits"] += event == _HIT
            counts["misses"] += event == _MISS

        settings = {
            "jax_compilation_cache_dir": str(self.folder),
            "jax_compilation_cache_max_size": -1 if self.max_bytes is None else self.max_bytes,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in settings}
        jax.monitoring.register_event_listener(listen)
        try:
            self._set(settings)
            yield counts
        finally:
            self._set(before)
            jax.monitoring.unregister_event_listener(listen)

    @staticmethod
    def _set(settings):
        from jax.experimental.compilation_cache import compilation_cache

        for name, value in settings.items():
            jax.config.update(name, value)
        # JAX decides once whether there is a cache; this makes it look again.
        compilation_cache.reset_cache()


def shared_cache() -> CompilationCache:
    """A cache for all commands of this user, `$XDG_CACHE_HOME/qwen_jax/compiled-KEY` (`~/.cache` by default).

    JAX looks up a program by its text, the compiler's version and options, and the kind of device, but not by the
    instruction set of a CPU; a program that was compiled for a larger one crashes. KEY stands for the processor, so
    machines that share a home do not share programs. A cache that JAX already has (JAX_COMPILATION_CACHE_DIR) stays
    as it is.
    """
    # JAX adds its options to the class of jax.config at run time, so its stub lacks them.
    if jax.config.jax_compilation_cache_dir:  # ty: ignore[missing-attribute]
        return CompilationCache(None)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return CompilationCache(home / "qwen_jax" / f"compiled-{_processor_key()}", _SHARED_BYTES)


@contextlib.contextmanager
def programs_kept() -> Generator[None]:
    """While open, or as a decorator, programs come from the shared cache or are put there."""
    with shared_cache().compiling():
        yield


def _processor_key() -> str:
    """A hash of the processor's model and instruction set."""
    described = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        described += sorted(set(re.findall(r"^(?:flags|Features|model name)\s*:.*$", text, re.MULTILINE)))
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:12]
