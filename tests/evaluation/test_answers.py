"""Answers to held-out questions are counted for what they are, whatever order they finish in."""

import json

import numpy as np
import pytest

from qwen_jax.data.chatml import encode_prompt
from qwen_jax.data.tokenizer import Tokenizer, write_ranks
from qwen_jax.evaluation.answers import Answered, Question, answer, read_questions, tally
from qwen_jax.inference import Result


def write(path, *records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
SAID = {"role": "assistant", "content": "Hello."}


def test_the_last_message_of_the_assistant_is_the_reference(tmp_path):
    file = write(
        tmp_path / "questions.jsonl",
        {"messages": [SYSTEM, USER, SAID]},
        {"messages": [USER, SAID, USER], "id": "x"},
        {"messages": [USER]},
    )
    found = read_questions(file)
    assert [(one.instruction, len(one.messages), one.reference) for one in found] == [
        ("1", 2, "Hello."), ("x", 3, None), ("3", 1, None),
    ]  # fmt: skip
    assert read_questions(file, limit=1) == found[:1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "questions.jsonl:1: expected messages with a role of system, user, assistant"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "expected messages with a role"),
        ({"messages": [{"role": "user", "content": None}]}, "expected messages with a role"),
        ({"messages": [SYSTEM, SAID]}, "no message of the user to answer"),
    ],
)
def test_wrong_questions_are_named_with_their_line(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / "questions.jsonl", record))
    with pytest.raises(ValueError, match="has no conversations"):
        read_questions(write(tmp_path / "questions.jsonl"))


def test_counts_are_of_whole_answers():
    known, open_end = Question("1", (USER,), "Answer: a."), Question("2", (USER,), None)
    answered = [
        Answered(known, "Answer: a.", True),
        Answered(known, "Answer: b.", False),
        Answered(known, "Answer: a.\nAnswer: a.", False),
        Answered(open_end, "I say Answer: a.", True),
    ]
    counts = tally(answered, r"Answer: .*\.")
    assert (counts.answers, counts.ended, counts.formatted, counts.equal) == (4, 2, 2, 1)
    assert tally(answered[3:]).equal is None and tally(answered).formatted is None


class ScriptedEngine:
    """An engine whose answers are given, and finish in the reverse order."""

    def __init__(self, tokenizer, endings):
        self.tokenizer, self.endings = tokenizer, endings

    def generate(self, requests):
        self.requests = requests
        for index in reversed(range(len(requests))):
            reason, last = self.endings[index]
            text = f"answer {index}"
            tokens = (*self.tokenizer.encode(text), last)
            certain = np.zeros(len(tokens), np.float32)
            yield Result(index, requests[index], tokens, certain, certain, text=text, finish_reason=reason)


def test_an_answer_has_ended_with_im_end_alone(tmp_path):
    write_ranks({bytes([byte]): byte for byte in range(256)}, tmp_path / "bytes.tiktoken")
    tokenizer = Tokenizer(tmp_path / "bytes.tiktoken")
    endings = [("stop_id", tokenizer.im_end_id), ("length", 65), ("stop_id", tokenizer.endoftext_id)]
    engine = ScriptedEngine(tokenizer, endings)
    questions = [Question(str(index), ({"role": "user", "content": "ab" * index},), None) for index in (1, 2, 3)]
    found = dict(answer(engine, questions, max_new_tokens=8, seed=5))
    assert [found[index].ended for index in range(3)] == [True, False, False]
    assert [found[index].text for index in range(3)] == ["answer 0", "answer 1", "answer 2"]
    assert [found[index].question for index in range(3)] == questions
    for index, request in enumerate(engine.requests):
        assert list(request.prompt) == encode_prompt(tokenizer, questions[index].messages) and request.seed == 5 + index
