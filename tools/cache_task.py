"""Caches a task or mixture: tokenizes it and packs it into examples of one length.

    python tools/cache_task.py python_corpus --cache_dir=cache --sequence_length=2048
    python tools/cache_task.py local_files --cache_dir=cache --sequence_length=2048 --num_workers=16 \\
        --gin.local_files.pattern='corpus/**/*.jsonl.zst'
    python tools/cache_task.py local_files … --beam.runner=FlinkRunner --beam.flink_master=localhost:8081

`--gin.NAME=VALUE` and `--gin_file=FILE` configure the task. `--num_workers` processes of this machine share the work,
or the workers of a cluster, where `--beam.OPTION=VALUE` is handed to Beam as `--OPTION=VALUE`
(https://beam.apache.org/documentation/runners). Complete splits are used as they are; an interrupted run continues
with the next shard.
"""

import task_arguments

from qwen_jax import command_line


def main(argv: list[str] | None = None) -> None:
    """Runs `qwen_jax.data.cache.prepare` with arguments of the command line; prints a table of packed splits."""
    parser = task_arguments.parser(__doc__)
    parser.add_argument("name", help="task or mixture")
    parser.add_argument(
        "--cache_dir",
        type=command_line.path_argument,
        required=True,
        help="folder of the cache; all workers must see it",
    )
    parser.add_argument("--sequence_length", required=True, type=int, help="tokens of an example")
    parser.add_argument(
        "--splits", default="train,validation", help="splits, separated by commas (default: %(default)s)"
    )
    parser.add_argument(
        "--num_workers",
        type=command_line.positive,
        default=1,
        help="worker processes on this machine (default: %(default)s)",
    )
    parser.add_argument(
        "--num_shards", type=command_line.positive, help="shards of packed examples (default: one for 32M tokens)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for the order of documents (default: %(default)s)")
    parser.add_argument(
        "--packing",
        choices=task_arguments.PACKINGS,
        default="concat",
        help="concat merges and cuts documents, best_fit keeps them apart, whole never cuts one into two examples "
        "(conversations, pairs), padded takes one an example (prompts) (default: %(default)s)",
    )
    parser.add_argument(
        "--images_per_row",
        type=int,
        default=0,
        help="the most pictures of an example; documents with more are left out and counted (default: %(default)s)",
    )
    arguments = task_arguments.parse(parser, argv)
    with command_line.quiet():
        from qwen_jax.data import cache
        from qwen_jax.data.pack_cache import removed_lines

    prepared = cache.prepare(
        arguments.name,
        cache_dir=arguments.cache_dir,
        sequence_length=arguments.sequence_length,
        splits=tuple(arguments.splits.split(",")),
        beam_options=arguments.beam_options,
        num_workers=arguments.num_workers,
        num_shards=arguments.num_shards,
        seed=arguments.seed,
        packing=arguments.packing,
        images_per_row=arguments.images_per_row,
    )
    print(f"{'task':24} {'split':10} {'examples':>12} {'tokens':>16} {'documents':>12} {'bytes/token':>11}")
    for one in prepared:
        m = one.manifest
        ratio = m.text_bytes / m.tokens
        print(f"{m.task:24} {m.split:10} {m.records:>12,} {m.tokens:>16,} {m.documents:>12,} {ratio:>11.3f}")
        for line in removed_lines(m):
            print(f"    {line}")


if __name__ == "__main__":
    command_line.run(main)
