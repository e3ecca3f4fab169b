"""Evaluates a model on benchmarks of the report (2.5, A.2.1), and writes its answers and scores.

    python -m qwen_jax.evaluate --checkpoint runs/tiny --benchmarks mmlu,gsm8k --data_dir data --output_dir runs/scores

The same command goes on with what is in the output directory. On several hosts: the same command on each
(`qwen_jax.distributed.hosts`).
"""

import argparse
import collections
import contextlib
import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_jax import files
from qwen_jax.command_line import add_mesh, path_argument, quick_imports, quiet, run

with quick_imports():
    from qwen_jax.compilation_cache import programs_kept
    from qwen_jax.conversion import load_tokenizer, read_model_config
    from qwen_jax.conversion.load import weight_files
    from qwen_jax.distributed import hosts
    from qwen_jax.distributed.watchdog import Activity, join_job
    from qwen_jax.evaluation.records import SETTINGS, Records, keep_settings
    from qwen_jax.evaluation.report_tables import Entry, counts_table, report_tables
    from qwen_jax.evaluation.results_page import markdown_table, write_results
    from qwen_jax.files import PathLike
    from qwen_jax.generate import load_engine
    from qwen_jax.sharding import MeshConfig

if TYPE_CHECKING:
    from qwen_jax.evaluation.benchmark import Benchmark, Example, LeftOut

log = logging.getLogger(__name__)

SCORES = "scores.json"
ALL = "all"


def registered() -> "Mapping[str, Benchmark]":
    """All benchmarks by name."""
    with quiet():
        import tasks.benchmarks  # noqa: F401  registers them
        from qwen_jax.evaluation.benchmark_tasks import benchmarks
    return benchmarks()


def find_benchmarks(names: Sequence[str]) -> "list[Benchmark]":
    """The benchmarks of these names, each once; "all" stands for all of them.

    Raises:
        ValueError: there is none of a name; the message has the nearest one.
    """
    known, found = registered(), {}
    for name in names:
        if name != ALL and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"no benchmark has the name {name!r}: {hint}--list shows all {len(known)}")
        found |= known if name == ALL else {name: known[name]}
    if not found:
        raise ValueError("name at least one benchmark; --list shows all")
    return list(found.values())


def evaluate(
    *,
    checkpoint: PathLike,
    benchmarks: Sequence[str],
    output_dir: PathLike,
    data_dir: PathLike | None = None,
    chat: bool = False,
    limit: int | None = None,
    name: str | None = None,
    wrong_answers: int = 20,
    dtype: str = "float32",
    slots: int = 16,
    context_length: int | None = None,
    mesh: MeshConfig | None = MeshConfig(),
    activity: Activity | None = None,
) -> dict[str, Entry]:
    """Lets a model answer benchmarks; goes on with the answers in `output_dir`.

    In a job of several processes all call it with the same arguments. Process 0 judges and writes.

    Args:
        checkpoint: a model in any format that `load_pretrained` reads, with its tokenizer.
        benchmarks: names, or "all".
        output_dir: of one checkpoint. Gets `results.json`, `results.md` and `results.html` over all benchmarks that
            were evaluated into it, and a folder for each with `answers.jsonl`.
        data_dir: has the folder of each benchmark with its publisher's files. None: the TFDS datasets.
        chat: ask by the prompts for chat models, in ChatML.
        limit: answer the first so many examples of each subject; a benchmark without subjects is one.
        name: of the model in the tables; None: that of the checkpoint's folder.
        wrong_answers: so many of each benchmark are shown to read.
        dtype: compute dtype, "float32" or "bfloat16".
        slots, context_length, mesh: see `load_engine`.
        activity: of the watchdog.

    Returns:
        Results by name of the benchmark; in process 0 alone.

    Raises:
        ValueError, OSError: a benchmark, a file, the checkpoint or the output directory cannot be used; the message
            says what to change.
    """
    if wrong_answers < 0:
        raise ValueError(f"wrong_answers must not be negative, found {wrong_answers}")
    chosen = find_benchmarks(benchmarks)
    from qwen_jax.evaluation import evaluator

    checkpoint, folder = files.as_path(checkpoint, "checkpoint"), files.as_path(output_dir, "output_dir")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    settings = model_settings(checkpoint, dtype, chat, context_length)
    data = None if data_dir is None else files.as_path(data_dir, "data_dir")
    with contextlib.ExitStack() as stack:
        main = hosts.process_index() == 0
        if main:
            stack.enter_context(files.locked(folder))
            files.remove_unfinished(folder)
            if (folder / SETTINGS).exists():
                keep_settings(folder, settings)  # refuses others before anything takes long
        examples, left_out = {}, {}
        for one in chosen:
            examples[one.name], left_out[one.name] = examples_of(one, data, chat, limit)
        engine = load_engine(checkpoint, dtype, slots, mesh=mesh, context_length=context_length)
        entries: dict[str, Entry] = {}
        for benchmark in chosen:
            some = examples[benchmark.name]
            records = None
            if main:
                keep_settings(folder, settings)
                where = folder / benchmark.name
                keep_settings(where, evaluator.settings(benchmark, some, engine.context_length, limit))
                records = stack.enter_context(Records(where, [example.id for example in some]))
            evaluator.answer(engine, benchmark, some, records, chat=chat, activity=activity)
            if records is not None:
                about = {"left_out": left_out[benchmark.name], "limit": limit, "wrong_answers": wrong_answers}
                entries[benchmark.name] = evaluator.entry(benchmark, some, records.rows, **about)
                shown = {"checkpoint": str(checkpoint), "data": str(data or "TFDS"), **settings}
                write_entry(folder, name or checkpoint.name, shown, entries[benchmark.name])
        # The others stay in the job until process 0 has written.
        hosts.run_on_main("evaluated", "process 0 to judge and write", lambda: None)
    return entries


def write_entry(folder: Path, model: str, settings: Mapping[str, Any], entry: Entry) -> None:
    """Writes the scores of one benchmark, and the results of all that are in the folder."""
    # In ASCII: wrong answers may hold lone surrogates.
    files.write_text(folder / entry.benchmark.name / SCORES, json.dumps(entry.to_json()) + "\n")
    write_results(folder, model, settings, finished(folder), registered())


def model_settings(checkpoint: Path, dtype: str, chat: bool, context_length: int | None) -> dict[str, Any]:
    """What decides the answers to every benchmark: weights by name, size and time of their files, and options.

    Raises:
        ValueError, OSError: there is no such checkpoint, or it has no tokenizer.
    """
    root = checkpoint.absolute()
    stats = []
    for file in weight_files(checkpoint):
        path, status = file.absolute(), file.stat()
        name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        stats.append([name, status.st_size, status.st_mtime_ns or status.st_mtime])  # of an object, seconds alone
    return {
        "weights": hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16],
        "tokenizer": load_tokenizer(checkpoint).fingerprint[:16],
        "dtype": dtype,
        "chat": chat,
        "context_length": context_length or read_model_config(checkpoint).inference_length,
    }


def examples_of(
    benchmark: "Benchmark", data_dir: Path | None, chat: bool, limit: int | None
) -> "tuple[list[Example], list[LeftOut]]":
    """The examples to answer, and the rows that are no examples.

    Raises:
        ValueError, OSError: as `read_examples`, or the benchmark has no prompts for chat models.
    """
    from qwen_jax.evaluation import evaluator
    from qwen_jax.evaluation.benchmark_tasks import read_examples

    left_out: list[LeftOut] = []
    found = list(read_examples(benchmark, data_dir, left_out))
    if chat:
        evaluator.check_chat(benchmark, found)
    kept = evaluator.first_of_subjects(found, limit)
    hosts.log_on_main("%s: %s of %s examples", benchmark.name, f"{len(kept):,}", f"{len(found):,}")
    for reason, count in collections.Counter(one.reason for one in left_out).items():
        first = next(one.where for one in left_out if one.reason == reason)
        hosts.log_on_main("%s: %s left out, %s: the first is %s", benchmark.name, f"{count:,}", reason, first)
    return kept, left_out


def finished(folder: Path) -> dict[str, Entry]:
    """Results of all benchmarks that were evaluated into a folder, by name."""
    paths = {name: folder / name / SCORES for name in registered()}
    return {
        name: Entry.from_json(registered()[name], files.read_json(path))
        for name, path in paths.items()
        if path.exists()
    }


def list_benchmarks() -> None:
    """Prints all benchmarks with what they expect."""
    from qwen_jax.evaluation.benchmark import Choices

    rows = [("name", "title", "shots", "answers", "report", "files, in the folder of --data_dir")]
    for name, one in registered().items():
        kind = "ranked" if isinstance(one.answers, Choices) else "written"
        rows.append((name, one.title, str(one.shots), kind, one.table or "–", f"{one.folder}/: {one.files}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]))


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    made = argparse.ArgumentParser(
        prog="python -m qwen_jax.evaluate",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--list", action="store_true", help="show all benchmarks with shots and files, and end")
    made.add_argument("--checkpoint", type=path_argument, help="a model in any known format, with its tokenizer")
    made.add_argument(
        "--benchmarks", default=[], type=lambda text: [one.strip() for one in text.split(",") if one.strip()],
        metavar="NAME,…", help="names, or all",
    )  # fmt: skip
    made.add_argument("--data_dir", type=path_argument, help="folder of publishers' files; without it, TFDS datasets")
    made.add_argument("--output_dir", type=path_argument, help="for answers and results of this checkpoint")
    made.add_argument("--chat", action="store_true", help="ask by prompts for chat models, in ChatML")
    made.add_argument("--limit", type=int, metavar="N", help="answer the first N examples of each subject")
    made.add_argument("--name", help="of the model in the tables; without it, that of the checkpoint's folder")
    made.add_argument("--wrong_answers", type=int, default=20, metavar="N", help="of each benchmark, shown to read")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    made.add_argument("--slots", type=int, default=16, help="texts that are written together")
    made.add_argument(
        "--context_length", type=int, metavar="N",
        help="tokens of prompt and answer together; longer prompts are cut from the left. Without it, the model's",
    )  # fmt: skip
    add_mesh(made, "fsdp has them all")
    hosts.add_arguments(made)
    return made


@programs_kept()
def main(argv=None) -> None:
    """Command line of `python -m qwen_jax.evaluate`."""
    flags = parser()
    args = flags.parse_args(argv)
    if args.list:
        list_benchmarks()
        return
    if missing := [name for name in ("checkpoint", "benchmarks", "output_dir") if not getattr(args, name)]:
        flags.error(f"give {', '.join(f'--{name}' for name in missing)}")
    logging.getLogger("qwen_jax.inference").setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)  # SeqIO warns that its evaluator writes no logs of its own
    names = ("checkpoint", "benchmarks", "output_dir", "data_dir", "chat", "limit", "name", "wrong_answers")
    options = {name: getattr(args, name) for name in (*names, "dtype", "slots", "context_length")}
    options["mesh"] = args.mesh or MeshConfig()
    with join_job(hosts.job_config(args), json.dumps(options, default=str)) as watchdog:
        entries = evaluate(activity=watchdog.activity, **options)
    if entries:
        for table in (*report_tables(args.name or args.checkpoint.name, entries, registered()), counts_table(entries)):
            print(f"{table.caption}\n\n{markdown_table(table)}\n")
        print(f"results: {args.output_dir / 'results.html'} and results.md, results.json beside it")


if __name__ == "__main__":
    run(main)
