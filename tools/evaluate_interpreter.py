"""Lets a checkpoint solve questions by the code interpreter, and scores code and results (report, Tables 7 and 8).

python tools/make_interpreter_questions.py --output runs/questions
python tools/evaluate_interpreter.py --checkpoint runs/chat --questions runs/questions/questions.jsonl --output runs/7_8

Questions are in the publisher's layout, or GSM8K's test.jsonl (`qwen_jax.evaluation.interpreter_benchmark`). Replies
are greedy. Each question has a kernel of its own. `solutions.jsonl` has the conversations, `figures/` the figures, for
a judge that sees.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from qwen_jax import files
from qwen_jax.agents.interpreter import Limits
from qwen_jax.agents.models import of_engine
from qwen_jax.command_line import path_argument, run
from qwen_jax.compilation_cache import programs_kept
from qwen_jax.data.react import DEFAULT_STYLE, STYLES
from qwen_jax.evaluation.interpreter_benchmark import (
    REPORT,
    TIMEOUT_S,
    ProbedInterpreter,
    Solution,
    react_solver,
    read_questions,
    scores,
    solve,
)
from qwen_jax.generate import load_engine


def table(found: dict) -> str:
    """A Markdown table of the scores beside the report's."""
    columns = ("math", "visualization", "visualization-hard", "visualization-easy", "general")
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    for name, shares in found.items():
        cells = [f"{shares[one]['share']:.1f} (of {shares[one]['of']})" if one in shares else "–" for one in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for model, rows in REPORT.items():
        executable = dict(zip(("math", "visualization", "general"), rows["executable"], strict=True))
        correct = dict(zip(("math", "visualization-hard", "visualization-easy"), rows["correct"], strict=True))
        for name, shares in (("executable", executable), ("correct", correct)):
            lines.append(f"| {model} in the report: {name} | {' | '.join(str(shares.get(c, '–')) for c in columns)} |")
    return "\n".join(lines)


def row(solution: Solution) -> dict:
    """The line of a solution."""
    return {
        "id": solution.question,
        "completion": solution.completion,
        "answer": solution.answer,
        "statuses": [done.status for done in solution.executions],
        "figures": solution.figures,
    }


@programs_kept()
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=path_argument, required=True, help="run folder, or converted folder")
    parser.add_argument("--questions", type=path_argument, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--output", type=path_argument, required=True, metavar="FOLDER")
    parser.add_argument("--limit", type=int, help="solve the first so many questions (default: all)")
    parser.add_argument("--style", choices=sorted(STYLES), default=DEFAULT_STYLE, help="default: %(default)s")
    parser.add_argument("--timeout_s", type=float, default=TIMEOUT_S, help="of each code (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of each reply (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    arguments = parser.parse_args(argv)
    logging.getLogger("qwen_jax.inference").setLevel(logging.WARNING)
    logging.getLogger("qwen_jax.agents").setLevel(logging.ERROR)  # it warns of each reply that is cut
    questions = read_questions(arguments.questions)[: arguments.limit]
    engine = load_engine(arguments.checkpoint, arguments.dtype, slots=1)
    solver = react_solver(of_engine(engine, max_new_tokens=arguments.max_new_tokens), arguments.style)

    def solutions(file: TextIO) -> Iterator[Solution]:
        with ProbedInterpreter(Limits(timeout_s=arguments.timeout_s)) as interpreter:
            for question in tqdm(questions, unit="question"):
                one = solve(question, solver, interpreter, arguments.output / "figures" / question.id)
                file.write(files.json_line(row(one)))
                yield one

    with (
        files.new_file(arguments.output / "solutions.jsonl") as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        found = scores(questions, solutions(file))
    files.write_json(arguments.output / "scores.json", found)
    print(table(found))
    print(f"wrote {arguments.output / 'solutions.jsonl'} and scores.json beside it")


if __name__ == "__main__":
    run(main)
