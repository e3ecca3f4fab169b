"""`python -m qwen_jax.train` with OUTPUT_DIR in a bucket: errors of one line, and kills at any request."""

import signal

import pytest

from qwen_jax import files
from qwen_jax.checkpoints.run_folder import saved_steps
from tests.fakes import text_corpus
from tests.object_stores import Fault, FaultProxy, environment, stores  # noqa: F401
from tests.test_hosts import Job, losses

CHANGES = {"TRAIN_STEPS": 60, "CHECKPOINT_EVERY": 20, "EVAL_EVERY": 0, "TrainerConfig.keep_checkpoints": 1}
SHORT_LEASE = {0: "from qwen_jax.files import locks\nlocks.LEASE = 2.0"}
# Requests in the middle of which process 0 is killed: taking the lock, the first file of the run, a checkpoint's data,
# its commit file, the deletion of the one before, and the restoring of a checkpoint.
PHASES = (
    r"PUT .*/\.lock",
    r"PUT .*/model_config\.json",
    r"PUT .*/checkpoints/20/params/",
    r"PUT .*/checkpoints/20/commit\.json",
    r"DELETE .*/checkpoints/20/commit\.json",
    r"GET .*/checkpoints/40/params/",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return text_corpus(tmp_path_factory.mktemp("buckets"), documents=40)


@pytest.mark.parametrize(
    ("output", "kind", "message"),
    [
        ("gs://no-such-bucket/run", None, "there is no bucket gs://no-such-bucket"),
        ("s3://s3-bucket-of-tests//run", None, "two slashes in a row"),
        ("s3://s3-bucket-of-tests/other", None, "holds 'notes.txt' and is not a run folder"),
        ("hdfs://host/run", None, "unknown scheme hdfs://"),
        ("gs://gs-bucket-of-tests/run", "403", "no permission"),
        ("s3://s3-bucket-of-tests/run", "region", "another region: set AWS_REGION"),
    ],
)
def test_what_cannot_be_a_run_is_one_line(stores, run_main, output, kind, message):  # noqa: F811
    files.write_text("s3://s3-bucket-of-tests/other/notes.txt", "")
    store = stores[output[:2]] if output[:2] in stores else stores["s3"]
    with FaultProxy(store) as proxy, environment(store.through(proxy)):
        proxy.faults = [Fault("", kind, count=1_000_000)] if kind else []
        code, said = run_main(["--gin_file=gin/runs/pretrain_tiny.gin", f"--gin.OUTPUT_DIR={output}"])
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_in_each_phase_ends_as_one_that_was_not(stores, corpus, processes):  # noqa: F811
    """SIGTERM first, then SIGKILL in the middle of a request of each phase; the losses are those of a local run."""
    store, size = stores["gs"], {"processes": processes, "devices": 2 // processes}
    output = files.as_path(store.folder(f"run-{processes}"))
    with FaultProxy(store) as proxy, environment(store.through(proxy)):

        def start():
            proxy.seen.clear()
            return Job(corpus, output, patches=SHORT_LEASE, **size, **CHANGES)

        for phase in PHASES:
            job = start()
            proxy.hold(phase)
            proxy.wait_for(phase, timeout=600)
            for process in job.processes:
                process.send_signal(signal.SIGKILL)
            job.wait()
            proxy.release()
            assert set(saved_steps(output)) <= {20, 40}
        job = start()
        proxy.wait_for(r"GET .*/checkpoints/40/", timeout=600)
        job.done()
    assert saved_steps(output) == [60]
    local = corpus / f"local-{processes}"
    Job(corpus, local, **size, **CHANGES).done()
    assert losses(output) == losses(local)
