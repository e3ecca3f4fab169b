"""`python -m qwen_jax.train` as several processes of one job: real ones, on this machine, killed, stopped, hung.

Each has a device or two of its own and reaches the others by Gloo over TCP, as CPU hosts of a cluster would. The
everyday tests are one chain of six starts (about a minute on two free cores); the rest is marked slow.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from qwen_jax.checkpoints.arrays import load_params
from qwen_jax.checkpoints.run_folder import saved_steps
from qwen_jax.distributed.hosts import TRY_AGAIN
from qwen_jax.training.metrics import read_metrics
from tests.environment import one_device
from tests.fakes import text_corpus
from tests.jobs import free_port
from tests.warm_python import python

SETTINGS = {
    "MIXTURE_OR_TASK": "local_files",
    "SEQUENCE_LENGTH": 32,
    "BATCH_SIZE": 8,
    "TRAIN_STEPS": 240,
    "WARMUP_STEPS": 5,
    "CHECKPOINT_EVERY": 50,
    "EVAL_EVERY": 120,
    "EVAL_BATCHES": 2,
    "LOG_EVERY": 10,
    "PEAK_LEARNING_RATE": 3e-4,
    "MeshConfig.data": 2,
    "ModelConfig.vocab_size": 512,
    "ModelConfig.hidden_size": 32,
    "ModelConfig.num_layers": 2,
    "ModelConfig.num_heads": 2,
    "ModelConfig.head_dim": 16,
    "ModelConfig.ffn_size": 64,
}
HEARTBEAT = 20
# Where no process is to be lost, a busy machine must not look like a lost one.
PATIENT_HEARTBEAT = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return text_corpus(tmp_path_factory.mktemp("hosts"), documents=40)


class Job:
    """Processes of one training job, their logs in files."""

    def __init__(
        self,
        corpus,
        output,
        processes=2,
        devices=1,
        flags=(),
        patches=None,
        per_process=None,
        heartbeat=PATIENT_HEARTBEAT,
        only=None,
        slurm=None,
        interpreter=None,
        **changes,
    ):
        settings = {
            **SETTINGS,
            "OUTPUT_DIR": output,
            "CACHE_DIR": corpus / "cache",
            "VOCABULARY": corpus / "small.tiktoken",
            "local_files.pattern": corpus / "text",
            "local_files.validation_share": 0.2,
            **changes,
        }
        environment = one_device() | {"JAX_NUM_CPU_DEVICES": str(devices)}
        address = f"localhost:{free_port()}"
        self.output, self.logs, self.processes = output, [], []
        for index in range(processes) if only is None else [only]:
            place = (
                ["--num_processes=1"]
                if processes == 1
                else [
                    f"--coordinator_address={address}",
                    f"--num_processes={processes}",
                    f"--process_id={index}",
                    f"--heartbeat_timeout={heartbeat}",
                ]
            )
            if slurm is not None:
                # What srun sets; the process is told nothing else.
                place = [f"--heartbeat_timeout={heartbeat}"]
                environment = {
                    **environment,
                    "SLURM_JOB_ID": str(slurm),
                    "SLURM_STEP_NODELIST": "localhost",
                    "SLURM_NTASKS": str(processes),
                    "SLURM_PROCID": str(index),
                    "SLURM_LOCALID": str(index),
                }
            own = {**settings, **(per_process or {}).get(index, {})}
            arguments = [
                "--gin_file=gin/runs/pretrain_tiny.gin",
                *place,
                *flags,
                *(f"--gin.{name}={value}" for name, value in own.items()),
            ]
            start = ["-m", "qwen_jax.train"]
            if patch := (patches or {}).get(index):
                start = ["-c", f"from qwen_jax import command_line, train\n{patch}\ncommand_line.run(train.main)"]
            self.logs.append(corpus / f"{output.name}-{len(list(corpus.glob('*.log')))}.log")
            with open(self.logs[-1], "w") as log:
                start = [interpreter or python(), *start]
                self.processes.append(subprocess.Popen([*start, *arguments], env=environment, stdout=log, stderr=log))

    def said(self, index) -> str:
        return self.logs[index].read_text()

    def errors(self, index) -> list[str]:
        return [line for line in self.said(index).splitlines() if line.startswith("error: ")]

    def when(self, step) -> None:
        """Returns once this job, not one before it, has logged step `step`."""
        self.until(lambda: "step/s" in self.said(0) and any(row["step"] >= step for row in read_metrics(self.output)))

    def saved(self, step) -> None:
        """Returns once a checkpoint of step `step` or of a later one is committed."""
        self.until(lambda: max(saved_steps(self.output), default=-1) >= step)

    def until(self, happened) -> None:
        """Returns once `happened()`; fails if a process ends before."""
        while not happened():
            assert all(process.poll() is None for process in self.processes), self.said(0) + self.said(-1)
            time.sleep(0.02)

    def wait(self, timeout=3000, without=()) -> list[int]:
        """Exit codes of all processes but those in `without`."""
        deadline = time.monotonic() + timeout
        try:
            return [
                process.wait(max(deadline - time.monotonic(), 0.1))
                for index, process in enumerate(self.processes)
                if index not in without
            ]
        except subprocess.TimeoutExpired:
            pytest.fail("\n\n".join(self.said(index)[-3000:] for index in range(len(self.processes))))
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def done(self) -> None:
        assert set(self.wait()) == {0}, "\n\n".join(self.said(i)[-3000:] for i in range(len(self.processes)))


def losses(output):
    return {row["step"]: row["loss"] for row in read_metrics(output) if "loss" in row}


def assert_same_run(output, reference, bits: bool):
    here, there = losses(output), losses(reference)
    assert here.keys() == there.keys()
    if bits:
        assert here == there
    for step, loss in here.items():
        assert loss == pytest.approx(there[step], rel=2e-5), step
    pairs = zip(jax.tree.leaves(load_params(output)[1]), jax.tree.leaves(load_params(reference)[1]), strict=True)
    for one, other in pairs:
        if bits:
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-5)


def held(step: int, until) -> dict[int, str]:
    """Patches of two processes: neither reads the examples of step `step` before the file `until` exists.

    However slow this test is, the job cannot have ended by the time it does something to it.
    """
    patch = f"""
import os, time
from qwen_jax.data import loader
read = loader.ExampleLoader.read
def held(self, start, stop):
    while self.repeat and start >= {step * SETTINGS["BATCH_SIZE"]} and not os.path.exists({str(until)!r}):
        time.sleep(0.02)
    return read(self, start, stop)
loader.ExampleLoader.read = held
"""
    return {0: patch, 1: patch}


@pytest.fixture(scope="module")
def alone(corpus):
    """The unbroken run of one process with two devices."""
    Job(corpus, corpus / "alone", processes=1, devices=2).done()
    return corpus / "alone"


def test_a_job_survives_a_lost_process_a_notice_and_another_number_of_processes(corpus, alone):
    output = corpus / "job"
    held_up = held(80, corpus / "never")
    job = Job(corpus, output, heartbeat=HEARTBEAT, patches=held_up, interpreter=sys.executable)
    job.when(60)
    job.saved(50)
    job.processes[1].kill()
    assert job.wait(without=[1]) == [TRY_AGAIN], job.said(0)
    # These are our words: JAX notices a lost process, too, but 90 s later.
    assert f"process 1 ({socket.gethostname()}, pid {job.processes[1].pid}) gave no sign of life" in job.errors(0)[0]
    assert saved_steps(output) == [50]

    job = Job(corpus, output, patches=held(80, corpus / "told"))
    job.when(60)
    job.processes[1].send_signal(signal.SIGTERM)
    (corpus / "told").touch()
    job.done()
    assert "stopped by SIGTERM after step" in job.said(0) and "stopped by SIGTERM" not in job.said(1)
    stopped = max(saved_steps(output))
    assert stopped < 240 and f"after step {stopped}, saved" in job.said(0)

    # The rest in one process with as many devices: the checkpoint of two is read by one.
    Job(corpus, output, processes=1, devices=2).done()
    assert_same_run(output, alone, bits=False)
    rows = read_metrics(output)
    assert [row["processes"] for row in rows if "processes" in row] == [2, 2, 1] and rows[0]["attention"] == "xla"
    hosts = next(row for row in rows if "hosts/step_median" in row)
    assert hosts["hosts/step_min"] <= hosts["hosts/step_median"] <= hosts["hosts/step_max"]
    assert hosts["hosts/busy_slowest"] in (0, 1)
    account = json.loads((output / "goodput.json").read_text())["starts"]
    assert len(account) == 3 and account[0]["kept"] <= account[0]["to"] and account[2]["first"] == stopped


def test_under_slurm_processes_find_each_other(corpus):
    """Two tasks that are told nothing but what Slurm says to every task: one job, each with one device."""
    short = {"TRAIN_STEPS": 6, "EVAL_EVERY": 6, "LOG_EVERY": 1, "CHECKPOINT_EVERY": 6}
    # JAX listens on port 61440 + the job's number modulo 4096.
    job = Job(corpus, corpus / "slurm", slurm=free_port(61440, 65536) - 61440, **short)
    job.done()
    assert "2 device(s)" in job.said(0) and "2 process(es)" in job.said(0)
    assert list(losses(corpus / "slurm")) == [1, 2, 3, 4, 5, 6]


# Version of another host, which is also slow to read the verdict: process 0, where it lies, must not be gone by then.
OTHER_VERSION = """
import time
from qwen_jax.distributed import hosts
hosts.jaxlib.__version__ = "0.0.1"
wait_for = hosts.wait_for
def slowly(*arguments):
    time.sleep(4)
    return wait_for(*arguments)
hosts.wait_for = slowly
"""


def test_processes_that_differ_are_refused_and_named(corpus):
    job = Job(
        corpus,
        corpus / "mixed",
        processes=3,
        per_process={1: {"TRAIN_STEPS": 700}},
        patches={2: OTHER_VERSION},
    )
    assert job.wait() == [2, 2, 2], job.said(1) + job.said(2)
    for index in range(3):
        (error,) = job.errors(index)
        assert f"process 1 ({socket.gethostname()}, pid" in error and "TRAIN_STEPS = 700" in error
        assert f"process 2 ({socket.gethostname()}, pid" in error and "jaxlib 0.0.1" in error
    assert not (corpus / "mixed").exists()


def test_flags_of_a_job_that_make_no_sense_are_named(corpus):
    from qwen_jax import train

    for flags, message in (
        (["--process_id=1"], "--process_id needs --coordinator_address and --num_processes"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], r"must be in \[0, 2\)"),
        (["--coordinator_address=a", "--num_processes=2", "--process_id=0"], "HOST:PORT"),
        (["--heartbeat_timeout=0"], "--heartbeat_timeout must be positive"),
        (["--join_timeout=0"], "--join_timeout must be positive"),
        (["--hang_timeout=-1"], "--hang_timeout must be at least 0"),
        (["--hang_timeout=inf"], "--hang_timeout must be .* found inf"),
        (["--join_timeout=1e300"], "--join_timeout must be .*found 1e.300"),
        (["--heartbeat_timeout=nan"], "--heartbeat_timeout must be .*found nan"),
    ):
        with pytest.raises(ValueError, match=message):
            files = ["--gin_file=gin/runs/pretrain_tiny.gin"]
            train.main([*files, "--gin.OUTPUT_DIR=/nowhere", *flags])


def test_a_job_that_does_not_come_together_ends_and_says_so(corpus):
    """Process 0 of one job and process 1 of another: nobody else comes."""
    jobs = [Job(corpus, corpus / f"only-{index}", only=index, flags=["--join_timeout=3"]) for index in range(2)]
    reasons = ("at least one of 2 processes has not joined at", "process 0 cannot be reached at")
    for job, reason in zip(jobs, reasons, strict=True):
        assert job.wait() == [TRY_AGAIN], job.said(0)
        assert f"error: {reason} localhost:" in job.errors(0)[0] and "after 3 s (--join_timeout)" in job.errors(0)[0]


HANG = """
from qwen_jax.data import loader
import time
read = loader.ExampleLoader.read
def hanging(self, start, stop):
    if start >= 400:
        time.sleep(10_000)
    return read(self, start, stop)
loader.ExampleLoader.read = hanging
"""


@pytest.mark.slow
def test_a_lost_job_goes_on_bit_for_bit(corpus):
    """Two processes killed and started again, against two that were left alone; process 0 is the one that is lost."""
    short = {"TRAIN_STEPS": 300, "LOG_EVERY": 10}
    Job(corpus, corpus / "left alone", **short).done()
    output = corpus / "killed"
    job = Job(corpus, output, heartbeat=HEARTBEAT, patches=held(80, corpus / "never"), **short)
    job.saved(50)
    job.processes[0].kill()
    assert job.wait(without=[0]) == [TRY_AGAIN]
    assert f"process 0 ({socket.gethostname()}, pid {job.processes[0].pid}), where the job's" in job.said(1)
    Job(corpus, output, **short).done()
    assert_same_run(output, corpus / "left alone", bits=True)


@pytest.mark.slow
@pytest.mark.parametrize("which", [1, 0])
def test_a_process_that_hangs_is_named_and_all_write_their_stacks(corpus, which):
    output = corpus / f"hang-{which}"
    job = Job(corpus, output, patches={which: HANG}, flags=["--hang_timeout=60"])
    assert job.wait() == [TRY_AGAIN] * 2
    for index in range(2):
        assert f"process {which} ({socket.gethostname()}, pid" in job.errors(index)[-1], job.said(index)
        assert "reading the batch of step" in job.errors(index)[-1] and "the others wait for" in job.errors(index)[-1]
        assert "Thread 0x" in job.said(index)
    assert (output / f"stacks_{which}.txt").exists()


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_used_by_none(corpus):
    short = {"TRAIN_STEPS": 40, "LOG_EVERY": 1, "CHECKPOINT_EVERY": 20, "EVAL_EVERY": 0}
    output = corpus / "unreadable"
    Job(corpus, output, **short).done()
    reference = losses(output)
    # Each process writes files of its own; those of process 1 are damaged.
    files = [p for p in (output / "checkpoints" / "40").rglob("*process_1*/d/*") if p.is_file()]
    assert files
    for file in files:
        file.write_bytes(b"")
    job = Job(corpus, output, **short)
    job.done()
    assert "after step 20" in job.said(0) and (output / "checkpoints" / "unreadable-40").is_dir()
    assert losses(output) == reference


@pytest.mark.slow
def test_a_notice_to_every_process_saves_one_step(corpus):
    job = Job(corpus, corpus / "notice", processes=4, TRAIN_STEPS=100_000, CHECKPOINT_EVERY=100_000, EVAL_EVERY=0)
    job.when(20)
    for process in job.processes:
        process.send_signal(signal.SIGTERM)
    job.done()
    (step,) = saved_steps(corpus / "notice")
    assert f"stopped by SIGTERM after step {step}" in job.said(0)


@pytest.mark.slow
def test_a_process_that_is_frozen_is_lost(corpus):
    job = Job(
        corpus, corpus / "frozen", heartbeat=HEARTBEAT, patches=held(40, corpus / "never"), interpreter=sys.executable
    )
    job.when(20)
    job.processes[1].send_signal(signal.SIGSTOP)
    assert job.wait(without=[1]) == [TRY_AGAIN]
    assert "process 1 (" in job.errors(0)[0] and "gave no sign of life" in job.errors(0)[0]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_its_text(corpus):
    patch = HANG.replace("time.sleep(10_000)", "raise OSError('the disk of this host is gone')")
    job = Job(corpus, corpus / "one error", patches={1: patch})
    assert job.wait() == [2, 2]
    assert "the disk of this host is gone" in job.errors(1)[0]
    assert f"process 1 ({socket.gethostname()}, pid" in job.errors(0)[0]
    assert "the disk of this host is gone" in job.errors(0)[0]


# What CACHE_DIR on a disk of its own would give a host that was set up at another time.
OTHER_DATA = """
loader = train.ExampleLoader
train.ExampleLoader = lambda *names, **where: loader(*names, **{**where, "seed": 7})
"""


@pytest.mark.slow
def test_a_host_with_other_data_is_refused_and_named(corpus):
    job = Job(corpus, corpus / "other data", patches={1: OTHER_DATA}, TRAIN_STEPS=6)
    assert job.wait() == [2, 2], job.said(0)
    for index in range(2):
        (error,) = job.errors(index)
        assert "are not those of process 0: all hosts must see the same CACHE_DIR" in error, error
    assert f"process 1 ({socket.gethostname()}, pid" in job.errors(0)[0]
    assert not saved_steps(corpus / "other data")


@pytest.mark.slow
def test_any_split_into_processes_gives_the_same_losses(corpus):
    """Four devices in one process, two and four; then the checkpoint of four goes on in two and one, other meshes."""
    short = {"TRAIN_STEPS": 40, "EVAL_EVERY": 20, "LOG_EVERY": 1, "CHECKPOINT_EVERY": 20, "MeshConfig.tensor": 1}
    runs = {}
    for processes in (1, 2, 4):
        runs[processes] = corpus / f"split-{processes}"
        Job(corpus, runs[processes], processes=processes, devices=4 // processes, **short).done()
        assert_same_run(runs[processes], runs[1], bits=False)
    # Rows that a process holds need not be neighbors: tensor lies inside fsdp, data outside.
    longer = {**short, "TRAIN_STEPS": 40}
    for processes, mesh in (
        (2, {"MeshConfig.data": 1, "MeshConfig.fsdp": 4}),
        (1, {"MeshConfig.data": 2, "MeshConfig.tensor": 2}),
    ):
        copy = corpus / f"resumed-{processes}"
        shutil.copytree(runs[4], copy)
        shutil.rmtree(copy / "checkpoints" / "40")
        job = Job(corpus, copy, processes=processes, devices=4 // processes, **{**longer, **mesh})
        job.done()
        assert "resuming" in job.said(0) and "after step 20" in job.said(0)
        assert_same_run(copy, runs[1], bits=False)
