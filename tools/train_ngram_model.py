"""Trains the character n-gram model whose perplexity curation filters by.

    python tools/train_ngram_model.py --corpus='encyclopedia/*.jsonl.zst' --output=ngrams.npz

Train it on text that is good, one file for each language or one for all. `NgramPerplexity.path` of a curation run names
the file. A corpus is what the task `local_files` reads: text, JSON lines or Parquet.
"""

import argparse
import itertools
import sys
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax import command_line


def main(argv: list[str] | None = None) -> None:
    """Trains, writes the file and prints its perplexity on documents held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="folder or glob of good text")
    parser.add_argument("--text_field", default="text", help="field of JSON lines, column of Parquet")
    parser.add_argument("--output", required=True, type=command_line.path_argument, help=".npz file to write")
    parser.add_argument("--order", type=int, default=5, help="characters of an n-gram (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=20, help="tables of 2**bits places (default: %(default)s)")
    parser.add_argument(
        "--max_documents", type=int, default=100_000, help="largest number of documents to read (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    from tqdm import tqdm

    from qwen_jax.curation.scoring import NgramPerplexity, train_ngram

    with command_line.quiet():
        from qwen_jax.data.corpora import documents

    rows = itertools.islice(documents(arguments.corpus, text_field=arguments.text_field), arguments.max_documents)
    held_out: list[str] = []

    def training_texts():
        for number, row in enumerate(tqdm(rows, unit=" documents", disable=not sys.stderr.isatty())):
            if number % 20 == 1 and len(held_out) < 200:
                held_out.append(row["text"])
            else:
                yield row["text"]

    read = train_ngram(training_texts(), arguments.output, order=arguments.order, bits=arguments.bits)
    size = arguments.output.stat().st_size
    print(f"{arguments.output}: order {arguments.order}, {read:,} characters, {size:,} bytes")
    scorer = NgramPerplexity(str(arguments.output))
    scores = sorted(scorer(text) for text in held_out)
    if scores:
        places = {share: min(int(share * len(scores)), len(scores) - 1) for share in (0.5, 0.9, 0.99)}
        print(
            "perplexity of a character on documents held out:",
            ", ".join(f"{share:.0%} below {scores[place]:.2f}" for share, place in places.items()),
        )


if __name__ == "__main__":
    command_line.run(main)
