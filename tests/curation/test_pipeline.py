"""The whole pipeline on a small crawl: nothing lost, the same bytes always, and continued after it was killed."""

import contextlib
import dataclasses
import html.parser
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from qwen_jax import files
from qwen_jax.curation import pipeline, readers, report, sources, stages, storage
from qwen_jax.curation.ledger import STAGES, Ledger
from qwen_jax.curation.scoring import LinearClassifier, ScoreFilter
from qwen_jax.files import whole
from tests.warm_python import python

ROOT = Path(__file__).resolve().parents[2]


def rows(folder: Path, kind: str) -> list[dict]:
    return [row for path in sorted((folder / kind).rglob("*.jsonl.zst")) for row in storage.read_lines(path)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_document_is_lost(run, inputs):
    counts = run.manifest["stages"]
    assert list(counts) == list(STAGES)
    kept, dropped = rows(run.folder, "documents"), rows(run.folder, "dropped")
    unique = {row["id"] for row in kept}
    read = sum(
        len(list(readers.read(path, text_field="text", max_bytes=10**7)))
        for name, patterns in inputs.items()
        for path, _ in sources.list_source(name, patterns).files
    )
    assert counts["read"]["in"][0] == read == len(unique) + len(dropped)
    assert not unique & {row["id"] for row in dropped} and len({row["id"] for row in dropped}) == len(dropped)
    assert counts["sampling"]["kept"][0] == len(unique)
    for before, after in zip(STAGES[:-1], STAGES[1:], strict=True):
        assert counts[before]["kept"] == counts[after]["in"]
    for stage, count in counts.items():
        mine = [row for row in dropped if row["stage"] == stage]
        assert sum(number for number, _ in count["dropped"].values()) == len(mine)
        for reason, (number, size) in count["dropped"].items():
            same = [row for row in mine if row["reason"] == reason]
            assert (number, size) == (len(same), sum(row["bytes"] for row in same))


def test_everything_wrong_with_the_crawl_is_found(run):
    reasons = {f"{s}: {r}" for s, c in run.manifest["stages"].items() for r in c["dropped"]}
    assert {
        "read: broken_record",
        "read: empty_file",
        "read: http_status",
        "read: not_a_page",
        "read: bad_json",
        "read: no_text_field",
        "extract: undecodable",
        "language: other_language",
        "exact: duplicate",
        "fuzzy: near_duplicate",
        "rules: min_tokens",
        "contamination: in_benchmark",
    } <= reasons
    kept = rows(run.folder, "documents")
    assert {row["language"] for row in kept} == {"en", "zh"}
    assert all("Privacy" not in row["text"] and "<" not in row["text"] for row in kept)
    assert any(row["url"].startswith("https://example.org/") for row in kept)
    assert run.manifest["counters"]["encoding"]["gb18030"] == 1


def test_of_duplicates_the_source_named_first_is_kept(run):
    dropped = [row for row in rows(run.folder, "dropped") if "duplicate_of" in row]
    assert any(row["duplicate_of"].startswith("books/") for row in dropped)
    assert not [row for row in dropped if row["source"] == "books" and row["duplicate_of"].startswith("web/")]
    ids = {row["id"] for kind in ("documents", "dropped") for row in rows(run.folder, kind)}
    assert all(row["duplicate_of"] in ids for row in dropped)


def test_sources_are_sampled_by_weight(run):
    kept = rows(run.folder, "documents")
    books = [row["id"] for row in kept if row["source"] == "books"]
    assert {books.count(one) for one in books} <= {2, 3} and books
    assert sorted({row["copy"] for row in kept if row["source"] == "books"}) == [0, 1, 2]
    web = [row["id"] for row in kept if row["source"] == "web"]
    assert len(web) == len(set(web))


def test_the_output_is_read_by_the_task_local_files(run):
    from qwen_jax.data.corpora import documents

    texts = [one["text"] for one in documents(str(run.folder / "documents"))]
    assert texts == [row["text"] for row in rows(run.folder, "documents")]


@pytest.mark.parametrize(
    "workers",
    [
        {"num_workers": 2},
        {
            "beam_options": [
                "--runner=FnApiRunner",
                "--direct_running_mode=multi_threading",
                "--direct_num_workers=3",
            ]
        },
    ],
)
def test_bytes_do_not_depend_on_workers_or_on_where_the_crawl_lies(run, crawl, config, workers, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(crawl, moved)
    inputs = {name: [str(moved / name)] for name in ("books", "web")}
    pipeline.curate(inputs, tmp_path / "again", config, **workers)
    assert contents(tmp_path / "again") == contents(run.folder)


def test_a_small_corpus_of_two_files_is_work_for_two_workers(tmp_path):
    """The number of units is the corpus's: the same files of output for any number of workers."""
    listed = [
        sources.Source("web", "/", tuple((f"/{number}.warc.gz", size) for number in range(2))) for size in (9_000_000,)
    ]
    assert [len(unit.files) for unit in pipeline._units(listed, None)] == [1, 1]
    listed = [sources.Source("web", "/", tuple((f"/{number}.html", 20_000) for number in range(200)))]
    assert [len(unit.files) for unit in pipeline._units(listed, None)] == [50] * 4


def test_a_piece_that_fails_leaves_nothing_and_the_next_run_goes_on(run, inputs, config, tmp_path, monkeypatch):
    select, done = stages.select, []

    def failing(work, number, parts):
        if len(done) == 2:
            raise OSError("no space left on device")
        done.append(number)
        select(work, number, parts)

    monkeypatch.setattr(stages, "select", failing)
    with pytest.raises(Exception, match="no space left"):
        pipeline.curate(inputs, tmp_path / "out", config)
    monkeypatch.setattr(stages, "extract", lambda *_: pytest.fail("extraction was done"))
    again = []
    monkeypatch.setattr(
        stages, "select", lambda work, number, parts: (again.append(number), select(work, number, parts))
    )
    assert not list((tmp_path / "out").rglob("*.tmp"))
    pipeline.curate(inputs, tmp_path / "out", config)
    assert not set(again) & set(done)
    assert contents(tmp_path / "out") == contents(run.folder)


@pytest.mark.parametrize("lost", ["plan.json", "benchmarks.npy"])
def test_ended_between_its_first_files_a_run_goes_on(run, inputs, config, tmp_path, monkeypatch, lost):
    new_file = files.new_file

    @contextlib.contextmanager
    def failing(path):
        if path.name == lost:
            raise OSError("no space left on device")
        with new_file(path) as temporary:
            yield temporary

    for module in (whole, files):
        monkeypatch.setattr(module, "new_file", failing)
    with pytest.raises(OSError, match="no space left"):
        pipeline.curate(inputs, tmp_path / "out", config)
    for module in (whole, files):
        monkeypatch.setattr(module, "new_file", new_file)
    pipeline.curate(inputs, tmp_path / "out", config)
    assert contents(tmp_path / "out") == contents(run.folder)


def test_killed_and_started_again_gives_the_same_bytes(run, crawl, tmp_path, plain_environment):
    weights = "--gin.make_config.weights={'books': 2.5}"
    command = [
        python(),
        str(ROOT / "tools" / "curate.py"),
        f"--input=books={crawl}/books",
        f"--input=web={crawl}/web",
        f"--output={tmp_path / 'out'}",
        f"--config={ROOT}/gin/curation/english_and_chinese.gin",
        weights,
        f"--gin.benchmarks.patterns={crawl}/benchmark.jsonl",
        "--gin.make_config.documents_per_part=40",
        "--gin.make_config.unit_bytes=10000",
        "--max_unread_share=1",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=plain_environment)
    # Killed as soon as anything was extracted, in the middle of a stage.
    while not list((tmp_path / "out").glob("work/extract/0*")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, env=plain_environment)
    assert done.returncode == 0, done.stderr
    assert "going on with an interrupted run" in done.stderr and "sampling" in done.stdout
    assert contents(tmp_path / "out") == contents(run.folder)
    again = subprocess.run(command, capture_output=True, text=True, env=plain_environment)
    assert "is complete already" in again.stderr
    command.append("--gin.Rules.min_tokens=99")
    other = subprocess.run(command, capture_output=True, text=True, env=plain_environment)
    assert other.returncode == 2 and "another configuration" in other.stderr and len(other.stderr.splitlines()) == 1


def test_scores_are_kept_and_bounds_heeded(inputs, config, tmp_path):
    length = ScoreFilter("length", _length, minimum=1500)
    manifest = pipeline.curate(inputs, tmp_path / "out", dataclasses.replace(config, scores=(length,), fuzzy=None))
    assert manifest["stages"]["scores"]["dropped"]["min_length"][0] > 0
    assert manifest["stages"]["fuzzy"]["dropped"] == {}
    assert all(row["scores"]["length"] == len(row["text"]) >= 1500 for row in rows(tmp_path / "out", "documents"))


def _length(text: str) -> float:
    return len(text)


def test_a_corpus_of_nothing_but_damage_is_reported(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.warc.gz").write_bytes(bytes(range(256)))
    (source / "b.jsonl").write_bytes(b"")
    (source / "c.html").write_bytes(b"<" * 1000)
    manifest = pipeline.curate({"web": [str(source)]}, tmp_path / "out")
    assert manifest["stages"]["read"]["in"][0] == 3 and manifest["stages"]["sampling"]["kept"][0] == 0
    assert manifest["files"]["documents"] == [] and (tmp_path / "out" / "report.html").exists()
    assert [(one["path"], one["unread"]) for one in manifest["damaged_files"]] == [("a.warc.gz", 256)]
    with pytest.raises(ValueError, match=r"1 input file could not be read .*web/a.warc.gz \(100.0%: broken_record\)"):
        pipeline.check_read(manifest, 0.01)
    pipeline.check_read(manifest, 1.0)


def test_names_that_are_not_utf_8_are_shown_by_escapes(tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for name, data in (
        ("\u5317\u4eac.txt".encode("gbk"), b"The committee of the city has decided to keep the old library open."),
        (b"cut\xff.warc.gz", b"\x1f\x8b\x08"),
        (b"\xff.png", b"png"),
    ):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
    manifest = pipeline.curate({"web": [str(tmp_path / "in")]}, tmp_path / "out")
    found = [row["id"] for row in rows(tmp_path / "out", "dropped")]
    assert sorted(found) == ["web/\\xb1\\xb1\\xbe\\xa9.txt#0", "web/cut\\xff.warc.gz#0"]
    assert [one["path"] for one in manifest["damaged_files"]] == ["cut\\xff.warc.gz"]
    assert manifest["files_left_out"] == {"web": [["\\xff.png", "unknown_suffix"]]}
    assert files.read_json(tmp_path / "out" / "manifest.json") == json.loads(json.dumps(manifest))


def test_bytes_read_and_left_out_are_all_bytes(run, inputs):
    for name, patterns in inputs.items():
        source = sources.list_source(name, patterns)
        counts = run.manifest["bytes_read"][name]
        sizes = [size for _, size in source.files]
        assert counts["bytes"] == sum(sizes) == sum(size for _, size in counts["outcomes"].values())
    damaged = {one["path"]: one for one in run.manifest["damaged_files"]}
    # The second record of part-2 is cut off; one line of two is no JSON; part-0 or part-1 has bytes between records.
    assert {"part-2.warc.gz", "lines.jsonl"} < set(damaged) and len(damaged) == 3
    assert damaged["lines.jsonl"]["outcomes"] == {"bad_json": [1, 29], "no_text_field": [1, 21]}
    assert damaged["part-2.warc.gz"]["unread"] == 300


def test_an_unreadable_file_and_files_left_out_are_named(tmp_path, crawl, plain_environment):
    source = tmp_path / "in"
    source.mkdir()
    (source / "good.txt").write_text("The committee of the city has decided to keep the old library open.")
    (source / "cut.warc.gz").write_bytes((crawl / "web" / "part-0.warc.gz").read_bytes()[:20])
    (source / "picture.png").write_bytes(b"png")
    (source / ".hidden.txt").write_text("hidden")
    tool = [python(), str(ROOT / "tools" / "curate.py"), f"--input={source}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(tool, capture_output=True, text=True, env=plain_environment)
    assert done.returncode == 2 and "web/cut.warc.gz (100.0%: broken_record)" in done.stderr.splitlines()[-1]
    for line in (
        "web: left out 20 (1 records): broken_record",
        "web: 1 files not read: hidden: .hidden.txt",
        "web: 1 files not read: unknown_suffix: picture.png",
    ):
        assert line in done.stdout.splitlines()
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert all(name in report for name in ("web/cut.warc.gz", "web/picture.png", "web/.hidden.txt"))
    again = subprocess.run([*tool, "--max_unread_share=1"], capture_output=True, text=True, env=plain_environment)
    assert again.returncode == 0 and "is complete already" in again.stderr


def test_what_cannot_be_meant_is_refused(inputs, config, tmp_path):
    with pytest.raises(ValueError, match="weights name a source 'book'"):
        pipeline.curate(inputs, tmp_path, dataclasses.replace(config, weights={"book": 2}))
    with pytest.raises(ValueError, match="'yue', which counts as 'zh'"):
        pipeline.curate(inputs, tmp_path, dataclasses.replace(config, languages=("yue",)))
    with pytest.raises(ValueError, match="two scores"):
        pipeline.curate(inputs, tmp_path, dataclasses.replace(config, scores=(ScoreFilter("a", len),) * 2))
    with pytest.raises(FileNotFoundError, match="no file matches"):
        pipeline.curate({"web": [str(tmp_path / "no")]}, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(inputs, config, tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds documents and no run of curation"):
        pipeline.curate(inputs, tmp_path, config)
    assert (tmp_path / "documents" / "thesis.txt").read_text() == "mine"
    (tmp_path / "other" / "work").mkdir(parents=True)
    (tmp_path / "other" / "work" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="holds notes"):
        pipeline.curate(inputs, tmp_path / "other", config)


def test_two_runs_do_not_work_in_one_folder(run, inputs, config, tmp_path):
    with files.locked(tmp_path / "out" / "work"):
        with pytest.raises(ValueError, match="in use by process"):
            pipeline.curate(inputs, tmp_path / "out", config)
    pipeline.curate(inputs, tmp_path / "out", config)
    assert contents(tmp_path / "out") == contents(run.folder)


def test_files_that_disappear_are_missed(inputs, config, tmp_path, monkeypatch):
    finish = pipeline._finish

    def lose(work, output, description):
        next(work.folder.glob(f"select/*/{stages.DOCUMENTS}")).unlink()
        return finish(work, output, description)

    monkeypatch.setattr(pipeline, "_finish", lose)
    with pytest.raises(RuntimeError, match="is gone"):
        pipeline.curate(inputs, tmp_path / "out", config)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_ledger_that_does_not_add_up_stops_the_run():
    ledger = Ledger()
    ledger.enter("read", 5)
    with pytest.raises(RuntimeError, match="stage read"):
        ledger.check()


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_shows_documents_as_text_only(run):
    page = _Page()
    page.feed((run.folder / "report.html").read_text(encoding="utf-8"))
    assert {"svg", "rect", "table", "details", "pre"} <= set(page.tags)
    assert not {"script", "img", "link", "iframe", "a"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on") or name in ("src", "href")]
    text = "".join(page.text)
    for part in ("In every stage, kept + dropped = read", "fuzzy: near_duplicate", "in_benchmark", "duplicate_5gram"):
        assert part in text
    assert "documents, of which" in text


def test_hostile_text_stays_text():
    ledger = Ledger()
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b[2J"
    ledger.sample(f"rules: {evil}", {"id": evil, "url": evil, "text": evil, "language": evil, "scores": {evil: 1}})
    ledger.value(evil, evil, {evil: 1.0})
    ledger.count("language", evil)
    source = report.render(
        ledger,
        stages.CurationConfig(),
        None,
        {"inputs": {evil: {"files": 1, "bytes": 2}}, "files_left_out": {evil: [[evil, "hidden"]]}},
    )
    page = _Page()
    page.feed(source)
    assert "script" not in page.tags and "img" not in page.tags
    assert "\u202e" not in source and "\x1b" not in source and "\\u202e" in source


def test_a_histogram_of_any_numbers_can_be_drawn():
    for numbers in ([1.0], [0.0, 0.0], [float("inf")], [1e-9, 1e9], [-3.0, 5.0], list(range(1000))):
        for low, high in ((None, None), (0.5, None), (None, 1e12), (-1, 2)):
            assert "nan" not in report._histogram("x", numbers, low, high)


def test_a_model_in_the_home_folder_is_part_of_what_a_run_is_made_from(config, tmp_path, monkeypatch):
    """Another model under the same name must not continue a run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    scored = dataclasses.replace(config, scores=(ScoreFilter("quality", LinearClassifier("~/model.npz")),))
    fingerprints = set()
    for content in (b"one", b"other"):
        (tmp_path / "model.npz").write_bytes(content)
        fingerprints.add(pipeline._describe([], scored)["fingerprint"])
    assert len(fingerprints) == 2
