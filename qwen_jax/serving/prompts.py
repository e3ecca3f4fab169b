"""Messages and tools to the token ids of a prompt.

Tools are described, called and answered in the ReAct form (`qwen_jax.data.react`), as in the released
`openai_api.py`: the prompt has the text that fine-tuning has. All content is untrusted text, in which the name of a
control token is ordinary characters (`qwen_jax.data.chatml`).
"""

import dataclasses
from collections.abc import Sequence

from qwen_jax.agents.react import encode
from qwen_jax.data import chatml, react
from qwen_jax.data.content import NUM_QUERIES, with_labels
from qwen_jax.data.conversations import Conversation, Unusable, tool_name
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.serving.errors import bad_request

THOUGHT, ACTION, ACTION_INPUT, FINAL_ANSWER = "Thought:", "\nAction:", "\nAction Input:", "\nFinal Answer:"
NONE, AUTO, REQUIRED, NAMED = "none", "auto", "required", "named"


@dataclasses.dataclass(frozen=True)
class ToolChoice:
    """Whether the reply may call a tool, or has to: `NONE`, `AUTO`, `REQUIRED`, or `NAMED` with the tool's name.

    Where it has to, or may not, the reply is begun for the model. The rest of one that has to is constrained to do so.
    """

    mode: str = AUTO
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Attributes:
        ids: token ids.
        opening: text at the end of `ids` that belongs to the reply, written for the model.
        tools: names of the tools that the reply may call.
    """

    ids: list[int]
    opening: str = ""
    tools: tuple[str, ...] = ()


def chat_prompt(
    tokenizer: Tokenizer,
    conversation: Conversation,
    choice: ToolChoice,
    system: str,
    style: str,
    num_queries: int = NUM_QUERIES,
) -> Prompt:
    """The prompt of a conversation whose next turn is the assistant's.

    Tools are described before the first question, where fine-tuning has them, so a conversation that goes on begins
    with the tokens that it had before. A conversation without tools is encoded as it stands.

    Args:
        tokenizer: the model's.
        conversation: with tools that have name and parameters.
        choice: of the reply; without tools it has no effect.
        system: system message of a conversation without one.
        style: one of `react.TRAINED_STYLES`, how tools are described.
        num_queries: features of a picture.

    Raises:
        ApiError: no message, calls and results that do not fit, or pictures beside them.
    """
    names = tuple(tool_name(tool) for tool in conversation.tools)
    messages = conversation.messages
    if not messages:
        raise bad_request("messages", "there is no message: give at least one")
    called = any(message.calls or message.role == "tool" for message in messages)
    if choice.mode == NONE:
        conversation, names = dataclasses.replace(conversation, tools=()), ()
    if not conversation.tools and not called:
        contents = with_labels([message.parts or message.content for message in messages])
        plain = [{"role": one.role, "content": content} for one, content in zip(messages, contents, strict=True)]
        return Prompt(chatml.encode_prompt(tokenizer, plain, system, num_queries))
    if any(message.parts for message in messages):
        raise bad_request("messages", "pictures and regions do not go with tools, which no model was trained on")
    try:
        said = react.prompt(conversation, style, "first")
    except Unusable as error:
        raise bad_request("messages", str(error)) from None
    goes_on = said[-1].role == "assistant"
    opening = _opening(choice, names, goes_on)
    before = said.pop().content.removesuffix(THOUGHT) if goes_on else ""
    if choice.mode == NAMED:
        names = (choice.name,)
    ids = encode(tokenizer, [*said, react.Said("assistant", before + opening)], system)
    return Prompt(ids, opening, names)


def _opening(choice: ToolChoice, names: Sequence[str], goes_on: bool) -> str:
    if not names:
        # Earlier turns have calls, which the model would go on to make.
        return f"{react.KNOWN}{FINAL_ANSWER}"
    if choice.mode == AUTO:
        return THOUGHT if goes_on else ""
    if choice.mode == REQUIRED and len(names) > 1:
        return f"{THOUGHT} I should use a tool.{ACTION}"
    name = choice.name or names[0]
    return f"{THOUGHT} I should use {name}.{ACTION} {name}{ACTION_INPUT}"
