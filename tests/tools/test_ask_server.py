"""tools/ask_server.py: a conversation with a served model is kept, and what cannot be asked is one line."""

import json

import pytest

from tests import warm_python
from tests.fakes import random_run


@pytest.fixture
def ask_server(tool, monkeypatch):
    made = tool("ask_server")
    monkeypatch.setattr(made.sys, "executable", warm_python.python())
    return made


def test_what_was_said_is_kept(ask_server, tmp_path, capsys):
    sizes = dict(hidden_size=16, num_layers=1, num_heads=1, ffn_size=16, context_length=512)
    model, kept = random_run(tmp_path, **sizes), tmp_path / "said" / "one.json"
    flags = ["--checkpoint", str(model), "--max_tokens", "4", "--output", str(kept)]
    ask_server.main([*flags, "--say", "Tell me about the owl.", "--say", "And the fox?"])
    said = json.loads(kept.read_text())
    assert [one["role"] for one in said["messages"]] == ["user", "assistant"] * 2
    assert said["messages"][2]["content"] == "And the fox?" and said["model"] == model.name
    assert all(one["finish_reason"] in ("stop", "length") for one in said["messages"][1::2])
    assert "user: And the fox?\nassistant: " in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--say", "a", "--complete", "b"], ["--complete", "b", "--image", "a.png"]])
def test_a_question_is_needed_and_of_one_kind(ask_server, tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        ask_server.main(["--checkpoint", str(tmp_path), "--output", str(tmp_path / "said.json"), *flags])
    assert ended.value.code == 2 and "--say" in capsys.readouterr().err


def test_a_missing_picture_is_named_before_a_server_is_started(ask_server, tmp_path):
    flags = ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "said.json"), "--say", "What is it?"]
    with pytest.raises(FileNotFoundError, match="no picture .*gone.png"):
        ask_server.main([*flags, "--image", str(tmp_path / "gone.png")])
