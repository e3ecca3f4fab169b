"""What crawlers leave behind: everything is read or counted, nothing is fatal."""

import functools
import gzip

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from qwen_jax.curation import html, language, readers, sources
from qwen_jax.curation.tally import Tally
from qwen_jax.data import corpora

PLAIN = b"WARC/1.0\r\nWARC-Type: resource\r\nWARC-Target-URI: http://x\r\nContent-Length: 5\r\n\r\nhello\r\n\r\n"


def read(path, data: bytes, max_bytes: int = 10_000):
    path.write_bytes(data)
    return list(readers.read(str(path), text_field="text", max_bytes=max_bytes))


@pytest.fixture(scope="module")
def records(tool):
    make = tool("make_crawl").warc_record
    return [make(f"http://{name}", f"<p>page {name}</p>".encode()) for name in "abc"]


@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress])
def test_pages_of_an_archive(records, compress, tmp_path):
    name = "x.warc.gz" if compress is gzip.compress else "x.warc"
    found = read(tmp_path / name, b"".join(map(compress, records)))
    assert [(one.url, one.payload, one.charset, one.is_html) for one in found] == [
        (f"http://{name}", f"<p>page {name}</p>".encode(), "utf-8", True) for name in "abc"
    ]


def test_records_behind_a_broken_one_are_read(records, tmp_path):
    a, b, c = records
    members = list(map(gzip.compress, records))
    damaged = members[1][:40] + bytes(8) + members[1][48:]
    cases = {
        "garbage.warc": (a + b"\x00\xffgarbage\n" * 50 + b + c, "a!bc"),
        "length.warc": (a + b.replace(b"Content-Length: ", b"Content-Length: x") + c, "a!c"),
        "long.warc": (a + b.replace(b"Content-Length: ", b"Content-Length: 999"), "a!"),
        "cut.warc": (a + b[:-30], "a!"),
        "damaged.warc.gz": (members[0] + damaged + members[2], "a!c"),
        "cut.warc.gz": (members[0] + members[1][:60], "a!"),
        "random.warc.gz": (bytes(range(256)) * 40, "!"),
        "empty.warc": (b"", "!"),
    }
    for name, (data, expected) in cases.items():
        found = read(tmp_path / name, data)
        assert "".join("!" if one.problem else one.url[-1] for one in found) == expected, name


def test_what_the_server_said_is_heeded(tool, tmp_path):
    make = tool("make_crawl").warc_record
    packed = make("http://gzip", gzip.compress(b"<p>hi"), "text/html\r\nContent-Encoding: gzip")
    wrong = make("http://wrong", b"no gzip", "text/html\r\nContent-Encoding: gzip")
    bomb = make("http://bomb", gzip.compress(bytes(10**6)), "text/html\r\nContent-Encoding: gzip")
    chunks = make("http://chunks", b"5\r\nhello\r\n0\r\n\r\n", "text/html\r\nTransfer-Encoding: chunked")
    gone, pdf = make("http://gone", b"no", status="404 Not Found"), make("http://pdf", b"%PDF", "application/pdf")
    found = read(tmp_path / "x.warc", packed + wrong + bomb + chunks + gone + pdf + PLAIN)
    assert [(one.payload, one.problem) for one in found] == [
        (b"<p>hi", None),
        (b"no gzip", None),
        (b"", "too_large"),
        (b"hello", None),
        (b"", "http_status"),
        (b"", "not_a_page"),
        (b"hello", None),
    ]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_is_fatal(data, tmp_path_factory, tool):
    good = b"".join(tool("make_crawl").warc_record(f"http://{n}", b"<p>" + b"x" * n) for n in range(3))
    name = data.draw(st.sampled_from(["x.warc", "x.warc.gz", "x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"]))
    if name.endswith("gz"):
        good = gzip.compress(good)
    elif name.endswith("zst"):
        good = zstandard.compress(b'{"text": "hello"}\n' * 9)
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    path = tmp_path_factory.mktemp("damaged") / name
    assert all(one.payload or one.problem for one in read(path, bytes(damaged[:cut])))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_that_are_too_long_or_wrong_are_counted(suffix, tmp_path):
    rows = [
        b'{"text": "one", "url": "http://one"}',
        b'{"text": "' + b"x" * 3_000_000 + b'"}',
        b"{not json",
        b'{"title": 1}',
        b"[1]",
        b"",
        b'{"html": "<p>page"}',
        b'{"text": "\\ud800"}',
        b"[" * 5000,
    ]
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    found = read(tmp_path / f"x.jsonl{suffix}", compress(b"\n".join(rows)))
    assert [one.problem for one in found] == [
        None,
        "too_large",
        "bad_json",
        "no_text_field",
        "no_text_field",
        None,
        None,
        "bad_json",
    ]
    assert found[0].url == "http://one" and found[1].size == len(rows[1]) + 1 and found[5].is_html
    assert html.printable(found[6].payload) == "\ufffd"


def test_a_line_of_100_megabytes_is_not_held_in_memory(tmp_path):
    import tracemalloc

    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "next"}\n')
    tracemalloc.start()
    found = list(readers.read(str(path), text_field="text", max_bytes=1_000_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(one.problem, one.payload) for one in found] == [("too_large", b""), (None, "next")]
    assert found[0].size > 100_000_000 and peak < 10_000_000


def test_a_compressed_file_that_is_cut_off_says_so(tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(20_000))
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        found = read(tmp_path / f"x.jsonl{suffix}", compress(lines)[:-9])
        assert found[-1].problem == "unreadable_file" and found[0].payload == "0"
    two = read(tmp_path / "two.jsonl.zst", zstandard.compress(lines) + zstandard.compress(lines))
    assert len(two) == 40_000 and two[-1].payload == "19999"


def test_parquet_text_and_html_files(tmp_path):
    table = pyarrow.table({"text": ["one", None, "x" * 20_000], "url": ["http://1", "http://2", "http://3"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    found = list(readers.read(str(tmp_path / "x.parquet"), text_field="text", max_bytes=10_000))
    assert [(one.url, one.problem) for one in found] == [
        ("http://1", None),
        ("http://2", "no_text_field"),
        ("http://3", "too_large"),
    ]
    assert [one.is_html for one in read(tmp_path / "x.html", b"<p>x")] == [True]
    assert [one.is_html for one in read(tmp_path / "x.txt", b"x")] == [False]
    assert [one.problem for one in read(tmp_path / "y.txt", b"")] == ["empty_file"]
    assert [one.problem for one in read(tmp_path / "z.txt", b"x" * 20_000)] == ["too_large"]


def test_rows_that_are_not_utf_8_cost_themselves(tmp_path):
    """Arrow looks at no text that it reads: Python does, and raised."""
    offsets = pyarrow.array([0, 3, 5, 10], pyarrow.int32()).buffers()[1]
    texts = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"one\xff\xfethree"))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    tally = Tally.of(str(tmp_path / "x.parquet"))
    found = list(readers.read(str(tmp_path / "x.parquet"), text_field="text", max_bytes=100, tally=tally))
    assert [(one.payload, one.problem) for one in found] == [("one", None), (b"", "broken_record"), ("three", None)]
    assert {reason: records for reason, (records, _) in tally.outcomes.items()} == {"read": 2, "broken_record": 1}
    with pytest.raises(ValueError, match=r"x\.parquet: not a readable Parquet file past row 0: .*can't decode"):
        list(corpora.read_file(tmp_path / "x.parquet"))


def test_sources(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("b.html", "a/c.JSONL", "a/.hidden.txt", "a/d.png"):
        (tmp_path / name).write_text("{}")
    source = sources.list_source("web", [str(tmp_path), str(tmp_path / "*.html")])
    assert [path.removeprefix(source.base) for path, _ in source.files] == ["/a/c.JSONL", "/b.html"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        sources.list_source("web", [str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="d.png: unknown suffix"):
        sources.list_source("web", [str(tmp_path / "a" / "*")])
    with pytest.raises(ValueError, match="becomes a folder"):
        sources.list_source("../web", [str(tmp_path)])


CHINESE = "今天天气很好，我们去公园散步。孩子们在湖边唱歌。"


@pytest.mark.parametrize(
    ("data", "charset", "expected"),
    [
        (CHINESE.encode(), None, CHINESE),
        (CHINESE.encode("gb18030"), "gb2312", CHINESE),
        (CHINESE.encode("gb18030"), None, CHINESE),
        (b'<meta charset="big5">' + "天氣很好".encode("big5"), None, '<meta charset="big5">天氣很好'),
        (CHINESE.encode(), "iso-8859-1", CHINESE),  # the server is wrong
        ("naïve café".encode("cp1252"), "utf-8", "naïve café"),
        ("日本語".encode("iso2022_jp"), "iso-2022-jp", "日本語"),
        (b"\xef\xbb\xbfhello", None, "hello"),
        ("hello".encode("utf-16"), None, "hello"),
        (b"plain", "no-such-charset", "plain"),
    ],
)
def test_encodings(data, charset, expected):
    assert html.decode(data, charset, is_html=True)[0] == expected


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(html.Unreadable, match="undecodable"):
        html.decode(bytes(range(256)) * 10)


def test_text_of_a_page_without_what_surrounds_it(tool):
    page = tool("make_crawl").page("A first sentence of text.\nA second sentence & more.", "The title")
    assert html.extract(page) == "The title\n\nA first sentence of text.\n\nA second sentence & more."


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("aé在。—…।กあ한😀𠀀,1\u00a0à |"), min_size=1, max_size=3), max_size=8),
    st.booleans(),
)
def test_short_pieces_between_links_are_kept(pieces, entities):
    def written(piece: str) -> str:
        return "".join(f"&#{ord(one)};" if entities and ord(one) > 127 else one for one in piece)

    body = "".join(f"<a>{written(one)}</a>" if place % 2 else written(one) for place, one in enumerate(pieces))
    text = html.extract(
        f"<html><body><main><article><p>甲乙<b>丙丁</b>{body}<i>戊己</i></p></article></main></body></html>"
    )
    assert "".join(text.split()) == "".join(f"甲乙丙丁{''.join(pieces)}戊己".split())


def test_a_chinese_sentence_of_links_is_whole():
    text = "<a>图灵</a>在<a>1936</a>年&#20110; <a>剑桥</a>。 Là <i>où</i> <a>l’</a>à."
    assert html.extract(f"<main><article><p>{text}</p></article></main>") == "图灵在1936年于 剑桥。 Là où l’à."


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<",
        "<p>a<p>b<table><tr><td>c<div></table>d &amp &#xZZ;",
        '<a x="' * 1000,
        "<script>",
        "<!--",
        "\x00<p>\ud800</p>",
        "<p>" * 100_000,
    ],
)
def test_malformed_pages_give_some_text(page):
    assert isinstance(html.extract(page), str)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "<div>",
                "</div>",
                "<p>",
                "<table><tr><td>",
                "</table>",
                "<script>x<",
                "</script>",
                "<!--",
                "-->",
                "<![CDATA[",
                "&amp",
                "&#0;",
                "&#xD800;",
                "<svg>",
                "<math>",
                "<template>",
                "</p",
                "<a href='",
                "text ",
                "\x00",
                "\ud800",
                "<select><option>",
                "<body>",
                "</html>",
                "<frameset>",
                "<plaintext>",
                "<title>",
                "<noscript>",
                "<textarea>",
                "世界",
                "<h1>",
                "<b><i></b></i>",
            ]
        ),
        max_size=40,
    )
)
def test_no_page_is_fatal(pieces):
    text = html.extract("".join(pieces))
    assert "\x00" not in text and text.encode().decode() == text


def test_a_page_made_to_exhaust_the_parser_is_refused():
    with pytest.raises(html.Unreadable, match="nested_too_deeply"):
        html.extract("<div>" * 100_000)


@pytest.mark.parametrize(
    "attributes", ["modal ", "class='header ", " id=a", " class=share", "class='a' ", " class='no-"]
)
def test_a_tag_without_an_end_takes_linear_time(attributes):
    page = f"<p>A sentence before it.</p><div {attributes * (300_000 // len(attributes))}"
    assert isinstance(html.extract(page), str)


CAPITALS = "THE COMMITTEE DECIDED TO KEEP THE OLD LIBRARY OPEN, ALTHOUGH MONEY WAS SHORT AND THE WINTER WAS COMING."


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (CHINESE, "zh"),
        ("The committee decided to keep the old library open, although money was short.", "en"),
        ("Le musée de la ville est ouvert tous les jours, sauf le lundi.", "fr"),
        ("Die alte Bibliothek bleibt geöffnet, obwohl das Geld knapp ist.", "de"),
        ("これは日本語の文章です。図書館はまだ開いています。", "ja"),
        ("Старая библиотека остаётся открытой, хотя денег мало.", "ru"),
        ("СТАРАЯ БИБЛИОТЕКА ОСТАЁТСЯ ОТКРЫТОЙ, ХОТЯ ДЕНЕГ МАЛО. о", "ru"),
        ("臺灣的高速鐵路連接臺北與高雄，行車時間約一個半小時。", "zh"),
        ("我哋今日去咗公園玩，啲細路喺湖邊唱歌，佢哋好開心㗎。", "zh"),
        (CAPITALS, "en"),
        (CAPITALS + " a", "en"),
        ("12345 --- 678", "und"),
        ("", "und"),
    ],
)
def test_languages(text, code):
    found, probability = language.identify(text)
    assert found == code and (probability > 0.5) == (code != "und")


def test_chinese_languages_count_together_unless_kept_apart():
    traditional = "香港特別行政區政府今日公布，明年起調整公共交通費用，市民可於網上查詢。"
    code, probability = language.identify(traditional)
    apart, alone = language.identify(traditional, {})
    assert (code, apart) == ("zh", "zh") and alone < 0.6 and probability > 0.99
    assert language.identify("我哋今日去咗公園玩，啲細路喺湖邊唱歌，佢哋好開心㗎。", {})[0] == "yue"


LIBRARY = functools.cache(lambda: LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True))


@settings(max_examples=150)
@given(st.text(st.sampled_from("the of and в на 的是了 é\u0301ßñあ한ع\n.1Aﬁ\ud800") | st.characters(), max_size=300))
def test_probabilities_are_those_of_the_library_to_the_last_bit(text):
    mine = language.model().probabilities(text)
    first = {}
    for label, value in zip(language.model().labels, mine.tolist(), strict=True):
        first.setdefault(label, value)
    assert first == dict(LIBRARY().rank(text))


def test_the_model_has_as_many_languages_as_the_documentation_says():
    codes = set(language.model().labels)
    assert len(codes) == 140 and {"zh", "yue", "wuu", "zxx"} < codes
    assert "139 languages and `zxx`" in language.__doc__
