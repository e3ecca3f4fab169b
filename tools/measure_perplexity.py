"""Perplexity and bits per byte of texts under a model, by language and domain.

    python tools/measure_perplexity.py --checkpoint runs/tiny --texts held_out --output runs/held_out_perplexity

Texts are files of a corpus (`.txt`, `.md`, `.py`, `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, `.parquet`), of one or more
folders. Language and domain are the fields `language` and `domain` of a row where it has them, else the first two
folders below --texts: `held_out/en/books/1.txt`. `--texts NAME=PATH` gives all texts there the domain NAME. A long text
is read by sliding windows: each predicts --stride tokens from the ones before them, as far as --context_length goes,
and every token is predicted once. Each text is read by itself.

--output gets `perplexity.json` and `perplexity.md`.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from qwen_jax import files
from qwen_jax.command_line import add_mesh, path_argument, quiet, run
from qwen_jax.compilation_cache import programs_kept
from qwen_jax.evaluation.perplexity import Text, measure, table
from qwen_jax.evaluation.report_tables import Table
from qwen_jax.evaluation.results_page import markdown_table
from qwen_jax.generate import load_engine
from qwen_jax.sharding import MeshConfig

LABELS = ("language", "domain")


def named_texts(text: str) -> tuple[str, Path]:
    """(domain, path) of `PATH` or `NAME=PATH`; the domain is empty without a name."""
    name, equals, path = text.partition("=")
    named = bool(equals) and "/" not in name and not path_argument(text).exists()
    return (name, path_argument(path)) if named else ("", path_argument(text))


def read_texts(folder: Path, text_field: str = "text", limit: int | None = None, domain: str = "") -> Iterator[Text]:
    """The texts of a folder or file with their groups.

    Args:
        domain: of all of them; empty: what rows or folders say.
        limit: the first so many of each group; None: all.

    Raises:
        OSError, ValueError: as `qwen_jax.data.corpora.read_rows`.
    """
    with quiet():
        from qwen_jax.data.corpora import list_files, read_rows

    counts: dict[tuple[str, str], int] = {}
    paths = list_files(folder)
    with tqdm(total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True, desc="files") as bar:
        for path in paths:
            parents = path.relative_to(folder).parts[:-1] if folder.is_dir() else ()
            by_folder = dict(zip(LABELS, parents, strict=False))
            for text, labels in read_rows(path, text_field=text_field, labels=LABELS):
                one = Text(text, **(by_folder | labels | ({"domain": domain} if domain else {})))
                group = (one.language, one.domain)
                counts[group] = counts.get(group, 0) + 1
                if limit is None or counts[group] <= limit:
                    yield one
            bar.update(path.stat().st_size)


@programs_kept()
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=path_argument, required=True, help="a model in any known format")
    parser.add_argument(
        "--texts", type=named_texts, nargs="+", required=True, metavar="[NAME=]PATH", help="folders or files"
    )
    parser.add_argument("--text_field", default="text", help="field or column (default: %(default)s)")
    parser.add_argument("--output", type=path_argument, metavar="FOLDER", help="gets perplexity.json and perplexity.md")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N texts of each group (default: all)")
    parser.add_argument("--context_length", type=int, help="tokens of a window (default: the model's)")
    parser.add_argument("--stride", type=int, help="tokens between two windows (default: half of a window)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    add_mesh(parser, "fsdp has them all")
    args = parser.parse_args(argv)
    mesh = args.mesh or MeshConfig()
    engine = load_engine(args.checkpoint, args.dtype, slots=1, mesh=mesh, context_length=args.context_length)
    stride = engine.context_length // 2 if args.stride is None else args.stride
    paths = [str(path) for _, path in args.texts]
    texts = (read_texts(path, args.text_field, args.limit, domain) for domain, path in args.texts)
    tallies, left_out = measure(engine, itertools.chain.from_iterable(texts), stride)
    if not tallies:
        raise ValueError(f"{', '.join(paths)}: no text to measure")
    header, *rows = table(tallies)
    window = f"windows of {engine.context_length:,} tokens, {stride:,} apart"
    shown = [f"{args.checkpoint}: {window}", markdown_table(Table("", header, tuple(rows)))]
    shown += [f"only the first {args.limit:,} texts of each group"] if args.limit else []
    shown += [f"left out, {reason}: {count:,}" for reason, count in left_out.items()]
    print("\n\n".join(shown))
    if args.output is not None:
        groups = [
            {"language": language, "domain": domain, **dataclasses.asdict(one)}
            | {"perplexity": one.perplexity, "bits_per_byte": one.bits_per_byte}
            for (language, domain), one in sorted(tallies.items())
        ]
        settings = {"checkpoint": str(args.checkpoint), "texts": paths, "dtype": args.dtype}
        settings |= {"context_length": engine.context_length, "stride": stride, "limit": args.limit}
        files.write_json(args.output / "perplexity.json", settings | {"left_out": left_out, "groups": groups})
        files.write_text(args.output / "perplexity.md", "\n\n".join(shown) + "\n")


if __name__ == "__main__":
    run(main)
