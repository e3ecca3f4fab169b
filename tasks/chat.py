"""Conversations for supervised fine-tuning (report section 3.1), one an example; pack them by `whole`.

| task | files |
|---|---|
| `chat_messages` | JSON lines in OpenAI's layout: `{"messages": [{"role", "content"}, …], "tools": […]}` |
| `chat_sharegpt` | JSON or JSON lines in ShareGPT's: `{"conversations": [{"from", "value"}, …]}` |

Rows become tokens and loss weights in `qwen_jax.data.chat`; docs/how_to/chat_data.md shows both.
"""

from collections.abc import Sequence

import gin

from qwen_jax.data.chat import ChatRows
from qwen_jax.data.chatml import DEFAULT_SYSTEM
from qwen_jax.data.react import DEFAULT_STYLE
from qwen_jax.data.records import Records, add_task, record_files
from qwen_jax.files import Pattern


@gin.configurable
def chat_messages(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    loss_on: str = "released",
    system: str = DEFAULT_SYSTEM,
    unusable: str = "stop",
    tool_style: str = DEFAULT_STYLE,
) -> Records:
    """Conversations in OpenAI's layout.

    Args:
        pattern: folder, glob, or list of these, of `.jsonl` and `.json` (also compressed).
        validation_share: share of the conversations held out.
        loss_on: `released` or `report`; see `qwen_jax.data.chat`.
        system: system message of a conversation without one.
        unusable: `stop` names the first conversation that cannot be trained on, `leave_out` counts them by reason.
        tool_style: how tools are described: `react_demo`, `react_prompt` or `openai_api`, the released programs.
    """
    rows = ChatRows(layout="messages", loss_on=loss_on, system=system, tool_style=tool_style)
    return _records("chat_messages", rows, pattern, validation_share, unusable)


@gin.configurable
def chat_sharegpt(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    loss_on: str = "released",
    system: str = DEFAULT_SYSTEM,
    unusable: str = "stop",
    tool_style: str = DEFAULT_STYLE,
) -> Records:
    """Conversations in ShareGPT's layout; arguments as `chat_messages`."""
    rows = ChatRows(layout="sharegpt", loss_on=loss_on, system=system, tool_style=tool_style)
    return _records("chat_sharegpt", rows, pattern, validation_share, unusable)


def _records(task: str, rows: ChatRows, pattern, validation_share: float, unusable: str) -> Records:
    files = record_files(pattern, task)
    return Records(files, validation_share=validation_share, rows=rows, unusable=unusable, task=task)


add_task("chat_messages", chat_messages)
add_task("chat_sharegpt", chat_sharegpt)
