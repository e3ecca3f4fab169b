"""Bytes of a page to its text: character encoding, then the main content without navigation, scripts and forms.

The work is done by Resiliparse (Bevendorff et al., ECIR 2018), compiled code that was made for web archives.
"""

import codecs
import re

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from qwen_jax.curation import charsets

# The time of extraction is quadratic in the depth of the tree: seconds at 20,000. Real pages stay below 100.
_MAX_DEPTH = 2000
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
# Elements without content, and those that the next of their kind closes: they do not nest.
_FLAT = frozenset(
    "area base br col embed hr img input link meta param source track wbr p li dt dd tr td th thead tbody tfoot option "
    "optgroup colgroup rp rt".split()
)
# The extractor drops a text node of three bytes if it is one character, as many Chinese ones between two links are, or
# an ASCII one and another ("où"). With a noncharacter behind them, which no text may hold, they stay.
_KEEP = "\ufdd0"
_ENTITY = r"&(?!nbsp;|#160;|#xa0;)#?\w{2,8};"
_SHORT = re.compile(
    rf"(>[ \t\n\r\f]*+(?:[\u0800-\uffff]|{_ENTITY}|(?:[^<>&\s]|{_ENTITY})(?:[\u0080-\u07ff]|&#?\w{{2,8}};)))"
    r"(?=[ \t\n\r\f]*<)"
)
# Classes of articles that say whether there are comments, which the extractor takes for comments.
_CLASS = re.compile(r"""\bclass\s*=\s*(?:"[^"<>]*"|'[^'<>]*')""", re.IGNORECASE)
_COMMENT_FLAG = re.compile(
    r"(?<![\w-])(?:[\w-]*-)?(?:(?:no|has|with|without|hide|show|allow|enable|disable)[-_]?comments?|comments?[-_]?"
    r"(?:open|opened|closed|enabled|disabled|allowed|on|off|none|hidden))(?![\w-])",
    re.IGNORECASE,
)
# Side matter and dialogs that hold an article.
_WRAPPED_ARTICLE = re.compile(
    r"<(?:aside|div\b(?=[^<>]*\bmodal\b))\b[^<>]*>(?=(?:\s*<div\b[^<>]*>){0,2}\s*<(?:article|main)\b)", re.IGNORECASE
)
# Elements that stand around a text: bylines, links to share it, menus, boxes of other pages. Those that say so by a
# class or id are left out, if they hold little of the page.
_SIDE = re.compile(
    r"""<((?:div|p|span|ul|ol|dl|section|aside|footer|header|nav|table|td|form|small|h\d|a|time)\b)"""
    r"""(?=[^<>]*\s(?:class|id)\s*=\s*(?:["'][^"'<>]*|[^\s"'<>]*)(?<![a-z])"""
    r"""(?:byline|dateline|kicker|(?:entry|post|article|page)[-_]?"""
    r"""(?:meta|info|date|header-meta|utility|footer|tags|time|author|stats|share)(?![a-z])|posted-on|date-header|"""
    r"""publish[-_]?(?:date|time)|breadcrumbs?|crumbs?|shar(?:e|ing|edaddy|er)(?![a-z])|social|skip(?:links?|-link|-to)?(?![a-z])|"""
    r"""related|recommend\w*|recirc|newsletter|subscri\w*|advert\w*|ad[-_](?:slot|label|inline|wireframe|banner)|taboola|outbrain|"""
    r"""pagination|pager|prev-?next|cookie|noprint|signature|navbox|reflist|references?[-_]list|hatnote|editsection|"""
    r"""postprofile|user-info|votecell|copyright|tag-?list|taglist|author-(?:bio|box|info)|comment-?respond|respond|"""
    r"""leave-comment|show_author|author_mail|most-?read|popular|trending|ranking|page-?tools|jump-?(?:link|box)|"""
    r"""rating|tagline|thead|permalinks?)(?![a-z]))""",
    re.IGNORECASE,
)
_SIDE_SHARE = 0.3
_SIDE_MARK = "data-qwen-jax-side"
_TITLE_IN_HEADER = re.compile(
    r"""<(?:div|header|section)\b(?=[^<>]*\b(?:id|class)\s*=\s*["'][^"'<>]*header)[^<>]*>"""
    r"""(?=(?:\s*<(?:div|span)\b[^<>]*>){0,2}\s*<h1\b[^<>]*>(?!\s*<a\b[^<>]*href=["']/["']))""",
    re.IGNORECASE,
)
_BUTTON_IN_HEADING = re.compile(r"(<h[1-6]\b[^<>]*>\s*)<button\b[^<>]*>((?:(?!</?button).)*)</button>", re.I | re.S)
_FIGURE = re.compile(r"<(/?)fig(ure|caption)\b", re.IGNORECASE)
_INVISIBLE = re.compile(r"visibility\s*:\s*hidden", re.IGNORECASE)
# Where no line is so long without comments, and one is with them, they are the main text: the answers of a forum.
_PROSE = 60
_LIST = re.compile(r"<(/?)ul\b[^<>]*>", re.IGNORECASE)
_ASIDE = re.compile(r"<(/?)aside\b", re.IGNORECASE)
_NAMES = re.compile(
    r"""\s(?:class|id|role|hidden|aria-hidden)\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+)""", re.IGNORECASE
)
# A page whose markup is this many times its text is extracted again, if the text is less than a share of the visible
# text.
_MARKUP, _SHARE = 8, 0.25
# More characters than this share that stand for nothing readable: not text.
_MAX_UNREADABLE = 0.05
# Of the bytes that are not ASCII, in UTF-8 that is believed; for other encodings four times as many.
_MAX_ERRORS = 0.05
_ASCII = bytes(range(128))
_UNREADABLE = re.compile("[\ufffd\x00-\x08\x0b\x0e-\x1f]")


class Unreadable(ValueError):
    """A page or text that cannot be turned into text; the message is the reason, one word of the report."""


def decode(data: bytes, charset: str | None = None, *, is_html: bool = False) -> tuple[str, str]:
    """Text of `data`, and the name of the encoding it was in.

    Valid UTF-8 is believed first, since text in another encoding is never valid by accident; then the server's
    header, the page's own declaration, and a guess from its bytes. Encodings are read as browsers read them
    (`qwen_jax.curation.charsets`). Bytes that fit none become U+FFFD.

    Args:
        data: bytes of a page or file.
        charset: of the HTTP header.
        is_html: whether to look for `<meta charset>`.

    Raises:
        Unreadable: `undecodable`, more than one character in twenty is no text: binary data.
    """
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if data.startswith(mark):
            return _checked(data[len(mark) :].decode(encoding, "replace")), encoding
    said = charsets.codec_of(charset)
    finders = [
        lambda: "iso2022_jp" if charsets.is_iso2022_jp(data) else None,
        lambda: said if charsets.is_stateful(said, data) else None,
        lambda: "utf-8",
        lambda: said,
        lambda: charsets.declared_in_page(data) if is_html else None,
        lambda: charsets.detect(data),
    ]
    first = None
    for find in finders:
        encoding = find()
        if encoding is None:
            continue
        text = charsets.to_text(data, encoding)
        # A page in another encoding has errors in most of its characters; one with a few is damaged. UTF-8 is declared
        # by templates whose pages are in something else, other encodings seldom.
        share = _MAX_ERRORS if encoding == "utf-8" else 4 * _MAX_ERRORS
        errors = text.count("\ufffd")
        if not errors or errors <= share * len(data.translate(None, _ASCII)):
            return _checked(text), encoding
        if first is None or first[1] == "utf-8":
            first = text, encoding
    assert first is not None  # UTF-8 is always tried
    text, encoding = first
    return _checked(text), encoding


def _checked(text: str) -> str:
    if len(_UNREADABLE.findall(text[:100_000])) > _MAX_UNREADABLE * min(len(text), 100_000):
        raise Unreadable("undecodable")
    return text


def extract(page: str) -> str:
    """Main text of an HTML page; paragraphs and headings are lines. Empty where there is none.

    The extractor goes by the names of elements and classes. Names that do not mean what it takes them for are changed
    first; where it still finds little of the visible text, it extracts the page again without any names.

    Raises:
        Unreadable: `nested_too_deeply`, a tree made to exhaust whoever walks it; `extraction_failed`.
    """
    if page.count("<") > _MAX_DEPTH and _depth(page) > _MAX_DEPTH:
        raise Unreadable("nested_too_deeply")
    page = _SHORT.sub(rf"\1{_KEEP}", _renamed(printable(page)))
    text = _plain_text(_without_sides(page))
    if "omment" in page and not _has_prose(text):
        with_comments = _plain_text(_without_sides(page), comments=True)
        if _has_prose(with_comments):
            text = with_comments
    if len(text) * _MARKUP < len(page) and len(text) < _SHARE * len(_plain_text(page, main_content=False)):
        again = _plain_text(_NAMES.sub(" ", _ASIDE.sub(r"<\1div", page)))
        if len(again) > 2 * len(text):
            return again
    return text


def _plain_text(page: str | HTMLTree, main_content: bool = True, comments: bool = False) -> str:
    try:
        text = extract_plain_text(page, main_content=main_content, alt_texts=False, comments=comments)
    except Exception as error:  # compiled code on arbitrary pages; one page must not end the run
        raise Unreadable("extraction_failed") from error
    return text.replace(_KEEP, "").strip()


def _has_prose(text: str) -> bool:
    return any(len(line) > _PROSE for line in text.split("\n"))


def _without_sides(page: str) -> str | HTMLTree:
    """The page without the small elements whose names say that they stand around its text."""
    marked, found = _SIDE.subn(rf"<\1 {_SIDE_MARK}", page)
    if not found:
        return page
    tree = HTMLTree.parse(marked)
    if tree.body is None:
        return page
    limit = _SIDE_SHARE * len(tree.body.text or "")
    for node in list(tree.body.query_selector_all(f"[{_SIDE_MARK}]")):
        small = len(node.text or "") < limit
        if small and node.parent is not None and node.query_selector("h1, article, main, pre") is None:
            node.parent.remove_child(node)
    return tree


def _renamed(page: str) -> str:
    """The page without the names that make the extractor drop articles and lists."""
    if "omment" in page:
        page = _CLASS.sub(lambda found: _COMMENT_FLAG.sub("", found[0]), page)
    if "isibility" in page:
        page = _INVISIBLE.sub("", page)
    if "<fig" in page:
        page = _FIGURE.sub(lambda found: f"<{found[1]}{'div' if found[2] == 'ure' else 'p'}", page)
    if "<button" in page:
        page = _BUTTON_IN_HEADING.sub(r"\1\2", page)
    if "eader" in page:
        page = _TITLE_IN_HEADER.sub("<div>", page)
    if "<aside" in page or "odal" in page:
        page = _WRAPPED_ARTICLE.sub("<div>", page)
    # It drops lists at less than three levels below the body. Deeper, it drops lists of links alone.
    return _LIST.sub(lambda found: f"{found[0]}{'</div>' * 3}" if found[1] else f"{'<div>' * 3}{found[0]}", page)


def _depth(page: str) -> int:
    """Upper bound on the depth of the tree, from tags alone."""
    depth = deepest = 0
    for closing, name in _TAG.findall(page):
        if name.lower() in _FLAT:
            continue
        depth = max(0, depth - 1) if closing else depth + 1
        deepest = max(deepest, depth)
    return deepest


def printable(text: str) -> str:
    """The text as every encoder takes it: lone surrogates become U+FFFD; no NUL; line ends are `\\n`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
