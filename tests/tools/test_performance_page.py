"""tools/performance_page.py: the page is that of the committed records; records that say too little are refused."""

import copy
import json

import pytest
from PIL import Image

MACHINES = {
    "small": {"title": "Small machine", "roofs": {"float32": 1e11}, "bandwidth": 1e10, "source": "a guess"},
    "v5p": {"title": "TPU v5p", "hardware": "gin/hardware/options/v5p.gin"},
}
WORK = {"operations": 2e8, "bytes": 4e8, "counted": "weights once"}
RECORD = {
    "title": "Walking, against running",
    "about": "Both on one road.",
    "history": "RESULTS.md",
    "order": 1,
    "runs": [
        {
            "date": "2026-01-31",
            "machine": "small",
            "load": "load 8 to 11",
            "command": "python walk.py",
            "commit": "abc1234",
            "versions": "legs 2.0",
            "rows": [
                {
                    "case": "uphill",
                    "measure": "steps/s",
                    "better": "more",
                    "ours": 12.0,
                    "peer": 10.0,
                    "peer_name": "runner",
                    "wanted": 1.5,
                    "limit": "the lungs",
                    "also": {"breaths": ["3", "4"]},
                    "work": WORK,
                },
                {
                    "case": "a mile",
                    "measure": "s, low and high bound",
                    "better": "less",
                    "ours": [300, 330],
                    "peer": [400, 500],
                    "peer_name": "runner",
                    "wanted": 0.8,
                },
            ],
        }
    ],
}


@pytest.fixture
def page(tool):
    return tool("performance_page")


def written(folder, record):
    """A folder of records."""
    folder.mkdir(exist_ok=True)
    (folder / "machines.json").write_text(json.dumps(MACHINES))
    (folder / "walking.json").write_text(json.dumps(record))
    return folder


def test_the_page_is_that_of_the_records(page, capsys):
    assert page.main(["--check"]) == 0, capsys.readouterr().out


def test_every_row_says_how_busy_the_machine_was_and_what_limits_it(page, tmp_path, capsys):
    results, docs = written(tmp_path / "results", RECORD), tmp_path / "docs"
    options = ["--results", str(results), "--docs", str(docs)]
    assert page.main([*options, "--check"]) == 1 and not docs.exists()
    assert page.main(options) == 0
    lines = (docs / "performance.md").read_text().splitlines()
    assert "2026-01-31, Small machine, **load 8 to 11** · `python walk.py` · abc1234 · legs 2.0" in lines
    assert "| uphill (steps/s) | 12 | runner | 10 | **1.20** | **≥ 1.5, missed** | loaded | breaths 3 / 4 |" in lines
    assert "- uphill (steps/s) against runner: the lungs." in lines
    assert (
        "| a mile (s, low and high bound) | 300 to 330 | runner | 400 to 500 | 0.75, 0.66 | ≤ 0.8, met | loaded |  |"
        in lines
    )
    # 12 steps of 2e8 operations with 4e8 bytes each, where memory lets pass 5e9 operations.
    assert "| 1 | uphill | 0.5 | 5 GFLOP/s | 2.4 GFLOP/s | 48% | runner 2 GFLOP/s | 40% |" in lines
    pictures = sorted(path.name for path in (docs / "images").iterdir())
    assert pictures == ["performance_aims.png", "roofline_small.png"]
    for name in pictures:
        with Image.open(docs / "images" / name) as picture:
            assert picture.width > 1000 and len(picture.getcolors(2**24)) > 10
    capsys.readouterr()
    assert page.main([*options, "--check"]) == 0
    changed = copy.deepcopy(RECORD)
    changed["runs"][0]["rows"][0]["ours"] = 13.0
    written(results, changed)
    assert page.main([*options, "--check"]) == 1
    told = capsys.readouterr().out
    for name in ("performance.md", "images/performance_aims.png", "images/roofline_small.png"):
        assert f"{docs / name} is out of date: run python tools/performance_page.py" in told


def test_limits_of_absent_devices_are_those_of_their_gin_file(tool, tmp_path):
    machines, _ = tool("performance_records").read_all(written(tmp_path / "results", RECORD))
    assert machines["v5p"].roofs == {"bfloat16": 459e12} and machines["v5p"].bandwidth == 2765e9
    assert machines["v5p"].estimated and not machines["small"].estimated


def change(where, value):
    """The record with another value (None: without it) at a path of names and places."""
    record = copy.deepcopy(RECORD)
    at = record
    for name in where[:-1]:
        at = at[name]
    if value is None:
        del at[where[-1]]
    else:
        at[where[-1]] = value
    return record


ROW = ("runs", 0, "rows", 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            change((*ROW, "limit"), None),
            r"walking.json, run 1, row 1, 'uphill': the aim 1.5 is missed; `limit` has to say why",
        ),
        (change((*ROW, "ratio"), 1.5), "ratio 1.5 is not that of the values, 1.200"),
        (change((*ROW, "peer_name"), None), "peer_name is missing"),
        (change((*ROW, "better"), "high"), 'better is "more" or "less", found \'high\''),
        (change((*ROW, "ours"), "12"), "expected positive numbers, found '12'"),
        (change((*ROW, "peer"), [1, 2]), r"ours has 1 value\(s\), the peer 2"),
        (change((*ROW, "speed"), 3), "'speed' is unknown; CONTRIBUTING.md lists the fields"),
        (change((*ROW, "work"), {"operations": 1}), "work: 'bytes' is missing, 'counted' is missing"),
        (change(("runs", 0, "load"), "some"), 'load is "quiet", "load 8 to 11" or "not timed", found \'some\''),
        (change(("runs", 0, "date"), "today"), "date is YYYY-MM-DD, found 'today'"),
        (change(("runs", 0, "machine"), "big"), "machines.json has no machine 'big', only small, v5p"),
        (change(("title",), None), "'title' is missing"),
        ([], "walking.json: expected the fields of a benchmark, found"),
    ],
)
def test_records_that_say_too_little_are_refused(page, tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        page.main(["--results", str(written(tmp_path / "results", record)), "--docs", str(tmp_path)])
    assert not (tmp_path / "performance.md").exists()
