"""Lays out data of two kinds, code and text, from the Python distributions that are installed beside this project.

    python tools/make_specialist_data.py --output runs/specialists/data

Every distribution is of one kind only, so nothing that is measured was trained on:

    text/NAME.jsonl       documentation (description and docstrings, without examples of code) of the large libraries
    repositories/NAME/    sources of other distributions with their licenses, as tools/make_code_corpus.py reads them
    held_out/text.jsonl   documentation of the distributions that are held out, with `language` and `domain`
    held_out/code.jsonl   their sources, likewise

The versions are those of requirements.txt, so that another machine lays out the same.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import itertools
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qwen_jax import command_line, files

TEXT = ("scipy", "scikit-learn", "pandas", "numpy", "matplotlib", "keras", "networkx")
CODE = (
    *("absl-py", "anyio", "beartype", "cryptography", "datasketch", "dnspython", "etils", "flax", "fonttools"),
    *("fsspec", "gin-config", "huggingface_hub", "hypothesis", "joblib", "mpmath", "narwhals", "nltk"),
    *("orbax-checkpoint", "pillow", "pyglove", "Pygments", "pymongo", "pytest", "setuptools", "sympy"),
    *("tensorflow-datasets", "apache-beam"),
)
HELD_OUT = ("attrs", "click", "grain", "Jinja2", "optax", "packaging", "requests", "rich", "tqdm", "urllib3")
# Tests repeat themselves; tables, generated and vendored code are no example of how people write.
_LEFT_OUT = {"test", "tests", "testing", "_vendor", "vendor", "_vendored", "unicode", "locale", "lexers"}
_LICENSE = re.compile(r"(?i)^(licen[cs]e|copying|notice)")
_SHORTEST = 200
MADE = "made.json"
# A line of an interactive session, with the lines of output up to the next empty one.
_SESSION = re.compile(r"^[ \t]*>>>.*(?:\n(?![ \t]*$).*)*", re.MULTILINE)


def distribution(name: str) -> importlib.metadata.Distribution:
    """The installed distribution.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} is not installed: install the lock, as `make` does (pip install --no-deps -r requirements.txt)"
        ) from error


def sources(found: importlib.metadata.Distribution, limit: int) -> Iterator[tuple[str, str]]:
    """(path, text) of Python files of a distribution, up to `limit` characters in all, in an order of no meaning."""
    paths = [path for path in found.files or () if path.suffix == ".py" and not _LEFT_OUT & set(path.parts)]
    size = 0
    for path in sorted(paths, key=lambda one: hashlib.sha256(str(one).encode()).digest()):
        file = Path(str(path.locate()))
        if file.stat().st_size > 4 * (limit - size):  # a character has at most 4 bytes
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if size + len(text) <= limit:
            size += len(text)
            yield str(path), text


def documentation(found: importlib.metadata.Distribution, limit: int) -> Iterator[tuple[str, str]]:
    """(path, text) of the description and of docstrings of at least `_SHORTEST` characters, each text once."""
    seen, size = set(), 0
    docstrings = ((path, one) for path, code in sources(found, sys.maxsize) for one in _said(code))
    for path, text in itertools.chain([("METADATA", found.metadata.get_payload() or "")], docstrings):
        text = re.sub(r"\n{3,}", "\n\n", _SESSION.sub("", text)).strip() + "\n"
        if len(text) < _SHORTEST or text in seen:
            continue
        seen.add(text)
        size += len(text)
        if size > limit:
            return
        yield path, text


def _said(code: str) -> Iterator[str]:
    """Docstrings of the modules, classes and functions of a source."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that no string has
            tree = ast.parse(code)
    except SyntaxError:  # a template of a source
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def lay_out_repository(found: importlib.metadata.Distribution, folder: Path, limit: int) -> None:
    """Copies sources and licenses of a distribution."""
    for path in found.files or ():
        if _LICENSE.match(path.name) and ".dist-info" in str(path):
            files.write_text(folder / path.name, Path(str(path.locate())).read_text(errors="replace"))
    for path, text in sources(found, limit):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / path, text)


def write_rows(path: Path, rows: list[dict]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make(folder: Path, text_size: int, code_size: int, held_out_size: int) -> None:
    """Writes everything into `folder`; each limit is the most of one distribution."""
    for name in TEXT:
        texts = documentation(distribution(name), text_size)
        write_rows(folder / "text" / f"{name}.jsonl", [{"text": text, "source": path} for path, text in texts])
    for name in CODE:
        lay_out_repository(distribution(name), folder / "repositories" / name, code_size)
    for domain, read in (("text", documentation), ("code", sources)):
        language = {"text": "en", "code": "python"}[domain]
        rows = [
            {"text": text, "language": language, "domain": domain, "source": path}
            for name in HELD_OUT
            for path, text in read(distribution(name), held_out_size)
        ]
        write_rows(folder / "held_out" / f"{domain}.jsonl", rows)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=command_line.path_argument, required=True, help="a new folder")
    sizes = {"text": 2_500_000, "code": 600_000, "held_out": 40_000}
    for kind, size in sizes.items():
        parser.add_argument(
            f"--{kind}_size",
            type=int,
            default=size,
            help="characters of one distribution at most (default: %(default)s)",
        )
    arguments = parser.parse_args(argv)
    output, limits = arguments.output, (arguments.text_size, arguments.code_size, arguments.held_out_size)
    made = {
        "limits": list(limits),
        "versions": {name: distribution(name).version for name in (*TEXT, *CODE, *HELD_OUT)},
    }
    if not output.exists():
        with files.new_folder(output) as folder:
            make(folder, *limits)
            files.write_json(folder / MADE, made)
    elif not (output / MADE).exists() or files.read_json(output / MADE) != made:
        raise FileExistsError(f"{output}: holds something else than these data: remove it, or name another folder")
    for part in ("text", "repositories", "held_out"):
        found = [path for path in (output / part).rglob("*") if path.is_file()]
        print(f"{output / part}: {len(found):,} files, {sum(one.stat().st_size for one in found):,} bytes")


if __name__ == "__main__":
    command_line.run(main)
