"""The image encoder, its resampler and the splicing of features, against torch and by their own rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax.conversion.mapping import FORMATS, external_tensors, from_external, gather, parameter_shapes
from qwen_jax.models.build import build_model, parameter_count
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.transformer import abstract_params
from qwen_jax.models.vision.config import VisionConfig
from qwen_jax.models.vision.positions import bicubic_matrix, resize_positions, sine_positions
from qwen_jax.models.vision.qwen_vl import feature_places
from qwen_jax.sharding import MeshConfig, make_mesh, tree_shardings, use_mesh
from tests.fakes import outputs, small_model

VISION = VisionConfig(
    image_size=28, patch_size=7, width=32, num_layers=2, num_heads=4, mlp_size=48, num_queries=4, image_start_id=60
)
CONFIG = small_model(hidden_size=256, head_dim=64, vision=VISION)
BEGIN, END, PAD = 60, 61, 62


@pytest.fixture(scope="module")
def model_and_params():
    model = build_model(CONFIG)
    params = nn.meta.unbox(jax.jit(model.init_params)(jax.random.key(0)))
    # Larger than initial ones, so that every part of the model counts.
    noise = lambda x: x + 0.1 * np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return model, jax.tree.map(noise, params)


def text_with(*pictures: int) -> list[int]:
    """A row with so many tokens of text before each picture."""
    row = []
    for count in pictures:
        row += [*range(1, count + 1), BEGIN, *[PAD] * VISION.num_queries, END]
    return row


def test_released_sizes():
    shapes = parameter_shapes(
        ModelConfig(vocab_size=1, hidden_size=4096, num_layers=1, num_heads=32, ffn_size=1, vision=VisionConfig())
    )
    visual = {path: shape for path, shape in shapes.items() if path.startswith("vision/")}
    assert sum(map(np.prod, visual.values())) == 1_935_610_624
    with_encoder = ModelConfig(vocab_size=8, hidden_size=4096, num_layers=1, num_heads=32, ffn_size=1)
    assert parameter_count(dataclasses.replace(with_encoder, vision=VisionConfig())) - parameter_count(
        with_encoder
    ) == (1_935_610_624)
    tensors = external_tensors(FORMATS["qwen"], dataclasses.replace(with_encoder, vision=VisionConfig()))
    assert sum(tensor.name.startswith("transformer.visual.") for tensor in tensors) == 594


def test_positions_are_resized_as_torch_does():
    np.testing.assert_allclose(bicubic_matrix(8, 16)[7, 2:6], [-0.1054688, 0.8789062, 0.2617188, -0.0351562], atol=1e-6)
    torch = pytest.importorskip("torch")
    # torch computes places of uneven ratios in float32.
    for size, grid, allowed in ((16, 32, 1e-6), (16, 8, 1e-6), (16, 15, 1e-5), (4, 9, 1e-5)):
        positions = np.random.default_rng(grid).standard_normal((size * size, 3)).astype(np.float32)
        square = torch.from_numpy(positions).reshape(1, size, size, 3).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
        expected = resized.permute(0, 2, 3, 1).reshape(grid * grid, 3).numpy()
        np.testing.assert_allclose(resize_positions(jnp.asarray(positions), grid), expected, atol=allowed)


def test_fixed_positions_are_of_the_column_first():
    positions = sine_positions(3, 8).reshape(3, 3, 8)
    assert (positions[0, 1, :4] != positions[0, 0, :4]).any() and (positions[0, 1, 4:] == positions[0, 0, 4:]).all()
    np.testing.assert_allclose(positions[2, 1, :2], np.sin([1, 0.01]), atol=1e-7)
    np.testing.assert_allclose(positions[2, 1, 6:], np.cos([2, 0.02]), atol=1e-7)


@pytest.mark.parametrize("place_start", [0.0, 3.0])
def test_features_can_start_at_their_own_patches(place_start):
    vision = VisionConfig(
        image_size=32, patch_size=8, width=64, num_layers=1, num_heads=4, mlp_size=64, num_queries=16, image_start_id=60
    )
    config = small_model(
        hidden_size=128, head_dim=64, init_std=0.08, vision=dataclasses.replace(vision, place_start=place_start)
    )
    model = build_model(config)
    params = nn.meta.unbox(jax.jit(model.init_params)(jax.random.key(0)))
    # A picture for each patch, in which that patch alone is not gray, and one all gray.
    pictures = np.full((17, 4, 8, 4, 8, 3), 128, np.uint8)
    for patch in range(16):
        pictures[patch, patch // 4, :, patch % 4] = (220, 30, 30)
    features = np.asarray(outputs(model, params, pictures.reshape(17, 32, 32, 3), method="encode_images"))
    moved = np.linalg.norm(features[:16] - features[16], axis=-1)  # [patch, feature]
    own = np.mean(np.diag(moved)) / np.mean(moved)
    assert own > 2 if place_start else own < 1.5
    sizes = np.linalg.norm(features, axis=-1).mean() / np.linalg.norm(params["token_embedding"], axis=-1).mean()
    assert (0.8 < sizes < 1.2) if place_start else sizes > 5


def test_a_block_computes_what_torch_computes(model_and_params):
    torch = pytest.importorskip("torch")
    model, params = model_and_params
    layer = {
        name: torch.from_numpy(np.array(x[0])) for name, x in flatten_dict(params["vision"]["layers"], sep="/").items()
    }

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (32,), layer[f"{name}/scale"], layer[f"{name}/bias"], eps=1e-6)

    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 16, 32)).astype(np.float32))
    kernel, bias = layer["query_key_value/kernel"], layer["query_key_value/bias"]
    mixed = torch.einsum("bld,dhnk->nbhlk", norm(x, "attention_norm"), kernel) + bias.transpose(0, 1)[:, None, :, None]
    attended = torch.nn.functional.scaled_dot_product_attention(*mixed)
    y = x + torch.einsum("bhlk,hkd->bld", attended, layer["attention_output/kernel"]) + layer["attention_output/bias"]
    wide = torch.nn.functional.gelu(norm(y, "mlp_norm") @ layer["up/kernel"] + layer["up/bias"])
    expected = y + wide @ layer["down/kernel"] + layer["down/bias"]

    from qwen_jax.models.vision.encoder import EncoderBlock

    first = jax.tree.map(lambda leaf: leaf[0], params["vision"]["layers"])
    found, _ = outputs(EncoderBlock(CONFIG, VISION), first, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_places_of_features():
    row = [*text_with(2, 1), 7, BEGIN, PAD]  # the third picture is cut off
    places = np.asarray(feature_places(jnp.asarray([row, [5] * len(row)]), VISION))
    assert places[0].tolist() == [-1, -1, -1, 0, 1, 2, 3, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, 8]
    assert (places[1] == -1).all()


def test_features_stand_in_their_places_and_nowhere_else(model_and_params):
    """A row is the same beside any other, with any padding of pictures; text alone runs no encoder."""
    model, params = model_and_params
    random = np.random.default_rng(1)
    images = random.standard_normal((2, 28, 28, 3)).astype(np.float32)
    one, two = text_with(3) + [9] * 7, text_with(2, 1) + [9]
    assert len(one) == len(two)
    alone = [
        outputs(model, params, jnp.asarray([one]), images=images[None, :1])[0],
        outputs(model, params, jnp.asarray([two]), images=images[None])[0],
    ]
    padded = np.stack([np.stack([images[0], 7 + 0 * images[0]]), images])
    both = outputs(model, params, jnp.asarray([one, two]), images=padded)
    # Of the logits' scale, about 4: rows are summed in another order with others beside them.
    np.testing.assert_allclose(both, np.stack(alone), rtol=0, atol=1e-5 * np.abs(alone).max())
    swapped = outputs(model, params, jnp.asarray([two]), images=images[None, ::-1])[0]
    assert np.abs(swapped[:3] - alone[1][:3]).max() < 1e-5 < np.abs(swapped[3:] - alone[1][3:]).max()
    text = jnp.asarray([[1, 2, 3]])
    without = {name: tree for name, tree in params.items() if name != "vision"}
    decoder = build_model(dataclasses.replace(CONFIG, vision=None))
    np.testing.assert_array_equal(outputs(model, params, text), outputs(decoder, without, text))
    assert "vision" not in str(jax.make_jaxpr(lambda p: model.apply({"params": p}, text))(without))


def test_the_gradient_reaches_the_encoder_and_equals_finite_differences(model_and_params):
    model, params = model_and_params
    random = np.random.default_rng(2)
    images = random.standard_normal((1, 1, 28, 28, 3)).astype(np.float32)
    tokens = jnp.asarray([text_with(2) + [3, 4]])
    cotangent = random.standard_normal((tokens.shape[1], CONFIG.vocab_size)).astype(np.float32)

    def loss(vision):
        logits = model.apply({"params": {**params, "vision": vision}}, tokens, images=images)
        return jnp.vdot(logits[0], cotangent)

    loss = jax.jit(loss)
    gradient = jax.jit(jax.grad(loss))(params["vision"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    direction = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), params["vision"])
    step = 3e-3
    ahead, behind = (
        loss(jax.tree.map(lambda x, d, sign=sign: np.asarray(x) + sign * step * d, params["vision"], direction))
        for sign in (1, -1)
    )
    slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert (ahead - behind) / (2 * step) == pytest.approx(float(slope), rel=2e-2)


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, sequence=2), dict(fsdp=4, tensor=2)])
def test_sharded_over_all_axes_it_is_the_same_model(model_and_params, axes):
    model, params = model_and_params
    random = np.random.default_rng(3)
    images = random.standard_normal((4, 2, 28, 28, 3)).astype(np.float32)
    tokens = jnp.asarray([text_with(2, 2), text_with(1, 3), text_with(2) + [5] * 8, [*range(1, 17)]])

    def loss(params, tokens, images):
        return jnp.mean(jax.nn.log_softmax(model.apply({"params": params}, tokens, images=images))[..., 5])

    expected = jax.jit(jax.value_and_grad(loss))(params, tokens, images)
    mesh = make_mesh(MeshConfig(**axes))
    with use_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(abstract_params(model), mesh))
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        found = jax.jit(jax.value_and_grad(loss))(placed, jax.device_put(tokens, rows), jax.device_put(images, rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_the_released_tensors_hold_the_same_numbers():
    """Through the released names and back: the interleaved projection, too."""
    random = np.random.default_rng(4)
    shapes = parameter_shapes(CONFIG)
    params = {path: random.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}

    class Weights:
        config = CONFIG

        def read(self, path, layer, dtype=None):
            return params[path] if layer is None else params[path][layer]

    tensors = {tensor.name: tensor for tensor in external_tensors(FORMATS["qwen"], CONFIG)}
    block = tensors["transformer.visual.transformer.resblocks.1.attn.in_proj.weight"]
    stored = gather(Weights(), block)
    kernel = params["vision/layers/query_key_value/kernel"][1]
    # Released: reshape to [heads, 3 * head_dim], then split.
    query, key, value = np.split(stored.reshape(4, 24, 32), 3, axis=1)
    for index, part in enumerate((query, key, value)):
        np.testing.assert_array_equal(part, kernel[:, :, index].transpose(1, 2, 0))
    np.testing.assert_array_equal(from_external(block.mapping.layout, stored, kernel.shape), kernel)
    assert sum(np.prod(tensor.shape) for tensor in tensors.values()) == sum(x.size for x in params.values())
    assert unflatten_dict(params, sep="/").keys() >= {"vision", "layers"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_size=30), "image_size 30 must be a multiple of patch_size 7"),
        (dict(width=30), "width 30 must be a multiple of num_heads 4"),
        (dict(num_queries=5), "num_queries must be a square number, found 5"),
        (dict(place_start=-1.0), "place_start must be a number of at least 0, found -1.0"),
        (dict(place_start="no"), "place_start must be a number of at least 0, found 'no'"),
        (dict(norm_epsilon=-1e-6), "norm_epsilon must be a number of at least 0, found -1e-06"),
        (dict(image_start_id=None), "image_start_id must be the id of a token, found None"),
        (dict(num_layers=0), "num_layers must be a positive integer, found 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VISION, **changes)


def test_models_and_pictures_that_do_not_fit_are_named(model_and_params):
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 128.*found 32"):
        small_model(vision=VISION)
    model, params = model_and_params
    with pytest.raises(
        ValueError, match=r"pictures must be \[batch, n, n, 3\] with n a multiple of 7, found \[1, 28, 21, 3\]"
    ):
        model.apply({"params": params}, np.zeros((1, 28, 21, 3)), method="encode_images")
    with pytest.raises(ValueError, match="qwen2 .*cannot express an image encoder"):
        external_tensors(FORMATS["qwen2"], CONFIG)
    assert ModelConfig(**CONFIG.to_dict()) == CONFIG
