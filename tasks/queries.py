"""Prompts that a model is to answer, for PPO and GRPO (report section 3.2.2), one an example; pack them by `padded`.

The task `queries` reads JSON lines with `prompt` (text) or `messages`, and optionally `answer`, the reference of a
programmatic reward; `qwen_jax.data.queries` says how they become tokens.
"""

from collections.abc import Sequence

import gin

from qwen_jax.data.chatml import DEFAULT_SYSTEM
from qwen_jax.data.queries import QueryRows
from qwen_jax.data.records import Records, add_task, record_files
from qwen_jax.files import Pattern


@gin.configurable
def queries(
    pattern: Pattern | Sequence[Pattern] | None = None,
    validation_share: float = 0.01,
    system: str = DEFAULT_SYSTEM,
    unusable: str = "stop",
) -> Records:
    """Prompts of the user.

    Args:
        pattern: folder, glob, or list of these, of `.jsonl` and `.json` (also compressed).
        validation_share: share of the prompts held out.
        system: system message of a prompt without one.
        unusable: `stop` names the first row that is no prompt, `leave_out` counts them by reason.
    """
    files = record_files(pattern, "queries")
    return Records(files, validation_share=validation_share, rows=QueryRows(system), unusable=unusable, task="queries")


add_task("queries", queries)
