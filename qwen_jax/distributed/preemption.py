"""Signals as a request to save and stop: SIGTERM, which schedulers send first, and Ctrl-C (SIGINT)."""

import contextlib
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class PreemptionHandler:
    """While open, SIGTERM and Ctrl-C request a save and a clean end instead of ending the process.

    After Ctrl-C the end is a KeyboardInterrupt, so that a script does not go on; a second one does not wait for the
    save. In a job of several processes JAX receives SIGTERM, whichever process gets it, and chooses a step for all.

    Attributes:
      cause: name of what requests the end.
    """

    cause = "SIGTERM"

    def __enter__(self):
        self._requested = False
        self._alone = jax.process_count() == 1
        self._handles = self._alone and threading.current_thread() is threading.main_thread()
        if self._handles:
            numbers = [signal.SIGTERM]
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a script's jobs in the background
                numbers.append(signal.SIGINT)
            self._previous = {one: signal.signal(one, self._request) for one in numbers}
        return self

    def _request(self, number: int, _frame) -> None:
        self._requested = True
        if number == signal.SIGINT:
            self.cause = "Ctrl-C"
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
            with contextlib.suppress(OSError):  # nobody may read it any more: Ctrl-C ends `tee`, too
                os.write(2, b"\nsaving after this step; Ctrl-C once more ends without it\n")

    def should_stop(self, step: int) -> bool:
        """Whether the run stops after `step`: the same answer in every process."""
        if not self._requested and not self._alone:
            self._requested = multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def __exit__(self, kind, *_):
        if self._handles:
            for one, handler in self._previous.items():
                signal.signal(one, handler)
        if kind is None and self.cause == "Ctrl-C":
            raise KeyboardInterrupt("the run is saved, and the same command goes on with it")
