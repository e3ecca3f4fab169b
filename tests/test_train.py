"""`python -m qwen_jax.train` as a user starts it: real processes, killed, stopped, misconfigured."""

import json
import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from qwen_jax.checkpoints.arrays import load_params
from qwen_jax.training.metrics import read_metrics
from tests.fakes import text_corpus
from tests.warm_python import python

SETTINGS = {
    "MIXTURE_OR_TASK": "local_files",
    "SEQUENCE_LENGTH": 32,
    "BATCH_SIZE": 4,
    "TRAIN_STEPS": 40,
    "WARMUP_STEPS": 5,
    "CHECKPOINT_EVERY": 4,
    "EVAL_EVERY": 20,
    "EVAL_BATCHES": 2,
    "LOG_EVERY": 1,
    "EMBEDDING_DROPOUT": 0.1,
    "ATTENTION_DROPOUT": 0.1,
    "ModelConfig.vocab_size": 512,
    "ModelConfig.hidden_size": 32,
    "ModelConfig.num_layers": 2,
    "ModelConfig.num_heads": 2,
    "ModelConfig.head_dim": 16,
    "ModelConfig.ffn_size": 64,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return text_corpus(tmp_path_factory.mktemp("train"))


def command(corpus, output, **changes):
    settings = {
        **SETTINGS,
        "OUTPUT_DIR": output,
        "CACHE_DIR": corpus / "cache",
        "VOCABULARY": corpus / "small.tiktoken",
        "local_files.pattern": corpus / "text",
        "local_files.validation_share": 0.2,
        **changes,
    }
    return [
        python(),
        "-m",
        "qwen_jax.train",
        "--gin_file=gin/runs/pretrain_tiny.gin",
        *(f"--gin.{name}={value}" for name, value in settings.items() if value is not None),
    ]


@pytest.fixture(scope="module")
def unbroken(corpus, plain_environment):
    output = corpus / "unbroken"
    done = subprocess.run(command(corpus, output), env=plain_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done


def losses(output):
    return [(row["step"], row["loss"]) for row in read_metrics(output) if "loss" in row]


def assert_same_run(output, reference):
    assert losses(output) == losses(reference)
    for one, other in zip(
        jax.tree.leaves(load_params(output)[1]), jax.tree.leaves(load_params(reference)[1]), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_run_learns_and_says_so(unbroken):
    output, done = unbroken
    history = losses(output)
    assert [step for step, _ in history] == list(range(1, 41)) and history[-1][1] < history[0][1] - 1
    assert "held-out loss" in done.stderr and "bits per byte" in done.stderr and "step 40" in done.stdout
    assert {"config.gin", "model_config.json", "tokenizer.tiktoken", "checkpoints", "metrics.jsonl", "tensorboard"} <= {
        p.name for p in output.iterdir()
    }
    assert "TRAIN_STEPS = 40" in (output / "config.gin").read_text()


def test_a_finished_run_started_again_changes_nothing(corpus, unbroken, plain_environment, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(unbroken[0], output)
    done = subprocess.run(command(corpus, output), env=plain_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(output, unbroken[0])


# Runs at each read of examples, without which no step goes on. Examples that follow a save are not read before it has
# begun and `due` was asked, so that no load of the machine can make a moment pass unseen.
KILLING = """
import os, pathlib, signal, time
from qwen_jax import command_line, train
from qwen_jax.data import loader
from qwen_jax.training.metrics import read_metrics
output = pathlib.Path({output!r})
checkpoints = output / "checkpoints"
def steps():
    return [int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()]
def saving():
    return any("tmp" in p.name for p in checkpoints.glob("*"))
def logged():
    return len([row for row in read_metrics(output) if "loss" in row])
read = loader.ExampleLoader.read
def reading(self, start, stop):
    step = start // 4
    while self.repeat:
        if {due}:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 0 or step % 4 or step in steps():
            break
        time.sleep(0.001)
    return read(self, start, stop)
loader.ExampleLoader.read = reading
command_line.run(train.main)
"""
MOMENTS = [
    "output.exists()",  # before the first step
    "logged() >= 2",  # before the first save
    "saving()",  # inside the first save
    "len(steps()) >= 2 and saving()",  # inside a later save
    "steps() and logged() >= max(steps()) + 2",  # between two saves
    "steps() and max(steps()) >= 28 and saving()",
]


def test_killed_at_any_moment_it_goes_on_bit_for_bit(corpus, unbroken, plain_environment, tmp_path):
    """Killed while starting, between saves, and inside saves; each time started again by the same command."""
    output = tmp_path / "run"
    killed = 0
    for due in MOMENTS:
        program = [python(), "-c", KILLING.format(output=str(output), due=due), *command(corpus, output)[3:]]
        with open(tmp_path / "log", "a") as log:
            ended = subprocess.run(program, env=plain_environment, stdout=log, stderr=log)
        assert ended.returncode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()[-2000:]
        killed += ended.returncode != 0
    assert killed >= 5, (tmp_path / "log").read_text()[-2000:]
    done = subprocess.run(command(corpus, output), env=plain_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(output, unbroken[0])
    assert not [p for p in (output / "checkpoints").glob("*") if "tmp" in p.name], "what the killed saves left is gone"


# Step 10 begins only after the signal was sent.
HOLDING = """
import os, time
from qwen_jax import command_line, train
from qwen_jax.data import loader
read = loader.ExampleLoader.read
def held(self, start, stop):
    while self.repeat and start >= 40 and not os.path.exists({told!r}):
        time.sleep(0.01)
    return read(self, start, stop)
loader.ExampleLoader.read = held
command_line.run(train.main)
"""


@pytest.mark.parametrize(("number", "code", "cause"), [(signal.SIGTERM, 0, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")])
def test_a_signal_saves_and_ends_cleanly(corpus, unbroken, plain_environment, tmp_path, number, code, cause):
    output, told = tmp_path / "run", tmp_path / "told"
    program = [
        python(),
        "-c",
        HOLDING.format(told=str(told)),
        *command(corpus, output, CHECKPOINT_EVERY=1000)[3:],
    ]
    process = subprocess.Popen(program, env=plain_environment, stderr=subprocess.PIPE, text=True)
    while not losses(output):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    told.touch()
    _, stderr = process.communicate()
    assert process.returncode == code and f"stopped by {cause} after step" in stderr and "Traceback" not in stderr
    assert ("interrupted: the run is saved, and the same command goes on" in stderr) == (number == signal.SIGINT)
    stopped = losses(output)[-1][0]
    assert stopped < 40 and [p.name for p in (output / "checkpoints").iterdir()] == [str(stopped)]
    done = subprocess.run(command(corpus, output), env=plain_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(output, unbroken[0])


def test_in_parts_that_fit_a_device_it_is_the_same_run(corpus, plain_environment, tmp_path):
    runs = {}
    for tokens, parts in ((None, 1), (64, 2)):
        output = tmp_path / str(parts)
        done = subprocess.run(
            command(
                corpus,
                output,
                TOKENS_PER_DEVICE=tokens,
                TRAIN_STEPS=6,
                WARMUP_STEPS=1,
                EVAL_EVERY=6,
                EMBEDDING_DROPOUT=0.0,
                ATTENTION_DROPOUT=0.0,
            ),
            env=plain_environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and f"a batch is computed in {parts} part(s)" in done.stderr, done.stderr
        rows = read_metrics(output)
        runs[parts] = [row[name] for name in ("loss", "eval/loss") for row in rows if name in row]
    assert len(runs[1]) == 8
    np.testing.assert_allclose(runs[2], runs[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"OUTPUT_DIR": None}, "OUTPUT_DIR is not set"),
        ({"TRAIN_STEP": 3}, "Did you mean TRAIN_STEPS"),
        ({"local_files.pattern": "/nowhere/*.txt"}, "/nowhere"),
        ({"MIXTURE_OR_TASK": "python_corpsu"}, "python_corpsu"),
        ({"VOCABULARY": "/nowhere/v.tiktoken"}, "/nowhere/v.tiktoken"),
        ({"MeshConfig.tensor": 3}, "does not divide 1 device"),
        ({"BATCH_SIZE": 5, "ACCUMULATION_STEPS": 2}, "multiple of 2"),
        ({"SEQUENCE_LENGTH": 2048}, "context_length"),
        ({"ModelConfig.vocab_size": 128}, "the vocabulary has 512 ids and the model 128 rows"),
        ({"WARMUP_STEPS": 50}, "WARMUP_STEPS"),
        ({"ModelConfig.num_layers": 10**8}, "too little memory"),
        ({"OUTPUT_DIR": "UNBROKEN", "ModelConfig.num_layers": 3}, "num_layers 3 here, 2 there"),
        ({"OUTPUT_DIR": "UNBROKEN", "SEED": 1}, "other data"),
        ({"OUTPUT_DIR": "FOREIGN"}, "holds 'thesis.doc' and is not a run folder"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_bad_input_is_one_line_that_says_how_to_mend_it(corpus, unbroken, tmp_path, changes, message, run_main):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").write_text("mine")
    places = {"UNBROKEN": unbroken[0], "FOREIGN": tmp_path / "foreign"}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    before = sorted(p.relative_to(unbroken[0]) for p in unbroken[0].rglob("*"))
    code, stderr = run_main(command(corpus, tmp_path / "run", **changes)[3:])
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], stderr
    assert "Traceback" not in stderr
    assert sorted(p.relative_to(unbroken[0]) for p in unbroken[0].rglob("*")) == before


def test_what_a_start_that_failed_has_left_does_not_bar_the_next(corpus, tmp_path, run_main, monkeypatch):
    """Compiled programs, a profile of the memory, stacks: none of them makes the folder somebody else's."""
    from qwen_jax.training import trainer

    output = tmp_path / "run"
    (output / "compiled").mkdir(parents=True)
    (output / "stacks_0.txt").write_text("…")

    def too_large(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "compile_run", too_large)
        code, stderr = run_main(command(corpus, output)[3:])
        assert code == 2 and "out of memory while compiling" in stderr and (output / "memory.prof").exists(), stderr
    code, stderr = run_main(command(corpus, output, TRAIN_STEPS=6, EVAL_EVERY=0)[3:])
    assert code == 0 and len(losses(output)) == 6, stderr


def test_whole_documents_can_be_packed_instead(tmp_path, corpus, unbroken, run_main):
    short = {"TRAIN_STEPS": 8, "OUTPUT_DIR": tmp_path / "run", "PACKING": "best_fit"}
    code, stderr = run_main(command(corpus, tmp_path / "run", **short)[3:])
    assert code == 0, stderr
    history = losses(tmp_path / "run")
    assert len(history) == 8 and history[-1][1] < history[0][1]
    assert history != losses(unbroken[0])[:8]


def test_an_empty_task_is_refused_and_leaves_nothing(tmp_path, corpus, run_main):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("")
    cache = tmp_path / "cache"
    code, stderr = run_main(
        command(corpus, tmp_path / "run", **{"local_files.pattern": tmp_path / "text", "CACHE_DIR": cache})[3:]
    )
    assert code == 2 and "local_files" in stderr and "Traceback" not in stderr
    assert not list(cache.rglob("manifest.json"))


def test_metrics_are_json_lines(unbroken):
    lines = (unbroken[0] / "metrics.jsonl").read_text().splitlines()
    assert all("step" in json.loads(line) for line in lines) and os.path.getsize(unbroken[0] / "metrics.jsonl") > 1000
