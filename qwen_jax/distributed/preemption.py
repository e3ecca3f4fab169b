"""SIGTERM, which schedulers send before they take a machine away, as a request to save and stop."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class PreemptionHandler:
    """While open, SIGTERM requests a save and a clean end instead of ending the process.

    In a job of several processes JAX receives the signal, whichever process gets it, and chooses a step for all.
    """

    def __enter__(self):
        self._requested = False
        self._alone = jax.process_count() == 1
        self._handles = self._alone and threading.current_thread() is threading.main_thread()
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *_):
        self._requested = True

    def should_stop(self, step: int) -> bool:
        """Whether the run stops after `step`: the same answer in every process."""
        if not self._requested and not self._alone:
            self._requested = multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def __exit__(self, *_):
        if self._handles:
            signal.signal(signal.SIGTERM, self._previous)
