"""Answers held-out conversations with one or more models, counts what ends and looks as it should, writes the answers.

python tools/answer.py base=runs/demo/run sft=runs/sft_tiny --questions runs/sft/held_out.jsonl --format 'Answer: .*\\.'
python tools/answer.py sft=runs/sft rlhf=runs/rlhf --questions questions.jsonl --output runs/compare/answers.jsonl

Questions are JSON lines with `messages`; a last message of the assistant is the reference. What --output writes is the
input of tools/make_annotation_page.py.
"""

import argparse
import logging
import re

from tqdm import tqdm

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.compilation_cache import programs_kept
from qwen_jax.evaluation.answers import Answered, Question, Tally, answer, read_questions, tally
from qwen_jax.generate import load_engine
from qwen_jax.inference import SamplingConfig


def named_model(text: str) -> tuple[str, str]:
    """(name, path) of NAME=PATH."""
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, str(path_argument(path))


def pattern(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def answers_of(name: str, path: str, questions: list[Question], arguments: argparse.Namespace) -> list[Answered]:
    """The answers of one model, in the order of the questions."""
    engine = load_engine(path, arguments.dtype, arguments.slots)
    sampling = SamplingConfig(temperature=arguments.temperature, top_p=arguments.top_p)
    found: list[Answered | None] = [None] * len(questions)
    made = answer(engine, questions, max_new_tokens=arguments.max_new_tokens, sampling=sampling, seed=arguments.seed)
    for index, one in tqdm(made, total=len(questions), desc=name, unit="answer"):
        found[index] = one
    return [one for one in found if one is not None]


def row(name: str, counts: Tally) -> str:
    """A line of the Markdown table."""

    def share(count: int | None) -> str:
        return "–" if count is None else f"{count} ({count / counts.answers:.1%})"

    return f"| {name} | {counts.answers} | {share(counts.ended)} | {share(counts.formatted)} | {share(counts.equal)} |"


@programs_kept()
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", type=named_model, metavar="NAME=PATH", help="name, and run folder or converted folder"
    )
    parser.add_argument("--questions", type=path_argument, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--limit", type=int, help="answer the first so many questions (default: all)")
    parser.add_argument("--format", type=pattern, metavar="REGEX", help="count the answers that match it as a whole")
    parser.add_argument("--output", type=path_argument, metavar="FILE", help="JSON lines of the answers of all models")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="limit of an answer (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the most probable token (default: %(default)s)"
    )
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus to draw from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument("--slots", type=int, default=32, help="answers in one batch (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if len({name for name, _ in arguments.models}) < len(arguments.models):
        parser.error("two models have one name: name them differently")
    logging.getLogger("qwen_jax.inference").setLevel(logging.WARNING)
    questions = read_questions(arguments.questions, arguments.limit)
    lines, rows = [], []
    for name, path in arguments.models:
        answered = answers_of(name, path, questions, arguments)
        rows.append(row(name, tally(answered, arguments.format)))
        for one in answered:
            record = {
                "instruction": one.question.instruction,
                "model": name,
                "messages": list(one.question.messages),
                "answer": one.text,
                "ended": one.ended,
            }
            lines.append(files.json_line(record))
    print(
        "| model | answers | end with <\\|im_end\\|> | in the format | equal to the reference |\n|---|---|---|---|---|"
    )
    print("\n".join(rows))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(arguments.output, "".join(lines))
        print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run(main)
