"""A page on which people accept or reject generated samples: one HTML file that needs no server and loads nothing.

Samples are rows of `messages` and `tools` with an `id`, as `qwen_jax.agents.self_instruct` writes them. The page keeps
decisions in the browser and gives them as JSON lines: {"id", "decision", "reviewer", "note"}. Samples are untrusted:
they are data in the page, never HTML or script.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwen_jax.evaluation.annotation_page import fill

TEMPLATE = Path(__file__).with_suffix(".html")


def make_page(samples: Sequence[Mapping]) -> str:
    """The page for these samples, in their order.

    Raises:
      ValueError: there is none, one has no id, or an id is there twice.
    """
    ids = [str(sample.get("id") or "") for sample in samples]
    if not ids:
        raise ValueError("nothing to review: there is no sample")
    if "" in ids or len(set(ids)) < len(ids):
        wrong = "" if "" in ids else next(one for one in ids if ids.count(one) > 1)
        raise ValueError(
            f"each sample needs an id of its own; {f'{wrong} is there twice' if wrong else 'one has none'}"
        )
    items = [
        {
            "id": name,
            "tools": [json.dumps(tool, ensure_ascii=False, indent=1) for tool in sample.get("tools") or []],
            "messages": [_shown(message) for message in sample["messages"]],
        }
        for name, sample in zip(ids, samples, strict=True)
    ]
    fingerprint = hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()[:16]
    return fill(TEMPLATE, {"fingerprint": fingerprint, "items": items})


def _shown(message: Mapping) -> dict[str, str]:
    """Role and text of a message, with its calls."""
    content = message.get("content")
    parts = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)] if content else []
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    parts += [json.dumps(call, ensure_ascii=False) for call in calls]
    return {"role": str(message.get("role")), "content": "\n".join(parts)}
