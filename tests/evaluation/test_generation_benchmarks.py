"""Benchmarks whose answers a model writes: prompts as released, layouts, extraction, figures, rows of TFDS."""

import hashlib
import json
import os
from pathlib import Path

import pytest

import tasks  # noqa: F401
from qwen_jax.evaluation import programs
from qwen_jax.evaluation.benchmark import Example, judged, scores
from qwen_jax.evaluation.benchmark_tasks import benchmarks, read_examples
from tasks.benchmarks import bbh, gsm8k, math23k, math401, natural_questions
from tests.evaluation.published import FILES, write_json, write_json_lines
from tests.evaluation.published.programs import PACKS, no_sandbox, no_toolchain

SHARED = Path(os.environ.get("QWEN_JAX_SHARED", Path(__file__).parents[3] / "shared")) / "data"


def outcome(name: str, text: str, target, *, chat: bool = False, **fields):
    example = Example(id="0", prompt="", target=target, **fields)
    return judged(benchmarks()[name], example, text, chat)


def test_the_worked_examples_of_gsm8k_are_those_of_the_released_prompt():
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: the publishers' files are not here")
    example = next(read_examples(benchmarks()["gsm8k"], SHARED))
    header, _, question = example.prompt.rpartition("\nQuestion: ")
    # Of eval/gsm8k_prompt.txt in QwenLM/Qwen.
    assert hashlib.sha256(header.encode()).hexdigest() == (
        "b067972c3ba476496af49bacfc2ade83e4bc72c47a52f7f0e70d7d9e8f573e0d"
    )
    assert question == f"{example.chat}\nLet's think step by step\n"


@pytest.mark.parametrize(
    ("text", "number", "released"),
    [
        ("He pays $1,234.", 1, 0),
        ("So 1234", 1, 1),
        ("The answer is 1234.00", 1, 0),
        ("The answer is -1234", 0, 1),
        ("The answer is 1234\n\nQuestion: Tom has 7", 1, 1),
        ("I do not know", 0, 0),
    ],
)
def test_gsm8k_is_scored_by_both_extractions(text, number, released):
    assert outcome("gsm8k", text, "1234").score == {"number": number, "released": released}


def test_gsm8k_of_a_chat_model_cuts_its_thinking():
    text = "<think>It may be 5.</think>First 3.\n\nThen 4 of them."
    assert outcome("gsm8k", text, "4", chat=True).score["number"] == 1
    assert outcome("gsm8k", "<think>It may be 5.", "5", chat=True).extracted == {"number": None, "released": None}


def test_numbers_without_end_are_wrong_and_end_nothing():
    assert outcome("gsm8k", "So it is 1e1000", "4").score["number"] == 0
    for name in ("math401", "arithmetic"):
        for text in ("1e999", "-1e999", "1e1000"):
            found = outcome(name, text, "4", chat=name == "arithmetic")
            assert (found.score, found.figures) == ({"number": 0}, {"relative_error": 10})


@pytest.mark.parametrize(
    ("name", "heading", "says"),
    [("math", "Problem:", r"The answer is \boxed{0.5}."), ("math23k", "问题：", "所以答案是0.5。")],
)
def test_a_chat_model_may_repeat_the_problem(name, heading, says):
    """What separates the shots of a base prompt ends the answer of a base model, after its thinking, and no other."""
    texts = [f"{heading} What is half of 1?\n\n{says}", f"<think>{heading} a half?</think>{says}"]
    for text in texts:
        assert outcome(name, text, "0.5", chat=True).score == {"answer": 1}, text
    assert outcome(name, texts[0], "0.5").extracted == {"answer": None}
    assert outcome(name, f"{says}\n\n{heading} What is 7?", "0.5").score == {"answer": 1}
    assert outcome(name, texts[1], "0.5").score == {"answer": 1}


def test_rows_of_tfds_are_the_same_examples(monkeypatch):
    rows = [{"question": f"q{n}?", "answer": f"{n}+0=<<{n}+0={n}>>{n}\n#### {n}"} for n in range(20)]
    marks = [gsm8k.digest(f"q{n}?") for n in range(8)]
    monkeypatch.setattr(gsm8k, "SHOTS", dict(enumerate(marks)))
    found = list(gsm8k.from_tfds(lambda split: iter(reversed(rows) if split == "train" else rows[:3])))
    assert [(one.id, one.target) for one in found] == [("test/0", "0"), ("test/1", "1"), ("test/2", "2")]
    assert found[0].prompt.startswith(
        "Question: q0?\nLet's think step by step\n0+0=0\nThe answer is 0\n\nQuestion: q1?"
    )
    with pytest.raises(ValueError, match="2 of the 8 worked examples are not in its train split"):
        list(gsm8k.from_tfds(lambda split: iter(rows[2:])))
    question = {"question": "who wrote it", "answer": ["Ann Lee", "A Lee"]}
    (one,) = benchmarks()["natural_questions"].tfds.read(lambda split: iter([question]))
    assert (one.prompt, one.target) == ("Answer these questions:\nQ: who wrote it?\nA:", ["Ann Lee", "A Lee"])
    (one,) = benchmarks()["lambada"].tfds.read(lambda split: iter([{"passage": "he went to the door"}]))
    assert (one.prompt, one.target) == ("Please complete the following sentence: he went to the", "door")


def test_math_is_read_from_the_publishers_folders_too(tmp_path):
    write_json_lines(tmp_path / "math" / "solved.jsonl", [{"problem": "p", "solution": "s"}] * 4)
    for place, answer in (("algebra/10", "10"), ("algebra/9", "9"), ("geometry/1", r"\frac{1}{2}")):
        problem = {"problem": place, "level": "Level 3", "type": place.split("/")[0].title()}
        write_json(
            tmp_path / "math" / "test" / f"{place}.json", problem | {"solution": rf"It is $\boxed{{{answer}}}$."}
        )
    found = list(read_examples(benchmarks()["math"], tmp_path))
    assert [one.id for one in found] == ["algebra/9", "algebra/10", "geometry/1"]
    assert [(one.subject, one.target) for one in found[1:]] == [("Algebra", "10"), ("Geometry", r"\frac{1}{2}")]
    assert outcome("math", r"So $\boxed{0.5}$.", found[2].target).score == {"answer": 1}
    (tmp_path / "math" / "test" / "geometry" / "2.json").write_text('{"problem": "cut')
    with pytest.raises(ValueError, match=r"geometry/2.json: not JSON: .* is the file cut\?"):
        list(read_examples(benchmarks()["math"], tmp_path))


def test_math401_reports_the_relative_error_of_its_publisher():
    outcomes = [
        outcome("math401", text, target)
        for text, target in (("4", "2"), ("2.0004", "2"), ("1000000", "0.5"), ("none", "5"), ("-9.0", "-10"))
    ]
    found = scores(benchmarks()["math401"], outcomes)
    assert found["score"] == 20 and found["no_answer"] == 1
    assert found["mean/relative_error"] == pytest.approx((1 + 0.0002 + 10 + 10 + 0.1) / 5)
    assert math401.relative_error("3", Example(id="0", prompt="", target="0")) == 3


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("880", "880"), ("10%", "10%"), ("((3)/(4))", "3/4"), ("5((7)/(10))", "5 7/10"), ("3/4", "3/4"), ("x", None)],
)
def test_answers_of_math23k(answer, gold):
    assert math23k.gold(answer) == gold


def test_math23k_may_be_one_array(tmp_path):
    rows = [{"id": "1", "original_text": "多少元？", "equation": "x=1", "ans": "5((7)/(10))"}]
    (tmp_path / "math23k").mkdir()
    (tmp_path / "math23k" / "math23k_test.json").write_text(json.dumps(rows), encoding="utf-8")
    (one,) = read_examples(benchmarks()["math23k"], tmp_path)
    assert one.prompt == "问题：多少元？\n答案："
    for text, score in (("所以是5.7元。", 1), ("答案是57/10元", 1), ("5.6", 0)):
        assert outcome("math23k", text, one.target).score["answer"] == score


def test_lambada_is_read_from_plain_text_too(tmp_path):
    (tmp_path / "lambada").mkdir()
    file = tmp_path / "lambada" / "lambada_test_plain_text.txt"
    file.write_text("i do n't care about `` signs ''\nit is my dog\n")
    found = list(read_examples(benchmarks()["lambada"], tmp_path))
    assert [one.target for one in found] == ["''", "dog"]
    file.write_text("it is my dog\nit is cu")
    with pytest.raises(ValueError, match=r"lambada_test_plain_text.txt:2: expected a line end .* is the file cut\?"):
        list(read_examples(benchmarks()["lambada"], tmp_path))


@pytest.mark.parametrize(
    ("text", "score"), [(" signs, and more", 1), ("signs", 1), (" Signs", 0), (" sign", 0), ("\nsigns.", 1), ("", 0)]
)
def test_the_first_word_counts_in_lambada(text, score):
    assert outcome("lambada", text, "signs").score == {"word": score}


@pytest.mark.parametrize(
    ("text", "score", "contains"),
    [
        (" December 1972\nQ: who", 1, 1),
        (" the December, 1972", 0, 0),
        ("The answer is December 1972.", 1, 1),
        (" in December 1972", 0, 1),
        (" 1973", 0, 0),
        ("\n", 0, 0),
    ],
)
def test_short_answers_of_natural_questions(text, score, contains):
    found = outcome("natural_questions", text, ["14 December 1972 UTC", "December 1972"])
    assert (found.score, found.figures) == ({"answer": score}, {"contains": contains})
    assert natural_questions.normalized("The  Dog's, tail") == "dogs"


@pytest.mark.parametrize(
    ("text", "target", "exact", "opencompass"),
    [
        ("We look. So the answer is (B).", "(B)", 1, 1),
        ("So the answer is B.", "(B)", 0, 1),
        ("So the answer is False.\n\nQ: So the answer is True.", "False", 1, 1),
        ("So the answer is apple banana.", "apple banana", 1, 1),
        ("It is (B)", "(B)", 0, 1),
        ("False", "False", 0, 0),
    ],
)
def test_answers_of_big_bench_hard(text, target, exact, opencompass):
    assert outcome("bbh", text, target).score == {"exact": exact, "opencompass": opencompass}


def test_big_bench_hard_averages_over_tasks_and_refuses_cut_prompts(tmp_path):
    outcomes = [
        outcome("bbh", "the answer is Yes.", target, subject=subject)
        for subject, target in (("navigate", "Yes"), ("navigate", "No"), ("web_of_lies", "Yes"))
    ]
    assert scores(benchmarks()["bbh"], outcomes)["score"] == 75
    write_json(tmp_path / "bbh" / "bbh" / "snarks.json", {"examples": [{"input": "i", "target": "(A)"}]})
    (tmp_path / "bbh" / "cot-prompts").mkdir()
    (tmp_path / "bbh" / "cot-prompts" / "snarks.txt").write_text("canary\n-----\nDo it.\n\nQ: a\nA: b")
    with pytest.raises(ValueError, match=r"snarks.txt: expected 3 worked examples .* is the file cut\?"):
        list(read_examples(bbh.BBH, tmp_path))


@pytest.mark.parametrize(
    "language", [pytest.param(one, marks=pytest.mark.slow) if one != "js" else one for one in PACKS]
)
def test_the_program_in_a_reply_of_a_chat_model_is_judged(language):
    if missing := no_toolchain(language):
        pytest.skip(missing)
    row = PACKS[language]
    full = row["prompt"] + row["canonical_solution"]
    bare = row["declaration"].rstrip().split("\n")[-1] + "\n" + row["canonical_solution"]
    replies = {
        f"Sure:\n```\n{full}\n```\nIt adds 1.": 1,
        f"<think>```\nno\n```</think>\n```{language}\n{full}\n```": 1,
        f"```\n{full.replace('1', '3').replace('+', '-')}\n```": 0,
        row["canonical_solution"]: 1,
        "I cannot.": 0,
    }
    if language not in ("java", "go"):  # what stands before the function is missing, and added
        replies[f"```\n{bare}\n```"] = 1
    for text, score in replies.items():
        found = outcome(f"humanevalpack_{language}", text, "", chat=True, extra=row)
        assert found.score == {"program": score}, text


def test_a_language_without_a_compiler_is_an_error_and_no_score(monkeypatch):
    if missing := no_sandbox():
        pytest.skip(missing)
    verdict = programs.Verdict(False, "not run: go: go is not installed", run=False)
    monkeypatch.setattr(programs, "judge_humanevalpack", lambda *_: verdict)
    with pytest.raises(ValueError, match="go is not installed: install it, or leave humanevalpack_go out"):
        outcome("humanevalpack_go", "", "", extra=PACKS["go"])


def test_humaneval_is_scored_by_both_cuts():
    if missing := no_sandbox():
        pytest.skip(missing)
    row = PACKS["python"] | {"test": "def check(candidate):\n    assert candidate(1) == 2\n"}
    text = "    one = 1\n\n    return n + one\n\n\nprint(1)\n"
    assert outcome("humaneval", text, "", extra=row).score == {"released": 0, "function": 1}
    reply = f"Sure:\n```python\nfrom operator import add\n\n{row['prompt']}    return add(n, 1)\n```"
    score = outcome("humaneval", reply, "", chat=True, extra=row).score
    assert score | {"block": 1, "released": 0} == score and list(score)[0] == "block"


def test_solved_examples_of_mbpp_stand_between_begin_and_done(tmp_path):
    (tmp_path / "mbpp").mkdir()
    FILES["mbpp"].write(tmp_path / "mbpp")
    left_out: list = []
    first, last = read_examples(benchmarks()["mbpp"], tmp_path, left_out)
    assert (first.id, last.id) == ("mbpp/11", "mbpp/510") and len(left_out) == 6
    assert first.prompt.startswith(
        "You are an expert Python programmer, and here is your task: Write a function to add 2. Your code should pass "
        "these tests:\n\nassert add(0) == 2\nassert add(1) == 3\nassert add(2) == 4\n[BEGIN]\ndef add(a):\r\n"
    )
    assert first.prompt.endswith("assert add(2) == 13\n[BEGIN]\n") and first.prompt.count("\n[DONE]\n\n") == 3
