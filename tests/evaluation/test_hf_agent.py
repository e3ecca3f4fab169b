"""The Hugging Face agent benchmark: how the wheel's scoring is called, on a toy of the same form and on the real wheel.

The real one is taken from the file that TRANSFORMERS_WHEEL names, or downloaded by the slow test.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qwen_jax.evaluation import hf_agent
from qwen_jax.sandbox import SandboxUnavailableError, run

TOY = {
    "prompts.py": 'import nothing_that_is_there\nCHAT_MESSAGE_PROMPT = "\\nQ: <<task>>\\nA:"\n',
    "base.py": 'class Half:\n    name = "half"\n    description = "halves a number"\n',
    "agents.py": """
import nothing_that_is_there

BASE_PYTHON_TOOLS = {"int": int}

def unused():
    return nothing_that_is_there

def clean_code_for_run(result):
    explanation, code = result.split("Answer:")
    return explanation, code

def clean_code_for_chat(result):
    _, code, _ = result.split("```")
    return result, code
""",
    "python_interpreter.py": """
def evaluate(code, tools, state):
    exec(code.strip(), {**tools}, state)
    return state['x']
""",
    "evaluate_agent.py": """
from .agents import BASE_PYTHON_TOOLS, clean_code_for_chat, clean_code_for_run
from .python_interpreter import evaluate

TEST_TOOLS = {"half": lambda number: number / 2}

def points(code, state):
    try:
        return evaluate(code, {**BASE_PYTHON_TOOLS, **TEST_TOOLS}, state) == 4
    except Exception as error:
        print(error)
        return False

def evaluate_agent(agent, return_errors):
    prompts = [agent.format_prompt(task) for task in ("half of `8`", "`4`")]
    cleaned = [clean_code_for_run(one) for one in agent.generate_many(prompts, stop=[])]
    right = [points(code, {}) for _, code in cleaned]
    errors = {task: {"code": {code}} for task, (_, code), good in zip(prompts, cleaned, right) if not good}
    return {"code score": 50 * sum(right)}, {}, {}, errors

def evaluate_chat_agent(agent, return_errors):
    score = 0
    for tasks in (["first", "second"], ["other"]):
        agent.prepare_for_new_chat()
        state = {}
        for task in tasks:
            prompt = agent.format_prompt(task, chat_mode=True)
            reply = agent.generate_one(prompt, stop=[])
            score += points(clean_code_for_chat(reply)[1], state)
    return {"code score": score}, {}, {}, {}
""",
}


def make_wheel(path: Path, version: str = hf_agent.VERSION) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"transformers-{version}.dist-info/METADATA", "")
        for name, source in TOY.items():
            wheel.writestr(f"transformers/tools/{name}", source)
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    try:
        run("")
    except SandboxUnavailableError as error:
        pytest.skip(str(error))
    return hf_agent.read_wheel(make_wheel(tmp_path_factory.mktemp("toy") / "toy.whl"))


def test_the_wheel_scores_the_replies_in_their_order(toy):
    assert toy.conversations("run") == [["half of `8`"], ["`4`"]]
    assert toy.conversations("chat") == [["first", "second"], ["other"]]
    found = toy.score("run", ["I halve.\nAnswer: x = half(8)", "Answer: x = int('4')"])
    assert found == {"scores": {"code score": 100}, "errors": [{}, {}, {}], "malformed": 0}
    found = toy.score("run", ["Answer: x = half(8)", "Answer: x = 3"])
    assert found["scores"] == {"code score": 50} and found["errors"][2] == {"`4`": {"code": "{' x = 3'}"}}
    assert toy.score("chat", ["```x = 4\n```", "ok\n```\ny = 1\n```", "```x=1\n```"])["scores"] == {"code score": 2}


def test_replies_that_the_wheel_cannot_take_apart_are_counted(toy):
    found = toy.score("run", ["I cannot.", "Answer: x = 4\nAnswer: x = 5"])
    assert found["malformed"] == 2 and found["scores"] == {"code score": 50}
    found = toy.score("chat", ["I cannot.", "```\nx = 4", "```x = 4\n```"])
    assert found["malformed"] == 2 and found["scores"] == {"code score": 2}
    with pytest.raises(ValueError, match="1 replies: mode run has 2 tasks"):
        toy.score("run", ["Answer:"])
    with pytest.raises(ValueError, match="mode is 'walk'"):
        toy.conversations("walk")


def test_code_that_does_not_end_or_does_harm_is_contained(toy, tmp_path):
    harm = f"Answer: open({str(tmp_path / 'new')!r}, 'w')"
    found = toy.score("run", ["Answer: import time\ntime.sleep(600)", harm])
    assert found["scores"] == {"code score": 0} and not (tmp_path / "new").exists()
    for forged in ('print(end="{}", file=sys.__stdout__, flush=True)', "1"):
        with pytest.raises(ValueError, match="do not run"):
            toy.score("run", [f"Answer: import os, sys\n{forged}\nos._exit(0)"] * 2)


def test_prompts_have_the_tools_and_the_conversation_so_far(toy):
    seen = []

    def complete(prompts, seeds):
        seen.append(list(prompts))
        return [f"reply {len(seen)}" for _ in prompts]

    assert hf_agent.ask(toy, "run", complete) == ["reply 1", "reply 1"]
    assert "- half: halves a number" in seen[0][0] and 'Task: "half of `8`"\n\nI will use the following' in seen[0][0]
    seen.clear()
    assert hf_agent.ask(toy, "chat", complete, template="T <<all_tools>>") == ["reply 1", "reply 2", "reply 1"]
    assert [len(one) for one in seen] == [2, 1]
    assert seen[1][0].endswith(
        "- video_generator: " + toy.descriptions["video_generator"] + "\nQ: first\nA:reply 1\n\nQ: second\nA:"
    )
    with pytest.raises(ValueError, match="lacks <<prompt>>"):
        hf_agent.ask(toy, "run", complete, template="<<all_tools>>")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not the wheel of transformers 4.33.3; pip download"):
        hf_agent.read_wheel(make_wheel(tmp_path / "other.whl", "4.34.0"))
    (tmp_path / "text.whl").write_text("text")
    with pytest.raises(ValueError, match="no wheel"):
        hf_agent.read_wheel(tmp_path / "text.whl")


def test_the_command_scores_replies_of_a_file(toy, tmp_path, tool, capsys):
    wheel = make_wheel(tmp_path / "toy.whl")
    file = tmp_path / "replies.jsonl"
    file.write_text("".join(json.dumps({"reply": one}) + "\n" for one in ("Answer: x = 4", "no")))
    command = ["--wheel", str(wheel), "--replies", str(file), "--mode", "run", "--output", str(tmp_path / "out")]
    tool("evaluate_hf_agent").main(command)
    printed = capsys.readouterr().out
    assert "| code score | 50.0 |" in printed and "1 replies could not be taken apart" in printed
    rows = [json.loads(line) for line in (tmp_path / "out/run/replies.jsonl").read_text().splitlines()]
    assert rows[0] == {"task": "half of `8`", "reply": "Answer: x = 4"}
    file.write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match="replies.jsonl:1: expected an object"):
        tool("evaluate_hf_agent").main(command)


@pytest.fixture(scope="module")
def real(tmp_path_factory, toy):
    """The benchmark of the real wheel."""
    path = os.environ.get("TRANSFORMERS_WHEEL")
    if not path:
        folder = tmp_path_factory.mktemp("wheel")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "transformers==4.33.3"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot download the wheel: {done.stderr.strip()[-200:]}")
        (path,) = folder.iterdir()
    return hf_agent.read_wheel(path)


@pytest.mark.slow
def test_the_real_benchmark(real):
    """Expected scores are counted by hand: a quarter less for each missing or unexpected tool."""
    tasks = [tasks[0] for tasks in real.conversations("run")]
    assert len(tasks) == 27 and sum(map(len, real.conversations("chat"))) == 47
    assert len(real.conversations("chat")) == 24 and len(real.descriptions) == 14
    place = tasks.index("Generate an image from the text given in `text_input`.")

    def scores(reply):
        """Of this reply to that task, and of empty ones to the others."""
        replies = ["\nAnswer:\n"] * len(tasks)
        empty = real.score("run", replies)["scores"]
        replies[place] = reply
        found = real.score("run", replies)["scores"]
        return [round((found[name] - empty[name]) / 100 * len(tasks), 6) for name in found]

    named = "tool: `image_generator`.\n\nAnswer:\n```py\n"
    # Empty replies have 0.75 points of each kind of tool for a task with one tool, and 0.3 for code.
    assert scores(named + "image_generator(text_input)\n```") == [0.25, 0.25, 0.7]
    assert scores(named + "x = image_generator(prompt=text_input)\nx\n```") == [0.25, 0.25, 0.7]
    assert scores(named + "1 + 1\n```") == [0.25, 0.0, 0.0]
    assert scores("tools `image_generator` and `summarizer`.\nAnswer:\nsummarizer(text_input)") == [0.0, -0.25, 0.0]
    # Real Python would run these; the wheel's executor refuses attributes and arithmetic.
    assert scores(named + "image_generator(text_input.strip())\n```") == [0.25, 0.25, 0.0]
    chats = real.score("chat", ["I will not.\n"] * 47)
    assert chats["malformed"] == 47 and chats["scores"]["code score"] == pytest.approx(30.0)


def test_replies_are_kept_where_they_cannot_be_scored(toy, tool, tmp_path, monkeypatch):
    command, wheel = tool("evaluate_hf_agent"), make_wheel(tmp_path / "toy.whl")
    monkeypatch.setattr(
        command, "completer", lambda _: lambda prompts, _: ["Answer: import os\nos._exit(0)"] * len(prompts)
    )
    with pytest.raises(ValueError, match="do not run"):
        command.main([f"--wheel={wheel}", "--server=-", "--model=m", f"--output={tmp_path / 'out'}"])
    rows = [json.loads(line) for line in (tmp_path / "out/run/replies.jsonl").open()]
    assert [row["task"] for row in rows] == ["half of `8`", "`4`"] and all("os._exit" in row["reply"] for row in rows)
