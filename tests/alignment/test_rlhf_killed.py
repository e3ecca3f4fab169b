"""`python -m qwen_jax.rlhf` as a user starts it: killed by SIGKILL at any moment, it goes on bit for bit."""

import json
import os
import signal
import subprocess

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

from qwen_jax import rlhf
from qwen_jax.alignment.responses import Responder
from qwen_jax.alignment.rollouts import Rollouts
from qwen_jax.alignment.scoring import Scorer
from qwen_jax.checkpoints.manager import Checkpoints
from qwen_jax.training.metrics import read_metrics
from tests.alignment.fakes import checkpoint
from tests.fakes import small_model
from tests.warm_python import python

# Four rollouts of 8 responses, each used in 4 updates.
STEPS, ROLLOUT = 16, 4
SETTINGS = {
    "MIXTURE_OR_TASK": "queries",
    "PRETRAINING": "local_files",
    "PRETRAINING_COEFFICIENT": 0.5,
    "WATCHED": "None",
    "SEQUENCE_LENGTH": 96,
    "PROMPT_LENGTH": 72,
    "ROLLOUT_PROMPTS": 4,
    "ROLLOUT_EPOCHS": 2,
    "BATCH_SIZE": 4,
    "TRAIN_STEPS": STEPS,
    "POLICY_START_STEP": 2,
    "LOG_EVERY": 1,
    "EVAL_EVERY": 8,
    "EVAL_BATCHES": 1,
    "CHECKPOINT_EVERY": ROLLOUT,
    "KEEP_CHECKPOINTS": 9,
    "local_files.validation_share": 0.2,
    "ModelConfig.vocab_size": 464,
    "ModelConfig.hidden_size": 32,
    "ModelConfig.num_layers": 1,
    "ModelConfig.num_heads": 4,
    "ModelConfig.head_dim": 8,
    "ModelConfig.ffn_size": 48,
}
# Starts of one run, one after the other, and what ends each: a signal, and what the run is doing at that step.
ENDS = (
    ("saving", 4, signal.SIGKILL),
    ("committing", 4, signal.SIGKILL),
    ("generating", 4, signal.SIGKILL),
    ("updating", 7, signal.SIGKILL),
    ("updating", 10, signal.SIGTERM),  # within a rollout, which is kept for the next start
    ("updating", 11, signal.SIGKILL),
    ("judging", 12, signal.SIGKILL),
)


def main(what: str, step: str, number: str, *arguments: str) -> None:
    """The command, which gets a signal at one of its moments."""
    wanted, last = (what, int(step)), [0]

    def at(place: str, step: int) -> None:
        if (place, step) == wanted:
            os.kill(os.getpid(), int(number))

    before_step, respond, judge, next_batch = (
        Rollouts.before_step,
        Responder.respond,
        Scorer.__call__,
        Rollouts.next,
    )
    save, rename = Checkpoints.save, os.rename

    def noting(self, trainer):
        last[0] = trainer.step
        before_step(self, trainer)

    def responding(self, *given):
        *others, tell = given

        def told(done):
            tell(done)
            if done == 3:
                at("generating", last[0])

        return respond(self, *others, told)

    def judging(self, *given):
        at("judging", last[0])
        return judge(self, *given)

    def reading(self):
        """The update before may still be computed."""
        at("updating", last[0])
        return next_batch(self)

    def saving(self, step, *given):
        """Files are written in the background."""
        save(self, step, *given)
        at("saving", step)

    def renaming(source, target, **given):
        folder, name = os.path.split(target)
        if os.path.basename(folder) == "checkpoints" and name.isdigit():
            at("committing", int(name))
        rename(source, target, **given)

    Rollouts.before_step, Rollouts.next = noting, reading
    Responder.respond, Scorer.__call__ = responding, judging
    Checkpoints.save, os.rename = saving, renaming
    rlhf.main(list(arguments))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prompts, text, a policy and a reward model."""
    folder, sizes = tmp_path_factory.mktemp("world"), dict(vocab_size=464, num_layers=1, context_length=256)
    words = "the cat sat on a mat and ran".split()
    prompts = [{"prompt": f"{first} {second}"} for first in words for second in words]
    texts = [{"text": f"{prompt['prompt']} " * 12} for prompt in prompts]
    for name, rows in (("prompts", prompts), ("text", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint(folder, "policy", small_model(**sizes))
    checkpoint(folder, "reward", small_model(head="scalar", **sizes), seed=1)
    return folder


def arguments_of(world, output) -> list[str]:
    settings = SETTINGS | {
        "OUTPUT_DIR": output,
        "CACHE_DIR": world / "cache",
        "COMPILATION_CACHE": world / "compiled",
        "VOCABULARY": world / "policy.tiktoken",
        "INITIAL_CHECKPOINT": world / "policy",
        "REWARD_CHECKPOINT": world / "reward",
        "queries.pattern": world / "prompts.jsonl",
        "local_files.pattern": world / "text.jsonl",
    }
    return ["--gin_file=gin/runs/ppo_tiny.gin", *(f"--gin.{name}={value}" for name, value in settings.items())]


def trees_of(output) -> dict:
    """Parameters, frozen parameters, optimizer and running statistics of the last checkpoint."""
    return ocp.load_checkpointables(str(output / "checkpoints" / str(STEPS)))


def rows_of(output) -> list[dict]:
    """Metrics without those of time."""
    timed = ("rollout/seconds/", "tokens_per_second", "data_wait", "goodput")
    rows = ({k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(output))
    return [row for row in rows if "attention" not in row]  # of each start


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_bit_for_bit(world, root, plain_environment, tmp_path):
    straight, output = tmp_path / "straight", tmp_path / "killed"

    def run(*program, of):
        done = subprocess.run(
            [python(), *program, *arguments_of(world, of)],
            cwd=root,
            env=plain_environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        return done.returncode, done.stderr

    code, said = run("-m", "qwen_jax.rlhf", of=straight)
    assert code == 0, said
    hooked = "import sys; from tests.alignment.test_rlhf_killed import main; main(*sys.argv[1:])"
    for what, step, number in ENDS:
        code, said = run("-c", hooked, what, str(step), str(int(number)), of=output)
        assert code == (0 if number == signal.SIGTERM else -number), (what, step, said[-3000:])
        there = {path.name for path in (output / "checkpoints").iterdir()}
        if what == "committing":
            assert str(step) not in there and any("tmp" in name for name in there), there
        if number == signal.SIGTERM:
            assert str(step) not in there and str(step + 1) in there
            assert (output / "experience" / f"{step // ROLLOUT * ROLLOUT}.npz").exists()
    code, said = run("-m", "qwen_jax.rlhf", of=output)
    assert code == 0, said
    jax.tree.map(np.testing.assert_array_equal, trees_of(output), trees_of(straight))
    assert trees_of(straight).keys() == {"params", "frozen", "optimizer", "extra"}
    ours, theirs = (Checkpoints.metadata(folder, STEPS) for folder in (output, straight))
    assert ours == theirs and ours["positions"] == {"prompts": 16, "pretraining": STEPS * 4 * 2}
    assert rows_of(output) == rows_of(straight)
    assert [row["step"] for row in rows_of(straight) if "loss" in row] == list(range(1, STEPS + 1))
    assert len([row for row in rows_of(straight) if "rollout/reward" in row]) == STEPS // ROLLOUT
    for file in (straight / "rollouts").iterdir():
        assert (output / "rollouts" / file.name).read_bytes() == file.read_bytes()
    assert not [path for path in (output / "checkpoints").iterdir() if "tmp" in path.name]
