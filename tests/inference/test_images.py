"""Pictures in prompts: the tokens of the model itself, encoded once, told apart by content, and refused if they do not
fit."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from qwen_jax.conversion import load_for_decoding, load_pretrained
from qwen_jax.data import images as data_images
from qwen_jax.inference import Engine, Request, SamplingConfig, programs
from qwen_jax.inference.images import prompt_key
from qwen_jax.models.vision import config as vision_config
from qwen_jax.sharding import MeshConfig, make_mesh
from tests.fakes import SMALL_VISION, outputs_of_row, random_run, random_vision_run

BEGIN, END, PAD = SMALL_VISION.image_start_id, SMALL_VISION.image_end_id, SMALL_VISION.image_pad_id
PICTURE = [BEGIN, *[PAD] * SMALL_VISION.num_queries, END]
RANDOM = np.random.default_rng(11)
RED, BLUE, NOISE = (
    np.broadcast_to(np.uint8([200, 10, 10]), (28, 28, 3)),
    np.broadcast_to(np.uint8([10, 10, 200]), (28, 28, 3)),
    RANDOM.integers(0, 256, (28, 28, 3), np.uint8),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_vision_run(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_pretrained(folder)


@pytest.fixture
def encoded(monkeypatch):
    """Number of pictures of every call of the encoder, with padding."""
    calls, encode = [], programs.encode_images

    def record(mesh, config, params, images):
        calls.append(len(images))
        return encode(mesh, config, params, images)

    monkeypatch.setattr(programs, "encode_images", record)
    return calls


def tokens_of(engine, requests):
    return [result.tokens for result in sorted(engine.generate(requests), key=lambda result: result.index)]


def greedy(model, params, prompt, images, count=8):
    """What the training-mode forward pass says, a token at a time, over floats of the pictures."""
    pixels = np.stack([(image / np.float32(255) - data_images.MEAN) / data_images.DEVIATION for image in images])[None]
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens, images=pixels))
    ids = list(prompt)
    for length in range(len(prompt), len(prompt) + count):
        filled = jnp.asarray([ids + [0] * (len(prompt) + count - length)])
        ids.append(int(apply(filled)[0, length - 1].argmax()))
    return tuple(ids[len(prompt) :])


def requests_of(count=8):
    """One picture, two, none, a long prompt, and one sampled."""
    return [
        Request([1, 2, *PICTURE, 9], count, images=[RED]),
        Request([*PICTURE, 3, *PICTURE, 9], count, images=[NOISE, BLUE]),
        Request([1, 2, 3], count),
        Request([7] * 40 + PICTURE + [5], count, images=[BLUE]),
        Request([1, *PICTURE, 9], count, SamplingConfig(temperature=1.0), images=[NOISE], seed=3),
    ]


# Prompts of fillings and pictures, of which there are three.
PROMPTS = st.lists(st.one_of(st.integers(0, 3), st.sampled_from("rbn")), max_size=5)


@hypothesis.given(one=PROMPTS, other=PROMPTS)
def test_prompts_have_one_key_if_they_are_one(one, other):
    """Up to any position: so far, keys are equal where tokens and pictures are."""
    shown = {"r": RED, "b": BLUE, "n": NOISE}

    def key(items):
        prompt = [token for item in items for token in (PICTURE if isinstance(item, str) else [item])]
        return prompt_key(prompt, [shown[item] for item in items if isinstance(item, str)], SMALL_VISION)

    def content(items):
        """What stands at each position."""
        return [
            (place, item) if 0 < place < len(PICTURE) - 1 else token
            for item in items
            for place, token in (enumerate(PICTURE) if isinstance(item, str) else [(0, item)])
        ]

    length = min(len(key(one)), len(key(other)))
    for end in range(length + 1):
        assert (key(one)[:end] == key(other)[:end]) == (content(one)[:end] == content(other)[:end])


def test_the_constants_are_one():
    np.testing.assert_array_equal(np.float32(vision_config.PIXEL_MEAN), data_images.MEAN)
    np.testing.assert_array_equal(np.float32(vision_config.PIXEL_DEVIATION), data_images.DEVIATION)


def test_tokens_are_those_of_the_model(loaded):
    model, params = loaded
    engine = Engine(model, params, slots=4)
    found = tokens_of(engine, requests_of())
    for tokens, request in list(zip(found, requests_of(), strict=True))[:2]:
        assert tokens == greedy(model, params, request.prompt, request.images)
    swapped = dataclasses.replace(requests_of()[1], images=[BLUE, NOISE])
    other = dataclasses.replace(requests_of()[0], images=[BLUE])
    assert tokens_of(engine, [other, swapped]) not in ([found[0], found[1]], [found[1], found[0]])
    # Floats give what the bytes that they are made of give.
    pixels = (BLUE / np.float32(255) - data_images.MEAN) / data_images.DEVIATION
    assert tokens_of(engine, [dataclasses.replace(other, images=[pixels])]) == tokens_of(engine, [other])


def test_decoding_weights_and_any_mesh_give_the_same(loaded, folder):
    expected = tokens_of(Engine(*loaded, slots=4), requests_of())
    assert tokens_of(Engine(*load_for_decoding(folder), slots=4), requests_of()) == expected
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    engine = Engine(*load_pretrained(folder, mesh=mesh), mesh=mesh, slots=4, prefix_cache_tokens=256)
    assert tokens_of(engine, requests_of()) == expected
    assert tokens_of(engine, requests_of()) == expected


def test_in_bfloat16(folder):
    """The program of another dtype: features, their places and the prefix cache are all of it."""
    engine = Engine(*load_for_decoding(folder, dtype="bfloat16"), slots=2, prefix_cache_tokens=256)
    request = Request([*[3] * 20, *PICTURE, *[4] * 20], 5, images=[NOISE])
    (first,), (second,) = engine.generate([request]), engine.generate([request])
    assert first.tokens == second.tokens and second.cached_tokens == 32
    (score,) = engine.score([request.prompt], [first.tokens], [request.images])
    np.testing.assert_allclose(score.log_probs, first.log_probs, atol=0.2)


def test_a_picture_is_encoded_once(loaded, encoded):
    engine = Engine(*loaded, slots=8)
    request = Request([1, *PICTURE, 9], 6, SamplingConfig(temperature=1.0), images=[RED])
    results = list(engine.generate([dataclasses.replace(request, seed=seed) for seed in range(4)]))
    assert encoded == [1] and sorted(result.cached_tokens for result in results) == [0, 8, 8, 8]
    tokens_of(engine, [Request([5, *PICTURE, 9], 4, images=[RED.copy()])])
    assert encoded == [1]
    others = [np.full((28, 28, 3), value, np.uint8) for value in range(3)]
    tokens_of(engine, [Request([*PICTURE, 9], 4, images=[image]) for image in others])
    assert encoded == [1, 4]
    engine.set_params(loaded[1])
    tokens_of(engine, [request])
    assert encoded == [1, 4, 1]


def test_the_prefix_cache_tells_pictures_apart(loaded, encoded):
    """A conversation that goes on computes its rest alone; other pictures under the same tokens share nothing."""
    before = [3] * 20
    # The picture lies over the edges of blocks, and at their edge.
    for filling in (before, before[:15], before[:10], [3] * 45):
        plain, engine = Engine(*loaded, slots=2), Engine(*loaded, slots=2, prefix_cache_tokens=512)
        prompt = [*filling, *PICTURE, *[4] * 30]
        seen = []
        for image in (RED, BLUE, RED, NOISE, BLUE):
            request = Request(prompt, 5, images=[image])
            (expected,), (found,) = plain.generate([request]), engine.generate([request])
            assert found.tokens == expected.tokens
            np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)
            seen.append(found.cached_tokens)
            follows = [*prompt, *found.tokens, 5, *PICTURE, 6]
            request = Request(follows, 5, images=[image, NOISE])
            assert tokens_of(engine, [request]) == tokens_of(plain, [request])
        alike = (len(filling) + 1) // 16 * 16  # `<img>` itself is of every picture
        assert seen[0] == 0 and max(seen[1], seen[3]) <= alike  # less where the rest has no room for its padding
        assert seen[2] == seen[4] == (len(prompt) - 1) // 16 * 16
    assert seen[1] == seen[3] == 32  # the filling before the picture
    encoded.clear()
    engine = Engine(*loaded, slots=2, prefix_cache_tokens=512)
    request = Request([*PICTURE, *[4] * 30], 5, images=[RED])
    tokens_of(engine, [request])
    engine._features.clear()
    assert encoded == [1] and tokens_of(engine, [request]) and encoded == [1]  # its keys are there


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ([1, *PICTURE], [], "the prompt has 1 time.* <img> .id 470., and the request 0"),
        ([1, 2], [RED], "the prompt has 0 time.*and the request 1 picture"),
        ([*PICTURE, *PICTURE], [RED], "has 2 time.*the request 1"),
        ([1, *PICTURE[:-1]], [RED], "<img> at position 1 .* must be followed by 4 places .* 471. at position 6"),
        ([1, BEGIN, PAD, END, PAD, PAD, 9], [RED], "<img> at position 1 .* at position 6"),
        ([BEGIN, PAD, BEGIN, PAD, PAD, END, PAD, END], [RED, RED], "<img> at position 0"),
        ([1, END], [], "</img> at position 1 of the prompt has no <img>"),
        ([*PICTURE], [RED[:14]], r"picture 0 must be uint8, or normalized floats, \[28, 28, 3\], found uint8 \[14, 28"),
        ([*PICTURE], [RED.astype(np.int32)], "found int32"),
        ([*PICTURE], [np.full((28, 28, 3), np.nan)], "picture 0 has numbers that are not finite"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(loaded, prompt, images, message):
    engine = Engine(*loaded, slots=1)
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(prompt, 4, images=images))
    assert engine.live == 0


def test_other_requests_that_cannot_be(loaded, tmp_path):
    with pytest.raises(ValueError, match="give pictures, or the embeddings .*, not both"):
        Engine(*loaded).submit(
            Request(PICTURE, 4, images=[RED], embeddings=np.zeros((1, 256)), embedding_positions=[1])
        )
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48)
    engine = Engine(*load_pretrained(random_run(tmp_path, **sizes)))
    with pytest.raises(ValueError, match="1 picture.*the model has no image encoder: take a checkpoint of Qwen-VL"):
        engine.submit(Request([1, 2], 4, images=[RED]))


def test_scores_are_those_of_the_model(loaded, encoded):
    """What prompts share is computed once, and only where their pictures are the same."""
    model, params = loaded
    engine = Engine(*loaded)
    shared = [*PICTURE, 5, 6]
    prompts = [[1, *shared], [1, *shared], [1, *shared], [1, 2, 3], [*PICTURE, 4, *PICTURE]]
    images = [[RED], [BLUE], [RED], [], [BLUE, NOISE]]
    continuations = [[7, 8], [7, 8], [9], [4], [5, 6, 7]]
    scores = engine.score(prompts, continuations, images)
    assert sum(encoded) <= 4
    for prompt, continuation, shown, score in zip(prompts, continuations, images, scores, strict=True):
        pixels = np.zeros((1, 2, 28, 28, 3), np.uint8)
        for number, image in enumerate(shown):
            pixels[0, number] = image
        whole = [*prompt, *continuation]
        logits = outputs_of_row(model, params, [*whole, *[0] * (24 - len(whole))], 24, images=pixels)
        wanted = np.asarray(jax.nn.log_softmax(logits))[len(prompt) - 1 : len(whole) - 1]
        np.testing.assert_allclose(score.log_probs, wanted[np.arange(len(continuation)), continuation], atol=1e-4)
    assert not np.array_equal(scores[0].log_probs, scores[1].log_probs)
    with pytest.raises(ValueError, match="prompt 1: the prompt has 1 time"):
        engine.score(prompts[:2], continuations[:2], [[RED], []])
    with pytest.raises(ValueError, match="one list of pictures for each prompt: found 1 for 2"):
        engine.score(prompts[:2], continuations[:2], [[RED]])
