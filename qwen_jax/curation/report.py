"""`report.html`, to read before training on the result: one static file with inline pictures.

All text of documents is untrusted and stands in the page escaped; the page has no script and loads nothing.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from qwen_jax.curation.ledger import EXCERPT, Ledger
from qwen_jax.curation.stages import CurationConfig
from qwen_jax.curation.tally import UNREADABLE

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1080px; padding: 1.5rem; color: #1d2733;
  background: #fff }
h1 { font-size: 1.6rem; margin: .2rem 0 }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d7dde4; padding-bottom: .2rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #eceff2 }
td:first-child, th:first-child { text-align: left }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid #e3e8ed; border-radius: 6px; padding: .5rem }
figcaption { font-size: .85rem }
svg { width: 100%; height: auto; display: block }
details { margin: .4rem 0; border: 1px solid #e3e8ed; border-radius: 6px; padding: .3rem .7rem }
summary { cursor: pointer; font-weight: 600 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f8fa; border-radius: 6px; padding: .6rem;
  margin: .3rem 0 .8rem; font: 13px/1.45 ui-monospace, monospace; max-height: 16rem; overflow: auto }
.meta { color: #5b6875; font-size: .85rem; overflow-wrap: anywhere }
.note { color: #5b6875 }
"""
_KEPT, _DROPPED, _OUTSIDE, _LINE = "#3b7dd8", "#d9822b", "#e6b88a", "#b3261e"
_SHOWN_FILES = 100
_SOUND = {
    "read": "records of the input files",
    "extract": "text out of pages",
    "language": "wanted languages",
    "exact": "first of equal texts",
    "fuzzy": "one of near-duplicates",
    "rules": "within the rules",
    "scores": "within the scores",
    "contamination": "not in a benchmark",
    "sampling": "sampled",
}


def render(ledger: Ledger, config: CurationConfig, clusters: dict | None, description: Mapping[str, Mapping]) -> str:
    """The page.

    Args:
        ledger: of the whole run.
        config: of the run; gives the thresholds.
        clusters: `sizes` and `shown` of near-duplicates, or None where they were not looked for.
        description: `inputs`, number of files and bytes of each source, and `files_left_out`, paths with reasons.
    """
    read, kept = ledger.stages["read"]["in"], ledger.stages["sampling"]["kept"]
    share = f" ({kept[0] / read[0]:.1%})" if read[0] else ""
    listed = ", ".join(
        f"{_e(name)} ({_count(one['files'], 'file')}, {_bytes(one['bytes'])})"
        for name, one in description["inputs"].items()
    )
    body = [
        "<h1>Curation report</h1>",
        f"<p>{kept[0]:,} of {_count(read[0], 'record')} kept{share}: {_bytes(kept[1])} of text. Sources: {listed}.</p>",
        "<h2>Documents and bytes through the stages</h2>",
        _waterfall(ledger),
        _stage_table(ledger),
        "<h2>What was read of the input files, and what was left out</h2>",
        _files(ledger, description["files_left_out"]),
        "<h2>Why documents were dropped</h2>",
        _reasons(ledger),
        "<h2>Sources, languages, encodings</h2>",
        _counters(ledger),
        "<h2>Statistics and scores</h2>",
        _histograms(ledger, config),
        "<h2>Clusters of near-duplicates</h2>",
        _clusters(ledger, clusters),
        "<h2>Random samples</h2>",
        _samples(ledger),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Curation report</title>'
        '<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'unsafe-inline'\"><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _e(text: object) -> str:
    """Escaped, with control and direction characters shown: they could reorder the page around them."""
    return html.escape("".join(f"\\u{ord(one):04x}" if _hidden(one) else one for one in str(text)))


def _hidden(character: str) -> bool:
    point = ord(character)
    if point < 0x20:
        return character not in "\n\t"
    return 0x7F <= point < 0xA0 or 0x200B <= point <= 0x200F or 0x202A <= point <= 0x202E or 0x2066 <= point <= 0x2069


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1000
    raise AssertionError


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _short(number: float) -> str:
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def _waterfall(ledger: Ledger) -> str:
    """Two columns of bars, documents and bytes: kept in blue, dropped by the stage in orange."""
    height, top, label, bar = 26, 22, 170, 330
    parts = []
    for column, place in enumerate((0, 1)):
        x = label + column * (bar + 110)
        largest = max(max(s["in"][place] for s in ledger.stages.values()), 1)
        title = "documents" if place == 0 else "bytes (of text, from extraction on)"
        parts.append(f'<text x="{x}" y="14" font-weight="600">{title}</text>')
        for row, (stage, counts) in enumerate(ledger.stages.items()):
            y = top + row * height
            kept = counts["kept"][place]
            dropped = sum(pair[place] for pair in counts["dropped"].values())
            wide, gone = kept / largest * bar, dropped / largest * bar
            figure = f"{kept:,}" if place == 0 else _bytes(kept)
            tooltip = f"{stage}: kept {figure}, dropped {dropped:,}"
            if column == 0:
                parts.append(f'<text x="{label - 8}" y="{y + 15}" text-anchor="end">{_e(_SOUND[stage])}</text>')
            parts.append(
                f'<g><title>{_e(tooltip)}</title><rect x="{x}" y="{y}" width="{wide:.1f}" height="18" fill="{_KEPT}"/>'
                f'<rect x="{x + wide:.1f}" y="{y}" width="{gone:.1f}" height="18" fill="{_DROPPED}"/>'
                f'<text x="{x + wide + gone + 5:.1f}" y="{y + 14}">{figure}</text></g>'
            )
    total = top + height * len(ledger.stages)
    legend = (
        f'<rect x="{label}" y="{total + 4}" width="12" height="12" fill="{_KEPT}"/>'
        f'<text x="{label + 17}" y="{total + 14}">goes on</text>'
        f'<rect x="{label + 80}" y="{total + 4}" width="12" height="12" fill="{_DROPPED}"/>'
        f'<text x="{label + 97}" y="{total + 14}">dropped by this stage</text>'
    )
    return (
        f'<svg viewBox="0 0 1050 {total + 22}" font-size="12.5" role="img" aria-label="waterfall">'
        f"{''.join(parts)}{legend}</svg>"
    )


def _stage_table(ledger: Ledger) -> str:
    rows = []
    for stage, counts in ledger.stages.items():
        dropped = [sum(pair[place] for pair in counts["dropped"].values()) for place in (0, 1)]
        share = f"{dropped[0] / counts['in'][0]:.1%}" if counts["in"][0] else "–"
        rows.append(
            (
                stage,
                f"{counts['in'][0]:,}",
                f"{counts['kept'][0]:,}",
                f"{dropped[0]:,}",
                share,
                _bytes(counts["in"][1]),
                _bytes(counts["kept"][1]),
            )
        )
    head = ("stage", "documents read", "kept", "dropped", "share dropped", "bytes read", "bytes kept")
    return _table(head, rows) + '<p class="note">In every stage, kept + dropped = read was checked.</p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{_e(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{_e(cell)}</th>" for cell in head)
    return f"<table><tr>{titles}</tr><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def _reasons(ledger: Ledger) -> str:
    rows = [
        (f"{stage}: {reason}", f"{documents:,}", _bytes(size))
        for stage, counts in ledger.stages.items()
        for reason, (documents, size) in sorted(counts["dropped"].items(), key=lambda one: (-one[1][0], one[0]))
    ]
    return _table(("reason", "documents", "bytes"), rows) if rows else "<p>Nothing was dropped.</p>"


def _files(ledger: Ledger, left_out: Mapping[str, Sequence]) -> str:
    rows = [
        (source, outcome, f"{records:,}", _bytes(size), f"{size / counts['bytes']:.2%}" if counts["bytes"] else "–")
        for source, counts in ledger.inputs.items()
        for outcome, (records, size) in counts["outcomes"].items()
    ]
    text = _table(("source", "outcome", "records", "bytes of the files", "share"), rows)
    text += '<p class="note">For every file, read + left out = all of its bytes was checked.</p>'
    damaged = sorted(ledger.damaged, key=lambda file: (-file["unread"], file["source"], file["path"]))
    if damaged:
        text += f"<h3>{_count(len(damaged), 'file')} with a part that could not be read</h3>"
        rows = [
            (f"{one['source']}/{one['path']}", _bytes(one["bytes"]), _bytes(one["unread"]), _unread(one["outcomes"]))
            for one in damaged[:_SHOWN_FILES]
        ]
        text += _table(("file", "bytes", "not read", "why"), rows)
    others = [(f"{source}/{path}", reason) for source, files in left_out.items() for path, reason in files]
    if others:
        text += f"<h3>{_count(len(others), 'file')} left out whole</h3>"
        text += _table(("file", "why"), others[:_SHOWN_FILES])
    if max(len(damaged), len(others)) > _SHOWN_FILES:
        text += f'<p class="note">The first {_SHOWN_FILES} are shown; manifest.json names all.</p>'
    return text


def _unread(outcomes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{reason} ({records:,})" for reason, (records, _) in outcomes.items() if reason in UNREADABLE)


def _counters(ledger: Ledger) -> str:
    counters = ledger.counters
    sources = [
        (name, f"{kept:,}", f"{counters['written_documents'][name]:,}", _bytes(counters["written_bytes"][name]))
        for name, kept in counters.get("kept_source", {}).items()
    ]
    found = counters.get("language", {})
    languages = [
        (code, f"{number:,}", f"{counters.get('kept_language', {}).get(code, 0):,}")
        for code, number in sorted(found.items(), key=lambda one: (-one[1], one[0]))[:25]
    ]
    encodings = [(name, f"{number:,}") for name, number in sorted(counters.get("encoding", {}).items())]
    return (
        _table(("source", "documents kept", "written, with copies", "bytes written"), sources)
        + '<div class="grid"><div>'
        + _table(("language", "found", "kept"), languages)
        + "</div><div>"
        + _table(("encoding of pages and files", "documents"), encodings)
        + "</div></div>"
    )


def _histograms(ledger: Ledger, config: CurationConfig) -> str:
    values = [row for _, row in ledger.values]
    if not values:
        return "<p>No document came so far.</p>"
    figures = []
    for language in sorted({row["language"] for row in values}):
        mine = [row for row in values if row["language"] == language]
        rules = config.rules.get(language, config.default_rules)
        bounds = dict(rules.bounds()) if rules is not None else {}
        bounds |= {one.name: (one.minimum, one.maximum) for one in config.scores}
        names = list(dict.fromkeys(name for row in mine for name in row if name not in ("id", "language")))
        scores = [one.name for one in config.scores]
        names.sort(key=lambda name: name not in scores)
        figures.append(f"<h3>Language {_e(language)}, {_count(len(mine), 'document')}</h3><div class='grid'>")
        for name in names:
            numbers = [row[name] for row in mine if name in row]
            figures.append(_histogram(name, numbers, *bounds.get(name, (None, None))))
        figures.append("</div>")
    note = (
        '<p class="note">Of a random sample of the documents that came to the rules. A red line is a threshold; bars '
        "outside it are pale.</p>"
    )
    return note + "".join(figures)


def _histogram(name: str, numbers: Sequence[float], low: float | None, high: float | None) -> str:
    finite = sorted(number for number in numbers if math.isfinite(number))
    if not finite:
        return ""
    # What lies beyond the hundredth part at either end goes into the outermost bars, and thresholds stay in sight.
    shown = [finite[len(finite) // 100], finite[-1 - len(finite) // 100]]
    shown += [bound for bound in (low, high) if bound is not None and bound <= 4 * max(abs(shown[1]), 1e-9)]
    first, last = min(shown), max(shown)
    logarithmic = first > 0 and last / first > 50
    scale = math.log if logarithmic else float
    begin, end = scale(first), scale(last)
    end = end if end > begin else begin + 1
    bins = 40
    counts = [0] * bins
    outside = 0
    for number in finite:
        place = (scale(max(number, first)) - begin) / (end - begin)
        counts[min(max(int(place * bins), 0), bins - 1)] += 1
        outside += (low is not None and number < low) or (high is not None and number > high)
    tallest, width, height = max(counts), 300, 90
    parts = []
    for index, count in enumerate(counts):
        middle = begin + (index + 0.5) / bins * (end - begin)
        number = math.exp(middle) if logarithmic else middle
        pale = (low is not None and number < low) or (high is not None and number > high)
        tall = count / tallest * height
        parts.append(
            f'<rect x="{index * width / bins:.1f}" y="{height - tall:.1f}" width="{width / bins - 0.6:.1f}" '
            f'height="{tall:.1f}" fill="{_OUTSIDE if pale else _KEPT}"/>'
        )
    for bound in (low, high):
        if bound is not None and first <= bound <= last:
            x = (scale(bound) - begin) / (end - begin) * width
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="{_LINE}" stroke-width="1.5"/>')
    ends = "".join(
        f'<text x="{x}" y="{height + 12}" text-anchor="{anchor}">{_short(number)}</text>'
        for x, anchor, number in ((0, "start", first), (width, "end", last))
    )
    allowed = " to ".join("…" if bound is None else _short(bound) for bound in (low, high))
    text = "no threshold" if low is None and high is None else f"allowed {allowed}, {outside / len(finite):.1%} outside"
    return (
        f"<figure><figcaption><b>{_e(name)}</b> <span class='note'>{_e(text)}{', logarithmic' if logarithmic else ''}"
        f'</span></figcaption><svg viewBox="0 0 {width} {height + 16}" font-size="10" role="img" '
        f'aria-label="histogram of {_e(name)}">{"".join(parts)}{ends}</svg></figure>'
    )


def _clusters(ledger: Ledger, clusters: dict | None) -> str:
    if clusters is None:
        return "<p>Near-duplicates were not looked for.</p>"
    if not clusters["sizes"]:
        return "<p>There are none.</p>"
    sizes = sorted((int(size), number) for size, number in clusters["sizes"].items())
    documents = sum(size * number for size, number in sizes)
    total = sum(number for _, number in sizes)
    rows = [(f"{size:,}", f"{number:,}") for size, number in sizes]
    if len(rows) > 14:
        rows = [*rows[:10], ("…", "…"), *rows[-3:]]
    text = [
        f"<p>{_count(total, 'cluster')} of {documents:,} documents; one of each is kept: of the source named first, "
        "the longest, the first in order. The largest, and some at random:</p>",
        _table(("documents in a cluster", "clusters"), rows),
    ]
    shown = sorted(clusters["shown"].items(), key=lambda one: (-one[1]["size"], int(one[0])))
    for representative, cluster in shown:
        rows = [row for _, row in ledger.samples.get(f"cluster: {representative}", [])]
        size = _count(cluster["size"], "document")
        text.append(f"<details><summary>{size}, of which {len(rows)} are shown</summary>")
        text += [_document(row) for row in sorted(rows, key=lambda row: row["id"])]
        text.append("</details>")
    return "\n".join(text)


def _samples(ledger: Ledger) -> str:
    text = [f'<p class="note">The first {EXCERPT:,} characters of each.</p>']
    labels = sorted(ledger.samples, key=lambda label: (label != "kept", label))
    for label in labels:
        if label.startswith("cluster: "):
            continue
        rows = [row for _, row in ledger.samples[label]]
        text.append(f"<details{' open' if label == 'kept' else ''}><summary>{_e(label)}</summary>")
        text += [_document(row) for row in rows]
        text.append("</details>")
    return "\n".join(text)


def _document(row: Mapping) -> str:
    hidden = ("text", "stage", "reason", "source", "url", "statistics", "scores")
    facts = [f"{name} {value}" for name, value in row.items() if name not in hidden]
    facts += [f"{name} {value}" for one in ("scores", "statistics") for name, value in row.get(one, {}).items()]
    meta = " · ".join([str(row.get("url", "")), *facts])
    return f'<div class="meta">{_e(meta)}</div><pre dir="auto">{_e(row.get("text", "(no text)"))}</pre>'
