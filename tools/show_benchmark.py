"""Shows what a benchmark reads and what a model gets to see: counts, rows left out, subjects, prompts with answers.

    python tools/show_benchmark.py mmlu --data_dir data
    python tools/show_benchmark.py ceval --data_dir data --subject law --num_examples 3
    python tools/show_benchmark.py mmlu --data_dir data --chat
    python tools/show_benchmark.py --table

A prompt stands between ⟦ and ⟧, and so does each choice, with an arrow at the right one. Invisible characters are shown
as escapes. Without `--data_dir` the TFDS dataset is read. `--table` prints the table of docs/reference/benchmarks.md.
"""

import argparse
import collections

from qwen_jax.command_line import escape, path_argument, run
from qwen_jax.evaluate import find_benchmarks
from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, LeftOut
from qwen_jax.evaluation.report_tables import place


def answered(benchmark: Benchmark) -> str:
    """How a model answers, in words."""
    if not isinstance(benchmark.answers, Choices):
        return f"written, at most {benchmark.answers.max_new_tokens:,} tokens"
    ranked = f"ranked by log-likelihood, normalization {benchmark.answers.normalization}"
    return ranked + (", prompt and choice encoded apart" if benchmark.answers.apart else "")


def table() -> str:
    """All benchmarks as a Markdown table, in the order of the report's tables."""
    names = ("name", "table", "shots", "answers", "average", "examples", "files under its folder", "TFDS", "source")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for one in sorted(
        find_benchmarks(["all"]), key=lambda one: (*(place(one.table) if one.table else (2000, "")), one.name)
    ):
        choices = one.answers if isinstance(one.answers, Choices) else None
        kind = "written" if choices is None else f"ranked, {choices.normalization}" + ", apart" * choices.apart
        cells = (
            f"`{one.name}`",
            one.table.removeprefix("Table ") or "–",
            f"{one.shots}",
            kind + " or written" * bool(choices and one.written),
            one.average,
            f"{one.size:,}" if one.size else "–",
            f"`{one.folder}/`: {one.files}",
            f"`{one.tfds.name}`" if one.tfds else "–",
            one.source,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def lines_of(benchmark: Benchmark, examples: list[Example], left_out: list[LeftOut]) -> list[str]:
    """What the benchmark is, and what was read, one line each."""
    subjects = collections.Counter(example.subject for example in examples if example.subject)
    size = f" of {benchmark.size:,} published" if benchmark.size else ""
    lines = [
        f"{benchmark.title} ({benchmark.name}), {benchmark.table or 'in no table of the report'}",
        f"answers:    {answered(benchmark)}",
        f"shots:      {benchmark.shots}",
        f"average:    over {benchmark.average}",
        f"source:     {benchmark.source}",
        f"examples:   {len(examples):,}{size}",
    ]
    for reason, count in collections.Counter(one.reason for one in left_out).items():
        first = next(one.where for one in left_out if one.reason == reason)
        lines.append(f"left out:   {count:,}: {reason}: the first is {first}")
    if subjects:
        lines.append(f"subjects:   {', '.join(f'{name} {count:,}' for name, count in subjects.items())}")
    return lines


def shown(benchmark: Benchmark, example: Example, chat: bool) -> list[str]:
    """An example as a model sees it, and its answer, in lines."""
    as_chat = chat and bool(example.chat)
    lines = [f"⟦{escape(example.chat if as_chat else example.prompt)}⟧"]
    if isinstance(benchmark.answered_by(example, chat), Choices):
        for index, choice in enumerate(example.choices):
            lines.append(f"{'→' if index == example.target else ' '} ⟦{escape(choice)}⟧")
    else:
        target = example.choices[example.target] if example.choices else example.target
        lines.append(f"→ {escape(str(target))}")
    return lines


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help="of a benchmark; `python -m qwen_jax.evaluate --list` shows all")
    parser.add_argument("--data_dir", type=path_argument, help="folder of publishers' files; without it, TFDS")
    parser.add_argument("--subject", help="show examples of this subject")
    parser.add_argument("--num_examples", type=int, default=1, help="examples to show (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="show the prompts for chat models")
    parser.add_argument("--table", action="store_true", help="print all benchmarks as a Markdown table, and end")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table())
        return
    if not arguments.name:
        parser.error("give the name of a benchmark, or --table")
    (benchmark,) = find_benchmarks([arguments.name])
    from qwen_jax.evaluation.benchmark_tasks import read_examples

    left_out: list[LeftOut] = []
    examples = list(read_examples(benchmark, arguments.data_dir, left_out))
    print("\n".join(lines_of(benchmark, examples, left_out)))
    chosen = [example for example in examples if arguments.subject in (None, example.subject)]
    if not chosen:
        known = ", ".join(sorted({example.subject for example in examples}))
        raise ValueError(f"{benchmark.name} has no subject {arguments.subject!r} here; it has {known}")
    for example in chosen[: arguments.num_examples]:
        print(f"--- {example.id}")
        print("\n".join(shown(benchmark, example, arguments.chat)))


if __name__ == "__main__":
    run(main)
