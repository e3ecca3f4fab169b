"""Examples made by arithmetic and models made by chance, for tests that need no corpus and no training."""

import dataclasses
import functools
import random
import subprocess
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from qwen_jax.batch_spec import Column, token_columns
from qwen_jax.checkpoints.arrays import save_params
from qwen_jax.conversion.mapping import parameter_shapes
from qwen_jax.data.tokenizer import write_ranks
from qwen_jax.distributed.watchdog import Activity
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.vision.config import VisionConfig
from qwen_jax.training.batches import Prefetcher
from qwen_jax.training.goodput import Goodput
from qwen_jax.training.objective import Objective
from qwen_jax.training.run import Run
from qwen_jax.training.step import batch_shapes
from qwen_jax.training.trainer import Trainer, standard_callbacks
from tests.warm_python import python


class FakeExamples:
    """Rows that are a function of their index: runs of a seeded arithmetic sequence, learnable in a few steps."""

    def __init__(self, length=16, vocab_size=61, count=400, repeat=True, seed=0, packed=False):
        self.length, self.vocab_size, self.count, self.repeat, self.seed = length, vocab_size, count, repeat, seed
        self.bytes_per_token, self.columns, self.packed = 2.0, token_columns(length, packed), packed
        self.fingerprint = f"fake-{seed}-{length}-{vocab_size}"
        self.reads: list[tuple[int, int]] = []

    def __len__(self):
        return self.count

    def read(self, start, stop):
        self.reads.append((start, stop))
        assert self.repeat or stop <= self.count
        rows = np.arange(start, stop)[:, None]
        tokens = (rows * 7 + self.seed + np.arange(self.length) * (1 + rows % 3)) % self.vocab_size
        weights = np.ones(tokens.shape, np.float32)
        weights[rows[:, 0] % 5 == 0, : self.length // 2] = 0.0
        return {"tokens": tokens.astype(np.int32), "loss_weights": weights, **self._segments(rows)}

    def _segments(self, rows):
        """Two documents a row, the second of which begins elsewhere in each."""
        if not self.packed:
            return {}
        begin, place = 1 + rows % (self.length - 1), np.arange(self.length)
        second = place >= begin
        return {
            "segment_ids": (1 + second).astype(np.int32),
            "positions": (place - second * begin).astype(np.int32),
        }


class ImageExamples:
    """Rows without a length: two small images, and a label that is a function of them; `pairs` are filling."""

    columns = (
        Column("images", "float32", (2, 4, 4, 3), (None, None, None, None)),
        Column("label", "float32", (), ()),
        Column("pairs", "int32", (2, 8), (None, "length")),
    )

    def __init__(self, count=400, repeat=True):
        self.count, self.repeat, self.fingerprint = count, repeat, "images"
        self.weights = np.random.default_rng(1).standard_normal((2, 4, 4, 3))

    def __len__(self):
        return self.count

    def read(self, start, stop):
        images = [
            np.random.default_rng(index % self.count).standard_normal((2, 4, 4, 3)) for index in range(start, stop)
        ]
        images = np.asarray(images, np.float32).reshape(-1, 2, 4, 4, 3)
        label = np.tanh(np.einsum("bnhwc,nhwc->b", images, self.weights)).astype(np.float32)
        rows = np.arange(start, stop, dtype=np.int32)
        return {"images": images, "label": label, "pairs": rows[:, None, None] + np.zeros((2, 8), np.int32)}


@dataclasses.dataclass(frozen=True)
class ImageModel:
    """A linear model of two images: training knows it by `qwen_jax.training.model.Model` alone."""

    has_dropout: bool = False

    def init_params(self, rng):
        """One kernel [96, 8] and one output [8], split as a decoder's are."""
        kernel = 0.1 * jax.random.normal(rng, (96, 8))
        return {
            "kernel": nn.LogicallyPartitioned(kernel, ("embed", "mlp")),
            "output": nn.LogicallyPartitioned(jnp.ones(8) / 8, ("mlp",)),
        }

    def attention(self, length, packed, mesh):
        """It has none."""
        return "none"

    def apply(self, params, images):
        """[rows] numbers of images [rows, 2, 4, 4, 3]."""
        return jnp.tanh(images.reshape(-1, 96) @ params["kernel"]) @ params["output"]


def squared_error(with_extra=False) -> Objective:
    """The squared error of a label, with other sums than those of text, and perhaps the running sum of labels."""

    def loss(model, params, batch, rng, extra=None):
        error = model.apply(params, batch["images"]) - batch["label"]
        weight = jnp.float32(error.shape[0])
        sums = {"weight": weight, "absolute": jnp.abs(error).sum(), "index": batch["pairs"].mean(dtype=jnp.float32)}
        return (error**2).sum(), sums | {"label": batch["label"].sum()}

    return Objective(
        loss,
        summarize=lambda sums: {"absolute_error": sums["absolute"] / sums["weight"]},
        evaluate=lambda sums, examples: {"absolute_error": sums["absolute"] / sums["weight"], "size": len(examples)},
        initial_extra=(lambda: {"labels": jnp.zeros(())}) if with_extra else None,
        update_extra=(lambda extra, sums: {"labels": extra["labels"] + sums["label"]}) if with_extra else None,
    )


def small_model(**changes) -> ModelConfig:
    """A float32 model whose every axis divides by 8 devices in any layout."""
    values = dict(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        ffn_size=48,
        head_dim=8,
        context_length=64,
        dtype="float32",
        remat="none",
    )
    return ModelConfig(**{**values, **changes})


@functools.partial(jax.jit, static_argnames=("model", "method"))
def outputs(model, params, *inputs, method=None, **named):
    """`model.apply` as one program: outside of one, each of its operations is compiled by itself, for each shape."""
    return model.apply({"params": params}, *inputs, method=method, **named)


def outputs_of_row(model, params, ids, length, **options):
    """Outputs of one row of `ids`, [len(ids), …], computed at `length`: rows of many lengths share a program."""
    row = np.zeros((1, length), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(outputs(model, params, row, **options))[0, : len(ids)]


def random_params(config: ModelConfig, spread: float = 0.1, seed: int = 0) -> dict:
    """Float32 parameters, biases too, around 0 and scales around 1. A model's own would take a program to compile."""
    random = np.random.default_rng(seed)
    flat = {
        path: (random.standard_normal(shape) * spread + ("scale" in path)).astype(np.float32)
        for path, shape in parameter_shapes(config).items()
    }
    return unflatten_dict(flat, sep="/")


def random_run(folder: Path, spread: float = 0.25, **sizes) -> Path:
    """A run folder with random weights, large enough that greedy choices differ, over a vocabulary of single bytes."""
    write_ranks({bytes([byte]): byte for byte in range(256)}, folder / "bytes.tiktoken")
    config = ModelConfig(**{"vocab_size": 464, "head_dim": 16, **sizes})
    save_params(folder / "run", config, random_params(config, spread), folder / "bytes.tiktoken")
    return folder / "run"


# Of a vocabulary of single bytes, whose 464 ids the nine tags follow: <img> is the seventh of them.
SMALL_VISION = VisionConfig(
    image_size=28, patch_size=14, width=32, num_layers=1, num_heads=2, mlp_size=48, num_queries=4, image_start_id=470
)


def random_vision_run(folder: Path, spread: float = 0.25, **sizes) -> Path:
    """As `random_run`, with an image encoder."""
    small = dict(vocab_size=480, hidden_size=256, num_layers=1, num_heads=2, ffn_size=48, context_length=256)
    return random_run(folder, spread, **{**small, "vision": SMALL_VISION, **sizes})


def text_corpus(folder: Path, documents: int = 60) -> Path:
    """Small documents in `folder`/text, and a vocabulary trained on them in `folder`/small.tiktoken."""
    words = random.Random(0)
    (folder / "text").mkdir()
    for index in range(documents):
        lines = [" ".join(words.choices("the cat sat on a mat and 1984".split(), k=9)) for _ in range(12)]
        (folder / "text" / f"{index}.txt").write_text(".\n".join(lines))
    # Enough different words for the vocabulary to be learned from.
    other = ["".join(words.choices("abcdefghij", k=6)) for _ in range(80)]
    (folder / "text" / "long.txt").write_text(" ".join(other * 3))
    subprocess.run(
        [
            python(),
            "tools/build_tokenizer.py",
            "--input",
            folder / "text",
            "--size",
            "512",
            "--output",
            folder / "small.tiktoken",
        ],
        check=True,
        capture_output=True,
    )
    return folder


def prepared_trainer(
    model, objective, optimizer, config, mesh, train_set, eval_set, folder, initial_weights=None, **options
) -> Trainer:
    """A trainer in `folder`, which nobody locks, that has compiled and restored."""
    made = new_trainer(
        model, objective, optimizer, config, mesh, train_set, eval_set, folder, initial_weights, **options
    )
    made.prepare()
    return made


def new_trainer(
    model, objective, optimizer, config, mesh, train_set, eval_set, folder, initial_weights=None, **options
) -> Trainer:
    """As `prepared_trainer`, before it has compiled anything."""
    run = Run(Path(folder), Activity(), Goodput(folder))
    batches = Prefetcher(
        train_set, batch_shapes(mesh, config.batch_size, train_set.columns), run.skipped_examples("train")
    )
    callbacks = standard_callbacks(run, config, optimizer, eval_set)
    return Trainer(
        run, model, objective, optimizer, config, mesh, batches, callbacks, initial_weights=initial_weights, **options
    )
