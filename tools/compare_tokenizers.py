"""Compares tokenizers by bytes of text per token, language by language: a table, and Figure 3 of the report.

    python tools/compare_tokenizers.py --texts corpus code:qwen_jax --relative_to=small --chart=compression.png \\
        --tokenizers qwen=released small=small.tiktoken other=path/to/tokenizer.json

`--texts` takes LANGUAGE:PATTERN, or a folder with one folder a language. A tokenizer is NAME=FILE, where FILE is

    released            the released vocabulary
    X.tiktoken          ranks, with Qwen's split pattern; `X.tiktoken@cl100k` with that of cl100k_base
    X.json              a tokenizer.json of the `tokenizers` library
    X.model             a SentencePiece model, such as that of XLM-R, to which the report's figure is relative

Bytes are those of the text in UTF-8. More bytes per token are better: the same text takes fewer tokens.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import task_arguments  # noqa: F401  makes the repository importable

from qwen_jax import command_line, files
from qwen_jax.command_line import path_argument, quiet
from qwen_jax.files import as_pattern

# The languages of Figure 3, in its order; others come before them.
FIGURE_3 = (
    "th",
    "he",
    "ar",
    "ko",
    "vi",
    "zh",
    "ja",
    "tr",
    "id",
    "pl",
    "ru",
    "nl",
    "pt",
    "it",
    "de",
    "es",
    "fr",
    "en",
    "code",
)
_NAMED_TEXT = re.compile(r"([A-Za-z][\w-]*):(.+)")
_MOST_TOKENIZERS = 10  # colors that a reader can distinguish

CountTokens = Callable[[list[str]], int]


def load_tokenizer(file: str) -> CountTokens:
    """A function that counts the tokens of a list of texts.

    Args:
        file: see the head of this file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: its content does not fit its suffix.
    """
    path, _, pattern = file.partition("@")
    path = as_pattern(path, "--tokenizers")
    if pattern not in ("", "cl100k"):
        raise ValueError(f"{file}: no split pattern is called {pattern!r}; there is cl100k, or none for Qwen's")
    if file != "released" and not Path(path).is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: expected `released` or a file (.tiktoken, .json, .model)")
    if path.endswith(".json"):
        return _from_json(path)
    if path.endswith(".model"):
        return _from_sentencepiece(path)
    from qwen_jax.data.tokenizer import PATTERN, Tokenizer, read_ranks

    if not pattern:
        tokenizer = Tokenizer(None if file == "released" else path)
        return lambda texts: sum(map(len, tokenizer.encode_batch(texts)))
    import tiktoken

    up_to_three_digits = PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    encoding = tiktoken.Encoding(
        "cl100k", pat_str=up_to_three_digits, mergeable_ranks=read_ranks(path), special_tokens={}
    )
    return lambda texts: sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=2)))


def _from_json(path: str) -> CountTokens:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: sum(len(one) for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False))


def _from_sentencepiece(path: str) -> CountTokens:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=path)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    return lambda texts: sum(map(len, processor.encode(texts)))


def find_texts(named: list[str]) -> dict[str, str]:
    """Language to pattern, languages in the order of the figure.

    Raises:
        FileNotFoundError: a folder has no folders in it.
        ValueError: a language is named twice.
    """
    found: dict[str, str] = {}
    for text in named:
        text = as_pattern(text, "--texts")
        match = None if Path(text).is_dir() else _NAMED_TEXT.fullmatch(text)
        pairs = [match.groups()] if match else [(p.name, str(p)) for p in sorted(Path(text).glob("*")) if p.is_dir()]
        if not pairs:
            raise FileNotFoundError(
                f"--texts {text}: expected LANGUAGE:PATTERN or a folder with a folder for each language"
            )
        for language, pattern in pairs:
            if found.setdefault(language, pattern) != pattern:
                raise ValueError(f"--texts names {language} twice: {found[language]} and {pattern}")
    return dict(sorted(found.items(), key=lambda item: (_place(item[0]), item[0])))


def _place(language: str) -> int:
    """The place of a language in Figure 3; `pt_BR` is Portuguese."""
    base = language.partition("_")[0].partition("-")[0]
    return FIGURE_3.index(base) if base in FIGURE_3 else -1


def measure(
    texts: Mapping[str, str], tokenizers: Mapping[str, CountTokens], max_bytes: int
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Bytes per token.

    Args:
        texts: language to folder or glob.
        tokenizers: name to counting function.
        max_bytes: bytes of text of each language; documents come in the order of their files.

    Returns:
        ({language: bytes read}, {language: {tokenizer: bytes per token}}).

    Raises:
        FileNotFoundError, ValueError: see `qwen_jax.data.corpora.documents`.
    """
    with quiet():  # TensorFlow is imported with the sources
        from qwen_jax.data.corpora import documents

    sizes, ratios = {}, {}
    for language, pattern in texts.items():
        size, tokens = 0, dict.fromkeys(tokenizers, 0)
        for document in documents(pattern):
            text = document["text"].encode("utf-8", "replace").decode()
            size += len(text.encode())
            for name, count in tokenizers.items():
                tokens[name] += count([text])
            if size >= max_bytes:
                break
        sizes[language] = size
        ratios[language] = {name: size / tokens[name] for name in tokenizers}
    return sizes, ratios


def table(sizes: Mapping[str, int], ratios: Mapping[str, Mapping[str, float]], relative_to: str) -> str:
    """A Markdown table: bytes per token, and in brackets how many times that of `relative_to`."""
    names = list(next(iter(ratios.values())))
    lines = [f"| text | bytes | {' | '.join(names)} |", f"|---|--:|{'--:|' * len(names)}"]
    for language, row in ratios.items():
        cells = [f"{row[name]:.2f} ({row[name] / row[relative_to]:.2f})" for name in names]
        lines.append(f"| {language} | {sizes[language]:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(ratios: Mapping[str, Mapping[str, float]], relative_to: str, path: Path) -> None:
    """The bar chart of Figure 3: a group of bars a language, and a line at 1 for `relative_to`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    names = [name for name in next(iter(ratios.values())) if name != relative_to]
    figure, axes = plt.subplots(figsize=(max(7.0, 0.55 * len(ratios) + 2), 4.5), layout="constrained")
    places, width = np.arange(len(ratios)), 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        heights = [row[name] / row[relative_to] for row in ratios.values()]
        axes.bar(places + (number - (len(names) - 1) / 2) * width, heights, width, label=name, color=f"C{number}")
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label=f"{relative_to} = 1")
    axes.set_xticks(places, list(ratios))
    axes.set_ylabel(f"UTF-8 bytes per token, {relative_to} = 1\n(more is better)")
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    axes.margins(x=0.01)
    figure.legend(loc="outside upper center", ncols=min(8, len(names) + 1), frameon=False)
    try:
        with files.new_file(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
    finally:
        plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Prints the table, and with --chart draws the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", required=True, help="LANGUAGE:PATTERN, or a folder of language folders")
    parser.add_argument(
        "--tokenizers", nargs="+", required=True, metavar="NAME=FILE", help="tokenizers to compare, as above"
    )
    parser.add_argument("--relative_to", metavar="NAME", help="tokenizer whose ratio is 1 (default: the first)")
    parser.add_argument(
        "--max_bytes", type=int, default=2_000_000, help="bytes of text of each language (default: %(default)s)"
    )
    parser.add_argument("--chart", type=path_argument, help="PNG to write")
    arguments = parser.parse_args(argv)
    named = dict(one.partition("=")[::2] for one in arguments.tokenizers)
    if len(named) < len(arguments.tokenizers) or not all(named.values()) or len(named) > _MOST_TOKENIZERS:
        raise ValueError(
            f"--tokenizers {' '.join(arguments.tokenizers)}: expected up to {_MOST_TOKENIZERS} NAME=FILE, each with a "
            "name of its own"
        )
    relative_to = arguments.relative_to or next(iter(named))
    if relative_to not in named:
        raise ValueError(f"--relative_to {relative_to}: the tokenizers are {', '.join(named)}")
    if arguments.chart and not arguments.chart.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {arguments.chart.absolute().parent} to write {arguments.chart.name} in")
    tokenizers = {name: load_tokenizer(file) for name, file in named.items()}
    sizes, ratios = measure(find_texts(arguments.texts), tokenizers, arguments.max_bytes)
    print(table(sizes, ratios, relative_to), end="")
    if arguments.chart:
        draw(ratios, relative_to, arguments.chart)
        print(f"wrote {arguments.chart}")


if __name__ == "__main__":
    command_line.run(main)
