"""The end of a process that hangs, whatever else fails; tests/test_hosts.py has jobs of several processes."""

import queue
import time

from qwen_jax.distributed import hosts, watchdog


def test_a_hang_ends_the_process_also_where_its_stacks_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "stacks_0.txt").mkdir()
    ended: queue.Queue = queue.Queue()
    monkeypatch.setattr(watchdog, "exit_process", lambda *said: ended.put(said))
    with watchdog.Watchdog(hosts.JobConfig(hang_timeout=0.1), folder=tmp_path) as one:
        one.activity.now("computing", 3)
        text, code = ended.get(timeout=20)
    assert code == hosts.TRY_AGAIN and "while computing after step 3" in text
    assert f"are in standard error ({tmp_path / 'stacks_0.txt'} could not be written: " in text


def test_an_activity_with_patience_may_take_as_many_times_as_long(tmp_path, monkeypatch):
    ended: queue.Queue = queue.Queue()
    monkeypatch.setattr(watchdog, "exit_process", lambda *said: ended.put((time.monotonic(), *said)))
    with watchdog.Watchdog(hosts.JobConfig(hang_timeout=0.1), folder=tmp_path) as one:
        one.activity.now("saving", 3, patience=8.0)
        began = one.activity.since
        when, text, _ = ended.get(timeout=20)
    assert when - began > 0.8 and "while saving after step 3" in text
