"""The code interpreter benchmark (report 3.4, Tables 7 and 8): executable code, and correct results.

Questions are JSON lines in the publisher's layout: `query`, `tags` with commas (`TAGS`), perhaps `input_file_path`;
GSM8K's own files are read, too. What the publisher left to a judge can be checked here, if a row has one of these
fields of ours:

    answer    a number; by the rule "report" it must stand in an execution result and in the answer, by "released" it
              must be the last number of the whole completion
    figure    what the figure must show, compared with the figure object itself (`check_figure`)
    contains  texts that must stand in the output of the code

Table 7 counts code that runs. As in the released metric it is the first code for figures and general questions, and
all code for mathematics; no code is not executable. Unlike there, the code is not run again outside of the
conversation, and no missing module is installed.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax import files
from qwen_jax.agents import react
from qwen_jax.agents.agent import Complete
from qwen_jax.agents.code_interpreter import CodeInterpreter, code_of
from qwen_jax.agents.interpreter import Execution, Interpreter
from qwen_jax.data.react import DEFAULT_STYLE
from qwen_jax.evaluation import extraction

MATH, VISUALIZATION, GENERAL = "math", "visualization", "general"
KINDS = (MATH, VISUALIZATION, GENERAL)
# Tags of the publisher's files of December and of October 2023, and ours.
TAGS = {
    "gsm8k": MATH,
    "ci_math_code": MATH,
    "ci_plot": VISUALIZATION,
    "ci_open_questions": GENERAL,
    f"{VISUALIZATION}-easy": VISUALIZATION,
    f"{VISUALIZATION}-hard": VISUALIZATION,
    **{kind: kind for kind in KINDS},
}
RULES = ("report", "released")
# Most calls of a model for a question: three, for general ones one.
MOST_CALLS = {MATH: 3, VISUALIZATION: 3, GENERAL: 1}
TIMEOUT_S = 10.0  # of the released metric; the released conversation itself has 30
# Executable code (Table 7), then correct results (Table 8: math, visualization hard, visualization easy).
REPORT = {
    "Qwen-7B-Chat": {"executable": (82.4, 64.4, 67.2), "correct": (41.9, 40.5, 54.4)},
}
_PROBE = Path(__file__).with_name("figure_probe.py")
_ENDED = "<|im_end|>"
# Characters of what `figure_probe.py` says of all figures: of each series up to 2,000 points.
_DESCRIPTION = 1 << 22


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      id: unique in its file.
      kind: one of `KINDS`.
      query: what the user asks.
      difficulty: "easy", "hard" or "": of figures.
      attached: (name, content) of files that the code may read.
      begun: (thought, code, result) of a call that has been made already; the code is run before the model is asked.
      answer, figure, contains: see the module; None: nothing is checked.
    """

    id: str
    kind: str
    query: str
    difficulty: str = ""
    attached: tuple[tuple[str, bytes], ...] = ()
    begun: tuple[str, str, str] | None = None
    answer: str | None = None
    figure: Mapping[str, Any] | None = None
    contains: tuple[str, ...] | None = None

    @property
    def asked(self) -> str:
        """The query, after the names of the files as the released prompt has them."""
        names = ", ".join(f"`{name}`" for name, _ in self.attached)
        return f"File{'s' * (len(self.attached) > 1)} {names}. {self.query}" if names else self.query


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file of JSON lines.

    Raises:
      OSError: no such file, or a file that a question names is missing.
      ValueError: a row is no question; the message has file and line.
    """
    found: list[Question] = []
    ids: set[str] = set()
    for where, row in files.read_json_lines(path):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
        one = _question(row, where, Path(path).parent, f"{len(found)}")
        if one.id in ("", ".", "..") or "/" in one.id:
            raise ValueError(f"{where}: the id {one.id!r} cannot be the name of a folder, which keeps its figures")
        if one.id in ids:
            raise ValueError(f"{where}: the id {one.id!r} is there twice: its two solutions would be taken for one")
        ids.add(one.id)
        found.append(one)
    if not found:
        raise ValueError(f"{path}: no question")
    return found


def _question(row: Mapping, where: str, folder: Path, number: str) -> Question:
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str) and "query" not in row:  # GSM8K
        gold = row["answer"].rpartition("#### ")[2].strip()
        return Question(number, MATH, row["question"], answer=_number(gold, where))
    query, tags = row.get("query"), row.get("tags", "")
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"{where}: expected a text in 'query', or GSM8K's 'question' and 'answer'")
    query, ended, rest = query.partition(_ENDED)
    begun = _begun(rest, where) if ended else None
    words = set(tags.split(",")) if isinstance(tags, str) else set(map(str, tags))
    kinds = sorted({TAGS[word.strip()] for word in words if word.strip() in TAGS})
    if len(kinds) != 1:
        raise ValueError(f"{where}: tags are {tags!r}: expected those of one kind, of {', '.join(TAGS)}")
    difficulty = next((one for one in ("easy", "hard") if f"{VISUALIZATION}-{one}" in words), "")
    if kinds[0] == VISUALIZATION and not difficulty:
        difficulty = "easy" if begun else "hard"  # as the released script tells them apart
    answer, figure, contains = row.get("answer"), row.get("figure"), row.get("contains")
    if figure is not None and not isinstance(figure, Mapping):
        raise ValueError(f"{where}: expected an object in 'figure', found {type(figure).__name__}")
    return Question(
        id=str(row.get("id", number)),
        kind=kinds[0],
        query=query,
        difficulty=difficulty,
        attached=tuple((Path(name).name, (folder / name).read_bytes()) for name in row.get("input_file_path") or ()),
        begun=begun,
        answer=None if answer is None else _number(str(answer), where),
        figure=figure,
        contains=None if contains is None else tuple(map(str, contains)),
    )


def _begun(text: str, where: str) -> tuple[str, str, str]:
    """The call with which an assistant's turn begins that stands in a query, as ChatML."""
    text = "\n" + text.partition("<|im_start|>assistant")[2].lstrip("\n")
    reply = react.parse(text)
    if not reply.name:
        raise ValueError(f"{where}: the query goes on after {_ENDED}, without a call of the interpreter")
    result = text.rpartition("\nObservation:")[2] if "\nObservation:" in text else ""
    return reply.thought, reply.arguments, result.partition("\nThought:")[0].partition(_ENDED)[0].strip()


def _number(text: str, where: str) -> str:
    if extraction.value(text) is None:
        raise ValueError(f"{where}: expected a number as answer, found {text!r}")
    return text.replace(",", "")


@dataclasses.dataclass(frozen=True)
class Solution:
    """How a model solved a question.

    Attributes:
      question: its id.
      completion: all that the model and the interpreter wrote.
      answer: the final answer.
      executions: of the code.
      figures: of each execution, as `figure_probe.py` describes them.
    """

    question: str
    completion: str
    answer: str
    executions: tuple[Execution, ...]
    figures: tuple[Any, ...]


# Lets a model answer: (question, tool) to (completion, final answer).
Solver = Callable[[Question, CodeInterpreter], tuple[str, str]]


class ProbedInterpreter(Interpreter):
    """An interpreter that describes the figures of each snippet after it.

    Attributes:
      figures: of each snippet, oldest first.
    """

    figures: list[Any]

    def start(self) -> None:
        """Starts the kernel anew, with figures that stay until they are described."""
        self.restart()
        super().start()
        self.figures = []
        Interpreter.execute(self, "%config InlineBackend.close_figures = False")

    def execute(self, code: str, *, timeout_s: float | None = None) -> Execution:
        """As `Interpreter.execute`."""
        done = super().execute(code, timeout_s=timeout_s)
        found: Any = []
        if any(output.image for output in done.outputs) and not done.state_lost:
            # Without an image nothing was drawn, and matplotlib need not be there.
            limits = self.limits
            self.limits = dataclasses.replace(limits, text=max(limits.text, _DESCRIPTION))
            try:
                found = json.loads(super().execute(_PROBE.read_text()).text)
            except (ValueError, RecursionError):
                found = []
            finally:
                self.limits = limits
        self.figures.append(found)
        return done


def react_solver(complete: Complete, style: str = DEFAULT_STYLE) -> Solver:
    """Solves as the released conversation does: at most `MOST_CALLS` calls of the model, and none after an error.

    Args:
      complete: the model, such as `qwen_jax.agents.models.of_engine`.
      style: of the prompts, a key of `qwen_jax.data.react.STYLES`.
    """

    def solver(question: Question, tool: CodeInterpreter) -> tuple[str, str]:
        messages: list[dict[str, Any]] = [{"role": "user", "content": question.asked}]
        if question.begun is not None:
            messages += _called(tool.name, *question.begun)
        completion: list[str] = []
        for _ in range(MOST_CALLS[question.kind]):
            said = react.prompt({"messages": messages, "tools": [tool.definition]}, style)
            goes_on = "Thought:" if said[-1].role == "assistant" else ""
            stops = react.stop_strings(style)
            try:
                text = goes_on + react.trim("".join(complete(said, stops)), stops)
            except ValueError:  # no room left in the context
                break
            completion.append(text)
            reply = react.parse(text, react.RULE_OF_STYLE[style])
            if not reply.name:
                return "\n".join(completion), reply.answer
            result = tool(reply.arguments)  # whatever name the model gives the only tool, as released
            completion.append(f"Observation: {result}")
            messages += _called(tool.name, reply.before, reply.arguments, result)
            if not tool.executions[-1].ok:
                break
        return "\n".join(completion), ""

    return solver


def _called(name: str, before: str, arguments: str, result: str) -> list[dict[str, Any]]:
    """The messages of a call and its result."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "assistant", "content": before, "tool_calls": [call]},
        {"role": "tool", "content": result},
    ]


def solve(
    question: Question, solver: Solver, interpreter: ProbedInterpreter, folder: str | Path | None = None
) -> Solution:
    """Lets a model answer a question with a new kernel; figures are kept in `folder`, for a judge.

    Raises:
      SandboxUnavailableError: this system cannot isolate the kernel.
    """
    interpreter.start()
    for name, content in question.attached:
        write = f"open({name!r}, 'wb').write({content!r});"
        assert Interpreter.execute(interpreter, write).ok, name
    if question.begun is not None:
        # Its result stands in the question already.
        Interpreter.execute(interpreter, code_of(question.begun[1]))
        Interpreter.execute(interpreter, _PROBE.read_text())  # closes its figures
    tool = CodeInterpreter(interpreter, folder=folder)
    completion, answer = solver(question, tool)
    return Solution(question.id, completion, answer, tuple(tool.executions), tuple(interpreter.figures))


def executable(question: Question, solution: Solution) -> bool:
    """Whether the code runs (Table 7): all of it for mathematics, else the first; False without any."""
    counted = solution.executions if question.kind == MATH else solution.executions[:1]
    return bool(counted) and all(done.ok for done in counted)


def correct(question: Question, solution: Solution, rule: str = "report") -> bool | None:
    """Whether the result is right (Table 8); None where the question has nothing to check it by.

    Args:
      rule: one of `RULES`, for numbers.

    Raises:
      ValueError: another rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}: it must be one of {', '.join(RULES)}")
    if question.answer is not None:
        gold = extraction.value(question.answer)
        if rule == "released":
            last = extraction.last_number(solution.completion)
            return last is not None and extraction.value(last) == gold
        results = "\n".join(done.text for done in solution.executions)
        return all(gold in map(extraction.value, extraction.numbers(text)) for text in (results, solution.answer))
    if question.figure is not None:
        # One right figure counts, if its code ran without an error, as in the released metric.
        drawn = [
            figure
            for done, figures in zip(solution.executions, solution.figures, strict=True)
            if done.ok and isinstance(figures, list)
            for figure in figures
        ]
        return any(not check_figure(question.figure, figure) for figure in drawn)
    if question.contains is not None:
        text = "\n".join(done.text for done in solution.executions if done.ok)
        return all(one in text for one in question.contains)
    return None


def check_figure(expected: Mapping[str, Any], figure: Any) -> str:
    """What is wrong with a figure; "" if nothing is.

    Args:
      expected: any of `axes` (number of axes with data), `kinds` (of all series: line, scatter, bar, barh, hist, pie,
        image), `values` (a list of series, each of which must be there; the shares of a pie in any scale), and `title`,
        `x_label`, `y_label`, `legend`, `texts` (words that must be there, in any case).
      figure: as `figure_probe.py` describes it; untrusted.
    """
    try:
        axes = [one for one in figure["axes"] if one["series"]]
        series = [one for part in axes for one in part["series"]]
        said = {name: " ".join(str(part[name]) for part in axes) for name in ("x_label", "y_label", "legend", "texts")}
        said["title"] = " ".join([str(figure["title"]), *(str(part["title"]) for part in axes)])
        # Ticks may stand where a label could: a bar's name is on the axis.
        said["texts"] = " ".join([said["texts"], *said.values()])
        if "axes" in expected and len(axes) != expected["axes"]:
            return f"{len(axes)} axes"
        kinds = {str(one["kind"]) for one in series}
        if "kinds" in expected and kinds != set(expected["kinds"]):
            return f"kinds are {', '.join(sorted(kinds)) or 'none'}"
        for wanted in expected.get("values", ()):
            if not any(_same(wanted, one["values"], one["kind"] == "pie") for one in series):
                return f"no series has the values {wanted}"
        for name, text in said.items():
            wanted = expected.get(name, ())
            for word in [wanted] if isinstance(wanted, str) else wanted:
                if word.casefold() not in text.casefold():
                    return f"{name} lacks {word!r}"
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"no description of a figure ({type(error).__name__})"
    return ""


def _same(wanted: Sequence[float], found: Sequence[Any], shares: bool) -> bool:
    if len(wanted) != len(found) or not all(isinstance(one, int | float) for one in found):
        return False
    if shares:
        wanted = [one / sum(wanted) for one in wanted]
    return all(math.isclose(one, two, rel_tol=1e-4, abs_tol=1e-6) for one, two in zip(wanted, found, strict=True))


def scores(questions: Sequence[Question], solutions: Iterable[Solution]) -> dict[str, dict[str, Any]]:
    """Percentages by column of Tables 7 and 8.

    Returns:
      "executable" by kind; "correct" and "correct (released rule)" by kind, figures by difficulty. Columns without a
      question that can be checked are left out. Each is {"share", "of"}: percent, and number of questions.
    """
    by_id = {question.id: question for question in questions}
    tally: dict[tuple[str, str], list[bool]] = collections.defaultdict(list)
    for solution in solutions:
        question = by_id[solution.question]
        column = f"{question.kind}-{question.difficulty}" if question.difficulty else question.kind
        tally["executable", question.kind].append(executable(question, solution))
        for name, rule in (("correct", "report"), ("correct (released rule)", "released")):
            verdict = correct(question, solution, rule)
            if verdict is not None and (rule == "report" or question.answer is not None):
                tally[name, column].append(verdict)
    result: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for (name, column), verdicts in sorted(tally.items()):
        result[name][column] = {"share": 100 * sum(verdicts) / len(verdicts), "of": len(verdicts)}
    return dict(result)
