"""Perplexity at 0.5, 1, 2, 4 and 8 times the training length, with and without context extension: the report's Table 3.

    python tools/long_context.py --checkpoint runs/tiny --task python_corpus --output long_context.png
    python tools/long_context.py --checkpoint exports/qwen_7b --text 'papers/*.txt' --dtype bfloat16

Long documents are cut into stretches of eight training lengths, and each stretch into windows of the length that is
measured: every length predicts the same tokens, each once, from the tokens before it in its window. Each row of the
table adds one part of report 2.3.2, whatever the model's configuration enables. The last one gives each layer a window:
the training length in the lowest, all tokens in the highest, evenly spaced in between.

`--task` takes its held-out documents, `--text` any files (`.txt`, `.md`, `.py`, `.jsonl`, `.parquet`): documents too
short for one stretch are left out. `--gin.NAME=VALUE` and `--gin_file=FILE` configure the task.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import task_arguments

from qwen_jax import command_line, files

MULTIPLES = (0.5, 1, 2, 4, 8)
VARIANTS = ("no extension", "+ dynamic NTK", "+ dynamic NTK + LogN", "+ dynamic NTK + LogN + window")
# Table 3, Qwen-7B (trained on 2,048 tokens), arXiv text.
REPORT = (
    (4.23, 3.78, 39.35, 469.81, 2645.09),
    (4.23, 3.78, 3.59, 3.66, 5.71),
    (4.23, 3.78, 3.58, 3.56, 4.62),
    (4.23, 3.78, 3.58, 3.49, 4.32),
)


def windows_by_layer(num_layers: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Evenly spaced from `shortest` in the lowest layer to `longest` in the highest."""
    step = (longest - shortest) / max(num_layers - 1, 1)
    return tuple(round(shortest + step * layer) for layer in range(num_layers))


def extended(config, training_length: int, variant: int, windows: tuple[int, ...]):
    """The ModelConfig of one row of the table."""
    return dataclasses.replace(
        config,
        context_length=training_length,
        use_dynamic_ntk=variant >= 1,
        use_logn=variant >= 2,
        window_sizes=windows if variant >= 3 else None,
    )


def stretches(documents: Iterable, length: int, limit: int):
    """Pieces of documents for windows of up to `length` tokens.

    Args:
        documents: token ids of each.
        length: tokens that a piece predicts; it has one more, which nothing predicts.
        limit: stop after this many predicted tokens.

    Returns:
        int32 [pieces, length + 1]. Pieces of one document follow on each other, so no token is predicted twice.

    Raises:
        ValueError: no document is long enough.
    """
    import numpy as np

    pieces, longest = [], 0
    for ids in documents:
        ids = np.asarray(ids, np.int32)
        longest = max(longest, len(ids))
        for start in range(0, len(ids) - length, length):
            pieces.append(ids[start : start + length + 1])
            if len(pieces) * length >= limit:
                return np.stack(pieces)
    if not pieces:
        raise ValueError(
            f"no document has the {length + 1:,} tokens that one stretch takes (the longest has {longest:,}): give "
            f"longer documents, or a smaller --training_length"
        )
    return np.stack(pieces)


def perplexity(model, params, pieces, length: int, rows: int, progress) -> float:
    """exp of the mean loss of the last tokens of `pieces` [pieces, n + 1], cut into windows of `length`.

    Args:
        model, params: the model in the measured variant.
        pieces: see `stretches`; n is a multiple of `length`.
        length: largest number of tokens that the model sees.
        rows: windows computed at a time.
        progress: a tqdm bar that counts tokens.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qwen_jax.models.log_probs import cross_entropy_sums
    from qwen_jax.models.transformer import Qwen

    @jax.jit
    def loss(params, inputs, targets, weights):
        hidden = model.apply({"params": params}, inputs, method=Qwen.inference_hidden_states)
        kernel = model.apply({"params": params}, method=Qwen.output_kernel)
        return cross_entropy_sums(hidden, kernel, targets, weights)["loss"]

    inputs, targets = pieces[:, :-1].reshape(-1, length), pieces[:, 1:].reshape(-1, length)
    total = 0.0
    for start in range(0, len(inputs), rows):
        parts = [part[start : start + rows] for part in (inputs, targets)]
        missing = ((0, rows - len(parts[0])), (0, 0))
        weights = np.pad(np.ones(parts[0].shape, np.float32), missing)
        total += float(loss(params, *(jnp.asarray(np.pad(part, missing)) for part in parts), weights))
        progress.update(parts[0].size)
    return float(np.exp(total / targets.size))


def measure(model, params, pieces, training_length: int, windows: tuple[int, ...]) -> list[list[float]]:
    """Perplexity of every variant (rows) at every length (columns)."""
    from tqdm import tqdm

    from qwen_jax.models.transformer import Qwen

    lengths = [int(training_length * multiple) for multiple in MULTIPLES]
    table = []
    with tqdm(total=pieces[:, 1:].size * len(lengths) * len(VARIANTS), unit="token", unit_scale=True) as bar:
        for variant, name in enumerate(VARIANTS):
            here = Qwen(extended(model.config, training_length, variant, windows))
            row = []
            for length in lengths:
                bar.set_description(f"{name}, {length} tokens")
                row.append(perplexity(here, params, pieces, length, lengths[-1] // length, bar))
            table.append(row)
            bar.write(f"{name}: " + "  ".join(f"{value:.2f}" for value in row))
    return table


def lines(table: list[list[float]], training_length: int) -> Iterator[str]:
    """The table, each row above the report's, and whether the order of Table 3 holds."""

    def row(name, values):
        return f"{name:34}" + "".join(f"{value:>11}" for value in values)

    yield row("perplexity at a length of", [f"{int(training_length * m):,}" for m in MULTIPLES])
    yield row("in training lengths", [f"{m:g}" for m in MULTIPLES])
    for name, ours, theirs in zip(VARIANTS, table, REPORT, strict=True):
        yield row(name, [f"{value:,.2f}" for value in ours])
        yield row("    report, Qwen-7B, arXiv", [f"{value:,.2f}" for value in theirs])
    trained = MULTIPLES.index(1)
    yield f"at {MULTIPLES[-1]} times the training length, in parts of the perplexity at the training length:"
    for name, ours, theirs in zip(VARIANTS, table, REPORT, strict=True):
        yield f"    {name:30}{ours[-1] / ours[trained]:>10.2f}   (report {theirs[-1] / theirs[trained]:.2f})"
    holds = all(above[-1] > below[-1] for above, below in itertools.pairwise(table))
    yield f"order of Table 3 there (each part makes it better): {'holds' if holds else 'does NOT hold'}"


def draw(table: list[list[float]], training_length: int, name: str, output: Path) -> None:
    """Our curves and the report's side by side, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    titles = (f"{name}, trained on {training_length:,} tokens", "report, Table 3: Qwen-7B, 2,048 tokens")
    for panel, rows, title in zip(panels, (table, REPORT), titles, strict=True):
        for row, label, style in zip(rows, VARIANTS, ("o-", "s-", "^--", "v:"), strict=True):
            panel.plot(MULTIPLES, row, style, label=label)
        panel.axvline(1, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(LogFormatter())
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))  # labeled within one decade only
        panel.set_xticks(MULTIPLES, [f"{multiple:g}" for multiple in MULTIPLES])
        panel.set_xlabel("length, in training lengths")
        panel.set_title(title)
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("perplexity")
    panels[0].legend()
    with files.new_file(output) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def _documents(arguments, tokenizer) -> Iterator:
    """Token ids of the documents of --text, or of the held-out ones of --task."""
    if arguments.text:
        from qwen_jax.data.corpora import documents

        for document in documents(arguments.text, text_field=arguments.text_field):
            yield tokenizer.encode(document["text"])
        return
    import gin

    from qwen_jax.data.quick_seqio import seqio
    from qwen_jax.data.tokenizer import write_ranks

    if arguments.task not in seqio.TaskRegistry.names():
        raise ValueError(f"{arguments.task!r} is no task; there are {', '.join(sorted(seqio.TaskRegistry.names()))}")
    task = seqio.get_mixture_or_task(arguments.task)
    if arguments.split not in task.splits:
        raise ValueError(f"task {task.name} has no split {arguments.split!r}; it has {', '.join(task.splits)}")
    with tempfile.TemporaryDirectory() as scratch:
        # The documents must be made of this model's tokens, whatever the task is configured with.
        write_ranks(tokenizer.mergeable_ranks, Path(scratch, "model.tiktoken"))
        gin.bind_parameter("vocabulary_path.path", str(Path(scratch, "model.tiktoken")))
        dataset = task.get_dataset(sequence_length=None, split=arguments.split, shuffle=False, use_cached=False)
        for example in dataset.as_numpy_iterator():
            yield example["targets"]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = task_arguments.parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=command_line.path_argument,
        required=True,
        help="run folder, or converted folder (qwen or qwen2)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--task", help="registered task, for its held-out documents")
    source.add_argument("--text", help="file, folder or glob")
    parser.add_argument("--split", default="validation", help="split of the task (default: %(default)s)")
    parser.add_argument(
        "--text_field", default="text", help="field of JSON lines or Parquet with the text (default: %(default)s)"
    )
    parser.add_argument("--training_length", type=int, help="default: context_length of the model's configuration")
    parser.add_argument(
        "--tokens", type=int, default=65536, help="tokens to predict at each length (default: %(default)s)"
    )
    parser.add_argument("--shortest_window", type=int, help="window of the lowest layer (default: the training length)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument(
        "--output",
        type=command_line.path_argument,
        default=Path("long_context.png"),
        help="PNG to write (default: %(default)s)",
    )
    arguments = task_arguments.parse(parser, argv)

    from qwen_jax.conversion import load_pretrained, load_tokenizer

    model, params = load_pretrained(arguments.checkpoint, dtype=arguments.dtype)
    training_length = model.config.context_length if arguments.training_length is None else arguments.training_length
    if training_length < 2 or training_length % 2:
        raise ValueError(f"the training length is halved, so it must be even and at least 2: found {training_length}")
    longest = int(training_length * MULTIPLES[-1])
    shortest = arguments.shortest_window or training_length
    if not 1 <= shortest <= longest:
        raise ValueError(f"--shortest_window={shortest} must be between 1 and {longest}, the longest length measured")
    windows = windows_by_layer(model.config.num_layers, shortest, longest)
    pieces = stretches(_documents(arguments, load_tokenizer(arguments.checkpoint)), longest, arguments.tokens)
    print(f"{pieces[:, 1:].size:,} tokens in {len(pieces)} stretches; windows from the lowest layer: {windows}")
    table = measure(model, params, pieces, training_length, windows)
    print("\n".join(lines(table, training_length)))
    draw(table, training_length, Path(arguments.checkpoint).name, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    command_line.run(main)
