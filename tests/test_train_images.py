"""`python -m qwen_jax.train` on a folder of pictures: the three stages, a kill, and what does not go together."""

import json
import re
import subprocess

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image, ImageDraw

from qwen_jax.checkpoints.arrays import load_params
from qwen_jax.training.metrics import read_metrics
from tests.environment import one_device
from tests.fakes import random_run, text_corpus
from tests.jobs import free_port
from tests.warm_python import python

# The vocabulary of `text_corpus` has 512 ids.
SIZES = {"vocab_size": 528, "hidden_size": 128, "num_layers": 1, "num_heads": 2, "head_dim": 16, "ffn_size": 64}
SETTINGS = {
    "SEQUENCE_LENGTH": 64,
    "BATCH_SIZE": 4,
    "TRAIN_STEPS": 6,
    "WARMUP_STEPS": 1,
    "CHECKPOINT_EVERY": 2,
    "EVAL_EVERY": 3,
    "EVAL_BATCHES": 2,
    "LOG_EVERY": 1,
    "IMAGE_SIZE": 16,
    "NUM_QUERIES": 4,
    "VisionConfig.image_start_id": 518,
    "VisionConfig.width": 16,
    "VisionConfig.num_layers": 1,
    "VisionConfig.num_heads": 2,
    "VisionConfig.mlp_size": 16,
    "MeshConfig.fsdp": -1,
    "ModelConfig.remat": "none",
    **{f"ModelConfig.{name}": value for name, value in SIZES.items()},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, pairs and dialogues with one to three of them, a vocabulary, and a decoder of text."""
    made = text_corpus(tmp_path_factory.mktemp("images"))
    colors, pairs, talks = ("red", "green", "blue", "white"), [], []
    for number in range(40):
        color = colors[number % 4]
        image = Image.new("RGB", (20, 12))
        ImageDraw.Draw(image).rectangle((number % 9, 2, number % 9 + 6, 9), fill=color)
        image.save(made / f"{number}.png")
        pairs.append({"image": f"{number}.png", "text": f"a {color} cat"})
        parts = [{"type": "image", "image": f"{(number + k) % 40}.png"} for k in range(1 + number % 3)]
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
        talks.append({"messages": [asked, {"role": "assistant", "content": f"{len(parts)} {color}"}]})
    for name, rows in (("pairs", pairs), ("talks", talks)):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "decoder").mkdir()
    random_run(made / "decoder", 0.05, **{k: v for k, v in SIZES.items() if k != "head_dim"})
    return made


def arguments(folder, output, stage=1, **changes):
    task, rows = ("vision_pairs", "pairs") if stage == 1 else ("vision_chat", "talks")
    settings = {
        **SETTINGS,
        "OUTPUT_DIR": output,
        "CACHE_DIR": folder / "cache",
        "VOCABULARY": folder / "small.tiktoken",
        "INITIAL_CHECKPOINT": folder / "decoder" / "run",
        f"{task}.pattern": folder / f"{rows}.jsonl",
        f"{task}.validation_share": 0.2,
        **({"vision_chat.system": "''"} if stage > 1 else {}),
        **changes,
    }
    flags = (f"--gin.{name}={value}" for name, value in settings.items() if value is not None)
    return [f"--gin_file=gin/runs/vl_stage{stage}_tiny.gin", *flags]


@pytest.fixture(scope="module")
def unbroken(folder, plain_environment):
    output = folder / "stage1"
    command = [python(), "-m", "qwen_jax.train", *arguments(folder, output)]
    done = subprocess.run(command, env=plain_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done


def losses(output):
    return {
        (row["step"], name): row[name] for row in read_metrics(output) for name in ("loss", "eval/loss") if name in row
    }


def parameters(output):
    return flatten_dict(load_params(output)[1], sep="/")


def test_stage_1_learns_to_see_beside_a_frozen_decoder_of_text(folder, unbroken):
    output, done = unbroken
    assert "images/s=" in done.stderr and "at most 1 image" in done.stderr
    steps = [row for row in read_metrics(output) if "loss" in row]
    assert [row["images"] for row in steps] == [4] * 6 and all(row["images_per_second"] > 0 for row in steps)
    assert set(losses(output)) == {(n, "loss") for n in range(1, 7)} | {(n, "eval/loss") for n in (0, 3, 6)}
    found, decoder = parameters(output), parameters(folder / "decoder" / "run")
    for path, value in decoder.items():
        np.testing.assert_array_equal(found[path], value)
    assert found.keys() - decoder.keys() == {path for path in found if path.startswith("vision/")}


# Kills the process when the examples of a later step are read, with a checkpoint of an earlier one behind it.
KILLING = """
import os, pathlib, signal, sys, time
from qwen_jax import command_line, train
from qwen_jax.data import loader
checkpoints = pathlib.Path({output!r}) / "checkpoints"
read = loader.ExampleLoader.read
def reading(self, start, stop):
    while self.repeat and start >= 16:
        if any(path.name.isdigit() for path in checkpoints.glob("*")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)
    return read(self, start, stop)
loader.ExampleLoader.read = reading
command_line.run(train.main)
"""


def test_killed_it_goes_on_bit_for_bit(folder, unbroken, plain_environment, tmp_path, run_main):
    output = tmp_path / "run"
    command = [python(), "-c", KILLING.format(output=str(output)), *arguments(folder, output)]
    killed = subprocess.run(command, env=plain_environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert [path.name for path in (output / "checkpoints").glob("*") if path.name.isdigit()]
    command = [python(), "-m", "qwen_jax.train", *arguments(folder, output)]
    done = subprocess.run(command, env=plain_environment, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming" in done.stderr, done.stderr
    assert losses(output) == losses(unbroken[0])
    jax.tree.map(np.testing.assert_array_equal, parameters(output), parameters(unbroken[0]))


@pytest.mark.slow
def test_two_processes_read_the_pictures_of_their_rows_and_give_the_same_losses(folder, unbroken, tmp_path):
    address, started = f"localhost:{free_port()}", []
    for index in range(2):
        place = [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={index}"]
        flags = [*place, "--heartbeat_timeout=300", *arguments(folder, tmp_path / "run")]
        log = open(tmp_path / f"{index}.log", "w")
        command = [python(), "-m", "qwen_jax.train", *flags]
        started.append(subprocess.Popen(command, env=one_device(), stdout=log, stderr=log))
    codes = [process.wait(1200) for process in started]
    assert codes == [0, 0], (tmp_path / "0.log").read_text() + (tmp_path / "1.log").read_text()
    assert "2 process(es)" in (tmp_path / "0.log").read_text()
    found, expected = losses(tmp_path / "run"), losses(unbroken[0])
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), [expected[key] for key in found], rtol=1e-5)


def test_stages_2_and_3_go_on_from_the_run_before(folder, unbroken, tmp_path, run_main):
    """Larger pictures, dialogues with several of them, and pictures decoded by a process beside the run."""
    one, two, three = unbroken[0], tmp_path / "stage2", tmp_path / "stage3"
    short = {"IMAGE_SIZE": 32, "TRAIN_STEPS": 2, "EVAL_EVERY": 2, "IMAGES_PER_ROW": 2, "IMAGE_WORKERS": 1}
    short |= {"SEQUENCE_LENGTH": 128, "vision_chat.max_left_out_share": 0.5}
    code, stderr = run_main(arguments(folder, two, 2, INITIAL_CHECKPOINT=one, **short))
    assert code == 0, stderr
    left_out = [line for line in stderr.splitlines() if "left out" in line]
    assert left_out and all("more than 2 images (IMAGES_PER_ROW)" in line for line in left_out)
    before, after = parameters(one), parameters(two)
    assert {path for path in after if np.array_equal(before[path], after[path])} == {"vision/resampler/positions"}
    # The data of stage 2 again: cached, packed, and without workers.
    code, stderr = run_main(arguments(folder, three, 3, INITIAL_CHECKPOINT=two, **short | {"IMAGE_WORKERS": 0}))
    assert code == 0, stderr
    found = parameters(three)
    same = {path for path in found if np.array_equal(after[path], found[path])}
    assert same == {p for p in found if p.startswith("vision/") and not p.startswith("vision/resampler/")} | {
        "vision/resampler/positions"
    }
    first = [next(row["eval/loss"] for row in read_metrics(run) if "eval/loss" in row) for run in (two, three)]
    last = [row["eval/loss"] for row in read_metrics(two) if "eval/loss" in row][-1]
    assert first[1] == pytest.approx(last, rel=1e-6) and first[0] != last


def test_the_encoder_may_come_from_other_weights(folder, unbroken, tmp_path, run_main):
    changes = {"VISION_CHECKPOINT": unbroken[0], "TRAIN_STEPS": 2, "EVAL_EVERY": 0}
    code, stderr = run_main(arguments(folder, tmp_path / "run", **changes))
    assert code == 0 and f"(token_embedding, layers, final_norm, output) and {unbroken[0]} (vision)" in stderr, stderr
    assert losses(tmp_path / "run")[0, "eval/loss"] == losses(unbroken[0])[6, "eval/loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"IMAGES_PER_ROW": -1}, "IMAGES_PER_ROW must be an integer of at least 0, found -1"),
        ({"IMAGE_WORKERS": "many"}, "IMAGE_WORKERS must be an integer of at least 0, or None, found 'many'"),
        ({"ModelConfig.vision": "None"}, "IMAGES_PER_ROW is 1, and the model has no image encoder"),
        ({"SEQUENCE_LENGTH": 5}, "a picture takes 6 tokens .* more than SEQUENCE_LENGTH 5"),
        ({"IMAGE_SIZE": 20}, "image_size 20 must be a multiple of patch_size 8"),
        ({"VisionConfig.image_start_id": 517}, "<img> is 518 in VOCABULARY .* set it to 518"),
        (
            {"VisionConfig.num_queries": 9},
            "gives each picture 4 places, and the model fills VisionConfig.num_queries = 9",
        ),
        ({"ModelConfig.vocab_size": 512, "INITIAL_CHECKPOINT": "None"}, "has 521 ids and the model 512 rows"),
        ({"VISION_CHECKPOINT": "DECODER"}, "vision/.* is not there"),
        ({"INITIAL_SUBTREE": "None"}, "vision/.* is not there"),
        ({"IMAGES_PER_ROW": 0, "vision_pairs.validation_share": 0.3}, "no document of task vision_pairs is left"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_does_not_go_together_is_one_line(folder, unbroken, tmp_path, run_main, changes, message):
    changes = {name: folder / "decoder" / "run" if value == "DECODER" else value for name, value in changes.items()}
    cache = tmp_path / "cache" if "vision_pairs.validation_share" in changes else folder / "cache"
    code, stderr = run_main(arguments(folder, tmp_path / "run", CACHE_DIR=cache, **changes))
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in stderr, stderr
    assert re.search(message, errors[0]), errors[0]
