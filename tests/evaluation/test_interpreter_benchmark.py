"""The code interpreter benchmark: rules of both tables on solutions made by hand, figures and code in the kernel."""

import contextlib
import dataclasses
import json
import weakref

import pytest

from qwen_jax.agents.interpreter import Execution, Interpreter, Limits, Output
from qwen_jax.evaluation.interpreter_benchmark import (
    GENERAL,
    MATH,
    VISUALIZATION,
    ProbedInterpreter,
    Question,
    Solution,
    check_figure,
    correct,
    executable,
    react_solver,
    read_questions,
    scores,
    solve,
)
from qwen_jax.sandbox import SandboxUnavailableError


@pytest.fixture(scope="module")
def probed():
    with ProbedInterpreter(Limits(timeout_s=60)) as made:
        try:
            made.start()
        except SandboxUnavailableError as error:
            pytest.skip(str(error))
        yield made


def printed(text, status="ok"):
    return Execution(status, (Output("stdout", text),))


def solution(*executions, answer="", completion="", figures=None):
    return Solution("q", completion or answer, answer, executions, tuple(figures or [[]] * len(executions)))


@pytest.mark.parametrize(
    ("results", "answer", "completion", "report", "released"),
    [
        ("42", "It is 42.", "… 42 … It is 42.", True, True),
        ("42.0", "It is $42.00 in all", "It is $42.00 in all", True, True),
        ("1,042", "42", "42", False, True),  # the number is not in the result
        ("42", "It is forty-two", "Observation: 42\nIt is forty-two", False, True),
        ("42", "42, as 3 of 14", "42, as 3 of 14", True, False),  # not the last one
        ("", "42", "42", False, True),  # no code
        ("41", "41", "41", False, False),
    ],
)
def test_the_two_rules_for_numbers(results, answer, completion, report, released):
    question = Question("q", MATH, "?", answer="42")
    done = solution(*[printed(results)] * bool(results), answer=answer, completion=completion)
    assert correct(question, done) is report and correct(question, done, "released") is released
    with pytest.raises(ValueError, match="rule is 'loose'"):
        correct(question, done, "loose")


def test_executable_is_the_first_code_or_all_of_it():
    ok, bad = printed("1"), printed("", "error")
    for kind, expected in ((MATH, False), (VISUALIZATION, True), (GENERAL, True)):
        assert executable(Question("q", kind, "?"), solution(ok, bad)) is expected
        assert executable(Question("q", kind, "?"), solution(bad, ok)) is False
        assert executable(Question("q", kind, "?"), solution()) is False
    assert executable(Question("q", MATH, "?"), solution(ok, ok))


def test_questions_are_read_in_the_layout_of_the_publisher(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n")
    rows = [
        {"query": "Draw it.", "tags": "all_ci,ci_plot", "input_file_path": ["data.csv"], "lang": "en"},
        {"query": "Unzip it.", "tags": "general"},
        {"query": "How many?", "tags": "math", "answer": 1234.5},
        {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"},
        {"query": "Draw.", "tags": ["visualization", "visualization-easy"], "id": "x", "figure": {"kinds": ["bar"]}},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_questions(file)
    assert [one.kind for one in found] == [VISUALIZATION, GENERAL, MATH, MATH, VISUALIZATION]
    assert [one.difficulty for one in found] == ["hard", "", "", "", "easy"]
    assert [one.answer for one in found] == [None, None, "1234.5", "1004", None]
    assert found[0].attached == (("data.csv", b"a,b\n"),) and found[0].asked == "File `data.csv`. Draw it."
    assert found[4].id == "x"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "expected an object, found list"),
        ({"tags": "math"}, "expected a text in 'query'"),
        ({"query": "?", "tags": "all_ci"}, "tags are 'all_ci': expected those of one kind"),
        ({"query": "?", "tags": "math,general"}, "expected those of one kind"),
        ({"query": "?", "tags": "math", "answer": "many"}, "expected a number as answer, found 'many'"),
        ({"query": "?<|im_end|>\n", "tags": "visualization"}, "the query goes on after .* without a call"),
        ({"query": "?", "tags": "visualization", "figure": "bar"}, "expected an object in 'figure', found str"),
        ({"query": "?", "tags": "general", "id": "../a"}, "the id '../a' cannot be the name of a folder"),
    ],
)
def test_wrong_questions_are_named(tmp_path, row, message):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"questions.jsonl:1: .*{message}"):
        read_questions(file)


def test_an_id_that_is_there_twice_is_named(tmp_path):
    file = tmp_path / "questions.jsonl"
    rows = [{"query": "?", "tags": "general"}, {"query": "!", "tags": "general", "id": 0}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="questions.jsonl:2: the id '0' is there twice"):
        read_questions(file)


PLOTS = {
    "plt.bar(['a', 'b', 'c'], [3, 1, 2])": ("bar", [3, 1, 2], ["a", "b", "c"]),
    "plt.barh(['a', 'b', 'c'], [3, 1, 2])": ("barh", [3, 1, 2], ["a", "b", "c"]),
    "plt.plot([1, 2, 3], [3, 1, 2], label='a')\nplt.legend()": ("line", [3, 1, 2], ["a"]),
    "plt.plot([1, 2, 3], [3, 1, 2], 'o')": ("scatter", [3, 1, 2], []),
    "plt.scatter([1, 2, 3], [3, 1, 2])": ("scatter", [3, 1, 2], []),
    "plt.pie([6, 2, 4], labels=['a', 'b', 'c'])": ("pie", [3, 1, 2], ["a", "b", "c"]),
    "plt.hist([1, 1, 1, 2, 3, 3], bins=3)": ("hist", [3, 1, 2], []),
    "import numpy as np\nplt.imshow(np.eye(2))": ("image", [], []),
}


def test_figures_are_compared_with_the_figure_object(probed):
    probed.start()
    for index, (plot, (kind, values, texts)) in enumerate(PLOTS.items()):
        done = probed.execute(f"import matplotlib.pyplot as plt\n{plot}\nplt.title('Trees 树')\nplt.show()")
        assert done.ok and len(done.images) == 1, plot
        (figure,) = probed.figures[index]
        wanted = {"axes": 1, "kinds": [kind], "values": [values], "title": "TREES", "texts": texts}
        assert check_figure(wanted, figure) == "", plot
        assert check_figure({"values": [[*values, 1]]}, figure).startswith("no series has the values")
        assert check_figure({"kinds": ["line", "bar"]}, figure).startswith("kinds are")
        assert check_figure({"title": "bushes"}, figure) == "title lacks 'bushes'"
    probed.execute(
        "figure, axes = plt.subplots(2, 1)\naxes[0].plot([1, 2])\naxes[1].bar([1], [2])\naxes[1].set_xlabel('x')"
    )
    (figure,) = probed.figures[-1]
    assert check_figure({"axes": 2, "kinds": ["bar", "line"], "values": [[1, 2], [2]], "x_label": "x"}, figure) == ""
    assert probed.execute("plt.get_fignums()").text == "[]\n"
    for wrong in (None, {}, {"axes": [{}]}, {"axes": 3, "title": ""}, {"axes": [{"series": 1}]}, []):
        assert check_figure({"kinds": ["bar"]}, wrong)


def test_a_figure_with_a_number_beyond_floats_is_wrong():
    axes = dict.fromkeys(("title", "x_label", "y_label", "legend", "texts"), "")
    axes["series"] = [{"kind": "bar", "values": [10**400]}]
    assert check_figure({"values": [[1]]}, {"title": "", "axes": [axes]})


@pytest.mark.parametrize("count", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_the_solutions_of_questions_made_by_rule_are_correct(probed, tmp_path, tool, count):
    tool("make_interpreter_questions").main(["--output", str(tmp_path), f"--count={count}", "--seed=4"])
    questions = read_questions(tmp_path / "questions.jsonl")
    codes = {row["id"]: row["code"] for row in map(json.loads, (tmp_path / "solutions.jsonl").open())}

    def solver(question, tool):
        answer = tool(f"```py\n{codes[question.id]}\n```")
        return f"Observation: {answer}\nFinal Answer: {answer}", answer

    def wrong(question, tool):
        return "", tool("import matplotlib.pyplot as plt\nplt.step([1], [3])\nplt.show()\n-1")

    right = scores(questions, [solve(question, solver, probed) for question in questions])
    columns = dict.fromkeys((MATH, "visualization-easy", "visualization-hard", GENERAL), count)
    assert right["correct"] == {name: {"share": 100.0, "of": of} for name, of in columns.items()}
    assert right["executable"] == {
        name: {"share": 100.0, "of": of} for name, of in ((MATH, count), (VISUALIZATION, 2 * count), (GENERAL, count))
    }
    assert right["correct (released rule)"] == {MATH: {"share": 100.0, "of": count}}
    off = scores(questions, [solve(question, wrong, probed) for question in questions[:4]])
    assert {column["share"] for column in off["correct"].values()} == {0.0}
    assert isinstance(probed, Interpreter)


def test_a_model_solves_in_the_released_conversation(probed):
    """At most three calls, none after an error, and whatever name the model gives the tool."""
    seen = []

    def solved(kind, *replies):
        rest = list(replies)

        def complete(said, stops):
            seen.append(said)
            return rest.pop(0)

        question = Question("q", kind, "How many?", attached=(("a.txt", "七".encode()),), answer="7")
        done = solve(question, react_solver(complete), probed)
        return question, done, len(replies) - len(rest)

    def code(text, name="code_interpreter"):
        return f"Thought: I compute.\nAction: {name}\nAction Input: ```py\n{text}\n```\nObservation: 8\nFinal Answer: 8"

    answer = " I now know the final answer\nFinal Answer: It is 7."
    question, done, calls = solved(MATH, code("n = 3 + 4"), code("n", "python"), answer, "unused")
    assert (calls, done.answer, correct(question, done), executable(question, done)) == (3, "It is 7.", True, True)
    assert [one.text for one in done.executions] == ["", "7\n"] and "Observation: 7" in done.completion
    asked, goes_on = seen[0][-1].content, seen[2][-1].content
    assert "code_interpreter: Call this tool" in asked and "File `a.txt`. How many?" in asked
    assert "triple backticks" in asked and goes_on.endswith("Observation: 7\nThought:")
    question, done, calls = solved(MATH, code("1 / 0"), answer)
    assert (calls, done.answer, executable(question, done)) == (1, "", False)
    question, done, calls = solved(MATH, *[code("open('a.txt').read()")] * 4)
    assert (calls, done.answer) == (3, "") and done.executions[0].text == "'七'\n"
    question, done, calls = solved(GENERAL, code("1"), answer)
    assert calls == 1
    assert not executable(*solved(MATH, answer)[:2])


def test_a_question_may_begin_with_a_call(probed, tmp_path):
    """As the publisher's easy figures do, in ChatML: the code is run first, and is none of the model's."""
    begun = (
        "Draw a and b of the file as bars.<|im_end|>\n<|im_start|>assistant\nThought: I read it.\n"
        "Action: code_interpreter\n"
        "Action Input: ```py\nn = [3, 4]\nprint('read')\n```\nObservation: a 3, b 4\nThought:"
    )
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"query": begun, "tags": "all_ci,visualization", "figure": {"values": [[3, 4]]}}) + "\n")
    (question,) = read_questions(file)
    assert (question.difficulty, question.query) == ("easy", "Draw a and b of the file as bars.")
    assert question.begun == ("I read it.", "```py\nn = [3, 4]\nprint('read')\n```", "a 3, b 4")
    seen = []

    def complete(said, stops):
        seen.append(said[-1].content)
        code = "import matplotlib.pyplot as plt\nplt.bar(['a', 'b'], n)\nplt.show()"
        return (
            f" I draw.\nAction: code_interpreter\nAction Input: ```py\n{code}\n```"
            if len(seen) == 1
            else "\nFinal Answer: x"
        )

    done = solve(question, react_solver(complete), probed)
    assert seen[0].endswith("Observation: a 3, b 4\nThought:") and "<|im" not in seen[0]
    assert len(done.executions) == 1 and executable(question, done) and correct(question, done)


def test_the_command_keeps_no_solution_that_is_written(tool, tmp_path, monkeypatch, capsys):
    """A solution has megabytes of figures."""
    command, seen = tool("evaluate_interpreter"), []

    def solved(question, *_):
        assert not any(one() for one in seen[:-1])  # the last one may still be counted
        done = dataclasses.replace(solution(printed(question.id), answer=question.id), question=question.id)
        seen.append(weakref.ref(done))
        return done

    rows = [{"query": "?", "tags": "math", "answer": 1, "id": f"{number}"} for number in range(5)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("load_engine", "of_engine", "react_solver", "ProbedInterpreter"):
        monkeypatch.setattr(command, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(command, "solve", solved)
    command.main([f"--checkpoint={tmp_path}", f"--questions={tmp_path / 'questions.jsonl'}", f"--output={tmp_path}"])
    assert len(seen) == 5 and "correct | 20.0 (of 5)" in capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "solutions.jsonl").open()]
    assert [row["answer"] for row in written] == ["0", "1", "2", "3", "4"]


def test_a_figure_of_many_points_is_described_whole(probed):
    """Its description is longer than what is kept of the text of a snippet."""
    probed.start()
    draw = "import numpy as np\nimport matplotlib.pyplot as plt\nx = np.linspace(0, 9, 1000)\n"
    done = probed.execute(f"{draw}for n in range(1, 5):\n    plt.plot(x, np.sin(n * x) / 3)\nplt.show()")
    assert done.ok and check_figure({"kinds": ["line"], "axes": 1}, probed.figures[0][0]) == ""
    assert probed.limits == Limits(timeout_s=60)
