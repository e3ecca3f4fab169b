"""The results in the report's layout, and a page that shows what models wrote as text, at any width."""

import dataclasses
import json

import pytest

from qwen_jax.command_line import escape
from qwen_jax.evaluation.benchmark import Benchmark, Choices, Generation
from qwen_jax.evaluation.report_tables import Entry, counts_table, report_tables
from qwen_jax.evaluation.results_page import write_results
from tests.browser import browser

HOSTILE = (
    "<script>document.title = 'taken'</script></pre><img src=x onerror=\"document.title='taken'\">\n"
    "```\n| a | b |\n<|im_end|> \u202e\x1b[31m\x00问题 " + "long" * 200
)


def benchmark(name, **fields):
    values = {"title": name.upper(), "folder": name, "files": "", "shots": 5, "read": lambda folder: iter(())}
    return Benchmark(**{"name": name, "answers": Choices(), **values, **fields})


REGISTRY = {
    one.name: one
    for one in (
        benchmark("mmlu", title="MMLU", report={"Qwen-7B": 58.2}, table="Table 2", size=14042, source="its <source>"),
        benchmark(
            "gsm8k",
            title="GSM8K",
            shots=8,
            report={"Qwen-7B": 51.7, "Math-Qwen-7B-Chat": 62.5},
            answers=Generation(max_new_tokens=8, extract={}, judge=lambda *_: True),
        ),
        benchmark("math", report={"Qwen-7B": 11.6}),
        benchmark("math401", report={"Math-Qwen-7B-Chat": 80.8}),
        benchmark("piqa", title="PIQA", shots=0, table="Table 17"),
        benchmark("mine", title="Mine"),
        benchmark("new", title="New", table="Table 11", report={"Code-Qwen-7B": 40.0}),
    )
}
RANKED = {
    "id": "anatomy/3",
    "prompt": "Header\n\nQuestion: which?\nAnswer:",
    "output": {"log_likelihoods": [-1.5, -0.25], "tokens": [1, 2]},
    "choices": [" A", f" {HOSTILE}"],
    "extracted": {"choice": 1},
    "target": 0,
}
WRITTEN = {
    "id": HOSTILE[:60],
    "prompt": "\n\n" + "p" * 700 + HOSTILE,
    "output": HOSTILE,
    "extracted": {"number": None, "released": "12"},
    "target": {"answer": "\ud800 3"},
    "finish_reason": "length",
}
METRICS = {"score": 50.0, "score_stderr": 1.25, "examples": 2.0, "no_answer": 0.0}


@pytest.fixture
def entries():
    ranked = METRICS | {"group/STEM": 40.0, "group/Other": 60.0, "subject/anatomy": 10.0, "subject/law": 90.0}
    return {
        "mmlu": Entry(benchmark=REGISTRY["mmlu"], metrics=ranked, examples=2, cut=1, limit=1, wrong=[RANKED]),
        "gsm8k": Entry(
            benchmark=REGISTRY["gsm8k"],
            metrics=METRICS | {"score_released": 25.0, "no_answer": 1.0},
            examples=2,
            written=2,
            unfinished=1,
            left_out={"no label": 3},
            wrong=[WRITTEN],
        ),
        "mine": Entry(benchmark=REGISTRY["mine"], metrics=METRICS, examples=1234),
    }


def test_tables_are_those_of_the_report(entries):
    two, twelve, thirteen, others = report_tables("tiny", entries, REGISTRY)
    assert two.caption == "Table 2" and two.header == ("model", "MMLU (5-shot)", "GSM8K (8-shot)", "MATH (5-shot)")
    # Models that the report has in another table are not rows of this one.
    assert two.rows == (
        ("Qwen-7B (report)", "58.2", "51.7", "11.6"),
        ("tiny", "50.0 ± 1.2", "50.0 ± 1.2", "–"),
    )
    assert (twelve.caption, [row[0] for row in twelve.rows]) == ("Table 12", ["Math-Qwen-7B-Chat (report)", "tiny"])
    assert thirteen.caption == "Table 13: MMLU by group (5-shot)" and thirteen.header == (
        "model",
        "STEM",
        "Other",
        "all",
    )
    assert thirteen.rows[-1] == ("tiny", "40.0", "60.0", "50.0 ± 1.2")
    assert others.caption == "Not in the report" and others.rows == (("tiny", "50.0 ± 1.2"),)
    (eleven,) = report_tables(
        "tiny", {"new": dataclasses.replace(entries["mine"], benchmark=REGISTRY["new"])}, REGISTRY
    )
    assert eleven.caption == "Table 11" and eleven.rows[0] == ("Code-Qwen-7B (report)", "40.0")


def test_everything_that_was_counted_is_shown(entries):
    ranked, written, mine = counts_table(entries).rows
    assert ranked == (
        *("MMLU (mmlu)", "ranked", "5", "50.0 ± 1.2", "–", "2 of 14,042 (first 1 of each subject)", "0", "1", "–", "–"),
    )
    assert written[1:] == ("written", "8", "50.0 ± 1.2", "released 25.0", "2", "3: no label", "0", "1", "1")
    assert mine[5] == "1,234"
    assert Entry.from_json(REGISTRY["gsm8k"], json.loads(json.dumps(entries["gsm8k"].to_json()))) == entries["gsm8k"]


def test_what_was_written_can_be_read_and_is_never_markup(entries, tmp_path):
    write_results(tmp_path, "tiny", {"dtype": "float32"}, entries, REGISTRY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.html", "results.json", "results.md"]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["benchmarks"]["gsm8k"]["metrics"]["score_released"] == 25.0 and content["model"] == "tiny"
    markdown = (tmp_path / "results.md").read_text()
    assert "| **tiny** | **50.0 ± 1.2** |" in markdown and f"````text\n{escape(HOSTILE)}\n````" in markdown
    assert '{"answer": "\\ud800 3"}' in markdown and "\x1b" not in markdown
    assert "Only a part of the examples was answered, unlike the report's figures: MMLU." in markdown
    page = (tmp_path / "results.html").read_text()
    assert "<script" not in page and "<img" not in page and "src=" not in page.replace("src=x", "")
    for text in ("1. &lt;script&gt;", "none found", "&lt;|im_end|&gt;", "its &lt;source&gt;", "3: no label"):
        assert text in page


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_in_a_browser(entries, tmp_path, width):
    write_results(tmp_path, "tiny", {"dtype": "float32"}, entries, REGISTRY)
    with browser(tmp_path / "profile", tmp_path) as page:
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        page.open((tmp_path / "results.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.evaluate("document.title") == "Evaluation of tiny" and not page.problems
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = page.evaluate("[...document.querySelectorAll('pre')].map(one => one.textContent)")
        assert escape(HOSTILE) in shown and escape(WRITTEN["prompt"]) in shown
        assert page.evaluate("performance.getEntriesByType('resource').length") == 0
