"""Runs `make vision` and the commands of docs/how_to/vision.md, with a toy, in one process."""

import json
import re

import pytest

from qwen_jax import files
from qwen_jax.checkpoints.run_folder import read_config
from tests.pages import blocks, copy_repository, shell

TOY = "num_layers=1 num_heads=2 ffn_size=64 vocab_size=752".split()
# A reader's steps take minutes; these show that every command does what the page says.
SHORT = (
    (r"^make vision", "python tools/vision.py --rehearse"),
    (
        r"--pairs 200 --tasks 200 --dialogues 60 --texts 400 --held_out 5",
        "--pairs 8 --tasks 8 --dialogues 8 --texts 8 --held_out 1",
    ),
    (
        r"(python -m qwen_jax.train .*)",
        r"\1 --gin.TRAIN_STEPS=2 --gin.WARMUP_STEPS=1 --gin.EVAL_BATCHES=1 --gin.BATCH_SIZE=2 "
        r"--gin.VisionConfig.num_layers=1 --gin.VisionConfig.image_start_id=742 "
        + " ".join(f"--gin.ModelConfig.{one}" for one in TOY),
    ),
)
# Calls what `python -m MODULE` and `python tools/NAME.py` would, without importing everything anew for each.
ONE_PROCESS = """
import importlib, json, sys
sys.path.insert(0, "tools")
import shown_commands
def call(*words):
    words = [str(word) for word in words]
    name, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0][6:-3], words[1:])
    print(">", name, flush=True)
    assert not importlib.import_module(name).main(arguments), name
shown_commands.call = call
for line in json.loads(sys.argv[1]):
    call(*line)
"""


def commands(page: str) -> list[list[str]]:
    """Words of each command of a page, after `python`."""
    found = []
    for kind, text in blocks(page):
        if kind == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                for pattern, replacement in SHORT:
                    line = re.sub(pattern, replacement, line)
                first, *words = line.split()
                assert first == "python", line
                found.append(words)
    return found


@pytest.mark.slow
def test_commands_of_the_page(tmp_path):
    copy_repository(tmp_path)
    listed = commands("how_to/vision.md")
    assert len(listed) == 6
    (tmp_path / "call.py").write_text(ONE_PROCESS)
    shown = shell(f"python call.py '{json.dumps(listed)}'", tmp_path).stdout
    runs = tmp_path / "runs/vision"
    table = (runs / "table.md").read_text()
    assert table in shown and len(re.findall(r"^\| (?:before|after).*\d%", table, re.MULTILINE)) == 5
    assert shown.count("holds  ") + shown.count("FAILS  ") == 8
    assert (runs / "vision.png").read_bytes().startswith(b"\x89PNG")
    assert len((runs / "steps.jsonl").read_text().splitlines()) == 15
    assert read_config(runs / "base").vision is None and read_config(runs / "stage1").vision is not None
    kinds = files.read_json(tmp_path / "runs/pictures/measured/scores.json")["kinds"]
    assert len(kinds) == 9 and {one["count"] for one in kinds.values()} == {1}


def test_the_example_rows_of_the_page_are_read():
    from qwen_jax.data import vision

    (rows,) = [text for kind, text in blocks("how_to/vision.md") if kind == "json"]
    pair, chat = (json.loads(line) for line in rows.splitlines())
    assert vision.KINDS["pairs"](pair)[1] == [" a black cat on a chair"]
    said = vision.CHAT_LAYOUTS["messages"](chat).messages
    assert [message.role for message in said] == ["user", "assistant"] and len(said[1].parts) == 2


@pytest.mark.slow
def test_the_claims_hold(root, tmp_path):
    """The whole of `make vision`, about 20 minutes on two quiet cores."""
    shell(f"python tools/vision.py --output {tmp_path / 'vision'}", root)
