"""Results as JSON, as Markdown, and as an HTML page that loads nothing; prompts and answers in it are never markup."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen_jax import files
from qwen_jax.command_line import escape
from qwen_jax.evaluation.benchmark import Benchmark
from qwen_jax.evaluation.report_tables import Entry, Table, counts_table, report_tables, subjects_table

# Characters at the end of a prompt that Markdown shows; the HTML page has the whole of it.
_PROMPT_END = 600
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8886; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
tr.ours td { font-weight: 600; background: #4c9f7022; }
details { margin: .5rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
details details { margin-left: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; margin: .25rem 0 1rem;
  padding: .5rem; background: #8881; border-radius: .25rem; font-size: .875rem; }
.note { color: #666; }
@media (prefers-color-scheme: dark) { .note { color: #aaa; } }
"""


def write_results(
    folder: Path,
    model: str,
    settings: Mapping[str, Any],
    entries: Mapping[str, Entry],
    registry: Mapping[str, Benchmark],
) -> None:
    """Writes `results.json`, `results.md` and `results.html`, each whole or not at all.

    Args:
        model: name of the model in the tables.
        settings: shown above the tables.
        entries: results by name of the benchmark.
        registry: all benchmarks by name.

    Raises:
        OSError: the folder cannot be written.
    """
    content = {
        "model": model,
        "settings": settings,
        "benchmarks": {
            name: {
                "title": entry.benchmark.title,
                "shots": entry.benchmark.shots,
                "limit": entry.limit,
                "examples": entry.examples,
                "written": entry.written,
                "left_out": entry.left_out,
                "prompts_cut": entry.cut,
                "unfinished": entry.unfinished,
                "metrics": entry.metrics,
                "report": entry.benchmark.report,
            }
            for name, entry in entries.items()
        },
    }
    tables = [*report_tables(model, entries, registry), counts_table(entries)]
    files.write_json(folder / "results.json", content)
    files.write_text(folder / "results.md", _markdown(model, settings, tables, entries.values()))
    files.write_text(folder / "results.html", _page(model, settings, tables, entries.values()))


def _notes(entries: Iterable[Entry]) -> list[str]:
    notes = [
        "Scores are in percent, ± their standard error. Rows marked (report) are figures of the Qwen technical report; "
        "honest implementations of one benchmark differ by 1 to 3 points."
    ]
    if limited := [entry.benchmark.title for entry in entries if entry.limit is not None]:
        notes.append(f"Only a part of the examples was answered, unlike the report's figures: {_and(limited)}.")
    return notes


def _and(names: list[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parts(row: Mapping[str, Any]) -> dict[str, str]:
    """What there is to read of a wrong answer, by name; invisible characters are shown as escapes."""
    parts = {"prompt": row["prompt"]}
    if "finish_reason" not in row:
        output = row["output"]
        scored = zip(row["choices"], output["log_likelihoods"], output["tokens"], strict=True)
        parts["choices: log-likelihood (tokens)"] = "\n".join(
            f"{index}. {text.strip()}: {total:.3f} ({tokens})" for index, (text, total, tokens) in enumerate(scored)
        )
        names = {index: text.strip() for index, text in enumerate(row["choices"])}
        extracted = {way: f"{value}. {names[value]}" for way, value in row["extracted"].items()}
        target = f"{row['target']}. {names[row['target']]}"
    else:
        parts["output"] = row["output"]
        extracted = {way: "none found" if value is None else _shown(value) for way, value in row["extracted"].items()}
        target = _shown(row["target"])
    parts |= {f"extracted ({way})": value for way, value in extracted.items()} | {"target": target}
    return {name: escape(text) for name, text in parts.items()}


# Markdown.


def _markdown(model: str, settings: Mapping[str, Any], tables: list[Table], entries: Iterable[Entry]) -> str:
    entries = list(entries)
    parts = [f"# Evaluation of {_cell(model)}", "\n".join(f"- {name}: {_shown(it)}" for name, it in settings.items())]
    parts += _notes(entries)
    for table in [*tables, *filter(None, map(subjects_table, entries))]:
        parts += [f"## {_cell(table.caption)}", markdown_table(table)]
    for entry in entries:
        if entry.wrong:
            parts.append(f"## {_cell(entry.heading)}: wrong answers, the first {len(entry.wrong)}")
        for row in entry.wrong:
            parts.append(f"### {_cell(escape(row['id']))}")
            for name, text in _parts(row).items():
                shown = text if len(text) <= _PROMPT_END or name != "prompt" else f"… {text[-_PROMPT_END:]}"
                parts.append(f"{name}:\n\n{_fenced(shown)}")
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown, our rows in bold."""
    lines = [table.header, ("---",) * len(table.header)]
    for index, row in enumerate(table.rows):
        ours = index >= len(table.rows) - table.ours
        lines.append(tuple(f"**{cell}**" if ours else cell for cell in map(_cell, row)))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"([\\|*_<>`\[\]#])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


# HTML.


def _page(model: str, settings: Mapping[str, Any], tables: list[Table], entries: Iterable[Entry]) -> str:
    entries = list(entries)
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    parts = [
        f"<h1>Evaluation of {html.escape(model)}</h1>",
        "<ul>" + "".join(f"<li>{html.escape(f'{key}: {_shown(it)}')}</li>" for key, it in settings.items()) + "</ul>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in _notes(entries)),
        *map(_html_table, tables),
    ]
    for entry in entries:
        parts.append(f"<h2>{html.escape(entry.heading)}</h2>")
        parts.append(
            f"<p>{html.escape(entry.score)}; source of the protocol: {html.escape(entry.benchmark.source)}</p>"
        )
        if (subjects := subjects_table(entry)) is not None:
            parts.append(f"<details><summary>{len(subjects.rows)} subjects</summary>{_html_table(subjects)}</details>")
        if entry.wrong:
            wrong = "".join(map(_html_answer, entry.wrong))
            summary = f"wrong answers: the first {len(entry.wrong)}"
            parts.append(f"<details open><summary>{summary}</summary>{wrong}</details>")
    policy = f"default-src 'none'; style-src 'sha256-{style}'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation of {html.escape(model)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    header = "".join(f"<th>{_unbroken(cell)}</th>" for cell in table.header)
    rows = []
    for index, row in enumerate(table.rows):
        mark = ' class="ours"' if index >= len(table.rows) - table.ours else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{_unbroken(cell)}</td>" for cell in row) + "</tr>")
    return (
        f'<h3>{html.escape(table.caption)}</h3><div class="wide"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _unbroken(cell: str) -> str:
    return html.escape(cell).replace(" ± ", "&nbsp;±&nbsp;").replace("-shot)", "&#8209;shot)")


def _html_answer(row: Mapping[str, Any]) -> str:
    # A line end at the start of <pre> is not shown, so one more is put there.
    parts = "".join(
        f"<div>{html.escape(name)}</div><pre>\n{html.escape(text)}</pre>" for name, text in _parts(row).items()
    )
    return f"<details><summary>{html.escape(escape(row['id']))}</summary>{parts}</details>"
