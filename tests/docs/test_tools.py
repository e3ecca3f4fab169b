"""Runs the commands and programs of docs/how_to/tools.md, in order, on a random model, in one process."""

import json
import re
import sys

import pytest

from qwen_jax import files
from tests.fakes import random_run
from tests.pages import ROOT, blocks, copy_repository, shell

# A reader's commands take minutes; these show that every command does what the page says.
SHORT = (
    # A random model ends a turn by chance alone.
    (r"(-m qwen_jax\.agent )", r"\1--max_new_tokens 3000 --temperature 5 "),
    (r"(tools/make_tool_use\.py )", r"\1--count=20 --texts=20 --one_tool=20 --held_out=2 "),
    (r"(-m qwen_jax\.evaluate )", r"\1--limit 1 "),
    ("runs/tool_use/vocabulary.tiktoken", "runs/tool_use/bytes.tiktoken"),
    (r"Tools\(builtin_tools\(\)\), most_calls=4", "Tools(builtin_tools()), most_calls=1"),
)
# Calls what `python -m MODULE` and `python tools/NAME.py` would, and runs programs, without importing everything anew.
ONE_PROCESS = """
import importlib, json, shlex, sys
sys.path.insert(0, sys.argv[2])
for kind, text in json.loads(sys.argv[1]):
    print("=====", flush=True)
    if kind == "python":
        exec(text, {})
        continue
    for line in text.replace("\\\\\\n", " ").splitlines():
        first, *words = shlex.split(line)
        assert first == "python", line
        name, flags = (words[1], words[2:]) if words[0] == "-m" else (words[0][6:-3], words[1:])
        assert not importlib.import_module(name).main(flags), name
"""


def test_commands_of_the_page(tmp_path):
    (tmp_path / "runs/tool_use").mkdir(parents=True)
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=4096)
    random_run(tmp_path / "runs/tool_use", **sizes).rename(tmp_path / "runs/tool_use/tools")
    listed = []
    for kind, text in blocks("tools.md"):
        if kind == "python" and text.startswith("# my_tools.py"):
            (tmp_path / "my_tools.py").write_text(text)
        elif kind in ("sh", "python") and not text.startswith("make "):
            for pattern, replacement in SHORT:
                text = re.sub(pattern, replacement, text)
            listed.append((kind, text))
    (tmp_path / "call.py").write_text(ONE_PROCESS)
    (tmp_path / "listed.json").write_text(json.dumps(listed))
    output = shell(f'python call.py "$(cat listed.json)" {ROOT / "tools"}', tmp_path, ROOT).stdout
    _, asked, own, inspected, program, _ = output.split("=====\n")
    assert asked.startswith("Question: What is 12.5 * 37?\n") and own.startswith("Question: What is the copper price")
    (saved,) = [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()]
    assert [tool["name"] for tool in saved["tools"]] == ["copper_price"] and saved["ended"] == "answered"
    assert "tokens with loss" in inspected and program.endswith("end 'failed'\n")
    scores = files.read_json(tmp_path / "runs/tool_use/scores/tool_use_none/scores.json")
    assert scores["metrics"]["mean/false_positive"] == 0 and scores["examples"] >= 1


@pytest.mark.slow
def test_make_tool_use_does_every_step_with_a_toy(tmp_path):
    copy_repository(tmp_path)
    rehearsal = "import sys; sys.path[:0] = ['tools', '.']; import tool_use; tool_use.main(['--rehearse'])"
    shown = shell(f'{sys.executable} -c "{rehearsal}"', tmp_path).stdout
    assert (tmp_path / "runs/tool_use/table.md").read_text() in shown
    assert shown.count("holds  ") + shown.count("FAILS  ") == 4 and "done before" not in shown
    assert (tmp_path / "runs/tool_use/tool_use.png").read_bytes().startswith(b"\x89PNG")
    again = shell(f'{sys.executable} -c "{rehearsal}"', tmp_path).stdout
    assert again.count("done before") == 7
