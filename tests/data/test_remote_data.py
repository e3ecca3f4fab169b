"""Corpora, caches and training data in buckets: the bytes and batches of a local disk, and what goes wrong is named."""

import functools
import gzip
import json
import threading

import gin
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import tasks  # noqa: F401  registers them
from qwen_jax import files
from qwen_jax.data import cache, packing, remote_shards
from qwen_jax.data import loader as loading
from qwen_jax.data.corpora import list_files
from qwen_jax.data.loader import ExampleLoader
from tests.object_stores import Fault, FaultProxy, environment, gcs, s3, stores  # noqa: F401

LENGTH = 32
LIMIT = {"QWEN_JAX_STORE_RETRY_SECONDS": "2"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of each kind that compress or parse differently."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"text": f"document {number}: " + "the model 你好 x = 1\n" * (number % 5)} for number in range(60)]
    lines = ["".join(json.dumps(row) + "\n" for row in rows[start::4]).encode() for start in range(4)]
    (folder / "deep").mkdir()
    (folder / "a.jsonl").write_bytes(lines[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    (folder / "deep" / "c.jsonl.zst").write_bytes(zstandard.compress(lines[2]))
    pyarrow.parquet.write_table(pyarrow.table({"text": [row["text"] for row in rows[3::4]]}), folder / "d.parquet")
    (folder / "e.txt").write_text("one text")
    (folder / "left.bin").write_bytes(b"x")
    return folder


def prepare(pattern, vocabulary_file, cache_dir, **settings):
    """Caches `local_files`."""
    with gin.unlock_config():
        gin.clear_config()
        gin.bind_parameter("local_files.pattern", str(pattern))
        gin.bind_parameter("local_files.validation_share", 0.2)
        gin.bind_parameter("vocabulary_path.path", str(vocabulary_file))
    try:
        return cache.prepare("local_files", cache_dir=cache_dir, sequence_length=LENGTH, num_shards=3, **settings)
    finally:
        gin.clear_config()


def upload(folder, url):
    for path in folder.rglob("*"):
        if path.is_file():
            files.copy_file(path, files.as_path(f"{url}/{path.relative_to(folder).as_posix()}"))


def contents(folder):
    found = [path for path in files.as_path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(files.as_path(folder))): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def cached(stores, corpus, vocabulary_file, tmp_path_factory):  # noqa: F811
    """The same corpus cached on a disk, and from and into a bucket of each kind: {name: cache_dir}."""
    local = tmp_path_factory.mktemp("cached")
    prepare(corpus, vocabulary_file, local)
    found = {"local": str(local)}
    for scheme, store in stores.items():
        url = store.folder()
        upload(corpus, f"{url}/texts")
        prepare(f"{url}/texts", vocabulary_file, f"{url}/cache")
        found[scheme] = f"{url}/cache"
    return found


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_corpus_in_a_bucket_is_that_of_a_disk(stores, corpus, scheme):  # noqa: F811
    url = stores[scheme].folder("texts")
    upload(corpus, url)
    for pattern in ("", "/**/*.jsonl*", "/*.txt", "/deep", "/a.jsonl", "/[ab].jsonl*", "/[a-e]*", "/dee*/*"):
        local = [path.relative_to(corpus).as_posix() for path in list_files(f"{corpus}{pattern}")]
        assert [str(path).removeprefix(f"{url}/") for path in list_files(url + pattern)] == local
    with pytest.raises(FileNotFoundError, match=r"no file of a corpus matches '.*/nothing\*'"):
        list_files(f"{url}/nothing*")
    with pytest.raises(ValueError, match=r"left\.bin: unknown suffix"):
        list_files(f"{url}/*.bin")
    for name in ("part[1].jsonl", "part1.jsonl"):
        files.write_text(files.as_path(url) / name, "{}")
        assert [path.name for path in list_files(f"{url}/part[1].jsonl")] == [name]
        files.remove_tree(files.as_path(url) / name)


def test_what_is_cached_in_a_bucket_has_the_bytes_of_a_disk(cached):
    local = contents(cached["local"])
    assert sum(name.endswith(".array_record") for name in local) == 6
    for scheme in ("s3", "gs"):
        assert contents(cached[scheme]) == local


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_batches_from_a_bucket_are_those_of_a_disk(cached, scheme):
    settings = {"sequence_length": LENGTH, "seed": 3}
    local = ExampleLoader("local_files", cache_dir=cached["local"], **settings)
    remote = ExampleLoader("local_files", cache_dir=cached[scheme], **settings)
    assert remote.fingerprint == local.fingerprint and len(remote) == len(local)
    # In order, as two hosts of one job read, again from the start, and far away.
    for start in (0, 4, 8, 12, 2, 10, 18, 0, 1000):
        found, expected = remote.read(start, start + 4), local.read(start, start + 4)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    validation = ExampleLoader("local_files", cache_dir=cached[scheme], split="validation", repeat=False, **settings)
    assert validation.read(0, len(validation))["tokens"].shape[0] == len(validation)


def test_threads_share_a_loader(cached):
    local = ExampleLoader("local_files", cache_dir=cached["local"], sequence_length=LENGTH)
    remote = ExampleLoader("local_files", cache_dir=cached["s3"], sequence_length=LENGTH)
    results = {}
    threads = [
        threading.Thread(target=lambda start=start: results.update({start: remote.read(start, start + 3)}))
        for start in range(0, 60, 3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for start, found in results.items():
        np.testing.assert_array_equal(found["tokens"], local.read(start, start + 3)["tokens"])
    assert len(results) == 20


def copy_of(cached, store):
    """The cache again, in a folder that a test may change."""
    url = files.as_path(store.folder())
    for name, content in contents(cached["local"]).items():
        (url / name).write_bytes(content)
    return url


def shard_of(url):
    return next(path for path in url.rglob("*.array_record") if "/train/" in str(path))


def read_all(url, **settings):
    loader = ExampleLoader("local_files", cache_dir=url, sequence_length=LENGTH, repeat=False, **settings)
    return loader.read(0, len(loader))


def test_a_shard_that_changed_is_refused_by_name(cached, s3):  # noqa: F811
    url = copy_of(cached, s3)
    shard = shard_of(url)
    data = bytearray(shard.read_bytes())
    data[200] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(OSError, match=rf"{shard}: record \d+ has not the checksum of the index: the object was"):
        read_all(url)
    index = shard.with_name(shard.name + ".index")
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(OSError, match=rf"{shard}: {index.name} beside it is damaged or was replaced"):
        read_all(url)
    index.unlink()
    with pytest.raises(OSError, match=rf"{index}: no such object"):
        read_all(url)


def test_data_without_an_index_are_read_as_before(cached, s3, caplog):  # noqa: F811
    url = copy_of(cached, s3)
    for path in url.rglob("*.index"):
        path.unlink()
    for path in url.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        for shard in manifest["shards"]:
            del shard["index_sha256"]
        path.write_text(json.dumps(manifest))
    found = read_all(url)
    np.testing.assert_array_equal(found["tokens"], read_all(cached["local"])["tokens"])
    assert "was packed without checksums" in caplog.text
    fingerprints = {
        packing.Manifest.load(packing.packed_folder(one, "local_files", LENGTH, "train")).fingerprint
        for one in (url, cached["local"])
    }
    assert len(fingerprints) == 1


@pytest.mark.parametrize("kind", ["503", "cut_download", "delay"])
def test_faults_that_pass_do_not_change_a_batch(cached, s3, kind):  # noqa: F811
    with FaultProxy(s3) as proxy, environment(s3.through(proxy) | {"QWEN_JAX_STORE_RETRY_SECONDS": "60"}):
        proxy.faults = [Fault(r"GET .*array_record$", kind, count=3, seconds=0.3)]
        found = read_all(cached["s3"])
        assert proxy.faults[0].met == 3
    np.testing.assert_array_equal(found["tokens"], read_all(cached["local"])["tokens"])


def test_an_object_that_is_refused_for_good_is_named(cached, s3):  # noqa: F811
    with FaultProxy(s3) as proxy, environment(s3.through(proxy) | LIMIT):
        proxy.faults = [Fault(r"GET .*array_record$", "403", count=10_000)]
        with pytest.raises(OSError, match=r"^s3://[^\n]*array_record: no permission[^\n]*$"):
            read_all(cached["s3"])


def test_shards_are_kept_on_a_local_disk_up_to_a_limit(cached, s3, tmp_path, monkeypatch):  # noqa: F811
    used = threading.Semaphore(0)
    use_copy = loading._Records._use_copy

    def counted(self, shard, path):
        use_copy(self, shard, path)
        used.release()

    monkeypatch.setattr(loading._Records, "_use_copy", counted)
    size = shard_of(files.as_path(cached["s3"])).stat().st_size
    (tmp_path / "of other data.array_record").write_bytes(b"x" * size)
    kept = remote_shards.ShardCache(tmp_path, int(2.5 * size))
    monkeypatch.setattr(loading, "shard_cache", lambda: kept)
    loader = ExampleLoader("local_files", cache_dir=cached["s3"], sequence_length=LENGTH)
    expected = ExampleLoader("local_files", cache_dir=cached["local"], sequence_length=LENGTH).read(0, 30)["tokens"]
    np.testing.assert_array_equal(loader.read(0, 30)["tokens"], expected)
    assert used.acquire(timeout=60) and used.acquire(timeout=60)  # the third does not fit
    copies = sorted(tmp_path.iterdir())
    assert len(copies) == 2 and sum(path.stat().st_size for path in copies) <= 2.5 * size
    np.testing.assert_array_equal(loader.read(0, 30)["tokens"], expected)
    # A copy that was damaged is not used, nor one whose object changed.
    copies[0].write_bytes(b"y" * size)
    again = ExampleLoader("local_files", cache_dir=cached["s3"], sequence_length=LENGTH)
    np.testing.assert_array_equal(again.read(0, 30)["tokens"], expected)


def test_a_cache_of_shards_is_local():
    with pytest.raises(ValueError, match="shard_cache.folder is s3://a-bucket/b: it must be on a local disk"):
        remote_shards.shard_cache(folder="s3://a-bucket/b")
    assert remote_shards.shard_cache() is None


def test_caching_that_was_interrupted_goes_on_in_a_bucket(cached, corpus, vocabulary_file, s3, monkeypatch):  # noqa: F811
    url = s3.folder()
    write_shard = packing.write_shard

    def fail_at_second(path, *args, **kwargs):
        if "00001-of" in path.name:
            raise KeyboardInterrupt
        return write_shard(path, *args, **kwargs)

    monkeypatch.setattr(packing, "write_shard", fail_at_second)
    make = functools.partial(prepare, corpus, vocabulary_file, url)
    with pytest.raises(KeyboardInterrupt):
        make()
    with pytest.raises(FileNotFoundError, match=r"no examples of local_files .*--cache_dir=s3://"):
        ExampleLoader("local_files", cache_dir=url, sequence_length=LENGTH)
    monkeypatch.setattr(packing, "write_shard", write_shard)
    make()
    # Other paths, the same names and sizes: the same corpus.
    assert contents(url) == contents(cached["local"])


def test_a_bucket_that_fails_costs_no_finished_shard(cached, corpus, vocabulary_file, s3):  # noqa: F811
    url = s3.folder()
    upload(corpus, f"{url}/texts")
    make = functools.partial(prepare, f"{url}/texts", vocabulary_file, f"{url}/cache")
    with FaultProxy(s3) as proxy, environment(s3.through(proxy) | LIMIT):
        proxy.faults = [Fault(r"GET .*c\.jsonl\.zst$", "403", count=10_000)]
        with pytest.raises(OSError, match=r"c\.jsonl\.zst: no permission"):
            make()
    folder = files.as_path(f"{url}/cache/local_files")
    assert len(list(folder.glob(".train-*.json"))) == 3  # a, b and d come before deep/c
    make()
    assert contents(f"{url}/cache") == contents(cached["local"])
