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
from qwen_jax.data.records import Records, add_task, record_files
from qwen_jax.files import Pattern


@gin.configurable
def chat_messages(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    loss_on: str = "released",
    system: str = DEFAULT_SYSTEM,
    unusable: str = "stop",
) -> Records:
    """Conversations in OpenAI's layout.

    Args:
        pattern: folder, glob, or list of these, of `.jsonl` and `.json` (also compressed).
        validation_share: share of the conversations held out.
        loss_on: `released` or `report`; see `qwen_jax.data.chat`.
        system: system message of a conversation without one.
        unusable: `stop` names the first conversation that cannot be trained on, `leave_out` counts them by reason.
    """
    return _records("chat_messages", "messages", pattern, validation_share, loss_on, system, unusable)


@gin.configurable
def chat_sharegpt(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    loss_on: str = "released",
    system: str = DEFAULT_SYSTEM,
    unusable: str = "stop",
) -> Records:
    """Conversations in ShareGPT's layout; arguments as `chat_messages`."""
    return _records("chat_sharegpt", "sharegpt", pattern, validation_share, loss_on, system, unusable)


def _records(task: str, layout: str, pattern, validation_share: float, loss_on: str, system: str, unusable: str):
    rows = ChatRows(layout=layout, loss_on=loss_on, system=system)
    files = record_files(pattern, task)
    return Records(files, validation_share=validation_share, rows=rows, unusable=unusable, task=task)


add_task("chat_messages", chat_messages)
add_task("chat_sharegpt", chat_sharegpt)
