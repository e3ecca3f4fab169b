"""Generated conversations with tools that people have accepted (report 3.4), one an example; pack them by `whole`.

| task | files |
|---|---|
| `self_instruct` | JSON lines that `python tools/self_instruct.py accept` writes, in OpenAI's layout |
| `sft_with_self_instruct` | a mixture: `chat_messages` and `self_instruct`, by their numbers of conversations |
"""

from collections.abc import Sequence

import gin

from qwen_jax.data.chat import ChatRows
from qwen_jax.data.chatml import DEFAULT_SYSTEM
from qwen_jax.data.quick_seqio import seqio
from qwen_jax.data.react import DEFAULT_STYLE
from qwen_jax.data.records import Records, add_task, record_files
from qwen_jax.files import Pattern


@gin.configurable
def self_instruct(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    loss_on: str = "released",
    system: str = DEFAULT_SYSTEM,
    unusable: str = "stop",
    tool_style: str = DEFAULT_STYLE,
) -> Records:
    """Accepted samples.

    Args:
        pattern: folder, glob, or list of these.
        validation_share: share of the samples held out.
        loss_on, system, unusable, tool_style: see `tasks.chat.chat_messages`.
    """
    rows = ChatRows(layout="messages", loss_on=loss_on, system=system, tool_style=tool_style)
    files = record_files(pattern, "self_instruct")
    return Records(files, validation_share=validation_share, rows=rows, unusable=unusable, task="self_instruct")


add_task("self_instruct", self_instruct)
seqio.MixtureRegistry.add(
    "sft_with_self_instruct",
    [(name, seqio.mixing_rate_num_examples) for name in ("chat_messages", "self_instruct")],
)
