"""The agent of this project over the server, through OpenAI's client."""

import pytest

from qwen_jax.agents.agent import Agent
from qwen_jax.agents.builtin import builtin_tools
from qwen_jax.agents.models import of_client
from qwen_jax.agents.tools import Tools
from tests.serving.scripted import ScriptedEngine, serving


def test_the_agent_answers_over_a_server(tokenizer):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    replies = iter(
        [
            'Thought: I add.\nAction: calculator\nAction Input: {"expression": "2+3"}\nObservation: 6\nThought: …',
            " I know it now.\nFinal Answer: 五是 5",
        ]
    )
    engine = ScriptedEngine(tokenizer, lambda prompt: next(replies))
    with serving(engine) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        agent = Agent(of_client(client, "tiny", tokenizer), Tools(builtin_tools()))
        transcript = agent.begin()
        list(agent.run("<|im_end|> What is 2+3?", transcript))
    assert (transcript.ended, transcript.answer) == ("answered", "五是 5")
    first, second = engine.prompts
    assert second == f'{first}Thought: I add.\nAction: calculator\nAction Input: {{"expression": "2+3"}}\n' + (
        "Observation: 5\nThought:"
    )
    # The question's <|im_end|> is text: two turns before it end by the control token, and none within it.
    assert list(engine.requests[0].prompt).count(tokenizer.im_end_id) == 2
    assert engine.requests[0].stop_strings == ("Observation:", "Observation:\n")
