"""Agents of others finish a task against the server: smolagents by calls and by code, Qwen-Agent in both its ways.

The replies are a script's, the code in them is a sum: smolagents runs it in this process.
"""

import json
import sys
import types

import pytest

from tests.serving.scripted import ScriptedEngine, serving


@pytest.fixture(scope="module")
def engine(tokenizer):
    made = ScriptedEngine(tokenizer, lambda prompt: "", tokens_a_step=7)
    made.context_length = 1 << 15  # smolagents' system message has ten thousand bytes
    return made


@pytest.fixture(scope="module")
def running(engine):
    with serving(engine) as running:
        yield running


def say(engine, *replies):
    """The engine gives these replies, one after the other."""
    left = iter(replies)
    engine.script = lambda prompt: next(left)
    engine.prompts.clear()


@pytest.fixture(scope="module")
def smolagents():
    pytest.importorskip("openai", reason="openai is not installed")
    return pytest.importorskip("smolagents", reason="smolagents is not installed")


@pytest.fixture(scope="module")
def model(smolagents, running):
    return smolagents.OpenAIModel("tiny", f"{running.url}/v1", "none", client_kwargs={"max_retries": 0})


@pytest.fixture(scope="module")
def population(smolagents):
    @smolagents.tool
    def population(city: str) -> int:
        """Tells how many people live in a city.

        Args:
            city: name of the city
        """
        return {"Paris": 2_100_000, "里昂": 520_000}[city]

    return population


@pytest.mark.parametrize("streams", [False, True])
def test_smolagents_by_calls(smolagents, model, engine, population, streams):
    pytest.importorskip("llguidance", reason="the agent asks for a call, which is constrained")
    agent = smolagents.ToolCallingAgent([population], model, stream_outputs=streams, verbosity_level=0)
    say(
        engine,
        ' population\nAction Input: {"city": "里昂"}\n',
        ' final_answer\nAction Input: {"answer": "520000 people"}\n',
    )
    assert agent.run("How many people live in Lyon?") == "520000 people"
    assert engine.prompts[0].endswith("Thought: I should use a tool.\nAction:")
    assert "should be one of [population, final_answer]" in engine.prompts[0]
    assert "520000" not in engine.prompts[0] and "520000" in engine.prompts[1]


@pytest.mark.parametrize("streams", [False, True])
def test_smolagents_by_code(smolagents, model, engine, population, streams):
    agent = smolagents.CodeAgent([population], model, stream_outputs=streams, verbosity_level=0)
    say(
        engine,
        "Thought: I add them.\n<code>\nboth = population(city='Paris') + population(city='里昂')\nprint(both)\n</code>",
        "Thought: done\n<code>\nfinal_answer(both)\n</code>",
    )
    assert agent.run("How many people live in Paris and Lyon together?") == 2_620_000
    assert "2620000" in engine.prompts[1]


@pytest.fixture(scope="module")
def qwen_agent():
    """Qwen-Agent without two packages that it imports and that these tests do not use."""
    pytest.importorskip("openai", reason="openai is not installed")
    absent = [name for name in ("dashscope", "dashscope.aigc", "dashscope.api_entities", "soundfile")]
    with pytest.MonkeyPatch.context() as patch:
        for name in absent:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        agents = pytest.importorskip("qwen_agent.agents", reason="qwen-agent is not installed", exc_type=ImportError)
        tools = pytest.importorskip("qwen_agent.tools.base", exc_type=ImportError)

        @tools.register_tool("population")
        class Population(tools.BaseTool):
            description = "Tells how many people live in a city."
            parameters = {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "name of the city"}},
                "required": ["city"],
            }

            def call(self, params, **_):
                return str({"Paris": 2_100_000, "里昂": 520_000}[json.loads(params)["city"]])

        yield agents
        tools.TOOL_REGISTRY.pop("population")


def last_message(agent, question):
    *_, messages = agent.run([{"role": "user", "content": question}])
    return messages


def test_qwen_agent_by_calls(qwen_agent, running, engine):
    settings = {"model": "tiny", "model_type": "oai", "model_server": f"{running.url}/v1", "api_key": "none"}
    settings |= {"generate_cfg": {"use_raw_api": True, "max_retries": 0}}
    agent = qwen_agent.Assistant(llm=settings, function_list=["population"])
    say(
        engine,
        'Thought: I ask.\nAction: population\nAction Input: {"city": "里昂"}\nObservation:',
        " I now know.\nFinal Answer: 520000 people.",
    )
    messages = last_message(agent, "How many people live in Lyon?")
    assert messages[-1]["content"] == "520000 people."
    calls = [message["function_call"] for message in messages if message.get("function_call")]
    assert [(call["name"], call["arguments"]) for call in calls] == [("population", '{"city": "里昂"}')]
    assert "Question: How many people live in Lyon?" in engine.prompts[0]
    assert engine.prompts[1].endswith("Observation: 520000\nThought:")


def test_qwen_agent_by_text_of_its_own(qwen_agent, running, engine):
    """Its default: it writes the tools into the messages, in another form, and reads the calls out of the text."""
    settings = {"model": "tiny", "model_type": "oai", "model_server": f"{running.url}/v1", "api_key": "none"}
    agent = qwen_agent.Assistant(llm=settings | {"generate_cfg": {"max_retries": 0}}, function_list=["population"])
    call = '<tool_call>\n{"name": "population", "arguments": {"city": "Paris"}}\n</tool_call>'
    say(engine, call, "2100000 people.")
    messages = last_message(agent, "How many people live in Paris?")
    assert messages[-1]["content"] == "2100000 people."
    assert "2100000" in engine.prompts[1]
