"""Rows with pictures in training: packed, in parts, on several devices and mixed with text, the loss is the same."""

import dataclasses
import io

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from qwen_jax.batch_spec import image_column, token_columns
from qwen_jax.compilation_cache import CompilationCache
from qwen_jax.data import images as data_images
from qwen_jax.data.packers import Document, padded, whole
from qwen_jax.models.build import build_model
from qwen_jax.models.vision import config as vision_config
from qwen_jax.models.vision.config import VisionConfig
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.metrics import read_metrics
from qwen_jax.training.objectives import next_token_loss, next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.trainer_config import TrainerConfig
from tests.fakes import new_trainer, small_model

VISION = VisionConfig(
    image_size=16, patch_size=8, width=16, num_layers=2, num_heads=2, mlp_size=16, num_queries=4, image_start_id=56
)
MODEL = build_model(small_model(hidden_size=256, num_layers=1, head_dim=64, vision=VISION))
BEGIN, PAD, END, EOS = 56, 58, 57, 0
LENGTH, MOST = 32, 3


def document(*pieces: int | np.ndarray) -> Document:
    """So many tokens of text, of which the later half carries loss, and pictures."""
    tokens, weights, spans, images = [], [], [], []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += [(7 * len(tokens) + n) % 50 + 1 for n in range(piece)]
            weights += [int(2 * n >= piece) for n in range(piece)]
        else:
            spans.append([len(tokens), len(tokens) + 6])
            tokens, weights = [*tokens, BEGIN, *[PAD] * 4, END], weights + [0] * 6
            images.append(piece)
    spans = np.array(spans) if spans else None
    return Document(np.array(tokens), np.array(weights, np.uint8), images=tuple(images), image_spans=spans)


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8))


def batch(rows: list[dict]) -> dict[str, np.ndarray]:
    """What a loader makes of packed rows."""
    images = np.zeros((len(rows), MOST, 16, 16, 3), np.uint8)
    for row, example in enumerate(rows):
        for index, image in enumerate(example.pop("images", ())):
            images[row, index] = image
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return stacked | {"loss_weights": stacked["loss_weights"].astype(np.float32), "images": images}


@pytest.fixture(scope="module")
def params():
    made = nn.unbox(jax.jit(MODEL.init_params)(jax.random.key(0)))
    # Larger than initial ones, so that every part of the model counts.
    noise = lambda x: x + 0.1 * np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(noise, made)


def documents() -> list[Document]:
    a, b, c, d, e = pictures(5)
    return [document(a, 6), document(2, b, 3, c, 5), document(8), document(d, 9), document(3, e, 2), document(5)]


def test_loss_and_gradient_of_packed_rows_are_those_of_their_documents(params):
    """Several pictures in a row, rows with fewer, and rows of text alone, in one shape."""
    options = dict(sequence_length=LENGTH, eos_id=EOS, images_per_row=MOST)
    together = batch(list(whole(documents(), **options)))
    alone = batch(list(padded(documents(), **options)))
    assert len(together["tokens"]) < len(alone["tokens"])
    held = (together["tokens"] == BEGIN).sum(axis=1)
    assert held.max() > 1 and len(set(held)) > 1
    compute = jax.jit(jax.value_and_grad(lambda p, b: next_token_loss(MODEL, p, b, None), has_aux=True))
    (loss, sums), gradient = compute(params, together)
    (expected, sums_alone), gradient_alone = compute(params, alone)
    assert float(sums["images"]) == float(sums_alone["images"]) == 5
    assert float(sums["weight"]) == float(sums_alone["weight"])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, gradient_alone)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["vision"]))
    # Another picture changes the loss of its document only.
    changed = {**alone, "images": alone["images"].copy()}
    changed["images"][1, 0] = 255 - changed["images"][1, 0]
    # With weight on the pictures' own places: the text of a random model hardly depends on them (4e-6 of a loss of 26).
    heavy = {"loss_weights": np.ones((1, LENGTH), np.float32)}
    row = lambda b, n: {name: array[n : n + 1] for name, array in b.items()} | heavy  # noqa: E731
    loss_of = jax.jit(lambda b: next_token_loss(MODEL, params, b, None)[0])
    losses = [[float(loss_of(row(b, n))) for n in (1, 3)] for b in (alone, changed)]
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-5) and losses[0][1] == losses[1][1]


def test_text_alone_runs_no_encoder(params):
    text = {
        name: array for name, array in batch(list(padded([document(8)], sequence_length=LENGTH, eos_id=EOS))).items()
    }
    del text["images"]
    program = str(jax.make_jaxpr(lambda p, b: next_token_loss(MODEL, p, b, None))(params, text))
    assert "erf" not in program  # the encoder's GELU is the only one
    loss, sums = jax.jit(lambda text: next_token_loss(MODEL, params, text, None))(text)
    assert "images" not in sums and float(loss) > 0


def test_levels_are_normalized_on_the_device_as_on_the_host(params):
    np.testing.assert_array_equal(np.float32(vision_config.PIXEL_MEAN), data_images.MEAN)
    np.testing.assert_array_equal(np.float32(vision_config.PIXEL_DEVIATION), data_images.DEVIATION)
    encoded = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(encoded, "PNG")
    levels = data_images.decode_images([encoded.getvalue()], 16)
    floats = data_images.pixels(Image.open(encoded), 16)
    encode = jax.jit(lambda pixels: MODEL.apply({"params": params}, pixels, method="encode_images"))
    np.testing.assert_allclose(encode(levels)[0], encode(floats[None])[0], atol=1e-5)


class PicturedExamples:
    """Rows of FakeExamples' kind with a picture each, two, or none: the color decides the answer."""

    columns = (*token_columns(LENGTH, packed=True), image_column(MOST, 16))
    bytes_per_token, fingerprint = 2.0, "pictured"

    def __init__(self, count=64, repeat=True):
        self.count, self.repeat = count, repeat

    def __len__(self):
        return self.count

    def read(self, start, stop):
        rows = []
        for index in range(start, stop):
            random = np.random.default_rng(index % self.count)
            images = [random.integers(0, 256, (16, 16, 3), np.uint8) // 4 for _ in range(index % 3)]
            made = document(*images, 4 + index % 5)
            rows += list(padded([made], sequence_length=LENGTH, eos_id=EOS, images_per_row=MOST))
        return batch(rows)


CONFIG = TrainerConfig(
    train_steps=4, batch_size=16, sequence_length=LENGTH, log_every=1, eval_batches=2, checkpoint_every=2
)


def trainer_in(folder, mesh, cache=CompilationCache(None), accumulation=1):
    config = dataclasses.replace(CONFIG, accumulation_steps=accumulation)
    return new_trainer(
        *(MODEL, next_token_prediction(), OptimizerConfig(1e-2), config, mesh),
        *(PicturedExamples(), PicturedExamples(24, repeat=False), folder),
        cache=cache,
    )


def run(folder, *arguments, **options):
    trainer_in(folder, *arguments, **options).run()
    return read_metrics(folder)


ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return CompilationCache(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache):
    return run(tmp_path_factory.mktemp("images"), ONE_DEVICE, cache)


def losses(rows):
    return {(row["step"], name): row[name] for row in rows for name in ("loss", "eval/loss") if name in row}


def test_on_eight_devices_and_in_parts_it_is_the_same_run(unbroken, tmp_path):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    found, expected = losses(run(tmp_path, mesh, accumulation=2)), losses(unbroken)
    assert found.keys() == expected.keys() and len(found) == 6
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-4)


def test_pictures_are_counted_and_their_pace_is_reported(unbroken):
    steps = [row for row in unbroken if "loss" in row]
    counted = [sum(index % 3 for index in range(16 * n, 16 * n + 16)) for n in range(4)]
    assert [row["images"] for row in steps] == counted
    for row in steps:
        ratio = row["images_per_second"] / row["tokens_per_second"]
        assert ratio == pytest.approx(row["images"] / (16 * LENGTH))
    assert losses(unbroken)[4, "eval/loss"] < losses(unbroken)[0, "eval/loss"]


def test_a_run_with_pictures_goes_on_bit_for_bit(unbroken, cache, tmp_path):
    trainer = trainer_in(tmp_path, ONE_DEVICE, cache)
    step = trainer.callbacks[-1]  # saving
    act = step.act

    class Stopped(Exception):
        pass

    def stop(trainer):
        act(trainer)
        trainer.checkpoints.wait()
        raise Stopped

    step.act = stop
    with pytest.raises(Stopped):
        trainer.run()
    assert losses(run(tmp_path, ONE_DEVICE, cache)) == losses(unbroken)
