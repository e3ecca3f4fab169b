"""Looking into a run: memory errors that name what is large, traces, kept programs, the account of its time."""

import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import files
from qwen_jax.checkpoints.run_folder import CheckpointError, write_run_files
from qwen_jax.compilation_cache import CompilationCache
from qwen_jax.distributed.watchdog import Activity
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.callbacks import Trace
from qwen_jax.training.goodput import Goodput, process_start_time, written_shares
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.profiling import OutOfMemory, explain_out_of_memory, largest_arrays
from qwen_jax.training.reporting import host_statistics
from qwen_jax.training.run import Run
from qwen_jax.training.spool import Spool
from qwen_jax.training.trainer import standard_callbacks
from qwen_jax.training.trainer_config import TrainerConfig
from tests.fakes import FakeExamples, prepared_trainer, small_model

TPU_MESSAGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used \
22.31G of 15.75G hbm. Exceeded hbm capacity by 6.56G.

Total hbm usage >= 22.81G:
    reserved        530.00M
    program          22.31G
    arguments            0B

Program hbm requirement 22.31G:
    HLO temp         22.31G

  Largest program allocations in hbm:

  1. Size: 9.27G
     Operator: op_name="jit(train_step)/transpose/dot_general"
     Shape: f32[4096,2,151936]{2,1,0:T(8,128)}
     Unpadded size: 9.27G
     XLA label: fusion.1
     Allocation type: HLO temp
     ==========================

  2. Size: 4.64G
     Shape: bf16[4096,2,151936]{2,1,0:T(8,128)(2,1)}
     Allocation type: HLO temp
     ==========================

  3. Size: 2.00G
     Operator: op_name="jit(train_step)/mlp/up"
     Shape: bf16[8192,2,22016]{2,1,0}
     ==========================
"""
# libtpu of 2026 says this alone; the list of buffers goes to its log.
SHORT_TPU_MESSAGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (61.02G) exceeds "
    "available HBM (15.75G)."
)
LONG_GPU_MESSAGE = """RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6291456 bytes.
BufferAssignment OOM Debugging.
Peak buffers:
\tBuffer 1:
\t\tSize: 96.00MiB
\t\tOperator: op_name="jit(train_step)/reduce_sum[axes=(2,)]" source_file="layers.py" source_line=652
\t\tXLA Label: fusion
\t\tShape: f32[128,256,768]
\t\t==========================

\tBuffer 2:
\t\tSize: 384.0KiB
\t\tEntry Parameter Subshape: f32[256,128,3]
\t\t==========================
"""
GPU_MESSAGE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."


def trainer(folder, cache=CompilationCache(None), **config):
    write_run_files(folder, small_model(), None)
    return prepared_trainer(
        Qwen(small_model()),
        next_token_prediction(),
        OptimizerConfig(1e-2, warmup_steps=2),
        TrainerConfig(train_steps=5, batch_size=8, sequence_length=16, log_every=1, checkpoint_every=100, **config),
        make_mesh(MeshConfig(), jax.devices()[:1]),
        FakeExamples(),
        None,
        folder,
        cache=cache,
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            TPU_MESSAGE,
            [
                "Used 22.31G of 15.75G hbm",
                "transpose/dot_general f32[4096,2,151936]{2,1,0:T(8,128)} 9.27G",
                "; bf16[4096,2,151936]{2,1,0:T(8,128)(2,1)} 4.64G",
                "mlp/up bf16[8192,2,22016]{2,1,0} 2.00G",
            ],
        ),
        (SHORT_TPU_MESSAGE, ["(61.02G) exceeds available HBM (15.75G)", "params/output float32[1024, 512] 2.00 MiB"]),
        (
            LONG_GPU_MESSAGE,
            [
                "allocate 6291456 bytes",
                "jit(train_step)/reduce_sum[axes=(2,)] f32[128,256,768] 96.00MiB",
                "; f32[256,128,3] 384.0KiB",
            ],
        ),
        (GPU_MESSAGE, ["17179869184 bytes", "params/output float32", "MiB"]),
    ],
    ids=["older TPU", "TPU", "GPU", "GPU without a list"],
)
def test_want_of_memory_names_the_need_and_the_three_largest_buffers(tmp_path, message, expected):
    state = {"params": {"output": jax.ShapeDtypeStruct((1024, 512), jnp.float32), "bias": jnp.zeros(3)}}
    with pytest.raises(OutOfMemory) as raised, explain_out_of_memory("training", tmp_path / "run", state):
        raise jax.errors.JaxRuntimeError(message)
    for text in ("out of memory while training", "fsdp", *expected):
        assert text in str(raised.value), str(raised.value)
    # pprof's format is gzipped.
    assert (tmp_path / "run" / "memory.prof").read_bytes()[:2] == b"\x1f\x8b"


def test_other_errors_pass(tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explain_out_of_memory("training", tmp_path, {}):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    assert not list(tmp_path.iterdir())


def test_a_step_without_memory_ends_the_run_with_names_of_its_state(tmp_path):
    run = trainer(tmp_path / "run")

    def step(state, batch):
        raise jax.errors.JaxRuntimeError(GPU_MESSAGE)

    run._train_step = step
    with pytest.raises(OutOfMemory, match="while training") as raised:
        run.run()
    assert re.search(r"params/layers/mlp/.* float32\[2, .*\] [\d.]+ MiB", str(raised.value))
    assert str(raised.value).count("MiB") == 3 and (tmp_path / "run" / "memory.prof").exists()


def test_the_size_of_an_array_is_that_of_its_part_on_one_device():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    tree = {"a": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding), "b": np.zeros((8, 32), np.int8)}
    assert [size for _, size in largest_arrays(tree)] == [64 * 64 * 4 // 8, 256]


def test_chosen_steps_are_traced(tmp_path):
    folder = tmp_path / "run"
    trainer(folder, trace_steps=(2, 3)).run()
    (file,) = (folder / "trace" / "process_0").rglob("*.xplane.pb")
    assert file.stat().st_size > 1000 and b"train" in file.read_bytes()
    with pytest.raises(ValueError, match="trace_process 1 is none of this job's 1 process"):
        trainer(tmp_path / "other", trace_steps=(2, 3), trace_process=1)
    for wrong in ((0, 3), (3, 2), 7, (1, 2, 3)):
        with pytest.raises(ValueError, match="TrainerConfig.trace_steps must be"):
            TrainerConfig(train_steps=5, batch_size=8, sequence_length=16, trace_steps=wrong)


def test_a_trace_of_a_run_in_a_bucket_is_named_as_it_is_uploaded(tmp_path):
    bucket = files.as_path("gs://bucket/runs/7b")
    run = Run(bucket, Activity(), Goodput(tmp_path), Spool(tmp_path, bucket))
    config = TrainerConfig(train_steps=5, batch_size=8, sequence_length=16, trace_steps=(2, 3))
    _, trace, _ = standard_callbacks(run, config, OptimizerConfig(1e-3), None)
    assert isinstance(trace, Trace) and str(trace.folder) == "gs://bucket/runs/7b/trace/process_0"


def test_the_second_start_finds_its_programs(tmp_path, caplog):
    caplog.set_level("INFO")
    cache = CompilationCache(tmp_path / "compiled")
    first = trainer(tmp_path / "one", cache=cache)
    first.run()
    assert "0 program(s) found" in caplog.text and list((tmp_path / "compiled").iterdir())
    caplog.clear()
    second = trainer(tmp_path / "two", cache=cache)
    assert "0 program(s) found" not in caplog.text and "0 put there" in caplog.text
    second.run()
    for one, other in zip(jax.tree.leaves(first.state), jax.tree.leaves(second.state), strict=True):
        np.testing.assert_array_equal(one, other)
    caplog.clear()
    trainer(tmp_path / "three")
    assert "program(s)" not in caplog.text, "nothing is kept where nobody asked for it"


def test_the_account_of_a_run_s_time(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def spend(account, cause, seconds):
        clock[0] += seconds
        account.count(cause)

    first = Goodput(tmp_path, began=990.0)
    spend(first, "compiling", 10)
    first.resumed(0)
    spend(first, "steps", 100)
    spend(first, "checkpoints", 5)
    first.write(50)
    # Killed, and started again a minute later from step 40: ten steps of two seconds are lost.
    clock[0] += 60
    second = Goodput(tmp_path)
    spend(second, "restoring", 5)
    second.resumed(40)
    spend(second, "steps", 20)
    second.write(50)
    total = 10 + 10 + 100 + 5 + 60 + 5 + 20
    shares = second.shares()
    assert sum(shares.values()) == pytest.approx(1)
    expected = {"steps": 100, "lost steps": 20, "compiling": 20, "checkpoints": 5, "restoring": 5, "idle": 60}
    assert {name: share * total for name, share in shares.items()} == pytest.approx(expected)
    assert str(second).startswith("goodput 47.6% of 210 s over 2 starts; the rest: ")
    assert written_shares(tmp_path) == pytest.approx(shares) and written_shares(tmp_path / "other") is None
    # A third start from step 40 loses what the second made, too, and the first's ten steps not twice.
    third = Goodput(tmp_path)
    third.resumed(40)
    spend(third, "steps", 1)
    assert third.shares()["lost steps"] * (total + 1) == pytest.approx(40)
    assert len(json.loads((tmp_path / "goodput.json").read_text())["starts"]) == 2


@pytest.mark.parametrize("text", ["", "{}", '{"starts": [{"begun": 3}]}'])
def test_an_account_that_cannot_be_read_does_not_keep_a_run_from_training(tmp_path, text, caplog):
    folder = tmp_path / "run"
    trainer(folder).run()
    (folder / "goodput.json").write_text(text)
    with pytest.raises(CheckpointError, match="goodput.json cannot be read"):
        written_shares(folder)
    trainer(folder).run()
    assert "goodput.json cannot be read" in caplog.text and "begins with this start" in caplog.text
    assert sum(written_shares(folder).values()) == pytest.approx(1)


def test_a_process_knows_when_it_began():
    assert 0 <= time.time() - process_start_time() < 24 * 3600


def test_the_slowest_host_is_named():
    paces = {0: {"step": 1.0, "busy": 0.1}, 1: {"step": 1.0, "busy": 0.7}, 2: {"step": 1.1, "busy": 0.2}}
    found = host_statistics(paces)
    assert (found["hosts/busy_min"], found["hosts/busy_median"], found["hosts/busy_max"]) == (0.1, 0.2, 0.7)
    assert found["hosts/busy_slowest"] == 1 and found["hosts/step_slowest"] == 2
