"""Makes a small crawl to try curation on: WARC with typical defects of web pages, and the pages of a good source.

    python tools/make_crawl.py --output=crawl --pages=400

Text is put together from word lists (English and Chinese), so nothing is downloaded. In `crawl/web/*.warc.gz`: articles
with menus, exact and near copies, spam, pages in French, a page that holds a question of a benchmark, and broken
records. In `crawl/books/*.jsonl.zst`: longer texts, of which the crawl has copies. In `crawl/benchmark.jsonl`: the
benchmark. In `crawl/examples.jsonl`: labeled examples for classifiers.
"""

import argparse
import gzip
import html
import json
import random
import sys
from pathlib import Path

import zstandard

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax import command_line

_SUBJECTS = (
    "the old library,a young engineer,the river,her grandmother,this small village,the committee,every student,our "
    "neighbour,the research ship,an unknown painter,the night train,that careful doctor,the city council,a group of "
    "farmers,the museum,his teacher,the northern harbour,a retired sailor,the orchestra,the gardener"
).split(",")
_VERBS = (
    "has collected,will repair,was writing about,carefully studied,never forgot,has often described,decided to keep,is "
    "building,wanted to explain,could not find,slowly changed,sold,has translated,remembered,is looking for,designed"
).split(",")
_OBJECTS = (
    "a map of the mountains,the history of paper,the first steam engine,several letters from the war,a bridge of stone,"
    "the names of all the birds,a method for cleaning water,the songs of the coast,an almost forgotten language,the "
    "wooden boats,a theory of colour,seeds from the south,the rules of the game,a clock with two faces,the roof of the "
    "church"
).split(",")
_ENDS = (
    "in the spring of that year,because nobody else was interested,with the help of a friend,and this is still visible,"
    "before the winter came,for a long time,as it is told in the valley,at the end of the road,but the result was "
    "different,although money was short,when the rain stopped,which surprised them all"
).split(",")
_HAN = (
    "老师,学生,工程师,河流,图书馆,城市,村庄,博物馆,火车,医生,农民,画家,科学家,朋友,孩子们",
    "正在研究,终于找到了,经常谈论,仔细地记录了,想要保护,慢慢改变了,很喜欢,没有忘记,修好了,翻译了",
    "一座古老的桥,山里的地图,关于水的方法,海边的歌,第一台机器,很多旧信件,春天的种子,两张照片,一本历史书,木船",
    "因为人很少,而且这很重要,在冬天到来之前,和朋友一起,所以大家都高兴,不过结果并不一样,就在路的尽头",
)
_NAME_PARTS = "ba,der,fi,gol,hu,kam,len,mor,nis,pel,qua,ros,sti,tor,ul,ven,wex,yar,zin,cho".split(",")
_NAME_CHARACTERS = "安白成春德东方光国海和红华江金兰林龙美明南平青清泉仁山石水松天文西新星雪云志中竹子紫"
_QUESTION = (
    "A baker makes forty loaves in the morning and sells three quarters of them before noon, then bakes half as many "
    "again as remain; how many loaves of bread does the baker have at the end of the day?"
)


def english(generator: random.Random, sentences: int) -> str:
    """Paragraphs of so many sentences in all."""
    made = []
    for number in range(sentences):
        parts = [generator.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS)]
        names = ["".join(generator.choices(_NAME_PARTS, k=3)).title() for _ in range(2)]
        sentence = " ".join((parts[0], "of", names[0], *parts[1:3], "near", names[1], parts[3]))
        made.append(sentence[0].upper() + sentence[1:] + (".\n" if number % 5 == 4 else "."))
    return " ".join(made).replace("\n ", "\n")


def chinese(generator: random.Random, sentences: int) -> str:
    """The same in Chinese."""
    made = []
    for number in range(sentences):
        a, b, c, d = (generator.choice(words.split(",")) for words in _HAN)
        name = "".join(generator.choices(_NAME_CHARACTERS, k=4))
        made.append(f"{name}的{a}{b}{c}，{d}。" + ("\n" if number % 5 == 4 else ""))
    return "".join(made)


def edited(generator: random.Random, text: str, share: float) -> str:
    """The text with one run of its words, `share` of them, replaced."""
    words = text.split(" ")
    length = max(1, round(share * len(words)))
    start = generator.randrange(max(1, len(words) - length))
    words[start : start + length] = [generator.choice(_SUBJECTS) for _ in range(length)]
    return " ".join(words)


def page(text: str, title: str) -> str:
    """An HTML page with a menu and a footer around the text."""
    paragraphs = "".join(f"<p>{html.escape(line)}</p>\n" for line in text.split("\n") if line)
    menu = "".join(f'<li><a href="/{name}">{name}</a></li>' for name in ("Home", "News", "Shop", "Login"))
    return (
        f"<!DOCTYPE html><html><head><title>{title}</title><script>var tracking = '{title}';</script></head><body>"
        f"<nav><ul>{menu}</ul></nav><main><article><h1>{title}</h1>\n{paragraphs}</article></main>"
        "<footer>© Example, all rights reserved. <a href='/privacy'>Privacy</a></footer></body></html>"
    )


def warc_record(url: str, body: bytes, content_type: str = "text/html; charset=utf-8", status: str = "200 OK") -> bytes:
    """A response record of WARC 1.0."""
    payload = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n\r\n".encode() + body
    head = (
        f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2023-08-01T00:00:00Z\r\n"
        f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload + b"\r\n\r\n"


def _web(generator: random.Random, pages: int, books: list[str]) -> list[bytes]:
    records = []

    def add(text, content_type="text/html; charset=utf-8", encoding="utf-8"):
        number = len(records)
        body = page(text, text[:24].title()).encode(encoding, "replace")
        records.append(warc_record(f"https://example.org/{number}", body, content_type))

    articles = []
    for number in range(pages):
        make = chinese if number % 3 == 2 else english
        articles.append(make(generator, generator.randint(12, 40)))
        add(articles[-1])
    for text in generator.sample(articles, pages // 10):
        add(text.upper() if generator.random() < 0.5 else text.replace(". ", " .  "))
    for text in generator.sample(articles[::3], pages // 12):
        add(edited(generator, text, 0.05))
    for text in books[: pages // 20]:
        add(text)
    for number in range(pages // 20):
        add("Buy cheap watches now!!! $$$ 99.99 *** >>> click here <<<\n" * (20 + number))
        add("Le musée de la ville est ouvert tous les jours, sauf le lundi, et les enfants entrent gratuitement. " * 5)
        add(english(generator, 2))
        add("You are a filthy stupid idiot and everybody hates you, idiot. " + english(generator, 14))
    add(english(generator, 8) + " " + _QUESTION + " " + english(generator, 8))
    add(chinese(generator, 30), "text/html; charset=gb18030", "gb18030")
    records.append(warc_record("https://example.org/gone", b"not found", status="404 Not Found"))
    records.append(warc_record("https://example.org/a.pdf", b"%PDF-1.4 ...", "application/pdf"))
    records.append(warc_record("https://example.org/bad", b"<p><div<<b>unclosed <table>&nbsp;&#xZZ;"))
    records.append(b"garbage between two records\r\n" * 5)
    records.append(warc_record("https://example.org/binary", bytes(range(256)) * 40))
    return records


def make(folder: Path, pages: int, seed: int = 0) -> None:
    """Writes the crawl; the same for the same arguments."""
    generator = random.Random(seed)
    (folder / "web").mkdir(parents=True, exist_ok=True)
    (folder / "books").mkdir(exist_ok=True)
    books = [(english if n % 2 else chinese)(generator, 120) for n in range(max(4, pages // 10))]
    records = _web(generator, pages, books)
    generator.shuffle(records)
    for part in range(2):
        data = b"".join(gzip.compress(record, mtime=0) for record in records[part::2])
        (folder / "web" / f"part-{part}.warc.gz").write_bytes(data)
    # The last record of this file is cut off, as by a crawler that was killed.
    whole = warc_record("https://example.org/cut", page(english(generator, 20), "Cut").encode())
    (folder / "web" / "part-2.warc.gz").write_bytes(gzip.compress(whole, mtime=0) + gzip.compress(whole, mtime=0)[:300])
    (folder / "web" / "empty.html").write_bytes(b"")
    (folder / "web" / "lines.jsonl").write_bytes(b'{"text": "a line that is cut\n{"title": "no text"}\n')
    rows = [_line({"text": text, "url": f"book {number}"}) for number, text in enumerate(books)]
    (folder / "books" / "books.jsonl.zst").write_bytes(zstandard.compress("\n".join(rows).encode()))
    (folder / "benchmark.jsonl").write_text(_line({"question": _QUESTION, "answer": "15"}) + "\n", encoding="utf-8")
    with (folder / "examples.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(120):
            good, calm = english(generator, 10), chinese(generator, 10)
            spam = "Buy cheap watches now, click here! " * generator.randint(3, 9) + english(generator, 1)
            rude = "You stupid idiot, everybody hates you. " + english(generator, generator.randint(1, 10))
            for text, quality, offensive in ((good, 1, 0), (calm, 1, 0), (spam, 0, 0), (rude, 0, 1)):
                file.write(_line({"text": text, "quality": quality, "offensive": offensive}) + "\n")


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False)


def main(argv: list[str] | None = None) -> None:
    """Runs `make` with arguments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=command_line.path_argument, help="folder of the crawl")
    parser.add_argument("--pages", type=int, default=400, help="number of articles (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for all choices (default: %(default)s)")
    arguments = parser.parse_args(argv)
    make(arguments.output, arguments.pages, arguments.seed)
    print(f"{arguments.output}: web/, books/, benchmark.jsonl, examples.jsonl")


if __name__ == "__main__":
    command_line.run(main)
