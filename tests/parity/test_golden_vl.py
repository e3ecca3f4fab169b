"""Outputs of the released Qwen-VL code on small random models, against ours (golden files; see their READMEs)."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from qwen_jax.conversion import convert, load_pretrained
from qwen_jax.data.images import open_image
from qwen_jax.inference import Engine, Request
from qwen_jax.models.transformer import Qwen
from tests.fakes import outputs

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("QWEN_JAX_SHARED", ROOT.parent / "shared")) / "golden" / "qwenvl_full"
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no {FOLDER}: set QWEN_JAX_SHARED to the folder that holds golden/"
)


@pytest.fixture(scope="module")
def golden():
    """(model, params, expected arrays)."""
    model, params = load_pretrained(FOLDER)
    return model, params, np.load(FOLDER / "expected.npz")


def images_of(expected, case):
    """The pictures of a case, [rows, most pictures of a row, height, width, 3], padded with zeros; None: none."""
    pixels = expected["pixels"].transpose(0, 2, 3, 1)
    spans = expected[f"{case}_spans"]
    rows = [
        [int(index) for row, _, _, index in spans if row == number] for number in range(len(expected[f"{case}_ids"]))
    ]
    most = max(map(len, rows))
    if not most:
        return None
    padded = np.zeros((len(rows), most, *pixels.shape[1:]), np.float32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = pixels[row]
    return padded


def test_features(golden):
    model, params, expected = golden
    found = outputs(model, params, expected["pixels"].transpose(0, 2, 3, 1), method="encode_images")
    # Wrong resizing of positions differs by 2e-3, the approximation of GELU by 2e-4.
    np.testing.assert_allclose(found, expected["features"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", ["one", "two", "batch_right", "text"])
def test_logits(golden, case):
    model, params, expected = golden
    logits = outputs(model, params, expected[f"{case}_ids"], images=images_of(expected, case))
    check_logits(logits, expected, case)


def test_logits_past_the_training_length(golden):
    model, params, expected = golden
    images = images_of(expected, "long")
    hidden = outputs(model, params, expected["long_ids"], images=images, method="inference_hidden_states")
    check_logits(outputs(model, params, hidden, method="logits"), expected, "long")


def check_logits(logits, expected, case):
    found = np.take_along_axis(np.asarray(logits), expected[f"{case}_sel"][..., None], axis=1)
    wanted = expected[f"{case}_logits"]
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("case", ["one", "two", "text"])
def test_greedy_continuation_by_the_engine(golden, case):
    """The engine decodes with the features in the place of embeddings; it needs no encoder."""
    model, params, expected = golden
    (ids,), images = expected[f"{case}_ids"].tolist(), images_of(expected, case)
    request = Request(ids, max_new_tokens=12)
    if images is not None:
        features = np.asarray(outputs(model, params, images[0], method="encode_images"))
        places = [at for _, begin, end, _ in expected[f"{case}_spans"] for at in range(begin + 1, end)]
        request = dataclasses.replace(
            request, embeddings=features.reshape(-1, features.shape[-1]), embedding_positions=places
        )
    decoder = Qwen(dataclasses.replace(model.config, vision=None))
    engine = Engine(decoder, {name: tree for name, tree in params.items() if name != "vision"})
    (result,) = engine.generate([request])
    assert list(result.tokens) == expected[f"{case}_greedy"][0].tolist()


def test_greedy_continuation_of_pictures_by_the_engine(golden):
    """The engine encodes the files' pictures itself; several requests at once, and again from the prefix cache."""
    model, params, expected = golden
    size = model.config.vision.image_size
    pictures = [
        np.asarray(open_image(FOLDER / str(path)).resize((size, size), Image.Resampling.BICUBIC))
        for path in expected["image_paths"]
    ]
    engine = Engine(model, params, slots=4, prefix_cache_tokens=2048)
    requests, wanted = [], []
    for case in ("one", "two", "text", "long"):
        images = [pictures[index] for *_, index in expected[f"{case}_spans"]]
        requests.append(Request(expected[f"{case}_ids"][0], max_new_tokens=12, images=images))
        wanted.append(expected[f"{case}_greedy"][0].tolist())
    for _ in range(2):
        results = sorted(engine.generate(requests), key=lambda result: result.index)
        assert [list(result.tokens) for result in results] == wanted
    assert [result.cached_tokens > 0 for result in results] == [True] * 4


@pytest.mark.parametrize(("case", "ids"), [("train", "batch_right"), ("train_text", "text")])
def test_loss_and_gradient_norms(golden, case, ids):
    model, params, expected = golden
    tokens, labels = jnp.asarray(expected[f"{ids}_ids"]), expected[f"{case}_labels"][:, 1:]
    images = images_of(expected, ids)

    def loss(params):
        logits = model.apply({"params": params}, tokens, images=images)[:, :-1]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(labels >= 0, picked, 0)) / np.sum(labels >= 0)

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert value == pytest.approx(expected[f"{case}_loss"], rel=1e-5)

    def norm(*trees):
        return float(np.sqrt(sum(np.sum(np.square(leaf)) for tree in trees for leaf in jax.tree.leaves(tree))))

    vision = gradient["vision"]
    # The released code holds the resampler's positions fixed: no gradient of theirs counts there.
    pool = {name: tree for name, tree in vision["resampler"].items() if name != "positions"}
    encoder = [vision[name] for name in ("patch_embedding", "positions", "input_norm", "layers")]
    for name, trees in {
        "wte": [gradient["token_embedding"]],
        "decoder_layers": [gradient["layers"]],
        "ln_f": [gradient["final_norm"]],
        "lm_head": [gradient["output"]],
        "visual_vit": encoder,
        "visual_attn_pool": [pool],
        "visual_ln_post": [vision["output_norm"]],
        "visual_proj": [vision["output"]],
    }.items():
        assert norm(*trees) == pytest.approx(expected[f"{case}_grad_norm_{name}"], rel=1e-4, abs=1e-9), name


def test_conversion_is_exact_in_both_directions(tmp_path):
    convert("qwen", FOLDER, "orbax", tmp_path / "run", progress=False)
    convert("orbax", tmp_path / "run", "qwen", tmp_path / "qwen", progress=False)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "qwen", FOLDER))
    assert ours.keys() == theirs.keys() and len(ours) == 69
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.astype(np.float32), err_msg=name)
