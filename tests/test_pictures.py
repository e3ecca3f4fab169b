"""Pictures on the command line: chat and generate with them, boxes drawn, and one line for what cannot be."""

import dataclasses
import io
import itertools
import json
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from qwen_jax import chat as chat_module
from qwen_jax import generate as generate_module
from qwen_jax.chat import Chat, command
from qwen_jax.conversion import convert
from qwen_jax.data.boxes import draw, find_boxes
from qwen_jax.data.chatml import encode_prompt
from qwen_jax.data.content import Picture, Reference, Region, decode, encode, parse_parts, to_json
from qwen_jax.data.images import open_image, squash
from qwen_jax.data.vision import VisionChatRows
from qwen_jax.generate import load_engine, read_prompts
from qwen_jax.inference import StreamChunk
from qwen_jax.pictures import draw_reply
from tests.fakes import SMALL_VISION, random_run, random_vision_run
from tests.warm_python import python

BOXED = (
    Reference("the cat"),
    Region(((100, 200), (500, 900))),
    " and ",
    Reference("dog"),
    Region(((0, 0), (999, 999))),
)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return random_vision_run(tmp_path_factory.mktemp("pictures"), head_dim=128)  # as format qwen has it


@pytest.fixture(scope="module")
def engine(run_folder):
    return load_engine(run_folder, slots=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two pictures, neither a square, and a file that is none."""
    folder = tmp_path_factory.mktemp("files")
    Image.new("RGB", (60, 30), "#804020").save(folder / "a.png")
    noise = np.random.default_rng(0).integers(0, 256, (100, 50, 3), np.uint8)
    Image.fromarray(noise).save(folder / "b.jpg")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    return folder


class Recorded:
    """An engine that notes the requests; with `replies`, it says these contents instead of its own."""

    def __init__(self, engine, replies=()):
        self.engine, self.requests, self.replies = engine, [], list(replies)

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def stream(self, request):
        self.requests.append(request)
        if not self.replies:
            return self.engine.stream(request)
        return self._say(self.replies.pop(0))

    def generate(self, requests):
        taken = list(requests)
        self.requests += taken
        return self.engine.generate(taken)

    def _say(self, content):
        tokenizer = self.engine.tokenizer
        for token in [*encode(tokenizer, content, 4), tokenizer.im_end_id]:
            ended = token == tokenizer.im_end_id
            text = "" if ended else tokenizer.decode([token])
            yield StreamChunk(None, (token,), (0.0,), text, "stop_id" if ended else None)


def say(chat, text):
    return "".join(chat.answer(text))


def test_a_conversation_about_pictures_is_as_released(engine, files, tmp_path):
    """Numbered through the conversation, the pictures of each message before its text; saved as a row of data."""
    recorded = Recorded(engine)
    chat = Chat(recorded, system="S", max_new_tokens=8)
    chat.attach(files / "a.png")
    first = say(chat, "What? <img>")
    chat.attach(files / "b.jpg")
    chat.attach(files / "a.png")
    say(chat, "And now?")
    one, two = (Picture("x") for _ in range(2))
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": ("Picture 1: ", one, "\n", "What? <img>")},
        {"role": "assistant", "content": first},
        {"role": "user", "content": ("Picture 2: ", one, "\n", "Picture 3: ", two, "\n", "And now?")},
    ]
    tokenizer = engine.tokenizer
    assert list(recorded.requests[0].prompt) == encode_prompt(tokenizer, messages[:2], num_queries=4)
    assert tokenizer.decode(recorded.requests[0].prompt).count(
        "Picture 1: <img><imgpad><imgpad><imgpad><imgpad></img>\n"
    )
    if "\ufffd" not in first:
        assert list(recorded.requests[1].prompt) == encode_prompt(tokenizer, messages, num_queries=4)
    a, b = (squash(open_image(files / name), 28) for name in ("a.png", "b.jpg"))
    for request, wanted in zip(recorded.requests, ([a], [a, b, a]), strict=True):
        np.testing.assert_array_equal(request.images, wanted)
    chat.save(tmp_path / "saved.json")
    saved = json.loads((tmp_path / "saved.json").read_text())["messages"]
    shown = saved[3]["content"][0]
    assert shown["type"] == "image" and (tmp_path / shown["image"]).samefile(files / "b.jpg")
    assert [part["type"] for part in saved[3]["content"]] == ["image", "image", "text"]
    chat.reset()
    say(chat, "no picture")
    assert not recorded.requests[-1].images


def test_a_saved_conversation_is_trained_on_as_it_was_held(engine, files, tmp_path):
    """The row of training data begins with the tokens that the model saw, pictures and regions among them."""
    recorded = Recorded(engine, [BOXED, "yes"])
    chat = Chat(recorded, system="S", max_new_tokens=8)
    chat.attach(files / "a.png")
    say(chat, "Where? <box>(1,2),(3,4)</box>")
    chat.attach(files / "b.jpg")
    say(chat, "There, too?")
    chat.save(tmp_path / "saved.json")
    row = json.loads((tmp_path / "saved.json").read_text())
    encoded = VisionChatRows(num_queries=4).encode(row, engine.tokenizer)
    seen = list(recorded.requests[1].prompt)
    assert encoded.tokens[: len(seen)].tolist() == seen
    assert [(tmp_path / name).resolve() for name in encoded.images] == [files / "a.png", files / "b.jpg"]


def test_pictures_leave_with_their_turns_and_keep_their_numbers(engine, files):
    recorded = Recorded(engine)
    chat = Chat(recorded, system="S", max_new_tokens=8)
    for name in ("a.png", "b.jpg"):
        chat.attach(files / name)
        say(chat, "x" * 120)
    assert "are left out from now on" in chat.notices[0]
    assert "Picture 2: <img>" in engine.tokenizer.decode(recorded.requests[1].prompt)
    np.testing.assert_array_equal(recorded.requests[1].images, [squash(open_image(files / "b.jpg"), 28)])


def test_more_pictures_than_there_is_room(engine, files):
    chat = Chat(engine, system="S", max_new_tokens=8)
    for _ in range(30):
        chat.attach(files / "a.png")
    with pytest.raises(ValueError, match=r"\(180 for 30 picture.s., which /reset takes away\), and 8 are kept"):
        chat.answer("What?")
    assert chat.messages == []
    chat.reset()
    assert say(chat, "What?")


def test_boxes_of_a_reply_are_drawn(engine, files, tmp_path, monkeypatch, capsys):
    """On the last picture as large as it is, in a file of its own each time; tags stay tags in the next prompt."""
    recorded = Recorded(engine, [BOXED, ("no ", Region(((5, 5), (9, 9)))), "and <box>(1,2),(3,1000)</box>"])
    monkeypatch.setattr(chat_module, "load_engine", lambda *_, **__: recorded)
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(f"/image {files / 'b.jpg'}\nWhere?\nAnd?\nMore?\n/image {files / 'a.png'}\n")
    )
    boxes = tmp_path / "boxes"
    options = ["--checkpoint", str(tmp_path), "--boxes", str(boxes), "--max_new_tokens", "8", "--system", "S"]
    chat_module.main([*options, "--image", str(files / "a.png")])
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == (
        "<ref>the cat</ref><box>(100,200),(500,900)</box> and <ref>dog</ref><box>(0,0),(999,999)</box>"
    )
    assert err.endswith("note: 1 picture(s) were not shown, as no message followed\n")
    assert f"note: drew 2 box(es) on {boxes / 'b-1.png'}" in err and f"drew 1 box(es) on {boxes / 'b-2.png'}" in err
    assert "note: not drawn: <box>(1,2),(3,1000)</box>: coordinates that are no integers in [0, 1000)" in err
    assert sorted(path.name for path in boxes.iterdir()) == ["b-1.png", "b-2.png"]
    before, after = (np.asarray(open_image(path), int) for path in (files / "b.jpg", boxes / "b-1.png"))
    assert after.shape == before.shape == (100, 50, 3)
    changed = np.abs(after - before).sum(-1) > 0
    # Width and height map back separately: the corner (100, 200) is at 5, 20.
    assert changed[20:90, 5].all() and changed[20, 5:25].all() and not changed[30:85, 8:20].any()
    tags, ids = engine.tokenizer.vision_tokens, list(recorded.requests[1].prompt)
    assert ids.count(tags["<box>"]) == 2 and ids.count(tags["<ref>"]) == 2 and ids.count(tags["<img>"]) == 2
    # The last reply wrote the characters, not the tags.
    assert list(recorded.requests[2].prompt).count(tags["<box>"]) == 3


def test_content_of_a_reply_is_what_was_encoded(engine):
    tokenizer = engine.tokenizer
    for content in (BOXED, "plain <box>", (*BOXED, " the end")):
        assert decode(tokenizer, encode(tokenizer, content)) == content
    tags = tokenizer.vision_tokens
    alone = [*tokenizer.encode("a"), tags["<box>"], *tokenizer.encode("(1,2)"), tags["</box>"], tags["<ref>"]]
    assert decode(tokenizer, alone) == "a<box>(1,2)</box><ref>"
    parts = (Picture("/x/y/a.png"), "see", *BOXED, Region(((1, 1), (2, 2))), Region(((1, 1), (2, 1), (2, 2), (1, 2))))
    assert parse_parts(to_json(parts, "/x/y"), "here") == (Picture("a.png"), *parts[1:])
    assert to_json(("x", Reference("y")), "/") == [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]


NUMBERS = st.integers(0, 999)
REGIONS = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS).map(
    lambda n: Region(((min(n[::2]), min(n[1::2])), (max(n[::2]), max(n[1::2]))))
)
TEXTS = st.text(st.characters(codec="ascii"), min_size=1, max_size=12)


@hypothesis.given(parts=st.lists(st.one_of(TEXTS, TEXTS.map(Reference), REGIONS), max_size=6))
def test_any_content_comes_back(engine, parts):
    """Whatever a text says, a tag or a box among it, it stays text, and tags stay tags."""
    texts = itertools.groupby(parts, key=lambda part: isinstance(part, str))
    content = tuple(part for text, group in texts for part in (["".join(group)] if text else group))
    found = decode(engine.tokenizer, encode(engine.tokenizer, content))
    assert found == content or (isinstance(found, str) and content in ((), (found,)))


def test_boxes_that_are_none_are_named():
    found, wrong = find_boxes(
        "<ref>a  dog</ref><box>(1, 2),(30,40)</box><box>(5,6),(7,8)</box><quad>(1,1),(9,1),(9,9),(1,9)</quad>"
        "<box>(1,2)</box><box>(9,2),(3,4)</box><box>(-1,2),(3,4)</box><box>1,2,3,4</box><box>(1,2),(3,4)"
    )
    assert [one.label for one in found] == ["a dog"] * 3
    assert [one.region.points for one in found[:2]] == [((1, 2), (30, 40)), ((5, 6), (7, 8))]
    assert [line.split(": ")[1:] for line in wrong] == [
        ["<box>(1,2)</box>", "a region without 4 numbers"],
        ["<box>(9,2),(3,4)</box>", "a box whose corners are in the wrong order"],
        ["<box>(-1,2),(3,4)</box>", "coordinates that are no integers in [0, 1000)"],
        ["<box>1,2,3,4</box>", "more than points (x,y)"],
    ]
    # A label that the font cannot write is a number: the same picture as with it.
    wide = Image.new("RGB", (200, 100), "white")
    number, chinese = (find_boxes(f"<ref>{label}</ref><box>(100,500),(900,900)</box>")[0] for label in ("1", "猫"))
    assert draw(wide, number).tobytes() == draw(wide, chinese).tobytes() != wide.tobytes()
    tiny = Image.new("RGB", (3, 2))
    assert draw(tiny, found).size == (3, 2) and tiny.getcolors() == [(6, (0, 0, 0))]


def test_a_person_may_ask_for_tags(engine, capsys, monkeypatch):
    recorded = Recorded(engine, ["a cat", "text"])
    chat = Chat(recorded, system="S", max_new_tokens=8)
    question = "What is in <box>(1,2),(3,4)</box> & <ref>it</ref>?"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/tags {question}\n{question}\n"))
    chat_module.converse(chat, False, "boxes")
    tags = engine.tokenizer.vision_tokens
    counts = [list(request.prompt).count(tags["<box>"]) for request in recorded.requests]
    assert counts == [1, 1]  # of the first message alone
    for wrong, message in (
        ("<box>(1,2),(3,1000)</box>", "no integers in .0, 1000."),
        ("<box>(1,2)", "<box> without its other half"),
        ("<img>a.png</img>", "a picture is shown with /image FILE"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"/tags {wrong}\n"))
        with pytest.raises(ValueError, match=message):
            chat_module.converse(chat, False, "boxes")


def test_labels_that_cannot_be_written_are_explained(files, tmp_path):
    reply = "<ref>a</ref><box>(1,2),(30,40)</box><ref>猫</ref><box>(5,6),(7,8)</box><box>(5,6),(7,8)</box>"
    lines = draw_reply(reply, files / "a.png", tmp_path)
    assert lines == [f"drew 3 box(es) on {tmp_path / 'a-1.png'} (2 is 猫, 3 is 猫)"]


def test_generate_with_pictures(run_folder, files, tmp_path, capsys, monkeypatch):
    rows = [
        {"prompt": "plain"},
        {"prompt": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
        {"prompt": [{"type": "image", "image": "b.jpg"}, {"type": "text", "text": "What?"}]},
    ]
    file = files / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--checkpoint", str(run_folder), "--max_new_tokens", "8"]
    given = []

    def load_recorded(*places, **settings):
        given.append(Recorded(load_engine(*places, **settings)))
        return given[-1]

    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "load_engine", load_recorded)
        generate_module.main([*options, "--prompts", str(file)])
    a, b = (squash(open_image(files / name), 28) for name in ("a.png", "b.jpg"))
    for request, wanted in zip(given[0].requests, ([], [a], [b]), strict=True):
        np.testing.assert_array_equal(request.images, wanted)
    lines = sorted(map(json.loads, capsys.readouterr().out.splitlines()), key=lambda line: line["index"])
    generate_module.main([*options, "--image", str(files / "a.png"), "--prompt", "What?"])
    assert capsys.readouterr().out == lines[1]["text"] + "\n"
    released = convert("orbax", run_folder, "qwen", tmp_path / "qwen", progress=False)
    texts = generate_module.generate(checkpoint=released, images=[files / "a.png"], prompt="What?", max_new_tokens=8)
    assert "".join(texts) == lines[1]["text"]
    recorded = Recorded(load_engine(run_folder), [BOXED])
    monkeypatch.setattr(generate_module, "load_engine", lambda *_, **__: recorded)
    prompt = ["--image", str(files / "a.png"), "--image_label", "Picture {number}: ", "--prompt", "Where?"]
    generate_module.main([*options, *prompt, "--boxes", str(tmp_path / "boxes")])
    assert (tmp_path / "boxes" / "a-1.png").is_file()
    assert recorded.tokenizer.decode(recorded.requests[0].prompt).startswith("Picture 1: <img><imgpad>")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "there is no picture .*missing.png"),
        ("broken.png", "broken.png cannot be read as an image"),
        ("prompts.txt", "prompts.txt cannot be read as an image"),
    ],
)
def test_pictures_that_cannot_be_read(run_folder, files, name, message):
    (files / "prompts.txt").write_text("no picture")
    for arguments in (["--prompt", "x"], []):
        main = generate_module.main if arguments else chat_module.main
        with pytest.raises((ValueError, OSError), match=message):
            main(["--checkpoint", str(run_folder), "--image", str(files / name), *arguments])


def test_what_cannot_be_is_named(run_folder, engine, files, tmp_path, monkeypatch, plain_environment):
    with pytest.raises(ValueError, match="/image needs a file"):
        command(Chat(engine, max_new_tokens=8), "/image")
    with pytest.raises(OSError, match="there is no picture none.png"):
        command(Chat(engine, max_new_tokens=8), "/image none.png")
    monkeypatch.setattr("qwen_jax.pictures.MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="b.jpg has .* bytes, more than 100"):
        Chat(engine, max_new_tokens=8).attach(files / "b.jpg")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": [{"type": "image"}]}\n')
    with pytest.raises(ValueError, match="bad.jsonl:1: a part of type image without a image"):
        read_prompts(bad)
    bad.write_text('{"prompt": "x"}\n{"prompt": [{"type": "image", "image": "none.png"}]}\n')
    with pytest.raises(OSError, match="prompt 1: there is no picture .*none.png"):
        generate_module.main(["--checkpoint", str(run_folder), "--prompts", str(bad)])
    with pytest.raises(ValueError, match="--image goes with --prompt"):
        options = ["--checkpoint", str(run_folder), "--prompts", str(bad)]
        generate_module.main([*options, "--image", str(files / "a.png")])
    with pytest.raises(ValueError, match="<img> is id 470 of 473 .* and id 400 of 480 in the model"):
        load_engine(random_vision_run(tmp_path, vision=dataclasses.replace(SMALL_VISION, image_start_id=400)))


def test_a_checkpoint_without_an_encoder_is_one_line_and_status_2(tmp_path, files, plain_environment):
    folder = random_run(tmp_path, hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=64)
    arguments = ["--checkpoint", folder, "--image", files / "a.png", "--prompt", "x"]
    done = subprocess.run(
        [python(), "-m", "qwen_jax.generate", *arguments], capture_output=True, text=True, env=plain_environment
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        "error: the checkpoint has no image encoder, so it takes no pictures: take one of Qwen-VL"
    )
