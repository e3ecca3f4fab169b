"""Damaged files: K damaged records cost K records, and what was read and what was left out make up the file."""

import gzip
import random
import zlib

import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwen_jax.curation import readers
from qwen_jax.curation.tally import UNREADABLE, Tally

CONTAINERS = {
    "plain": ("x.warc", bytes, False),
    "gzip members": ("x.warc.gz", gzip.compress, False),
    "one gzip stream": ("x.warc.gz", gzip.compress, True),
    "Zstandard frames": ("x.warc.zst", zstandard.compress, False),
    "one Zstandard frame": ("x.warc.zst", zstandard.compress, True),
}
# What happens to a record before it is compressed.
DAMAGE = {
    "shorter": lambda record: record[:-90],
    "longer": lambda record: record[:-4] + b"more than the length says" * 3 + record[-4:],
    "far too long": lambda record: record.replace(b"\nContent-Length: ", b"\nContent-Length: 99"),
    "beyond the limit": lambda record: record.replace(b"\nContent-Length: ", b"\nContent-Length: 99999"),
    "no number": lambda record: record.replace(b"\nContent-Length: ", b"\nContent-Length: x"),
    "no length": lambda record: record.replace(b"\nContent-Length: ", b"\nContent-Lenght: "),
    "cut in its header": lambda record: record[: record.index(b"Content-Type")],
    "no version": lambda record: record.replace(b"WARC/1.0", b"\x00\xfeRC/1"),
}
HEADLESS = ("cut in its header", "no version")


def container(name: str, records: list[bytes]) -> bytes:
    _, compress, whole = CONTAINERS[name]
    return compress(b"".join(records)) if whole else b"".join(map(compress, records))


def read(path, data: bytes, max_bytes: int = 100_000):
    path.write_bytes(data)
    tally = Tally.of(str(path))
    found = list(readers.read(str(path), text_field="text", max_bytes=max_bytes, tally=tally))
    assert sum(size for _, size in tally.outcomes.values()) == len(data) == tally.size
    return found, tally


@pytest.fixture(scope="module")
def make(tool):
    record = tool("make_crawl").warc_record

    def made(number: int) -> bytes:
        words = random.Random(number).choices("the river was seen by every student in spring".split(), k=30)
        return record(f"http://{number}", b"<p>" + b" ".join(word.encode() for word in words))

    return made


@settings(max_examples=150, deadline=None)
@given(
    damage=st.lists(st.sampled_from([None, None, *DAMAGE]), min_size=2, max_size=12),
    name=st.sampled_from(sorted(CONTAINERS)),
)
def test_damaged_records_cost_themselves(damage, name, make, tmp_path_factory):
    # The rest of a header without its first line would complete the one that is cut.
    assume(("cut in its header", "no version") not in zip(damage, damage[1:], strict=False))
    records = [DAMAGE[kind](make(number)) if kind else make(number) for number, kind in enumerate(damage)]
    path = tmp_path_factory.getbasetemp() / CONTAINERS[name][0]
    found, tally = read(path, container(name, records))
    intact = [f"http://{number}" for number, kind in enumerate(damage) if kind is None]
    assert [one.url for one in found if one.problem is None] == intact
    broken = [one for one in found if one.problem]
    assert {one.problem for one in broken} <= {"broken_record"}
    # Behind a damaged record, one without a whole header cannot be told from the rest of the damage.
    told = [
        kind for place, kind in enumerate(damage) if kind and (kind not in HEADLESS or not any(damage[:place][-1:]))
    ]
    assert len(told) == len(broken) == tally.outcomes.get("broken_record", [0])[0]
    if name == "plain":
        sizes = [len(record) for record, kind in zip(records, damage, strict=True) if kind is None]
        assert tally.outcomes.get("read", [0, 0]) == [len(intact), sum(sizes)]
        assert tally.unread == len(path.read_bytes()) - sum(sizes)
    elif name in ("gzip members", "Zstandard frames"):
        sizes = [len(CONTAINERS[name][1](record)) for record, kind in zip(records, damage, strict=True) if kind is None]
        assert tally.outcomes.get("read", [0, 0]) == [len(intact), sum(sizes)]


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\r\n"], ids=["LF", "CR CR LF"])
def test_headers_with_other_line_ends(line_end, name, make, tmp_path):
    """CR CR LF: written through a text file of Windows. A record with usual ends and a damaged one stand between."""
    changed = []
    for number in range(4):
        header, body = make(number).split(b"\r\n\r\n", 1)
        assert body.endswith(b"\r\n\r\n")
        ended = (header + b"\r\n\r\n").replace(b"\r\n", line_end) + body[:-4] + 2 * line_end
        changed.append(ended)
    data = container(name, [changed[0], make(5), changed[1], DAMAGE["no number"](changed[2]), changed[3]])
    found, tally = read(tmp_path / CONTAINERS[name][0], data)
    pages = [page for page in found if page.problem is None]
    assert [page.url for page in pages] == [f"http://{number}" for number in (0, 5, 1, 3)]


@pytest.mark.parametrize(
    "line",
    [b"WARC/1.0\r\n", b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 90000\r\n\r\n", b"WARC/1.0\r\nA: b\r\n"],
)
def test_nothing_but_headers_takes_linear_time(line, make, tmp_path):
    """Each header could be the next record: 5 MB of them are left behind without looking far ahead from each."""
    data = line * (5_000_000 // len(line)) + make(1)
    found, tally = read(tmp_path / "x.warc", data, max_bytes=1000)
    assert found[-1].url == "http://1" and tally.unread > 4_900_000


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_members_cost_themselves(data, make, tmp_path_factory):
    """Bytes overwritten after compression, where the compression has a checksum that tells."""
    compress = data.draw(
        st.sampled_from([gzip.compress, lambda one: zstandard.ZstdCompressor(write_checksum=True).compress(one)])
    )
    count = data.draw(st.integers(2, 9))
    members = [compress(make(number)) for number in range(count)]
    hit = data.draw(st.sets(st.integers(0, count - 1), max_size=count))
    for number in hit:
        member = bytearray(members[number])
        place = data.draw(st.integers(20, len(member) - 30))
        member[place : place + 8] = bytes(one ^ 0x5A for one in member[place : place + 8])
        members[number] = bytes(member)
    path = tmp_path_factory.getbasetemp() / ("m.warc.gz" if compress is gzip.compress else "m.warc.zst")
    found, tally = read(path, b"".join(members))
    assert [one.url for one in found if one.problem is None] == [f"http://{n}" for n in range(count) if n not in hit]
    assert tally.outcomes.get("broken_record", [0])[0] == sum(1 for one in found if one.problem) == len(hit)
    assert tally.unread == sum(len(members[number]) for number in hit)


def test_a_damaged_member_behind_padding_costs_itself(make, tmp_path):
    """Members on a tape begin at multiples of its blocks, and zeros fill what is between."""
    members = [gzip.compress(make(number)) for number in range(3)]
    damaged = bytearray(members[1])
    damaged[40:48] = bytes(one ^ 0x5A for one in damaged[40:48])
    padded = [one + b"\0" * (-len(one) % (1 << 15)) for one in (members[0], bytes(damaged), members[2])]
    found, tally = read(tmp_path / "x.warc.gz", b"".join(padded))
    assert [(one.url, one.problem) for one in found if one.problem is None] == [("http://0", None), ("http://2", None)]
    assert tally.outcomes["broken_record"][0] == sum(1 for one in found if one.problem) == 1
    assert len(padded[1]) <= tally.unread <= len(padded[0]) + len(padded[1])  # with the zeros before it


def test_what_comes_before_damage_in_one_stream_is_kept(make, tmp_path):
    records = [make(number) for number in range(2000)]
    ends = [0]
    for record in records:
        ends.append(ends[-1] + len(record))
    for name, packed in (
        ("x.warc.gz", gzip.compress(b"".join(records))),
        ("x.warc.zst", zstandard.compress(b"".join(records))),
    ):
        middle = len(packed) // 2
        damaged = packed[:middle] + bytes(64) + packed[middle + 64 :] + (packed if name.endswith("gz") else b"")
        found, tally = read(tmp_path / name, damaged)
        good = [one.url for one in found if not one.problem]
        if name.endswith("gz"):  # another member follows
            good, again = good[: -len(records)], good[-len(records) :]
            assert again == [f"http://{number}" for number in range(len(records))]
        if name.endswith("gz"):
            inflate = zlib.decompressobj(31)
            size = len(inflate.decompress(packed[: middle - 8]))
            before = sum(end <= size for end in ends) - 2
            # Between the damage and where zlib notices it, records can be wrong and look whole.
            assert good[:before] == [f"http://{number}" for number in range(before)] and before > 500
        assert tally.unread > len(packed) // 3


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_bytes_add_up_whatever_a_file_holds(data, make, tmp_path_factory):
    kind = data.draw(
        st.sampled_from(["x.warc", "x.warc.gz", "x.warc.zst", "x.jsonl", "x.jsonl.gz", "x.json.zst", "x.html.gz"])
    )
    parts = [make(1), make(2)] if "warc" in kind else [b'{"text": "one"}\n', b"\n", b'{"text": 1}\n', b"{\n"]
    compress = gzip.compress if kind.endswith("gz") else zstandard.compress if kind.endswith("zst") else bytes
    content = b"".join(
        data.draw(
            st.lists(
                st.one_of(
                    st.sampled_from([compress(part) for part in parts] + [bytes(7), b"WARC/1.0\r\n"]),
                    st.binary(max_size=40),
                ),
                min_size=1,
                max_size=8,
            )
        )
    )
    path = tmp_path_factory.getbasetemp() / f"any-{kind}"
    found, tally = read(path, content, max_bytes=data.draw(st.sampled_from([5, 600, 100_000])))
    assert tally.outcomes.get("read", [0])[0] == sum(one.problem is None for one in found)
    for reason in UNREADABLE:
        assert tally.outcomes.get(reason, [0])[0] == sum(one.problem == reason for one in found)


def test_a_damaged_row_group_costs_its_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "x.parquet"
    rows = [f"row {number} " * 20 for number in range(90)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": rows}), path, row_group_size=30, compression="gzip", use_dictionary=False
    )
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    data[end - 30 : end] = bytes(30)
    found, tally = read(path, bytes(data))
    assert [one.payload for one in found if not one.problem] == rows[:30] + rows[60:]
    assert tally.outcomes["unreadable_file"][0] == 30 and tally.outcomes["read"][0] == 60
