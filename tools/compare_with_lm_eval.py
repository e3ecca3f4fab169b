"""Compares our evaluation of a checkpoint with that of EleutherAI's lm-evaluation-harness on the same prompts.

    python tools/compare_with_lm_eval.py --checkpoint runs/tiny --data_dir data --benchmarks mmlu,arc_easy --limit 20

Each benchmark becomes a task of the harness: a YAML file, and a JSON file with our prompts. The harness runs it with
its own model class for transformers, `HFLM`, on the exported weights, and our evaluation runs beside it. Printed for
each benchmark: the scores of both, the share of examples with the same result (the same choice, or the same text), and
the largest difference between log-likelihoods. Needs the extras `evaluation` and `test`.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.conversion import convert
from qwen_jax.conversion.load import detect_format
from qwen_jax.evaluate import find_benchmarks
from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, judged
from qwen_jax.evaluation.benchmark_tasks import read_examples
from qwen_jax.evaluation.evaluator import answer, first_of_subjects, new_tokens
from qwen_jax.evaluation.records import Records
from qwen_jax.generate import load_engine
from qwen_jax.inference import Engine
from qwen_jax.sharding import MeshConfig

# HFLM leaves control tokens out of a text, our evaluation writes their names.
_CONTROL = re.compile(r"<\|(?:endoftext|im_start|im_end|extra_\d+)\|>")
DEFAULT = "mmlu,arc_easy,arc_challenge,hellaswag,piqa,boolq,commonsenseqa,gsm8k,lambada"


def write_task(benchmark: Benchmark, examples: Sequence[Example], context_length: int, folder: Path) -> None:
    """Writes NAME.jsonl with the prompts of a benchmark, and NAME.yaml, the task of the harness that reads it."""
    rows, answers = [], benchmark.answers
    for example in examples:
        if isinstance(answers, Choices):
            pairs = answers.pairs(example)
            rows.append({"prompt": pairs[0][0], "choices": [choice for _, choice in pairs], "target": example.target})
        else:
            rows.append({"prompt": example.prompt, "target": ""})
    data = folder / f"{benchmark.name}.jsonl"
    files.write_text(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    task = {
        "task": f"same_{benchmark.name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "target_delimiter": "",
    }
    if isinstance(answers, Choices):
        task |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}]}
    else:
        arguments = {"until": list(answers.stop), "max_gen_toks": new_tokens(answers, context_length)}
        task |= {"output_type": "generate_until", "generation_kwargs": {**arguments, "do_sample": False}}
        task |= {"metric_list": [{"metric": "bypass"}]}
    files.write_text(folder / f"{benchmark.name}.yaml", yaml.safe_dump(task, sort_keys=False))


def harness_outputs(model, benchmarks: Sequence[Benchmark], folder: Path) -> dict[str, list]:
    """What a model of the harness answers to the tasks of a folder: log-likelihoods, or a text, of each example."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model,
        tasks=[f"same_{benchmark.name}" for benchmark in benchmarks],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    outputs = {}
    for benchmark in benchmarks:
        samples = sorted(found["samples"][f"same_{benchmark.name}"], key=lambda sample: sample["doc_id"])
        ranked = isinstance(benchmark.answers, Choices)
        # A filter may have made pairs of numbers out of a sample's responses; these are as the model gave them.
        outputs[benchmark.name] = [
            [float(reply[0][0]) for reply in sample["resps"]] if ranked else sample["resps"][0][0] for sample in samples
        ]
    return outputs


def our_rows(engine: Engine, benchmark: Benchmark, examples: Sequence[Example], folder: Path) -> list[dict]:
    """The rows of `answers.jsonl` that our evaluation writes, in the order of the examples."""
    folder.mkdir()
    with Records(folder, [example.id for example in examples]) as records:
        answer(engine, benchmark, examples, records)
        return [records.rows[example.id] for example in examples]


def compared(benchmark: Benchmark, examples: Sequence[Example], ours: Sequence[Mapping], theirs: Sequence) -> dict:
    """Scores in percent, the share of equal results, and the largest difference of log-likelihoods (None: of texts)."""
    same, scores, difference = 0, [0.0, 0.0], 0.0
    ranked = isinstance(benchmark.answers, Choices)
    for example, row, output in zip(examples, ours, theirs, strict=True):
        if ranked:
            mine = row["output"]["log_likelihoods"]
            difference = max(difference, *(abs(one - other) for one, other in zip(mine, output, strict=True)))
            output = row["output"] | {"log_likelihoods": output}
        outcome = judged(benchmark, example, output)
        same += outcome.extracted == row["extracted"] if ranked else output == _CONTROL.sub("", row["output"])
        scores[0] += next(iter(row["score"].values()))
        scores[1] += next(iter(outcome.score.values()))
    count = len(examples)
    return {
        "benchmark": benchmark.title,
        "examples": count,
        "ours": 100 * scores[0] / count,
        "lm-eval": 100 * scores[1] / count,
        "same": 100 * same / count,
        "difference": difference if ranked else None,
    }


def compare(
    checkpoint: Path, data_dir: Path, names: Sequence[str], limit: int | None, context_length: int | None = None
) -> list[dict]:
    """A row of `compared` for each benchmark.

    Args:
        limit: the first so many examples of each subject.
        context_length: of both; None: the model's.
    """
    from lm_eval.models.huggingface import HFLM

    engine = load_engine(checkpoint, mesh=MeshConfig(), context_length=context_length)
    benchmarks = find_benchmarks(names)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        examples = {one.name: first_of_subjects(list(read_examples(one, data_dir)), limit) for one in benchmarks}
        (folder / "tasks").mkdir()
        for one in benchmarks:
            write_task(one, examples[one.name], engine.context_length, folder / "tasks")
        ours = {one.name: our_rows(engine, one, examples[one.name], folder / one.name) for one in benchmarks}
        exported = checkpoint
        if (found := detect_format(checkpoint)) != "qwen2":
            exported = convert(found, checkpoint, "qwen2", folder / "qwen2", progress=False)
        peer = HFLM(str(exported), device="cpu", dtype="float32", batch_size=8, max_length=engine.context_length)
        theirs = harness_outputs(peer, benchmarks, folder / "tasks")
    return [compared(one, examples[one.name], ours[one.name], theirs[one.name]) for one in benchmarks]


def table(rows: Sequence[Mapping]) -> str:
    """The rows as a table of Markdown."""
    lines = [
        "| benchmark | examples | ours | lm-eval | same results | largest difference |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        difference = "texts" if row["difference"] is None else f"{row['difference']:.1e}"
        lines.append(
            f"| {row['benchmark']} | {row['examples']:,} | {row['ours']:.2f} | {row['lm-eval']:.2f} | "
            f"{row['same']:.1f}% | {difference} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=path_argument, required=True, help="run folder, or a converted one")
    parser.add_argument("--data_dir", type=path_argument, required=True, help="folders with the publishers' files")
    parser.add_argument("--benchmarks", default=DEFAULT, help="names, joined by commas (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="answer the first so many examples of each subject")
    parser.add_argument("--context_length", type=int, help="of both programs (default: the model's)")
    args = parser.parse_args(argv)
    rows = compare(args.checkpoint, args.data_dir, args.benchmarks.split(","), args.limit, args.context_length)
    print(table(rows))
    return int(any(row["same"] < 100 for row in rows))


if __name__ == "__main__":
    run(main)
