"""The interpreter as a tool: which part of an action input is code, and what the model reads."""

import json

import pytest

from qwen_jax.agents.code_interpreter import DEFINITION, CodeInterpreter, code_of, observation
from qwen_jax.agents.interpreter import Execution, Output


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```py\na = 1\nprint(a)\n```", "a = 1\nprint(a)\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("Here it is:\n```python\na = 1\n```\nThat is all.", "a = 1\n"),
        ("```python\nprint('cut off')", "print('cut off')"),
        ("```1 + 1```", "1 + 1"),
        ('{"code": "print(1)"}', "print(1)"),
        ('{"code": "a = 1\nprint(a)"}', "a = 1\nprint(a)"),
        ('{"text": "print(1)"}', '{"text": "print(1)"}'),
        ("print('中文')", "print('中文')"),
        pytest.param("[" * 100_000, "[" * 100_000, id="brackets"),
        ("", ""),
    ],
)
def test_code_is_found_in_the_input_of_an_action(text, code):
    assert code_of(text) == code


def no_image(_):
    raise AssertionError


def test_the_model_reads_what_happened():
    assert observation(Execution("ok"), no_image) == "The code ran and printed nothing."
    outputs = (
        Output("stdout", "a"),
        Output("result", "1"),
        Output("image", image=b"png"),
        Output("stderr", "warning\n"),
    )
    assert observation(Execution("ok", outputs), lambda image: "![x](y)") == "a\n1\n![x](y)\nwarning"
    failed = Execution("error", (Output("stdout", "b\n"), Output("error", "long traceback")), "NameError: x")
    assert observation(failed, no_image) == "b\nerror: NameError: x"
    late = Execution("timeout", (), "KeyboardInterrupt: ")
    assert observation(late, no_image) == "error: the code took too long and was interrupted."
    lost = Execution("memory", state_lost=True, cut="7 characters")
    assert observation(lost, no_image).splitlines() == [
        "error: the code used too much memory.",
        "(7 characters of output are left out)",
        "The interpreter was started anew: variables and files are gone.",
    ]
    long = observation(Execution("ok", (Output("stdout", "x" * 50 + "y" * 50),)), no_image, longest=20)
    assert long == "x" * 10 + "\n… 80 characters are left out …\n" + "y" * 10


def test_calls_share_the_state_and_keep_their_figures(interpreter, tmp_path):
    tool = CodeInterpreter(interpreter, folder=tmp_path / "figures")
    assert tool("```py\nn = 20\n```") == "The code ran and printed nothing."
    assert tool(json.dumps({"code": "n + 1"})) == "21"
    assert tool("import matplotlib.pyplot as plt\nplt.bar(['a'], [n])\nplt.show()") == "![fig-001](fig-001.png)"
    assert tool("plt.plot([1])\n1 / 0") == "![fig-002](fig-002.png)\nerror: ZeroDivisionError: division by zero"
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["fig-001.png", "fig-002.png"]
    assert [done.status for done in tool.executions] == ["ok", "ok", "ok", "error"]
    assert tool.name == DEFINITION["name"] and tool.parameters["required"] == ["code"]
