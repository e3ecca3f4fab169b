"""Mathematical instructions for Math-Qwen-Chat (report section 5): a question and its worked answer, one an example.

`math_instructions` reads JSON lines with `question` and `answer` (or the field names of MATH, MetaMathQA, MathInstruct;
see `qwen_jax.data.conversations.from_question`) and makes conversations of one turn of them. What the system and the
user say carries no loss. The report trains on sequences of 1,024 tokens; pack by `whole`. `tools/make_arithmetic.py`
writes such a file by rule.
"""

from collections.abc import Sequence

import gin

from qwen_jax.data.chat import ChatRows
from qwen_jax.data.chatml import DEFAULT_SYSTEM
from qwen_jax.data.records import Records, add_task, record_files
from qwen_jax.files import Pattern


@gin.configurable
def math_instructions(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    layout: str = "questions",
    loss_on: str = "report",
    system: str = DEFAULT_SYSTEM,
    unusable: str = "stop",
) -> Records:
    """Questions with answers.

    Args:
        pattern: folder, glob, or list of these, of `.jsonl` and `.json` (also compressed).
        validation_share: share of the questions held out; all answers to a question are held out together.
        layout: `questions`, or `messages` or `sharegpt` for conversations (`qwen_jax.data.chat.LAYOUTS`).
        loss_on: `report` (the assistant alone) or `released`; see `qwen_jax.data.chat`.
        system: system message of a row without one.
        unusable: `stop` names the first row that cannot be trained on, `leave_out` counts them by reason.
    """
    rows = ChatRows(layout=layout, loss_on=loss_on, system=system)
    files = record_files(pattern, "math_instructions")
    return Records(files, validation_share=validation_share, rows=rows, unusable=unusable, task="math_instructions")


add_task("math_instructions", math_instructions)
