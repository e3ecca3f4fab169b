"""Requests with pictures: the engine's own tokens, their count, and refusals before anything is decoded or fetched."""

import base64
import io
import logging
import zlib

import numpy as np
import pytest
from PIL import Image

openai = pytest.importorskip("openai", reason="openai is not installed")

from qwen_jax.data.chatml import encode_prompt  # noqa: E402
from qwen_jax.data.content import Picture  # noqa: E402
from qwen_jax.data.images import squash  # noqa: E402
from qwen_jax.generate import load_engine  # noqa: E402
from qwen_jax.inference import Request, SamplingConfig  # noqa: E402
from qwen_jax.serve import compile_first  # noqa: E402
from tests.fakes import SMALL_VISION, random_vision_run  # noqa: E402
from tests.serving.scripted import ScriptedEngine, serving  # noqa: E402
from tests.serving.test_openai_client import post  # noqa: E402

RED, BLUE = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "blue")
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def part(data, kind="png"):
    data = encoded(data) if isinstance(data, Image.Image) else data
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def text(said):
    return {"type": "text", "text": said}


def huge_png():
    """A header that asks for 10^10 pixels, in 60 bytes."""
    head = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big") + b"\0\0\0\0IDAT"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_vision_run(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def engine(folder):
    return load_engine(folder, slots=2, prefix_cache_tokens=256)


@pytest.fixture(scope="module")
def running(engine):
    with serving(engine, vision=SMALL_VISION, max_images=3, max_image_pixels=10_000) as server:
        yield server


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_an_answer_is_the_engine_s_and_the_pictures_are_counted(client, engine):
    shown = Picture("x")
    contents = ("Picture 1: ", shown, "\n", "What?"), "Red.", ("Picture 2: ", shown, "\n", "And <img> now?")
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    ids = encode_prompt(engine.tokenizer, messages, num_queries=4)
    pixels = [squash(image, 28) for image in (RED, BLUE)]
    ends = (engine.tokenizer.im_end_id, engine.tokenizer.endoftext_id)
    (expected,) = engine.generate([Request(ids, 12, stop_ids=ends, images=pixels)])
    said = [
        {"role": "user", "content": [part(RED), text("What?")]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [part(encoded(BLUE, "GIF"), "gif"), text("And <img> now?")]},
    ]
    given = dict(model="tiny", temperature=0, max_tokens=12)
    whole = client.chat.completions.create(messages=said, **given)
    assert whole.choices[0].message.content == expected.text
    assert whole.usage.prompt_tokens == len(ids)
    chunks = client.chat.completions.create(messages=said, **given, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    said[0]["content"][0] = part(BLUE)
    other = client.chat.completions.create(messages=said, **given, logprobs=True).choices[0]
    found = np.asarray([token.logprob for token in other.logprobs.content])
    assert np.abs(found - expected.log_probs[: len(found)]).max() > 1e-3


def test_the_first_client_waits_for_no_encoder(folder, caplog):
    caplog.set_level(logging.INFO, "qwen_jax.inference")
    engine = load_engine(folder, slots=1)
    compile_first(engine, SamplingConfig())
    assert caplog.text.count("compiled encode 1 pictures") == 1
    ids = [SMALL_VISION.image_start_id, *[SMALL_VISION.image_pad_id] * 4, SMALL_VISION.image_end_id, 5]
    list(engine.generate([Request(ids, 1, images=[squash(RED, 28)])]))
    assert caplog.text.count("compiled encode") == 1


def test_regions_are_tags_where_they_are_parts_and_text_elsewhere(tokenizer):
    engine = ScriptedEngine(tokenizer, lambda prompt: "yes")
    box = {"type": "box", "ref": "it", "boxes": [[1, 2, 3, 4]]}
    with serving(engine, vision=SMALL_VISION) as server:
        body = {"messages": [{"role": "user", "content": [text("<ref>a</ref>"), box]}]}
        assert post(server.url, "/v1/chat/completions", body)[0] == 200
    ids = list(engine.requests[0].prompt)
    assert engine.prompts[0].count("<ref>") == 2 and ids.count(tokenizer.vision_tokens["<ref>"]) == 1


WRONG = {
    "address": ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}], "the server opens no address"),
    "path": ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "the server opens no address"),
    "bare path": ([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}], "the server opens no address"),
    "our own layout": ([{"type": "image", "image": "/etc/passwd"}], "content that is no text"),
    "no address": ([{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}], "without an address"),
    "not base64": ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,A*A"}}], "not base64"),
    "percent": ([{"type": "image_url", "image_url": {"url": "data:image/png,%89PNG"}}], "the server opens no address"),
    "no picture": ([part(b"hello")], "picture 1 cannot be read as an image"),
    "cut": ([part(RED), part(encoded(BLUE)[:50])], "picture 2 cannot be read as an image"),
    "a program": ([part(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")], "cannot be read"),
    "too large": ([part(Image.new("L", (101, 100)))], "101 x 100 pixels, more than 10,000"),
    "far too large": ([part(huge_png())], "10000000000 pixels"),
    "too many": ([part(RED)] * 4, "4 pictures: there may be 3 at most"),
    "outside": ([{"type": "box", "boxes": [[0, 0, 1000, 5]]}], "no integers in [0, 1000)"),
    "too long": ([part(RED), text("x" * 240)], "at most 256 tokens"),
    "many regions": ([{"type": "box", "boxes": [[0, 0, 9, 9]] * 257}], "258 messages, calls, pictures and regions"),
    "a long reference": ([{"type": "box", "ref": "x" * 200_000, "boxes": [[0, 0, 9, 9]]}], "200000 characters"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_picture_gets_one_line(running, case):
    content, message = WRONG[case]
    body = {"messages": [{"role": "user", "content": content}]}
    status, _, answer = post(running.url, "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["param"] == "messages"
    assert message in answer["error"]["message"] and "\n" not in answer["error"]["message"]


def test_pictures_where_they_do_not_belong(running, tokenizer):
    messages = [{"role": "user", "content": [part(RED)]}]
    for body, message in (
        ({"messages": messages, "tools": TOOLS}, "do not go with tools"),
        (
            {"messages": [{"role": "system", "content": [part(RED)]}, *messages]},
            "message 0: pictures are shown by the user",
        ),
        ({"messages": [*messages, {"role": "assistant", "content": [part(RED)]}, *messages]}, "not by 'assistant'"),
    ):
        status, _, answer = post(running.url, "/v1/chat/completions", body)
        assert status == 400 and message in answer["error"]["message"]
    with serving(ScriptedEngine(tokenizer, lambda prompt: "")) as text_alone:
        status, _, answer = post(text_alone.url, "/v1/chat/completions", {"messages": messages})
    assert status == 400 and "this model has no image encoder" in answer["error"]["message"]
    ids = [SMALL_VISION.image_start_id, 1, 2, 3, 4, SMALL_VISION.image_end_id]
    status, _, answer = post(running.url, "/v1/completions", {"prompt": ids, "max_tokens": 4})
    assert status == 400 and "and the request 0 picture" in answer["error"]["message"]
