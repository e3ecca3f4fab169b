"""Pages for benchmarks/extraction.py. All text is written for this project; the pages lie in benchmarks/extraction/.

`composed_pages` puts main text of nine kinds (contents.json) into layouts of our own (layouts/). A content is a list of
blocks; its HTML and the text that an extractor should give both come from the blocks, so the expected text is exact.
`*word*` is a link, `_word_` emphasis.

`marked_pages` have the markup of blogs, forums, documentation and shops as the common generators and sites write it
(pages/). In each, a person has put the main text between `<!--[-->` and `<!--]-->`.
"""

import dataclasses
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent / "extraction"
Block = tuple[str, object]
_MARKED = re.compile(r"<!--\[-->(.*?)<!--\]-->", re.DOTALL)
_BLOCK = re.compile(
    r"</?(?:address|article|aside|blockquote|br|caption|center|dd|details|div|dl|dt|figcaption|figure|footer|form|h\d|"
    r"header|hr|li|main|ol|p|pre|section|summary|table|tbody|td|th|thead|tr|ul)\b[^>]*>",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        name: kind, content and layout.
        kind: such as `articles`.
        source: HTML.
        text: what a reader came for, without menus, comments of others, related links and legal lines.
    """

    name: str
    kind: str
    source: str
    text: str


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"\*([^*\n]+)\*", r'<a href="/page">\1</a>', text)
    return re.sub(r"(?<!\w)_([^_\n]+)_(?!\w)", r"<em>\1</em>", text)


def _plain(text: str) -> str:
    return re.sub(r"(?<!\w)_([^_\n]+)_(?!\w)", r"\1", re.sub(r"\*([^*\n]+)\*", r"\1", text))


def _cells(rows: list[list[str]], convert) -> list[list[str]]:
    return [[convert(cell) for cell in row] for row in rows]


def to_html(blocks: list[Block]) -> str:
    """The blocks as HTML."""
    parts = []
    for tag, content in blocks:
        if tag in ("ul", "ol"):
            parts.append(f"<{tag}>" + "".join(f"<li>{_inline(item)}</li>" for item in content) + f"</{tag}>")
        elif tag == "dl":
            parts.append("<dl>" + "".join(f"<dt>{_inline(a)}</dt><dd>{_inline(b)}</dd>" for a, b in content) + "</dl>")
        elif tag == "table":
            head, *rows = _cells(content, _inline)
            cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
            parts.append(f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{cells}</table>")
        elif tag == "pre":
            parts.append(f"<pre><code>{html.escape(content, quote=False)}</code></pre>")
        elif tag == "post":
            parts.append(f'<div class="post"><div class="body"><p>{_inline(content)}</p></div></div>')
        else:
            parts.append(f"<{tag}>{_inline(content)}</{tag}>")
    return "\n".join(parts)


def to_text(blocks: list[Block]) -> str:
    """The blocks as the text that is expected."""
    parts = []
    for tag, content in blocks:
        if tag in ("ul", "ol"):
            parts.append("\n".join(map(_plain, content)))
        elif tag == "dl":
            parts.append("\n".join(f"{_plain(a)}\n{_plain(b)}" for a, b in content))
        elif tag == "table":
            parts.append("\n".join(" ".join(row) for row in _cells(content, _plain)))
        else:
            parts.append(content if tag == "pre" else _plain(content))
    return "\n\n".join(parts)


def composed_pages() -> Iterator[Page]:
    """Each content in three layouts."""
    layouts = sorted((_FOLDER / "layouts").glob("*.html"))
    for number, content in enumerate(json.loads((_FOLDER / "contents.json").read_text(encoding="utf-8"))):
        for step in range(3):
            layout = layouts[(number + 4 * step) % len(layouts)]
            source = layout.read_text(encoding="utf-8").replace("CONTENT", to_html(content["blocks"]))
            name = f"{content['kind']}/{content['title']}/{layout.stem}"
            yield Page(name, content["kind"], source, to_text(content["blocks"]))


def _visible(source: str) -> str:
    """The text of HTML without its markup; blocks are lines."""
    source = re.sub(r"<(script|style)\b.*?</\1>", "", source, flags=re.DOTALL | re.IGNORECASE)
    text = html.unescape(re.sub(r"<[^>]+>", "", _BLOCK.sub("\n", source)))
    return "\n".join(line for line in (part.strip() for part in text.split("\n")) if line)


def marked_pages() -> Iterator[Page]:
    """Pages whose main text is marked, without the marks."""
    for file in sorted((_FOLDER / "pages").glob("*/*.html")):
        marked = file.read_text(encoding="utf-8")
        text = "\n".join(_visible(part) for part in _MARKED.findall(marked))
        yield Page(
            f"{file.parent.name}/{file.stem}",
            file.parent.name,
            marked.replace("<!--[-->", "").replace("<!--]-->", ""),
            text,
        )
