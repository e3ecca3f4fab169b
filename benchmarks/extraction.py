"""Main text of web pages: token F1 of curation's extractor and of a peer, trafilatura, on the same pages.

    python -m venv peer && peer/bin/pip install trafilatura==2.3.1 lxml_html_clean
    python benchmarks/extraction.py --peer_python=peer/bin/python

The pages are those of benchmarks/extraction_pages.py: nine kinds of content in twelve layouts of our own, and pages in
the markup of common generators and sites with their main text marked by hand. Tokens are words, and single characters
in Chinese and Japanese; F1 is of the bags of tokens of a page, averaged over pages. trafilatura runs with three
settings. All pages were made while this extractor was mended, so expect less of it on pages of others.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_PEER = """
import json, sys, trafilatura
pages = json.load(sys.stdin)
settings = {"default": {}, "favor_recall": {"favor_recall": True}, "favor_precision": {"favor_precision": True}}
json.dump({name: [trafilatura.extract(page, include_comments=name == "favor_recall", **one) or "" for page in pages]
           for name, one in settings.items()}, sys.stdout)
"""


def f1(found: str, expected: str) -> float:
    """F1 of the tokens of two texts, as bags."""
    one, other = collections.Counter(_TOKEN.findall(found)), collections.Counter(_TOKEN.findall(expected))
    shared = sum((one & other).values())
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def scores(texts: list[str], pages: list) -> dict[str, float]:
    """Mean F1 by kind of page, and of all."""
    by_kind = collections.defaultdict(list)
    for text, page in zip(texts, pages, strict=True):
        score = f1(text, page.text)
        by_kind[page.kind].append(score)
        by_kind["all"].append(score)
    return {kind: sum(values) / len(values) for kind, values in by_kind.items()}


def report(title: str, every: list, peer_python: str | None, worst: int) -> None:
    """Prints the table of one set of pages, and the worst of them."""
    from qwen_jax.curation import html

    found = {"qwen_jax": [html.extract(page.source) for page in every]}
    if peer_python:
        sources = json.dumps([page.source for page in every])
        done = subprocess.run([peer_python, "-c", _PEER], input=sources, capture_output=True, text=True, check=True)
        found |= {f"trafilatura, {name}": texts for name, texts in json.loads(done.stdout).items()}
    table = {name: scores(texts, every) for name, texts in found.items()}
    print(f"\n{len(every)} {title}".ljust(17) + "".join(name.rjust(30) for name in table))
    for kind in table["qwen_jax"]:
        print(kind.ljust(16) + "".join(f"{one[kind]:30.4f}" for one in table.values()))
    best = max((one["all"] for name, one in table.items() if name != "qwen_jax"), default=None)
    if best is not None:
        print(f"ratio to the best of the peer: {table['qwen_jax']['all'] / best:.3f}")
    ranked = sorted(zip(every, found["qwen_jax"], strict=True), key=lambda pair: f1(pair[1], pair[0].text))
    for page, text in ranked[:worst]:
        print(f"\n{page.name}: {f1(text, page.text):.3f}\n{text[:400]}")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", metavar="PYTHON", help="interpreter of an environment with trafilatura")
    parser.add_argument("--worst", type=int, default=0, help="show so many of the worst pages")
    arguments = parser.parse_args()
    from benchmarks.extraction_pages import composed_pages, marked_pages

    for title, every in (("composed", list(composed_pages())), ("marked", list(marked_pages()))):
        report(title, every, arguments.peer_python, arguments.worst)


if __name__ == "__main__":
    main()
