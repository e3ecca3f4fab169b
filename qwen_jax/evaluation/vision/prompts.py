"""Prompts with pictures of the released evaluation of Qwen-VL (QwenLM/Qwen-VL eval_mm)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax import files
from qwen_jax.data.content import parse_parts, written

LETTERS = "ABCDE"


def pictured(*parts: Path | str | Mapping[str, Any]) -> dict[str, Any]:
    """Fields `parts` and `prompt` of an `Example`.

    Args:
        parts: paths of pictures, texts, and other parts in the JSON layout of `content.parse_parts`.
    """
    found = tuple(_part(one) for one in parts)
    return {"parts": found, "prompt": written(parse_parts(found, "a prompt"))}


def _part(one: Path | str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(one, Path | files.RemotePath):
        return {"type": "image", "image": str(one)}
    return {"type": "text", "text": one} if isinstance(one, str) else one


def asked(image: Path, question: str) -> dict[str, Any]:
    """A question with a short answer: `<img>…</img>What is it? Answer:`."""
    return pictured(image, f"{question} Answer:")


def options(choices: Sequence[str]) -> str:
    """Options with their letters, a line each."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
