"""Makes a corpus of source code of repositories: languages, licenses, filters, exact and near duplicates.

    python tools/make_code_corpus.py --input repositories/ more.tar.zst --output corpus/code

Each folder of an input is a repository (with --depth 2: OWNER/NAME). Its license is read from its files, or from an
SPDX tag in a file. The task `code_files` reads `OUTPUT/documents`, and holds out whole repositories.
`OUTPUT/left_out.jsonl` names every file that is not there, with the reason.
"""

import argparse
import sys
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax import command_line
from qwen_jax.curation import code_corpus, dedup, licenses
from qwen_jax.curation.source_code import SourceRules


def _licenses(text: str) -> frozenset[str] | None:
    if text == "any":
        return None
    names = frozenset(name for name in text.split(",") if name)
    return (names - {"permissive"}) | licenses.PERMISSIVE if "permissive" in names else names


def main(argv: list[str] | None = None) -> None:
    """Makes the corpus and prints what was read, kept and left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=command_line.path_argument, required=True, metavar="FOLDER_OR_TAR")
    parser.add_argument("--output", type=command_line.path_argument, required=True, metavar="FOLDER")
    parser.add_argument("--depth", type=int, default=1, help="folders that name a repository (default: %(default)s)")
    parser.add_argument(
        "--licenses",
        type=_licenses,
        default="permissive",
        metavar="NAMES",
        help="SPDX names with commas between, `permissive` for a list of them, or `any` (default: %(default)s)",
    )
    parser.add_argument("--languages", nargs="+", default=(), metavar="NAME", help="take only these (default: all)")
    parser.add_argument("--max_bytes", type=int, default=SourceRules.max_bytes, help="of a file (default: %(default)s)")
    parser.add_argument(
        "--similarity",
        type=float,
        default=dedup.FuzzyConfig.threshold,
        help="files at least so similar are near-duplicates; 0: only equal ones are duplicates (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    config = code_corpus.CodeConfig(
        depth=arguments.depth,
        licenses=arguments.licenses,
        rules=SourceRules(max_bytes=arguments.max_bytes, languages=tuple(arguments.languages)),
        fuzzy=dedup.FuzzyConfig(threshold=arguments.similarity) if arguments.similarity else None,
    )
    made = code_corpus.make_corpus(arguments.input, arguments.output, config)
    print(f"{made['files']:,} files of {made['repositories']:,} repositories")
    print(f"documents  {made['documents']:>9,}  {made['bytes']:,} bytes of text")
    for name, count in made["languages"].items():
        print(f"           {count:>9,}  {name}")
    print(f"left out   {sum(made['left_out'].values()):>9,}")
    for reason, count in made["left_out"].items():
        print(f"           {count:>9,}  {reason}")
    print(f"wrote {arguments.output / code_corpus.DOCUMENTS}, {code_corpus.LEFT_OUT}, {code_corpus.MANIFEST}")


if __name__ == "__main__":
    command_line.run(main)
