"""Uploads beside the work: what a piece wrote is in its bucket when the stage ends, whole, in order, or not at all."""

import contextlib
import os
import tempfile
import threading

import pytest

from qwen_jax import files
from qwen_jax.files import uploads
from qwen_jax.workers import open_workers
from tests.object_stores import Fault, FaultProxy, environment, s3, stores  # noqa: F401

FILES = ("array.bin", "last.txt")
LIMIT = {"QWEN_JAX_STORE_RETRY_SECONDS": "2"}


@pytest.fixture
def folder(s3):  # noqa: F811
    """A new folder of a bucket."""
    return files.as_path(s3.folder())


@pytest.fixture
def proxy(s3):  # noqa: F811
    """Between this process and the bucket."""
    with FaultProxy(s3) as found, environment(s3.through(found) | LIMIT):
        yield found


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder of temporary files, for this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def make(folder, number: int) -> None:
    with files.new_folder(folder / f"made{number}", last="last.txt") as local:
        (local / "array.bin").write_bytes(bytes([number]) * 1000)
        (local / "last.txt").write_text("complete")
    with files.new_file(folder / f"{number}.bin") as local:
        local.write_bytes(bytes([number]) * 1000)
    files.write_text(folder / f"{number}.txt", f"{number} by {os.getpid()}")


def make_but_not_two(folder, number: int) -> None:
    make(folder, number)
    if number == 2:
        raise ValueError("piece 2 is wrong")


def names(folder) -> list[str]:
    return [str(path.relative_to(folder)) for path in files.find(f"{folder}/**")]


def made(*numbers: int) -> list[str]:
    each = (
        (f"{number}.bin", f"{number}.txt", f"made{number}/array.bin", f"made{number}/last.txt") for number in numbers
    )
    return sorted(name for some in each for name in some)


def test_the_next_piece_works_while_one_is_uploaded(folder, proxy, scratch):
    proxy.hold(r"PUT .*/0\.bin")
    with files.UploadsBehind() as work:
        work(make, folder, 0)
        proxy.wait_for(r"PUT .*/0\.bin")
        work(make, folder, 1)
        assert work.waiting
        # Of piece 0, what comes after the object that is held is not there.
        assert not {"0.bin", "0.txt"} & set(names(folder)) and "made0/last.txt" in names(folder)
        proxy.release()
    assert names(folder) == made(0, 1) and not work.waiting
    assert (folder / "1.bin").read_bytes() == b"\x01" * 1000
    assert not list(scratch.iterdir())


def test_of_a_piece_that_fails_nothing_is_uploaded(folder, scratch):
    with pytest.raises(ValueError, match="piece 2 is wrong"), files.UploadsBehind() as work:
        for number in (1, 2, 3):
            work(make_but_not_two, folder, number)
    assert names(folder) == made(1)
    assert not list(scratch.iterdir())


def test_a_piece_that_writes_much_uploads_it_at_once_and_in_order(folder, scratch, monkeypatch):
    monkeypatch.setattr(uploads, "_BYTES", 1500)
    found = []

    def piece():
        for number in range(4):
            files.write_text(folder / f"{number}", "x" * 1000)
            found.append(names(folder))

    with files.UploadsBehind() as work:
        work(piece)
    assert found == [[], ["0", "1"], ["0", "1"], ["0", "1", "2", "3"]]


def test_much_that_is_uploaded_is_waited_for(folder, proxy, monkeypatch):
    monkeypatch.setattr(uploads, "_BYTES", 3000)
    proxy.hold(r"PUT .*/0\.bin")
    with files.UploadsBehind() as work:
        work(make, folder, 0)
        proxy.wait_for(r"PUT .*/0\.bin")
        threading.Timer(0.2, proxy.release).start()
        work(make, folder, 1)  # some 4,000 bytes together
        assert "0.bin" in names(folder)
    assert names(folder) == made(0, 1)


@pytest.mark.parametrize("number_of_workers", [1, 2])
def test_what_is_made_stays_where_another_piece_fails(folder, proxy, number_of_workers):
    proxy.latency = 0.2
    with open_workers(number_of_workers) as workers, pytest.raises(ValueError, match="piece 2 is wrong"):
        workers("some", make_but_not_two, [(folder, number) for number in (0, 1, 2)], lambda left: [])
    assert set(made(0, 1)) <= set(names(folder)) and not {"2.bin", "2.txt"} & set(names(folder))


def test_what_was_begun_is_not_found_by_a_later_stage(folder):
    """The object may be another one by then."""
    for number in range(2):
        (folder / f"{number}").write_text("old")

    def piece(number):
        if number == 0:
            raise ValueError("a bad row")

    def read(number):
        found.append((folder / f"{number}").open("rb").read())

    found, pieces = [], [(0,), (1,)]
    with open_workers() as workers:
        for function in (piece, read):
            if function is read:
                for number in range(2):
                    (folder / f"{number}").write_text("new")
            with contextlib.suppress(ValueError):
                workers("some", function, pieces, lambda left: [True, True], lambda number: [folder / f"{number}"])
    assert found == [b"new", b"new"]
    opened = files.opened_in_turn([folder / "0", folder / "1"])
    next(opened)
    opened.close()
    (folder / "1").write_text("newer")
    assert (folder / "1").open("rb").read() == b"newer"


def test_an_upload_that_fails_ends_the_work_with_its_object(folder, proxy, scratch):
    proxy.faults.append(Fault(r"PUT .*/1\.bin", "403", count=99))
    with pytest.raises(PermissionError, match=r"/1\.bin: no permission"), files.UploadsBehind() as work:
        for number in range(3):
            work(make, folder, number)
        work.wait()
    found = names(folder)
    assert "1.bin" not in found and "1.txt" not in found
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("number_of_workers", [1, 2])
def test_a_stage_ends_when_all_is_uploaded(folder, proxy, number_of_workers):
    proxy.latency = 0.05
    pieces = [(folder, number) for number in range(7)]
    with open_workers(number_of_workers) as workers:
        for label, some in (("first", pieces[:3]), ("second", pieces[3:])):
            workers(label, make, some, lambda left: files.are_files([one / f"{number}.txt" for one, number in left]))
            assert names(folder) == made(*range(3 if label == "first" else 7))


def test_a_stage_of_several_workers_ends_with_the_error_of_an_upload(folder, proxy):
    proxy.faults.append(Fault(r"PUT .*/4\.txt", "403", count=99))
    with (
        open_workers(2) as workers,
        pytest.raises(PermissionError, match=r"/4\.txt: no permission"),
    ):
        workers("some", make, [(folder, number) for number in range(6)], lambda left: [True for _ in left])
    assert set(made(0, 1, 2, 3, 5)) <= set(names(folder))


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_files_are_opened_in_turn(folder, tmp_path, where):
    base = tmp_path if where == "local" else folder
    sizes = {"a": 0, "b": 10, "c": 5_000_000}
    for name, size in sizes.items():
        (base / name).write_bytes(name.encode() * size)
    read = {path.name: len(file.read()) for path, file in files.opened_in_turn([base / name for name in sizes])}
    assert read == sizes
    opened = files.opened_in_turn([base / "b", base / "missing", base / "c"])
    assert next(opened)[1].read(3) == b"bbb"
    with pytest.raises(FileNotFoundError, match="missing"):
        next(opened)
    opened = files.opened_in_turn([base / "b", base / "c"])
    next(opened)
    opened.close()


def test_an_object_with_the_name_of_a_folder_is_one(folder):
    for path in (folder / "a", folder / "a" / "b"):
        path.write_bytes(b"x")
    assert files.are_files([folder / "a" / "b", folder / "a"]) == [True, True]


def test_statuses_of_many_objects_take_one_request(folder, proxy):
    paths = [folder / "deep" / f"{number}.txt" for number in range(20)]
    for number, path in enumerate(paths):
        path.write_bytes(b"x" * number)
    proxy.seen.clear()
    found = files.statuses(paths)
    assert [one.st_size for one in found] == list(range(20)) and len(proxy.seen) == 1
    assert found[3] == paths[3].stat()
    with pytest.raises(FileNotFoundError, match=r"missing.txt: no such object"):
        files.statuses([*paths, folder / "deep" / "missing.txt"])
