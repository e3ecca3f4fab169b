"""Answers of chat models to held-out conversations, and how many end and look as they should."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qwen_jax import files
from qwen_jax.data import chatml
from qwen_jax.inference import Engine, Request, SamplingConfig


@dataclasses.dataclass(frozen=True)
class Question:
    """A conversation up to a message of the assistant.

    Attributes:
      instruction: its id.
      messages: each with `role` and `content`; the last is not the assistant's.
      reference: what the assistant says next, or None.
    """

    instruction: str
    messages: tuple[Mapping[str, str], ...]
    reference: str | None


@dataclasses.dataclass(frozen=True)
class Answered:
    """An answer.

    Attributes:
      question: the question.
      text: what the model said.
      ended: whether the model ended it with `<|im_end|>`, and not the limit or another token.
    """

    question: Question
    text: str
    ended: bool


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The conversations of a file of JSON lines, with `messages` and perhaps an `id` each.

    A last message of the assistant is the reference; earlier ones belong to the question. Ids are line numbers from 1
    where there are none.

    Raises:
      OSError: no such file.
      ValueError: a line has no messages of text, or none before the assistant's; the message has file and line.
    """
    found = []
    for number, (where, content) in enumerate(files.read_json_lines(path), 1):
        if limit is not None and len(found) == limit:
            break
        found.append(_question(content if isinstance(content, dict) else {}, where, number))
    if not found:
        raise ValueError(f"{path} has no conversations")
    return found


def _question(content: dict, where: str, number: int) -> Question:
    messages = content.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(one, Mapping) and isinstance(one.get("content"), str) and one.get("role") in chatml.ROLES
        for one in messages
    ):
        raise ValueError(f"{where}: expected messages with a role of {', '.join(chatml.ROLES)} and a text content")
    reference = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else None
    asked = messages if reference is None else messages[:-1]
    if not any(one["role"] == "user" for one in asked):
        raise ValueError(f"{where}: no message of the user to answer")
    return Question(str(content.get("id", number)), tuple(asked), reference)


def answer(
    engine: Engine,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 128,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
) -> Iterator[tuple[int, Answered]]:
    """Yields (index of the question, answer) as answers finish; question i has the seed `seed` + i.

    Raises:
      ValueError: the engine has no tokenizer, or a question leaves no room in the model's context; the message has its
        index.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError("the engine has no tokenizer: give it the one of the model, to read text and write it")
    stop_ids = chatml.stop_ids(tokenizer)
    requests = [
        Request(chatml.encode_prompt(tokenizer, one.messages), max_new_tokens, sampling, stop_ids, seed=seed + index)
        for index, one in enumerate(questions)
    ]
    for result in engine.generate(requests):
        ended = result.finish_reason == "stop_id" and int(result.tokens[-1]) == tokenizer.im_end_id
        yield result.index, Answered(questions[result.index], result.text or "", ended)


@dataclasses.dataclass(frozen=True)
class Tally:
    """Counts of answers.

    Attributes:
      answers: all of them.
      ended: those that end with `<|im_end|>`.
      formatted: those that match the format as a whole; None without a format.
      equal: those equal to their reference; None without references.
    """

    answers: int
    ended: int
    formatted: int | None
    equal: int | None


def tally(answered: Sequence[Answered], form: str | None = None) -> Tally:
    """Counts how many answers end, match the regular expression `form`, and equal their reference."""
    references = [one for one in answered if one.question.reference is not None]
    return Tally(
        len(answered),
        sum(one.ended for one in answered),
        None if form is None else sum(re.fullmatch(form, one.text) is not None for one in answered),
        sum(one.text == one.question.reference for one in references) if references else None,
    )
