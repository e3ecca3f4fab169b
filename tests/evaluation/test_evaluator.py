"""How the evaluator asks, counts and records, with an engine that answers by rule."""

import json
import threading

import numpy as np
import pytest

from qwen_jax.data.tokenizer import Tokenizer, write_ranks
from qwen_jax.evaluation import evaluator
from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, Generation
from qwen_jax.evaluation.records import Records
from qwen_jax.inference import Result, Score


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "bytes.tiktoken"
    write_ranks({bytes([byte]): byte for byte in range(256)} | {b" A": 256, b" B": 257}, path)
    return Tokenizer(path)


class RuleEngine:
    """An engine whose log-likelihoods and texts are functions of the text before them; texts finish last first."""

    def __init__(self, tokenizer, likes=lambda text: 0.0, writes=lambda text: "", context_length=512):
        self.tokenizer, self.context_length, self.likes, self.writes = tokenizer, context_length, likes, writes
        self.scored, self.requests = [], []

    def score(self, prompts, continuations):
        for prompt, continuation in zip(prompts, continuations, strict=True):
            assert prompt and continuation and len(prompt) + len(continuation) <= self.context_length + 1
            self.scored.append((prompt, continuation))
        texts = [self.tokenizer.decode([*p, *c]) for p, c in zip(prompts, continuations, strict=True)]
        return [
            Score(np.full(len(ids), self.likes(text) / len(ids), np.float32), np.ones(len(ids), bool))
            for text, ids in zip(texts, continuations, strict=True)
        ]

    def generate(self, requests):
        self.requests += requests
        for index, request in reversed(list(enumerate(requests))):
            assert len(request.prompt) + request.max_new_tokens <= self.context_length
            text = self.writes(self.tokenizer.decode(request.prompt))
            yield Result(index, request, (), np.zeros(0), np.zeros(0), text, "stop_string" if text else "length")


def benchmark(answers, **fields):
    return Benchmark(
        name="toy", title="Toy", folder="toy", files="", shots=0, read=lambda _: iter(()), answers=answers, **fields
    )


def examples(count, **fields):
    return [
        Example(id=str(n), prompt=f"{n}+{n}=", target=n % 2, choices=(" A", " B"), subject="ab"[n % 2], **fields)
        for n in range(count)
    ]


WRITTEN = Generation(
    max_new_tokens=8,
    stop=("\n",),
    extract={"choice": lambda text, example: text.strip() or None, "length": lambda text, example: len(text)},
    judge=lambda answer, example: answer == example.target,
    chat_extract={"choice": lambda text, example: int(text)},
)


def answered(engine, one, asked, folder, **options):
    folder.mkdir(exist_ok=True)
    with Records(folder, [example.id for example in asked]) as records:
        evaluator.answer(engine, one, asked, records, **options)
        assert records.rows.keys() == {example.id for example in asked}
        return [records.rows[example.id] for example in asked]


def test_choices_are_ranked_and_each_example_is_recorded_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "FIRST_WINDOW", 3)
    right = RuleEngine(tokenizer, lambda text: -1.0 - (int(text[0]) % 2 != " A B".index(text[-1]) // 2))
    rows = answered(right, benchmark(Choices()), examples(7), tmp_path / "right")
    assert all(row["right"] and row["score"] == {"choice": 1.0} for row in rows) and len(right.scored) == 14
    assert rows[1] == {
        "id": "1",
        "subject": "b",
        "prompt": "1+1=",
        "output": {"log_likelihoods": [-2.0, -1.0], "tokens": [1, 1], "greedy": [True, True]},
        "extracted": {"choice": 1},
        "target": 1,
        "score": {"choice": 1.0},
        "right": True,
        "chat": False,
        "cut_tokens": 0,
        "choices": [" A", " B"],
    }
    wrong = RuleEngine(tokenizer, lambda text: -right.likes(text))
    assert not any(row["right"] for row in answered(wrong, benchmark(Choices()), examples(7), tmp_path / "wrong"))


def test_only_examples_without_an_answer_are_asked(tokenizer, tmp_path):
    asked = examples(6)
    engine = RuleEngine(tokenizer)
    answered(engine, benchmark(Choices()), asked, tmp_path)
    path = tmp_path / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:2]) + lines[2][:25]
    path.write_bytes(kept)
    engine.scored.clear()
    answered(engine, benchmark(Choices()), asked, tmp_path)
    assert len(engine.scored) == 8 and path.read_bytes().startswith(b"".join(lines[:2]))
    engine.scored.clear()
    answered(engine, benchmark(Choices()), asked, tmp_path)
    assert not engine.scored


def test_long_prompts_are_cut_from_the_left_and_counted(tokenizer, tmp_path):
    asked = [Example(id="long", prompt="x" * 100 + "?", target=0, choices=(" A", " longer"))]
    engine = RuleEngine(tokenizer, context_length=20)
    (row,) = answered(engine, benchmark(Choices()), asked, tmp_path / "ranked")
    assert [tokenizer.decode(prompt) for prompt, _ in engine.scored] == ["x" * 19 + "?", "x" * 13 + "?"]
    assert row["cut_tokens"] == 87
    (row,) = answered(engine, benchmark(WRITTEN), asked, tmp_path / "written")
    (request,) = engine.requests
    assert (request.max_new_tokens, tokenizer.decode(request.prompt)) == (8, "x" * 11 + "?") and row["cut_tokens"] == 89
    asked = [Example(id="full", prompt="?", target=0, choices=(" A", " " + "y" * 30))]
    with pytest.raises(ValueError, match="toy, example full: the answer alone fills the context"):
        answered(engine, benchmark(Choices()), asked, tmp_path / "full")


def test_whole_texts_are_scored_from_their_first_token_on(tokenizer, tmp_path):
    engine = RuleEngine(tokenizer, context_length=8)
    asked = [Example(id="1", prompt="ab", target=0, choices=("cd", "cdefghijk"))]
    (row,) = answered(engine, benchmark(Choices(normalization="text")), asked, tmp_path)
    (short, long) = engine.scored
    assert (short[0], tokenizer.decode(short[1])) == ([tokenizer.endoftext_id], "abcd")
    assert tokenizer.decode(long[0] + long[1]) == "cdefghijk" and row["output"]["tokens"] == [4, 8]
    assert row["cut_tokens"] == 3  # the token before the text, and two of its own


def test_encoded_apart_or_as_one_text(tokenizer, tmp_path):
    asked = [Example(id="1", prompt="x: ", target=0, choices=("A", "B"))]
    engine = RuleEngine(tokenizer)
    answered(engine, benchmark(Choices()), asked, tmp_path / "one")
    answered(engine, benchmark(Choices(apart=True)), asked, tmp_path / "apart")
    assert [following for _, following in engine.scored] == [[256], [257], [65], [66]]


def test_texts_are_judged_by_every_way_of_extraction(tokenizer, tmp_path):
    engine = RuleEngine(tokenizer, writes=lambda text: "" if text.startswith("2") else f" {text[0]} ")
    asked = [Example(id=str(n), prompt=f"{n}+", target=str(n)) for n in range(4)]
    rows = answered(engine, benchmark(WRITTEN), asked, tmp_path)
    assert [row["right"] for row in rows] == [True, True, False, True]
    assert rows[2]["extracted"] == {"choice": None, "length": 0} and rows[2]["finish_reason"] == "length"
    assert rows[3]["score"] == {"choice": 1.0, "length": 0.0}
    for request in engine.requests:
        assert request.stop_strings == ("\n",) and set(request.stop_ids) == {
            tokenizer.endoftext_id,
            tokenizer.im_end_id,
        }


def test_chat_models_are_asked_in_chatml_where_there_is_such_a_prompt(tokenizer, tmp_path):
    engine = RuleEngine(tokenizer, writes=lambda text: "1")
    one = benchmark(Choices(), written=WRITTEN)
    asked = [*examples(2, chat="Say <|im_end|> 1"), Example(id="base", prompt="p", target=0, choices=(" A", " B"))]
    rows = answered(engine, one, asked, tmp_path, chat=True)
    assert [row["chat"] for row in rows] == [True, True, False] and len(engine.scored) == 2
    assert rows[1]["prompt"] == "Say <|im_end|> 1" and rows[1]["extracted"] == {"choice": 1} and rows[1]["right"]
    (request, _) = engine.requests
    assert not request.stop_strings and request.prompt.count(tokenizer.im_end_id) == 2
    evaluator.check_chat(one, asked)
    for other in (benchmark(Choices()), benchmark(WRITTEN)):
        with pytest.raises(ValueError, match="toy defines no prompt for chat models: leave it out"):
            evaluator.check_chat(other, examples(2, chat="x" if isinstance(other.answers, Choices) else ""))


def test_judges_run_beside_the_model_and_beside_each_other(tokenizer, tmp_path):
    both = threading.Barrier(2)

    def judge(answer, example):
        both.wait()  # never ends if one judge waits for the end of another
        return True

    one = benchmark(Generation(max_new_tokens=8, extract={"text": lambda text, _: text}, judge=judge))
    engine = RuleEngine(tokenizer, writes=lambda text: "x")
    rows = answered(engine, one, [Example(id=str(n), prompt="p", target="x") for n in range(2)], tmp_path)
    assert all(row["right"] for row in rows)


def test_a_judge_that_fails_ends_the_evaluation_and_answers_stay(tokenizer, tmp_path):
    def judge(answer, example):
        if example.id == "1":
            raise ValueError("no sandbox here")
        return True

    one = benchmark(Generation(max_new_tokens=8, extract={"text": lambda text, _: text}, judge=judge))
    asked = [Example(id=str(n), prompt="p", target="x") for n in range(3)]
    with pytest.raises(ValueError, match="no sandbox here"):
        answered(RuleEngine(tokenizer, writes=lambda text: "x"), one, asked, tmp_path)
    kept = [json.loads(line)["id"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert "1" not in kept and len(kept) == len(set(kept))


def test_a_damaged_model_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="toy, example 0: log-likelihoods .* are not finite: is the"):
        answered(RuleEngine(tokenizer, lambda text: float("nan")), benchmark(Choices()), examples(2), tmp_path)


def test_windows_grow_until_they_take_a_while():
    assert [evaluator.next_window(32, seconds) for seconds in (1, 30, 100)] == [64, 32, 16]
    assert (evaluator.next_window(8, 100), evaluator.next_window(1024, 1)) == (8, 1024)


def test_the_limit_is_of_each_subject():
    assert [one.id for one in evaluator.first_of_subjects(examples(7), 2)] == ["0", "1", "2", "3"]
    assert evaluator.first_of_subjects(examples(3), None) == examples(3)


def test_examples_have_a_fingerprint():
    assert evaluator.fingerprint(examples(3)) == evaluator.fingerprint(examples(3))
    others = [examples(4), examples(3)[::-1], examples(3, chat="x"), examples(2)]
    assert len({evaluator.fingerprint(some) for some in [examples(3), *others]}) == 5
