"""Turns manual pages into plain text, one folder a language: text in twenty languages that any Debian mirror has.

    apt-get download manpages manpages-dev manpages-de manpages-fr manpages-ja manpages-zh
    for package in *.deb; do dpkg-deb -x $package pages; done
    python tools/manual_pages.py pages corpus

`corpus/de/ls.1.txt` is then the German page of `ls`, without roff markup. Pages without a language are English. With
`--sections 1` only commands are taken, with `--sections 2 3 4 5 6 7 8` only the rest: text to learn from, and other
text to test on.
"""

import argparse
import gzip
import re
import zlib
from collections import Counter

import task_arguments  # noqa: F401  makes the repository importable

from qwen_jax import command_line

_KEPT_MACROS = {"SH", "SS", "B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM", "SB", "IP", "Nd", "Sh", "Ss"}
_NAMED = {"aq": "'", "dq": '"', "oq": "‘", "cq": "’", "lq": "“", "rq": "”", "en": "–", "em": "—", "co": "©", "bu": "•"}
_ESCAPE = re.compile(
    r"\\(?:f(?:\(..|\[[^\]]*\]|.)"  # fonts
    r"|\*(?:\(..|\[[^\]]*\]|.)"  # strings
    r"|s[-+]?\d"  # sizes
    r"|\((?P<two>..)|\[(?P<name>[^\]]*)\]"  # named characters
    r"|[hvwlLDoXZ]'[^']*'"  # drawing and motion
    r"|(?P<char>.))"
)


def plain_text(page: str) -> str:
    """Text of one page in roff's `man` or `mdoc` macros; headings and emphasized words stay, markup goes."""
    lines = []
    for line in page.splitlines():
        if line.startswith((".", "'")):
            name, _, rest = line[1:].strip().partition(" ")
            if name not in _KEPT_MACROS:
                continue
            # Macros such as .BR set their arguments side by side, without the quotes.
            words = re.findall(r'"([^"]*)"|(\S+)', rest)
            between = "" if len(name) == 2 and name.isupper() and name not in ("SH", "SS", "IP") else " "
            line = between.join(quoted or plain for quoted, plain in words)
        lines.append(_ESCAPE.sub(_character, line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _character(match: re.Match) -> str:
    if match["two"] or match["name"]:
        return _NAMED.get(match["two"] or match["name"], "")
    return {"-": "-", "e": "\\", "\\": "\\", "'": "'", " ": " ", "~": " ", "0": " "}.get(match["char"] or "", "")


def main(argv: list[str] | None = None) -> None:
    """Converts all pages below a folder, and prints the number of pages of each language."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pages", type=command_line.path_argument, help="folder with unpacked packages: …/man/LANGUAGE/man1/ls.1.gz"
    )
    parser.add_argument("output", type=command_line.path_argument, help="folder to write into")
    parser.add_argument("--sections", nargs="+", metavar="N", help="sections of the manual (default: all)")
    arguments = parser.parse_args(argv)
    written: Counter[str] = Counter()
    unreadable = 0
    for path in sorted(arguments.pages.rglob("man/**/*.gz")):
        if path.is_symlink():
            continue  # another name of the same page
        if arguments.sections and path.parent.name.removeprefix("man")[:1] not in arguments.sections:
            continue
        parts = path.parts[len(path.parts) - path.parts[::-1].index("man") : -1]
        language = "en" if len(parts) == 1 else parts[0].partition(".")[0]
        try:
            text = plain_text(gzip.decompress(path.read_bytes()).decode("utf-8"))
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error):
            unreadable += 1
            continue
        folder = arguments.output / language
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{path.name.removesuffix('.gz')}.txt").write_text(text, encoding="utf-8")
        written[language] += 1
    if not written:
        raise FileNotFoundError(f"no such manual pages below {arguments.pages}: expected …/man/LANGUAGE/man1/NAME.1.gz")
    print(", ".join(f"{language} {count}" for language, count in sorted(written.items())))
    if unreadable:
        print(f"left out: {unreadable} pages that are not UTF-8, not gzip or damaged")


if __name__ == "__main__":
    command_line.run(main)
