"""Files and folders appear whole or not at all, and a lock names who holds it."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading

import pytest

from qwen_jax import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), files.new_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_json_is_written_as_utf8_and_read_back(tmp_path):
    files.write_json(tmp_path / "deep" / "a.json", {"b": "图灵", "a": [1.5, None]}, sort_keys=True)
    assert (tmp_path / "deep" / "a.json").read_text(encoding="utf-8").index('"a"') < 10
    assert files.read_json(tmp_path / "deep" / "a.json") == {"a": [1.5, None], "b": "图灵"}


@pytest.mark.parametrize("text", ["\ud83d", "a\\\udc00b", "😀", "図 \u2028"])
def test_json_with_halves_of_characters_is_written_and_read_back(tmp_path, text):
    """JSON may hold lone surrogates, which UTF-8 cannot."""
    files.write_json(tmp_path / "a.json", {text: text})
    files.write_text(tmp_path / "a.jsonl", files.json_line([text]) + files.json_line(text))
    assert files.read_json(tmp_path / "a.json") == {text: text}
    assert [row for _, row in files.read_json_lines(tmp_path / "a.jsonl")] == [[text], text]


def test_of_two_equal_folders_the_first_stays(tmp_path):
    with files.new_folder(tmp_path / "out") as first:
        (first / "x").write_text("1")
        with files.new_folder(tmp_path / "out") as second:
            (second / "x").write_text("1")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["x"]
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "other") as temporary:
        (temporary / "x").write_text("1")
        raise RuntimeError
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from qwen_jax import files\n"
        "with files.new_folder(Path(sys.argv[1]) / 'run'), files.new_file(Path(sys.argv[1]) / 'a.json') as file:\n"
        "    file.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path]).returncode == 9
    (tmp_path / ".a.tmp").write_text("a user's")
    (tmp_path / ".gitignore").write_text("")
    assert len(names(tmp_path)) == 4
    files.remove_unfinished(tmp_path, "run")
    assert len(names(tmp_path)) == 3
    files.remove_unfinished(tmp_path)
    assert names(tmp_path) == [".a.tmp", ".gitignore"]


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    with files.locked(tmp_path / "run"), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
        with files.locked(tmp_path / "run"):
            pass
    with files.locked(tmp_path / "run"):
        assert json.dumps(names(tmp_path / "run")) == '[".lock"]'


def test_who_waits_for_a_lock_gets_it_and_no_file_stays(tmp_path, caplog):
    order = []

    def second():
        with files.locked_in_turn(tmp_path, ".a.lock"):
            order.append("second")

    with files.locked_in_turn(tmp_path, ".a.lock"):
        thread = threading.Thread(target=second)
        thread.start()
        while not caplog.records:
            assert thread.is_alive()
            thread.join(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and names(tmp_path) == []
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"waiting for another process: {tmp_path} is in use by process {os.getpid()} on ")
    for _ in range(2):
        with files.locked(tmp_path):  # a file that stays is no obstacle
            pass


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Whoever waited for it has opened the file of the last owner; another process would make, and lock, a new one."""
    flock, calls = fcntl.flock, []

    def remove_first(file, how):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with files.locked(tmp_path):
        assert names(tmp_path) == [".lock"] and len(calls) == 2
        with pytest.raises(files.InUseError), files.locked(tmp_path):
            pass


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_that_nests_too_deeply_is_named(tmp_path, name):
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=rf"{name}.*: not JSON: "):
        list(files.read_json_rows(tmp_path / name))


def test_a_file_that_is_renamed_meanwhile_hides_no_others(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_text(name)
    scandir = os.scandir

    @contextlib.contextmanager
    def renaming(folder):
        with scandir(folder) as found:
            entries = sorted(found, key=lambda one: one.name)
            (tmp_path / "b").rename(tmp_path / "d")
            yield entries

    monkeypatch.setattr(os, "scandir", renaming)
    assert files.sizes_in(tmp_path) == {"a": 1, "c": 1}
