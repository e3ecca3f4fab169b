"""Tasks of the two specialists: code by repository, mixed with text, and mathematical instructions."""

import json

import gin
import numpy as np
import pytest
import seqio

import tasks  # noqa: F401  registers them
from qwen_jax.data import cache
from qwen_jax.data.conversations import Message, from_question
from qwen_jax.data.loader import ExampleLoader
from qwen_jax.data.mixing import rates_of


@pytest.fixture
def configure(vocabulary_file):
    gin.clear_config()
    gin.bind_parameter("vocabulary_path.path", str(vocabulary_file))
    yield gin.bind_parameter
    gin.clear_config()


def _write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _texts(name: str, split: str) -> list[str]:
    task = seqio.get_mixture_or_task(name)
    dataset = task.get_dataset(None, split, shuffle=False)
    return [task.output_features["targets"].vocabulary.decode(row["targets"]) for row in dataset.as_numpy_iterator()]


def test_code_is_held_out_by_repository(configure, tmp_path):
    rows = [{"text": f"x = {i}{j}\n", "repository": f"r{i}", "path": f"{j}.py"} for i in range(40) for j in range(3)]
    configure("code_files.pattern", _write(tmp_path / "code.jsonl", rows))
    configure("code_files.validation_share", 0.2)
    train, held_out = (_texts("code_files", split) for split in ("train", "validation"))
    assert sorted(train + held_out) == sorted(row["text"] + "<|endoftext|>" for row in rows)
    of = {row["text"] + "<|endoftext|>": row["repository"] for row in rows}
    assert held_out and not {of[text] for text in train} & {of[text] for text in held_out}


def test_a_line_without_a_repository_is_named(configure, tmp_path):
    path = _write(tmp_path / "code.jsonl", [{"text": "a", "repository": "r"}, {"text": "b", "path": "b.py"}])
    configure("code_files.pattern", path)
    with pytest.raises(Exception, match=r"code.jsonl:2: expected .* 'text' and 'repository', found path, text"):
        _texts("code_files", "train")


def test_gin_sets_the_share_of_code(configure, tmp_path):
    code = [{"text": f"def f{i}(): return {i}\n" * 4, "repository": f"r{i % 5}"} for i in range(60)]
    text = [{"text": f"page {i} of a book " * 5} for i in range(60)]
    configure("code_files.pattern", _write(tmp_path / "code.jsonl", code))
    configure("local_files.pattern", _write(tmp_path / "text.jsonl", text))
    mixture = seqio.get_mixture_or_task("code_and_text")
    cache.prepare("code_and_text", cache_dir=tmp_path / "cache", sequence_length=32, splits=("train",))
    for share in (0.75, 0.5):
        configure("code_share.share", share)
        assert rates_of(mixture, tmp_path / "cache") == {"code_files": share, "local_files": 1 - share}
    loader = ExampleLoader("code_and_text", split="train", cache_dir=tmp_path / "cache", sequence_length=32, seed=0)
    vocabulary = mixture.output_features["targets"].vocabulary
    rows = [vocabulary.decode(tokens) for tokens in loader.read(0, 20)["tokens"]]
    assert sum("page" in row for row in rows) == sum("return" in row for row in rows) == 10
    configure("code_share.share", 1.0)
    with pytest.raises(ValueError, match="code_share.share is 1.0: it must be between 0 and 1"):
        rates_of(mixture, tmp_path / "cache")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"question": "1+1=", "answer": "2", "kind": "add"}, [("user", "1+1="), ("assistant", "2")]),
        ({"problem": "p", "solution": "s", "answer": "a", "level": "Level 1"}, [("user", "p"), ("assistant", "s")]),
        ({"query": "q", "response": "r"}, [("user", "q"), ("assistant", "r")]),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, [("user", "Add.\n1, 2"), ("assistant", "3")]),
        (
            {"system": "s", "prompt": "p", "completion": "c"},
            [("system", "s"), ("user", "p"), ("assistant", "c")],
        ),
    ],
)
def test_questions_are_conversations_of_one_turn(row, messages):
    assert from_question(row).messages == tuple(Message(*one) for one in messages)


def test_system_and_user_carry_no_loss_in_mathematical_instructions(configure, tmp_path):
    rows = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(8)]
    configure("math_instructions.pattern", _write(tmp_path / "math.jsonl", rows))
    configure("math_instructions.validation_share", 0.0)
    task = seqio.get_mixture_or_task("math_instructions")
    tokenizer = task.output_features["targets"].vocabulary.tokenizer
    found = list(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
    assert len(found) == 8
    for row, example in zip(rows, found, strict=True):
        tokens, weights = np.array(example["targets"]), np.array(example["loss_weights"])
        text = tokenizer.decode(tokens.tolist())
        expected = f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n{row['answer']}<|im_end|>\n"
        assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n") and expected in text
        assert tokenizer.decode(tokens[weights > 0].tolist()) == f"{row['answer']}<|im_end|>"


def test_all_answers_to_a_question_are_held_out_together(configure, tmp_path):
    rows = [{"question": f"question {i}?", "answer": f"{i} by way {way}"} for i in range(30) for way in range(2)]
    configure("math_instructions.pattern", _write(tmp_path / "math.jsonl", rows))
    configure("math_instructions.validation_share", 0.3)
    questions = [
        {text.partition("question ")[2].partition("?")[0] for text in _texts("math_instructions", split)}
        for split in ("train", "validation")
    ]
    assert questions[0] and questions[1] and not questions[0] & questions[1]


def test_rows_that_are_no_questions_are_named(configure, tmp_path):
    configure("math_instructions.pattern", _write(tmp_path / "math.jsonl", [{"question": "q", "reply": "r"}]))
    configure("math_instructions.validation_share", 0.0)
    with pytest.raises(Exception, match=r"math.jsonl:1: expected a question and an answer .*, found question, reply"):
        list(seqio.get_mixture_or_task("math_instructions").get_dataset(None, "train").as_numpy_iterator())
    configure("math_instructions.layout", "questons")
    with pytest.raises(ValueError, match="layout is 'questons': it must be one of messages, sharegpt, questions"):
        seqio.get_mixture_or_task("math_instructions").source.list_shards("train")
