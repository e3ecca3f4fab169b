"""Curation from a bucket into a bucket: the bytes of a local run, also killed and started again on a bad network."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qwen_jax import files
from qwen_jax.curation import pipeline, readers, sources, storage
from tests.curation.test_pipeline import contents
from tests.object_stores import Fault, FaultProxy, environment, s3, stores  # noqa: F401
from tests.warm_python import python

ROOT = Path(__file__).resolve().parents[2]


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            files.copy_file(path, files.as_path(url) / path.relative_to(folder).as_posix())


def objects(url: str) -> dict[str, bytes]:
    folder = files.as_path(url)
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.glob("**/*") if one.is_file()}


@pytest.fixture(scope="module")
def corpora(stores, crawl):  # noqa: F811
    """The crawl in a folder of each bucket."""
    urls = {scheme: store.folder("crawl") for scheme, store in stores.items()}
    for url in urls.values():
        upload(crawl, url)
    return urls


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_bytes_are_those_of_a_local_run(scheme, stores, corpora, run, config):  # noqa: F811
    crawl, output = corpora[scheme], stores[scheme].folder("corpus")
    inputs = {"books": [f"{crawl}/books/*.zst"], "web": [f"{crawl}/web"]}
    workers = {"num_workers": 2} if scheme == "s3" else {"beam_options": ["--runner=FnApiRunner"]}
    manifest = pipeline.curate(inputs, output, config, **workers)
    assert manifest == run.manifest
    assert objects(output) == contents(run.folder)
    again = pipeline.curate(inputs, output, config)
    assert again == files.read_json(files.as_path(output) / pipeline.MANIFEST)


def test_killed_and_started_again_through_a_bad_network(s3, corpora, run, crawl, plain_environment):  # noqa: F811
    output = s3.folder("corpus")
    command = [
        python(),
        str(ROOT / "tools" / "curate.py"),
        f"--input=books={corpora['s3']}/books",
        f"--input=web={corpora['s3']}/web",
        f"--output={output}",
        f"--config={ROOT}/gin/curation/english_and_chinese.gin",
        "--gin.make_config.weights={'books': 2.5}",
        f"--gin.benchmarks.patterns={crawl}/benchmark.jsonl",
        "--gin.make_config.documents_per_part=40",
        "--gin.make_config.unit_bytes=10000",
        "--max_unread_share=1",
    ]
    with FaultProxy(s3) as proxy:
        settings = plain_environment | os.environ | s3.through(proxy)
        proxy.hold("PUT .*/work/extract/000001/ledger.json")
        with subprocess.Popen(command, env=settings, stderr=subprocess.DEVNULL) as process:
            proxy.wait_for("PUT .*/work/extract/000001/ledger.json")
            process.send_signal(signal.SIGKILL)
        proxy.release()
        names = set(objects(output))
        assert "manifest.json" not in names and not [name for name in names if not name.startswith("work/")]
        files.as_path(f"{output}/work/.lock").unlink()  # in the place of waiting for the end of the lease
        proxy.faults += [
            Fault("GET .*warc.gz", "cut_download"),
            Fault("PUT .*/select/.*zst", "503", count=2),
            Fault("PUT .*/select/.*zst", "cut_upload"),
        ]
        done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on with an interrupted run" in done.stderr
    assert [fault.met for fault in proxy.faults] == [1, 2, 1]
    assert objects(output) == contents(run.folder)


def two_runs_under_the_same_names(s3, corpora, crawl, config, tmp_path):  # noqa: F811
    output, config = s3.folder("corpus"), dataclasses.replace(config, weights={})
    for part in ("books", "web"):
        files.remove_tree(output)
        pipeline.curate({"web": [f"{corpora['s3']}/{part}"]}, output, config)
        pipeline.curate({"web": [str(crawl / part)]}, tmp_path / part, config)
        assert objects(output) == contents(tmp_path / part)


def test_a_second_run_under_the_same_names_reads_its_own_files(s3, corpora, crawl, config, tmp_path):  # noqa: F811
    two_runs_under_the_same_names(s3, corpora, crawl, config, tmp_path)


def test_a_worker_that_outlives_a_run_does_so_too(s3, corpora, crawl, config, tmp_path, monkeypatch):  # noqa: F811
    """As those of a cluster."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def run(label, function, pieces, done, reads=None):
            for future in [pool.submit(function, *piece) for piece in pieces]:
                future.result()

        monkeypatch.setattr(pipeline, "open_workers", lambda *_: contextlib.nullcontext(run))
        two_runs_under_the_same_names(s3, corpora, crawl, config, tmp_path)


def test_a_run_asks_little_of_a_bucket(s3, corpora, config):  # noqa: F811
    config = dataclasses.replace(config, weights={})
    with FaultProxy(s3) as proxy, environment(s3.through(proxy)):
        pipeline.curate({"web": [corpora["s3"] + "/web"]}, s3.folder("corpus"), config)
    methods = collections.Counter(one.partition(" ")[0] for one in proxy.seen)
    listings = [one for one in proxy.seen if "list-type" in one]
    # Files whose names are known are neither looked for one by one nor listed: 12 and 17; 184 and 84 before that. What
    # this process has written it does not read again: 19 other GETs.
    assert methods["HEAD"] <= 18 and len(listings) <= 24 and methods["GET"] - len(listings) <= 26, (methods, listings)


def test_a_name_with_characters_of_globs_is_itself_before_it_is_a_pattern(s3):  # noqa: F811
    folder = files.as_path(s3.folder())
    for name in ("part1.jsonl", "part[1].jsonl"):
        files.write_text(folder / name, "{}")
        assert sources.list_source("web", [f"{folder}/part[1].jsonl"]).files == ((f"{folder}/{name}", 2),)


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_rows_and_slices_of_arrays(s3, tmp_path, small, monkeypatch):  # noqa: F811
    monkeypatch.setattr(storage, "_SMALL", small)
    array = np.arange(60, dtype=np.uint64).reshape(4, 15)
    for folder in (files.as_path(s3.folder()), tmp_path):
        storage.save_array(folder / "a.npy", array)
        assert [storage.load_row(folder / "a.npy", row).tolist() for row in range(4)] == array.tolist()
        with files.new_file(folder / "b.u32") as temporary:
            temporary.write_bytes(np.arange(20, dtype=np.uint32).tobytes())
        found = storage.load_slices(folder / "b.u32", [(3, 5), (7, 7), (18, 20)])
        assert [one.tolist() for one in found] == [[3, 4], [], [18, 19]]


def test_a_bucket_that_refuses_is_no_damaged_file(s3, corpora):  # noqa: F811
    (path,) = [path for path, _ in sources.list_source("web", [corpora["s3"] + "/web"]).files if "part-0" in path]
    table = s3.folder("part-0.parquet")
    files.write_text(table, "a download that is refused tells nothing of this")
    with FaultProxy(s3) as proxy, environment(s3.through(proxy)):
        proxy.faults.append(Fault("GET .*part-0", "403", count=1000))
        for refused in (path, table):
            with pytest.raises(OSError, match="part-0.(warc.gz|parquet): no permission"):
                list(readers.read(refused, text_field="text", max_bytes=10**7))


def test_what_a_bucket_lacks_is_named(s3, corpora, tmp_path):  # noqa: F811
    with pytest.raises(FileNotFoundError, match=r"source 'web': no file matches 's3://.*/nothing/\*': expected"):
        sources.list_source("web", [corpora["s3"] + "/nothing/*"])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="on local disks and in buckets"):
        sources.list_source("web", [corpora["s3"] + "/web", str(tmp_path)])
    files.write_text(f"{s3.folder()}/thesis.txt", "mine")
    url = s3.folder()
    files.write_text(f"{url}/thesis.txt", "mine")
    with pytest.raises(ValueError, match="holds thesis.txt and no run of curation"):
        pipeline.curate({"web": [corpora["s3"] + "/web"]}, url)
    found = sources.list_source("web", [corpora["s3"] + "/web/**"])
    assert {sources.relative(path, found.base) for path, _ in found.files} >= {"part-0.warc.gz", "lines.jsonl"}
