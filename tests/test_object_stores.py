"""Buckets behave as folders do: objects appear whole, locks hold, faults are repeated or named in one line."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

from qwen_jax import files
from tests.object_stores import ROOT, Fault, FaultProxy, environment, gcs, s3, stores  # noqa: F401

LIMIT = {"QWEN_JAX_STORE_RETRY_SECONDS": "2"}


@pytest.fixture(params=["s3", "gs"])
def store(stores, request):  # noqa: F811
    """Each of the two servers."""
    return stores[request.param]


@pytest.fixture
def folder(store):
    """A new folder of each."""
    return files.as_path(store.folder())


def through(store, proxy):
    """Environment of a client behind a proxy that gives up soon."""
    return environment(store.through(proxy) | LIMIT)


def names(folder):
    return [str(path.relative_to(folder)) for path in files.find(f"{folder}/**")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("http://host/a", "unknown scheme http://; write gs:// or s3://"),
        ("hdfs://host/a", "unknown scheme hdfs://"),
        ("S3://bucket/a", "unknown scheme S3://"),
        ("s3://", "no bucket"),
        ("gs:///a", "no bucket"),
        ("gs://a_/b", "no bucket named 'a_' can exist"),
        ("gs:/bucket/a", "write gs:// with two slashes"),
        ("s3://bucket/a//b", "two slashes in a row"),
        ("s3://bucket//a", "two slashes in a row"),
        ("s3://bucket/../a", "a part '..'"),
    ],
)
def test_what_is_no_path_of_a_bucket_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match="^OUTPUT_DIR: ") as found:
        files.as_path(given, "OUTPUT_DIR")
    assert message in str(found.value) and "\n" not in str(found.value)


def test_a_path_of_a_bucket_reads_as_one_on_disk():
    path = files.as_path("gs://bucket/runs/a.tar.gz/")
    assert str(path) == "gs://bucket/runs/a.tar.gz" and path.parts == ("gs://bucket", "runs", "a.tar.gz")
    assert (path.name, path.stem, path.suffix, path.suffixes) == ("a.tar.gz", "a.tar", ".gz", [".tar", ".gz"])
    assert path.parent / "b" == path.with_name("b") and str(path.with_suffix(".zst")).endswith("a.tar.zst")
    assert [str(one) for one in path.parents] == ["gs://bucket/runs", "gs://bucket"]
    assert str(path.relative_to(files.as_path("gs://bucket"))) == "runs/a.tar.gz"
    assert not path.is_relative_to(files.as_path("s3://bucket")) and files.as_path(path) is path
    with pytest.raises(TypeError):
        open(path)  # never a local file `gs:`
    for use in (open, pathlib.Path, zipfile.ZipFile, os.listdir, Image.new("L", (1, 1)).save):
        with pytest.raises(
            ValueError, match="gs://bucket/runs/a.tar.gz is in a bucket, and here files of a local disk are meant"
        ):
            use(path)
    with pytest.raises(ValueError, match="two slashes"):
        path / "a//b"


def test_files_folders_and_globs(folder):
    assert not folder.exists() and not (folder / "a").is_file()
    for name in ("a.txt", "b.json", "deep/er/c.txt", ".hidden", "deep/.d.txt"):
        (folder / name).write_text(name)
    assert folder.is_dir() and (folder / "deep").is_dir() and not (folder / "de").exists()
    assert [path.name for path in folder.iterdir()] == [".hidden", "a.txt", "b.json", "deep"]
    assert [path.name for path in folder.glob("*.txt")] == ["a.txt"]
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == {
        *("a.txt", "b.json", "deep", "deep/er", "deep/er/c.txt", ".hidden", "deep/.d.txt")
    }
    assert names(folder) == ["a.txt", "b.json", "deep/er/c.txt"]
    assert [path.name for path in files.find(f"{folder}/[ab].*")] == ["a.txt", "b.json"]
    assert [path.name for path in files.find(f"{folder}/**/?.txt")] == ["a.txt", "c.txt"]
    assert files.find(folder / "a.txt") == [folder / "a.txt"] and files.find(folder / "nothing") == []
    assert (folder / "a.txt").stat().st_size == 5
    (folder / "a.txt").unlink()
    with pytest.raises(FileNotFoundError, match="a.txt: no such object"):
        (folder / "a.txt").read_text()
    files.remove_tree(folder)
    assert not folder.exists()


def test_globs_of_a_bucket_find_what_globs_of_a_disk_do(stores, tmp_path):  # noqa: F811
    remote = files.as_path(stores["s3"].folder())
    for name in ("a/b/c.x", "a/c.x", "c.x", "a/b/d[1].x", "a/.h/c.x", "a.x/c", "z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
        (remote / name).write_text("")
    for pattern in ("**/*.x", "*/*.x", "a/**/c.x", "**", "*/?", "[!a]*", "a/b/d[[]1].x", "a/.h/*", "**/b/*", "*"):
        local = [path for path in files.find(f"{tmp_path}/{pattern}") if path.is_file()]
        assert names_below(remote, pattern) == [path.relative_to(tmp_path).as_posix() for path in local], pattern


def names_below(remote, pattern):
    return [str(path.relative_to(remote)) for path in files.find(f"{remote}/{pattern}")]


def test_a_file_that_fails_half_way_leaves_the_old_one(folder):
    files.write_text(folder / "a.txt", "old")
    with pytest.raises(RuntimeError), files.new_file(folder / "a.txt") as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert names(folder) == ["a.txt"] and (folder / "a.txt").read_text() == "old"
    files.write_json(folder / "b.json", {"b": "图灵"})
    assert files.read_json(folder / "b.json") == {"b": "图灵"}


def test_reading_goes_through_all_of_an_object_and_its_ranges(folder, monkeypatch):
    from qwen_jax.files.reading import RemoteFile

    data = os.urandom(300_000)
    (folder / "a").write_bytes(data)
    monkeypatch.setattr(RemoteFile, "BLOCK", 65_536)
    with files.open_file(folder / "a") as file:
        assert b"".join(iter(lambda: file.read(50_000), b"")) == data
        file.seek(-10, 2)
        assert file.read() == data[-10:]
        file.seek(123_456)
        assert file.read(7) == data[123_456:123_463]
    assert files.read_range(folder / "a", 5, 9) == data[5:9]
    assert files.read_ranges(folder / "a", [(0, 1), (299_999, 300_000), (9, 9)]) == [data[:1], data[-1:], b""]
    with pytest.raises(OSError, match="expected bytes 299,990 to 300,010"):
        files.read_range(folder / "a", 299_990, 300_010)
    with files.local_copy(folder / "a") as local:
        assert local.name == "a" and local.read_bytes() == data
    assert not local.exists()


def requests(proxy):
    """Methods of the requests so far, which are forgotten."""
    found = [one.partition(" ")[0] for one in proxy.seen]
    proxy.seen.clear()
    return found


def test_a_small_object_is_read_by_one_request(store):
    folder = files.as_path(store.folder())
    for size in (10, 0):
        (folder / str(size)).write_bytes(b"1" * size)
    with FaultProxy(store) as proxy, through(store, proxy):
        with files.open_file(folder / "10") as file:
            assert file.seek(0, os.SEEK_END) == 10 and file.seek(0) == 0 and file.read() == b"1" * 10
        assert requests(proxy) == ["GET"]
        with files.open_file(folder / "0") as file:
            assert file.read() == b""
        # An answer that breaks off is asked for again, and not before it is read.
        proxy.faults.append(Fault("GET .*/10$", "cut_download"))
        with files.open_file(folder / "10") as file:
            assert file.read() == b"1" * 10
        assert [fault.met for fault in proxy.faults] == [1]


def test_many_files_are_looked_for_by_one_request(store, tmp_path):
    folder = files.as_path(store.folder())
    given = ("a", "b/c", "d/e", "none", "b")
    for where in (folder, tmp_path):
        for name in ("a", "b/c", "d/e", "of_others"):
            files.write_text(where / name, name)
        assert files.are_files([where / name for name in given]) == [True, True, True, False, False]
        assert files.sizes_in(where) == {"a": 1, "of_others": 9} and files.sizes_in(where / "none") == {}
        files.remove_files([where / name for name in ("a", "b/c", "none")])
        assert files.are_files([where / name for name in given]) == [False, False, True, False, False]
        assert files.are_files([]) == []
    with FaultProxy(store) as proxy, through(store, proxy):
        assert files.are_files([folder / "d/e", folder / "a"]) == [True, False] and requests(proxy) == ["GET"]
        assert files.sizes_of(folder / "d/e") == {folder / "d/e": 3} == files.sizes_of(folder / "d/*")
        assert files.sizes_below(folder) == {folder / "d/e": 3, folder / "of_others": 9}
    other = files.as_path(f"{store.scheme}://another-bucket/a")
    assert files.are_files([folder / "d/e", other]) == [True, False]


def test_an_object_that_is_missing_keeps_no_others_from_being_deleted(stores):  # noqa: F811
    store = stores["gs"]
    folder = files.as_path(store.folder())
    names = [f"{number:02d}" for number in range(20)]
    with FaultProxy(store) as proxy, through(store, proxy):
        # Cloud Storage answers so, and the server of these tests does not.
        proxy.faults.append(Fault(f"DELETE .*/({folder.name}|none)$", "404", count=4))
        for remove in (files.remove_tree, lambda _: files.remove_files([folder / name for name in ("none", *names)])):
            for name in names:
                (folder / name).write_text(name)
            remove(folder)
            assert not folder.exists()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_of_json_are_read_decompressed(stores, tmp_path, suffix):  # noqa: F811
    import gzip

    import zstandard

    data = "".join(json.dumps({"n": n}) + "\n" for n in range(5)).encode()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = files.as_path(stores["gs"].folder(f"rows.jsonl{suffix}"))
    path.write_bytes(pack(data))
    assert list(files.read_json_lines(path)) == [(f"{path}:{n + 1}", {"n": n}) for n in range(5)]
    assert [row for _, row in files.read_json_rows(path)] == [{"n": n} for n in range(5)]


def test_copies_go_each_way(folder, tmp_path):
    (tmp_path / "a").write_text("1")
    files.copy_file(tmp_path / "a", folder / "a")
    files.copy_file(folder / "a", folder / "b/c")
    files.copy_file(folder / "b/c", tmp_path / "d")
    assert (tmp_path / "d").read_text() == "1" and names(folder) == ["a", "b/c"]


def test_the_object_that_completes_a_folder_comes_last(store):
    folder = files.as_path(store.folder())
    (folder / "of_a_killed_upload").write_text("")
    with FaultProxy(store) as proxy, through(store, proxy), files.new_folder(folder, last="done.json") as local:
        for name in ("a", "b/c", "done.json", "z"):
            (local / name).parent.mkdir(exist_ok=True)
            (local / name).write_text(name)
    written = [one.rpartition("/")[2] for one in proxy.seen if one.startswith("PUT ")]
    assert len(written) == 4 and "done" in written[-1]
    assert names(folder) == ["a", "b/c", "done.json", "z"]
    with files.new_folder(folder, last="done.json") as local:  # of a second worker: the first one stays
        (local / "done.json").write_text("other")
    assert (folder / "done.json").read_text() == "done.json"
    with pytest.raises(ValueError, match="last="), files.new_folder(folder):
        pass


HOLDER = """
import sys
from qwen_jax import files
with files.locked(files.as_path(sys.argv[1]), lease=float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Starts a process that holds a folder."""
    started = []

    def start(folder, lease):
        command = [sys.executable, "-c", HOLDER, str(folder), str(lease)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_lock_names_its_living_holder(folder, holder):
    process = holder(folder, 1)
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on "), files.locked(folder):
        pass
    process.communicate()
    assert process.returncode == 0
    with files.locked(folder):  # at once: the holder has let it go
        assert names(folder) == [] and (folder / files.LOCK_FILE).is_file()
    assert not (folder / files.LOCK_FILE).is_file()


def test_the_lock_of_a_killed_process_goes_to_one_successor(folder, holder):
    process = holder(folder, 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with files.locked(folder, lease=1), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
        with files.locked(folder, lease=1):
            pass


def test_a_lock_survives_lost_answers(store):
    folder = files.as_path(store.folder())
    with FaultProxy(store) as proxy, through(store, proxy):
        proxy.faults = [Fault("PUT .*lock", "lost")]
        with files.locked(folder, lease=0.3):
            proxy.wait_for("PUT .*lock", count=5)  # renewed all the same
            with pytest.raises(ValueError, match="in use by process"), files.locked(folder):
                pass
    assert not (folder / files.LOCK_FILE).is_file()


@pytest.mark.parametrize("kind", ["503", "cut_upload", "cut_download", "expired", "lost"])
def test_transient_faults_are_repeated_and_nothing_is_lost(store, kind, tmp_path):
    folder, data = files.as_path(store.folder()), os.urandom(200_000)
    (tmp_path / "a").write_bytes(data)
    with FaultProxy(store) as proxy, through(store, proxy):
        proxy.faults = [Fault(f"{method} ", kind, count=2) for method in ("PUT", "GET", "HEAD")]
        files.copy_file(tmp_path / "a", folder / "a")
        with files.open_file(folder / "a") as file:
            assert file.read() == data
        files.copy_file(folder / "a", tmp_path / "b")
        assert files.find(f"{folder}/*") == [folder / "a"]
    assert (tmp_path / "b").read_bytes() == data
    met = {fault.match for fault in proxy.faults if fault.met == 2}
    # Half of a small answer's body, where it has any, is cut off.
    assert met >= ({"GET "} if kind == "cut_download" else {"PUT ", "GET ", "HEAD "})


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("503", OSError, r"after \d+ retries.*503 Service Unavailable"),
        ("expired", PermissionError, "the credentials have expired"),
        ("403", PermissionError, "no permission"),
        ("region", OSError, "another region: set AWS_REGION"),
    ],
)
def test_lasting_faults_end_in_one_line_that_names_the_object(store, kind, error, message):
    path = files.as_path(store.folder("a"))
    path.write_text("1")
    with FaultProxy(store) as proxy, through(store, proxy):
        proxy.faults = [Fault("", kind, count=1_000_000)]
        for operation in (path.read_text, lambda: path.write_text("2")):
            with pytest.raises(error, match=message) as found:
                operation()
            assert str(found.value).startswith(f"{path}: ") and "\n" not in str(found.value)
    assert path.read_text() == "1"


def test_an_object_that_changes_during_a_read_is_refused(folder, monkeypatch):
    from qwen_jax.files.reading import RemoteFile

    monkeypatch.setattr(RemoteFile, "BLOCK", 1000)
    (folder / "a").write_bytes(b"1" * 10_000)
    with files.open_file(folder / "a") as file:
        file.read(100)
        (folder / "a").write_bytes(b"2" * 10_000)
        with pytest.raises(files.ObjectChangedError, match="another process has written this object"):
            file.seek(9_000)
            file.read()


def test_a_bucket_that_does_not_exist_is_named(store):
    path = files.as_path(f"{store.scheme}://no-such-bucket/a")
    for operation in (path.exists, path.read_text, lambda: path.write_text(""), lambda: files.find(f"{path}/*")):
        with pytest.raises(FileNotFoundError, match=f"there is no bucket {store.scheme}://no-such-bucket"):
            operation()


def test_without_obstore_the_error_says_what_to_install(monkeypatch):
    from qwen_jax.files import objects

    objects.forget_stores()
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ValueError, match=r"pip install -c requirements.txt -e '.\[gcs\]'"):
        files.as_path("gs://bucket/a").exists()
    with pytest.raises(ValueError, match=r"'.\[s3\]'"):
        files.as_path("s3://bucket/a").read_text()
