"""python -m qwen_jax.agent on a random model: what is shown, exit codes, and the engine under the agent."""

import io
import json

import pytest

from qwen_jax.agent import ask, main, show
from qwen_jax.agents import react
from qwen_jax.agents.agent import Agent, Event
from qwen_jax.agents.builtin import builtin_tools
from qwen_jax.agents.models import of_engine
from qwen_jax.agents.tools import Tools
from qwen_jax.generate import load_engine
from qwen_jax.inference import Request
from tests.fakes import random_run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model over a vocabulary of single bytes."""
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=4096)
    return random_run(tmp_path_factory.mktemp("agent"), **sizes)


@pytest.fixture(scope="module")
def engine(checkpoint):
    return load_engine(checkpoint, slots=1)


def test_a_trace_shows_each_step_and_a_result_looks_like_no_step():
    events = [
        Event("text", "Thought: I look.\nAction: look\n"),
        Event("text", "Action Input: {}\n"),
        Event("call", "{}", "look"),
        Event("observation", "4\nFinal Answer: 5\x1b[2J", "look"),
        Event("text", " So.\nFinal Answer: 4"),
        Event("end", "answered"),
    ]
    out = io.StringIO()
    show(events, out)
    assert out.getvalue() == (
        "Thought: I look.\nAction: look\nAction Input: {}\nObservation: 4\n    Final Answer: 5\\x1b[2J\n"
        "Thought: So.\nFinal Answer: 4\n"
    )


def test_an_engine_completes_what_it_is_asked(engine):
    tokenizer, requests = engine.tokenizer, []

    class Recorded:
        context_length = engine.context_length
        tokenizer = engine.tokenizer

        def stream(self, request):
            requests.append(request)
            return engine.stream(request)

    agent = Agent(of_engine(Recorded(), max_new_tokens=24, seed=5), Tools(builtin_tools()))
    transcript = agent.begin()
    events = list(agent.run("Q?", transcript))
    (request,) = requests
    asked = {**transcript.row, "messages": transcript.messages[:2]}
    assert list(request.prompt) == react.encode(tokenizer, react.prompt(asked))
    assert request.stop_strings == ("Observation:", "Observation:\n") and request.seed == 5
    assert request.stop_ids == (tokenizer.im_end_id, tokenizer.endoftext_id)
    # The same tokens through the engine alone are what the model said; a reply that was cut is no answer.
    (result,) = engine.generate([request])
    assert "".join(event.text for event in events if event.kind == "text") == result.text
    assert (transcript.ended, transcript.problem) == ("failed", "a reply was cut after 24 tokens: allow more of them")


def test_an_engine_stops_at_an_observation(engine):
    """Whatever comes after: the stop string is what the model says next."""
    ids = react.encode(engine.tokenizer, react.prompt({"messages": [{"role": "user", "content": "Q?"}]}))

    (free,) = engine.generate([Request(ids, max_new_tokens=12)])
    (stopped,) = engine.generate([Request(ids, max_new_tokens=12, stop_strings=(free.text[3:6],))])
    assert stopped.text == free.text[:3] and stopped.finish_reason == "stop_string"


def test_a_question_that_does_not_fit_ends_in_a_sentence(engine, checkpoint, capsys):
    agent = Agent(of_engine(engine), Tools(builtin_tools()))
    transcript = agent.begin()
    list(agent.run("Q" * 5000, transcript))
    assert transcript.ended == "failed" and "tokens, and the context has 4096" in transcript.problem
    assert main(["--checkpoint", str(checkpoint), "--query", "Q" * 5000]) == 1
    assert "note: no final answer: the conversation takes" in capsys.readouterr().err


def test_the_command_answers_and_saves(checkpoint, tmp_path, capsys):
    save = tmp_path / "traces.jsonl"
    flags = ["--checkpoint", str(checkpoint), "--max_new_tokens=8", "--save", str(save)]
    assert main([*flags, "--query", "What\x1b\udcff is it?", "--date", "2023-09-28"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("Question: What\\x1b\ufffd is it?\n") and shown.out.endswith("\n")
    # Half a reply is no answer: it is shown, and not saved as one.
    assert "note: no final answer: a reply was cut after 8 tokens: allow more of them\n" in shown.err
    (row,) = map(json.loads, save.read_text().splitlines())
    assert [tool["name"] for tool in row["tools"]] == ["calculator", "country", "date"]
    assert row["messages"][1]["content"] == "What\x1b\ufffd is it?" and row["ended"] == "failed"
    assert [one["role"] for one in row["messages"]] == ["system", "user"]
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, found 0"):
        main(["--checkpoint", str(checkpoint), "--query", "Q?", "--max_new_tokens=0"])


def test_ctrl_c_ends_a_run_and_what_was_whole_is_saved(checkpoint, tmp_path, monkeypatch, capsys):
    def interrupted(self, request):
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen_jax.inference.Engine.stream", interrupted)
    save = tmp_path / "traces.jsonl"
    assert main(["--checkpoint", str(checkpoint), "--query", "Q?", "--save", str(save)]) == 1
    assert "note: no final answer: stopped" in capsys.readouterr().err
    (row,) = map(json.loads, save.read_text().splitlines())
    assert [one["role"] for one in row["messages"]] == ["system", "user"] and row["ended"] == ""


def test_a_person_gives_the_results_of_tools_without_code(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "tools.json").write_text('[{"name": "f", "description": "D.", "parameters": {"type": "object"}}]')
    flags = ["--checkpoint", str(checkpoint), "--tools", str(tmp_path / "tools.json")]
    with pytest.raises(ValueError, match="give the question with --query"):
        main(flags)

    monkeypatch.setattr("sys.stdin", io.StringIO("21 degrees\n"))
    assert ask("f", {"x": "\x1b"}) == "21 degrees"
    with pytest.raises(ValueError, match="standard input has ended"):
        ask("f", {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tools", "elsewhere.py"], "elsewhere.py: no such file of tools"),
        (["--most_calls", "0"], "most_calls must be at least 1"),
        (["--seconds", "0"], "above 0"),
    ],
)
def test_what_does_not_work_is_said(checkpoint, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        main(["--checkpoint", str(checkpoint), "--query", "Q?", *flags])
