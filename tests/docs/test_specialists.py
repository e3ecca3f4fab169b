"""Runs the commands of docs/how_to/specialists.md in a copy of the repository, with a toy, in one process."""

import json
import re

import pytest

from qwen_jax import files
from qwen_jax.checkpoints.run_folder import read_config
from tests.pages import blocks, copy_repository, shell

TOY = "num_layers=1 hidden_size=64 num_heads=1 ffn_size=64".split()
# A reader's steps take minutes; these show that every command does what the page says.
SHORT = (
    (r"^make specialists", "python tools/specialists.py --rehearse"),
    (r"(tools/make_specialist_data.py .*)", r"\1 --text_size=20000 --code_size=15000 --held_out_size=3000"),
    (r"(tools/make_arithmetic.py .*)", r"\1 --count 40 --held_out 8"),
    (r"(tools/make_conversations.py .*)", r"\1 --count 40 --held_out 8"),
    (
        r"(python -m qwen_jax.train .*)",
        r"\1 --gin.TRAIN_STEPS=2 --gin.WARMUP_STEPS=1 " + " ".join(f"--gin.ModelConfig.{one}" for one in TOY),
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
    listed = commands("specialists.md")
    assert len(listed) == 11
    (tmp_path / "call.py").write_text(ONE_PROCESS)
    shown = shell(f"python call.py '{json.dumps(listed)}'", tmp_path).stdout
    runs = tmp_path / "runs/specialists"
    table = (runs / "table.md").read_text()
    assert table in shown and re.search(r"^\| base \| \d\.\d{3} \| \d\.\d{3} \| \d+\.\d% \|$", table, re.MULTILINE)
    assert shown.count("holds  ") + shown.count("FAILS  ") == 4
    assert (runs / "specialists.png").read_bytes().startswith(b"\x89PNG")
    # Nothing is run twice, and what is measured was measured on the same texts.
    assert len((runs / "steps.jsonl").read_text().splitlines()) == 11
    base, code = (files.read_json(runs / "measured" / name / "perplexity.json") for name in ("base", "code"))
    assert [group["size"] for group in base["groups"]] == [group["size"] for group in code["groups"]]
    assert read_config(tmp_path / "runs/own/chat_2").hidden_size == 64
