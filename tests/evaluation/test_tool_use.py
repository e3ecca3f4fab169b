"""The metric of Table 6 equals the released one, and the questions made by rule can be answered only by reading."""

import json
import re
from pathlib import Path

import pytest

import tasks  # noqa: F401
from qwen_jax.data.conversations import check, from_openai
from qwen_jax.evaluation import tool_use
from qwen_jax.evaluation.benchmark import judged, scores
from qwen_jax.evaluation.benchmark_tasks import benchmarks, read_examples
from qwen_jax.evaluation.evaluator import entry

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/tool_use/expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: row["name"])
def test_a_reply_is_judged_as_by_the_released_script(row):
    gold, found = tool_use.released(GOLDEN["response"]), tool_use.released(row["reply"])
    assert found.called == row["called"]
    assert (found.called and tool_use.same_tool(found.action, gold.action)) == row["right"]
    assert tool_use.rouge_l(gold.input, found.input) == pytest.approx(row["rouge_l"], abs=1e-12)


def test_the_golden_rows_have_what_one_would_guess_wrong():
    rows = {row["name"]: row for row in GOLDEN["rows"]}
    assert rows["keys in another order, JSON5"]["rouge_l"] == 1
    assert 0 < rows["another city"]["rouge_l"] < 1
    assert rows["another tool, same input"]["rouge_l"] == 1 and not rows["another tool, same input"]["right"]
    assert rows["Action opens the text"]["rouge_l"] == 1 and not rows["Action opens the text"]["called"]
    assert rows["two calls, the second is right"]["right"] is False


def test_agents_read_the_last_call_where_the_script_reads_the_first():
    two = "Thought: a\nAction: f\nAction Input: {'x': 1}\nAction: g\nAction Input: {'x': 2}"
    assert tool_use.released(two).action == "f"
    assert tool_use.parsed(two) == tool_use.ToolCall(True, "g", '{"x": 2}')
    assert not tool_use.parsed("Thought: a\nFinal Answer: b").called
    invented = "Thought: a\nAction: f\nAction Input: {}\nObservation: 1\nThought: b\nAction: g\nAction Input: {}"
    assert tool_use.parsed(invented).action == "f"


def test_rouge_l_over_tokens():
    assert tool_use.rouge_l('{"city": "北京"}', '{"city": "上海"}') < 1
    assert tool_use.rouge_l('{"城市": "北京"}', '{"城市": "北京"}') == 1
    assert tool_use.rouge_l("a b c d e f", "a b c") == pytest.approx(0.6667, abs=1e-4)
    assert tool_use.rouge_l("", "") == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory, tool):
    folder, make_tool_use = tmp_path_factory.mktemp("made"), tool("make_tool_use")
    make_tool_use.main(["--output", str(folder), "--count=200", "--texts=100", "--one_tool=100", "--held_out=150"])
    return folder, make_tool_use


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def listed(prompt: str) -> list[tuple[str, str]]:
    """(name, description) of the tools of a prompt."""
    return re.findall(r"(?m)^(\w+): Call this tool .* useful for\? (.*?) Parameters: ", prompt)


def test_made_questions_are_read_by_the_benchmarks(made):
    folder, _ = made
    examples = {name: list(read_examples(benchmarks()[name], folder)) for name in ("tool_use", "tool_use_none")}
    assert [len(one) for one in examples.values()] == [150, 150]
    assert {one.subject for one in examples["tool_use"]} == {"en", "zh"}
    positive = rows(folder / "tool_use/exam_plugin_made_react_positive.jsonl")
    right = [
        judged(benchmarks()["tool_use"], one, row["response"], chat=True)
        for one, row in zip(examples["tool_use"], positive, strict=True)
    ]
    found = scores(benchmarks()["tool_use"], right)
    assert (found["score"], found["score_parsed"], found["mean/rouge_l"]) == (100, 100, 1)
    none = [judged(benchmarks()["tool_use_none"], one, right[0].id, chat=True) for one in examples["tool_use_none"]]
    assert scores(benchmarks()["tool_use_none"], none)["mean/false_positive"] == 0


def test_figures_reach_the_scores_of_an_evaluation(made):
    """What the evaluator recorded, after a kill too, gives the same as judging anew."""
    folder, _ = made
    for name, wrong in (("tool_use", "mean/rouge_l"), ("tool_use_none", "mean/false_positive")):
        benchmark = benchmarks()[name]
        examples = list(read_examples(benchmark, folder))[:3]
        recorded, outcomes = {}, []
        for example in examples:
            reply = 'Thought: a\nAction: x\nAction Input: {"city": "Rome"}'
            outcome = judged(benchmark, example, reply, chat=True)
            row = {"id": example.id, "subject": example.subject, "chat": True, "cut_tokens": 0, "right": False}
            row |= {"extracted": dict(outcome.extracted), "score": dict(outcome.score), "finish_reason": "stop_id"}
            recorded[example.id] = json.loads(json.dumps(row))
            outcomes.append(outcome)
        found = entry(benchmark, examples, recorded).metrics
        assert found[wrong] == pytest.approx(scores(benchmark, outcomes)[wrong]) and found[wrong] > 0


def test_two_files_of_a_kind_are_refused(made, tmp_path):
    folder, _ = made
    text = (folder / "tool_use/exam_plugin_made_react_positive.jsonl").read_bytes()
    (tmp_path / "tool_use").mkdir()
    for version in ("v1", "v20231206"):
        (tmp_path / f"tool_use/exam_plugin_{version}_react_positive.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match="keep one positive file"):
        list(read_examples(benchmarks()["tool_use"], tmp_path))


def test_what_is_held_out_is_in_no_training_file(made):
    folder, maker = made
    kinds = ("positive", "negative")
    exam = [row for kind in kinds for row in rows(folder / f"tool_use/exam_plugin_made_react_{kind}.jsonl")]
    tools = [tool for row in exam for tool in listed(row["prompt"])]
    assert all(1 <= len(listed(row["prompt"])) == row["tools"] <= 5 for row in exam) and len(tools) > 500
    trained = "".join((folder / name).read_text("utf-8") for name in ("train.jsonl", "one_tool.jsonl", "text.jsonl"))
    assert not [name for name, _ in tools if name in trained]
    for language in maker.LANGUAGES.values():
        pairs = [(first, second) for first in language.firsts for second in language.seconds]
        written = {language.subject.format(first=first, second=second) for first, second in pairs}
        asked = {one for one in written if any(one in about for _, about in tools)}
        assert asked and not [one for one in asked if one in trained]


def test_only_the_list_tells_whether_there_is_a_tool(made):
    """The tool asked for is listed, in no fixed place; a question without a call could be about a tool as well."""
    folder, maker = made
    places, missing = [], 0
    for kind in ("positive", "negative"):
        for row in rows(folder / f"tool_use/exam_plugin_made_react_{kind}.jsonl"):
            question, tools = row["prompt"].rsplit("Question: ", 1)[1], listed(row["prompt"])
            language = maker.LANGUAGES[row["language"]]
            subjects = [
                (first, second)
                for first in language.firsts
                for second in language.seconds
                if language.subject.format(first=first, second=second) in question
            ]
            names = [name for name, _ in tools]
            assert len(subjects) <= 1 and len({name.split("_")[1] for name in names}) == len(names) == row["tools"]
            if kind == "positive":
                right = tool_use.released(row["response"]).action
                about = language.subject.format(first=subjects[0][0], second=subjects[0][1])
                assert [name for name, told in tools if about in told] == [right]
                places.append(names.index(right) / (len(tools) - 1))
            else:
                assert not tool_use.released(row["response"]).called
                assert not subjects or not any(
                    language.subject.format(first=f, second=s) in row["prompt"].rsplit("Question: ", 1)[0]
                    for f, s in subjects
                )
                missing += len(subjects)
    assert 0.35 < sum(places) / len(places) < 0.65 and missing > 0.5 * len(places)


def test_training_rows_can_be_trained_on_and_depend_on_the_seed_alone(made, tmp_path):
    folder, maker = made
    for name, share in (("train.jsonl", 0.5), ("one_tool.jsonl", 1.0)):
        found = rows(folder / name)
        assert all(check(from_openai(row)) for row in found)
        said = [message for row in found for message in row["messages"]]
        asked = sum(message["role"] == "user" for message in said)
        assert asked == (6 if name == "train.jsonl" else 1) * len(found)
        assert sum("tool_calls" in message for message in said) / asked == pytest.approx(share, abs=0.06)
    flags = ["--count=200", "--texts=100", "--one_tool=100", "--held_out=150"]
    maker.main(["--output", str(tmp_path / "same"), *flags])
    maker.main(["--output", str(tmp_path / "other"), *flags, "--seed=1"])
    assert (tmp_path / "same/train.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()
    assert (tmp_path / "other/train.jsonl").read_bytes() != (folder / "train.jsonl").read_bytes()


def test_more_questions_than_there_are_subjects_are_refused(tool, tmp_path):
    """No two subjects of an example share their second word."""
    flags = ["--output", str(tmp_path), "--count=5", "--texts=1", "--one_tool=1", "--held_out=1", "--without=1"]
    tool("make_tool_use").main([*flags, "--questions=15"])
    with pytest.raises(ValueError, match="--questions must be from 1 to 15"):
        tool("make_tool_use").main([*flags, "--questions=16"])
