"""Benchmarks with pictures, answered by a tiny model on the engine."""

import numpy as np
import pytest
from PIL import Image

from qwen_jax.conversion import load_for_decoding
from qwen_jax.data.tokenizer import Tokenizer, write_ranks
from qwen_jax.evaluation import evaluator
from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, Generation
from qwen_jax.evaluation.records import Records
from qwen_jax.evaluation.vision.prompts import asked, pictured
from qwen_jax.inference import Engine, Request
from tests.fakes import SMALL_VISION, random_vision_run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Of bytes: its control tokens are those of `SMALL_VISION`."""
    path = tmp_path_factory.mktemp("ranks") / "bytes.tiktoken"
    write_ranks({bytes([byte]): byte for byte in range(256)}, path)
    assert Tokenizer(path).vision_tokens["<img>"] == SMALL_VISION.image_start_id
    return Tokenizer(path)


@pytest.fixture(scope="module")
def engine(tokenizer, tmp_path_factory):
    loaded = load_for_decoding(random_vision_run(tmp_path_factory.mktemp("pictures")))
    return Engine(*loaded, tokenizer=tokenizer, slots=2)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return path


def benchmark(answers) -> Benchmark:
    return Benchmark(name="toy", title="Toy", folder="toy", files="", shots=0, read=lambda _: iter(()), answers=answers)


def answered(engine, answers, examples, folder, **options) -> list[dict]:
    folder.mkdir(exist_ok=True)
    with Records(folder, [example.id for example in examples]) as records:
        evaluator.answer(engine, benchmark(answers), examples, records, **options)
        return [records.rows[example.id] for example in examples]


WRITTEN = Generation(max_new_tokens=6, extract={"answer": lambda text, _: text}, judge=lambda answer, example: False)


def pixels(path) -> np.ndarray:
    size = SMALL_VISION.image_size
    return np.asarray(Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def test_a_picture_is_shown_with_its_question(engine, tokenizer, picture, tmp_path):
    examples = [
        Example(id="0", target="", **asked(picture, "What?")),
        Example(id="1", target="", **pictured(picture, {"type": "opening", "ref": "it"})),
        Example(id="2", target="", prompt="What? Answer:"),
    ]
    rows = answered(engine, WRITTEN, examples, tmp_path)
    tags = tokenizer.vision_tokens
    shown = [tags["<img>"], *[tags["<imgpad>"]] * SMALL_VISION.num_queries, tags["</img>"]]
    prompts = [
        [*shown, *b"What? Answer:"],
        [*shown, tags["<ref>"], *b"it", tags["</ref>"], tags["<box>"]],
        [*b"What? Answer:"],
    ]
    images = [[pixels(picture)], [pixels(picture)], []]
    stop = (tokenizer.im_end_id, tokenizer.endoftext_id)
    requests = [Request(ids, 6, stop_ids=stop, images=some) for ids, some in zip(prompts, images, strict=True)]
    expected = {result.index: result.text for result in engine.generate(requests)}
    assert [row["output"] for row in rows] == [expected[index] for index in range(3)]
    assert rows[0]["prompt"] == f"<img>{picture}</img>What? Answer:" and rows[0]["cut_tokens"] == 0


def test_choices_are_ranked_after_a_picture(engine, tokenizer, picture, tmp_path):
    example = Example(id="0", target=1, choices=(" A", " B"), **asked(picture, "Which?"))
    (row,) = answered(engine, Choices(normalization="tokens", apart=True), [example], tmp_path)
    tags = tokenizer.vision_tokens
    prompt = [tags["<img>"], *[tags["<imgpad>"]] * SMALL_VISION.num_queries, tags["</img>"], *b"Which? Answer:"]
    scores = engine.score([prompt] * 2, [list(b" A"), list(b" B")], images=[[pixels(picture)]] * 2)
    expected = [float(score.log_probs.astype("float64").sum()) for score in scores]
    assert row["output"]["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="choices after pictures must be encoded apart"):
        answered(engine, Choices(), [example], tmp_path / "other")


def test_a_chat_model_is_shown_pictures_in_chatml(engine, tokenizer, picture, tmp_path):
    parts = pictured(picture, "\nIs it?")
    example = Example(id="0", target="", chat=parts["prompt"], chat_parts=parts["parts"], **parts)
    (row,) = answered(engine, WRITTEN, [example], tmp_path, chat=True)
    assert row["chat"] and row["prompt"] == f"<img>{picture}</img>\nIs it?"


def test_what_cannot_be_shown_is_named(engine, tokenizer, picture, tmp_path):
    missing = Example(id="7", target="", **asked(tmp_path / "none.png", "What?"))
    with pytest.raises(ValueError, match="toy, example 7: .*none.png"):
        answered(engine, WRITTEN, [missing], tmp_path / "0")
    long = Example(id="8", target="", **asked(picture, "What? " * 60))
    with pytest.raises(ValueError, match="toy, example 8: the prompt has 374 tokens, 4 for each picture, and there is"):
        answered(engine, WRITTEN, [long], tmp_path / "1")
    (tmp_path / "text").mkdir()
    loaded = load_for_decoding(random_vision_run(tmp_path / "text", vision=None))
    text_only = Engine(*loaded, tokenizer=tokenizer, slots=1)
    with pytest.raises(ValueError, match="toy shows pictures, and the checkpoint has no image encoder"):
        answered(text_only, WRITTEN, [Example(id="9", target="", **asked(picture, "What?"))], tmp_path / "2")
