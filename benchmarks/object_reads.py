"""A server of objects that are files of a folder, for reads alone.

    python benchmarks/object_reads.py FOLDER SECONDS

It prints its port and answers as S3 does to GET (with ranges), HEAD and listings, SECONDS later. It serves some
thousand requests a second on a core, where moto behind a proxy serves some hundred: what is measured is the reader. It
ends when standard input does.
"""

import asyncio
import email.utils
import sys
import urllib.parse
from pathlib import Path

_LISTING = (
    '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false'
    "</IsTruncated>{}</ListBucketResult>"
)
_ENTRY = (
    "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>0</ETag>"
    "<Size>{}</Size></Contents>"
)


class Server:
    """Serves the files below a folder as the objects of any bucket."""

    def __init__(self, folder: Path, latency: float):
        self._folder, self._latency = folder, latency
        self._contents: dict[str, bytes] = {}

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the requests of one connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                await asyncio.sleep(self._latency)
                writer.write(self._answer(head))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()

    def _answer(self, head: str) -> bytes:
        first, *lines = head.split("\r\n")
        method, target = first.split(" ")[:2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        url = urllib.parse.urlsplit(target)
        key = urllib.parse.unquote(url.path).lstrip("/").partition("/")[2]
        if "list-type" in url.query:
            return _response("200 OK", self._listing(urllib.parse.parse_qs(url.query).get("prefix", [""])[0]))
        if key not in self._contents:
            if not (self._folder / key).is_file():
                return _response("404 Not Found", b"<Error><Code>NoSuchKey</Code></Error>")
            self._contents[key] = (self._folder / key).read_bytes()
        data, status, more = self._contents[key], "200 OK", {}
        if "range" in headers:
            start, stop = (int(number) for number in headers["range"].removeprefix("bytes=").split("-"))
            if start >= len(data):
                return _response("416 Range Not Satisfiable", b"<Error><Code>InvalidRange</Code></Error>")
            stop = min(stop, len(data) - 1)
            more = {"Content-Range": f"bytes {start}-{stop}/{len(data)}"}
            data, status = data[start : stop + 1], "206 Partial Content"
        return _response(status, data, more, body=method != "HEAD")

    def _listing(self, prefix: str) -> bytes:
        found = [path for path in (self._folder / prefix).rglob("*") if path.is_file()]
        entries = (_ENTRY.format(path.relative_to(self._folder), path.stat().st_size) for path in found)
        return _LISTING.format("".join(entries)).encode()


def _response(status: str, data: bytes, more: dict[str, str] | None = None, body: bool = True) -> bytes:
    lines = {
        "Content-Length": str(len(data)),
        "ETag": '"0"',
        "Last-Modified": email.utils.formatdate(0, usegmt=True),
        **(more or {}),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + (data if body else b"")


async def main() -> None:
    """Serves until standard input ends."""
    server = await asyncio.start_server(Server(Path(sys.argv[1]), float(sys.argv[2])), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
