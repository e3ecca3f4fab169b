"""Many clients that ask, leave, and send what is wrong: all who wait are answered, and nothing of them stays behind."""

import asyncio
import collections
import contextlib
import json
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from tests.fakes import random_run

pytest.importorskip("starlette", reason="the server needs the extra `serve`")

SIZES = dict(hidden_size=32, num_layers=2, num_heads=2, ffn_size=48, context_length=256)
CLIENTS, SLOTS, MOST_BYTES = 12, 4, 20_000
SYSTEM = {"role": "system", "content": "Answer in the language of the question, in one sentence."}
QUESTIONS = ["Hello!", "你好吗？", "🙂" * 9, "What is " + "very " * 12 + "long?"]
WRONG = [
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}',
    b'{"messages": [{"role": "user", "content": 7}]}',
    b'{"messages": [{"role": "nobody", "content": "a"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": "hot"}',
    b'{"messages": ' + b"[" * 5_000,
]


def asked(question: str, **options) -> bytes:
    """The body of a valid request; what a greedy one is answered depends on `question` alone."""
    messages = [SYSTEM, {"role": "user", "content": question}]
    return json.dumps({"messages": messages, "max_tokens": 24, "temperature": 0, **options}).encode()


@contextlib.asynccontextmanager
async def sent(port: int, body: bytes):
    """A connection on which a request was sent: the reader of the answer."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        yield reader
    finally:
        writer.transport.abort()


async def answer(port: int, body: bytes) -> tuple[int, bytes]:
    """(status, everything after the head)."""
    async with sent(port, body) as reader:
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    return int(head.split()[1]), content


def streamed_text(content: bytes) -> tuple[str, str | None]:
    """(text, finish reason) of an answer in events, in whatever pieces HTTP cut it."""
    events = re.findall(rb"data: (\{.*\})", content)
    assert b"data: [DONE]" in content
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    return "".join(choice["delta"].get("content") or "" for choice in choices), reasons[0] if reasons else None


async def soak(port: int, count: int, seed: int) -> collections.Counter:
    """Sends `count` requests of all kinds, `CLIENTS` at a time, and checks each answer.

    Returns:
      How many there were of each kind.
    """
    random = np.random.default_rng(seed)
    kinds = iter(random.choice(["whole", "stream", "samples", "leaves", "wrong", "long", "large"], count).tolist())
    done: collections.Counter = collections.Counter()
    replies: dict[str, str] = {}

    async def one(kind: str) -> None:
        question = QUESTIONS[random.integers(len(QUESTIONS))]
        if kind == "leaves":
            async with sent(port, asked(question, stream=bool(random.integers(2)), max_tokens=60)) as reader:
                # At once, or after the head, or in the midst of the reply.
                for _ in range(random.integers(6)):
                    await reader.readline()
            return
        if kind == "wrong":
            status, content = await answer(port, WRONG[random.integers(len(WRONG))])
            assert status == 400 and json.loads(content)["error"]["message"], content
        elif kind == "long":
            status, content = await answer(port, asked("a b" * 400))
            assert status == 400 and json.loads(content)["error"]["code"] == "context_length_exceeded", content
        elif kind == "large":
            status, content = await answer(port, asked("a" * MOST_BYTES))
            assert status == 413 and json.loads(content)["error"]["message"], content
        elif kind == "samples":
            status, content = await answer(port, asked(question, n=2, temperature=1.0, seed=int(random.integers(9))))
            assert status == 200 and len(json.loads(content)["choices"]) == 2, content
        else:
            status, content = await answer(port, asked(question, stream=kind == "stream"))
            assert status == 200, content
            if kind == "stream":
                text, reason = streamed_text(content)
            else:
                choice = json.loads(content)["choices"][0]
                text, reason = choice["message"]["content"] or "", choice["finish_reason"]
            assert reason in ("length", "stop")
            assert replies.setdefault(question, text) == text

    async def client() -> None:
        for kind in kinds:
            await one(kind)
            done[kind] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return done


def metrics(port: int) -> dict[str, float]:
    """Numbers of the server by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        lines = [line for line in response.read().decode().splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def settled(port: int) -> dict[str, float]:
    """The server's numbers once no request is under way: disconnects reach the engine with its next step."""
    while True:
        found = await asyncio.to_thread(metrics, port)
        if found["qwen_jax_rows_in_use"] == found["qwen_jax_waiting_requests"] == 0:
            return found
        await asyncio.sleep(0.05)


def assert_nothing_failed(found: dict[str, float], done: collections.Counter) -> None:
    """No answer had status 5xx, and each valid request was answered."""
    statuses: collections.Counter = collections.Counter()
    for name, value in found.items():
        if labels := re.search(r'^qwen_jax_requests_total\{.*status="(\d+)"', name):
            statuses[labels[1]] += int(value)
    assert not [status for status in statuses if status.startswith("5") or status == "429"], statuses
    assert statuses["200"] >= done["whole"] + done["stream"] + done["samples"]
    assert statuses["400"] == done["wrong"] + done["long"] and statuses["413"] == done["large"]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """(port of a server in a thread, its engine)."""
    from qwen_jax import serve

    servers, engines, ready, load = [], [], threading.Event(), serve.load_engine

    def started(server):
        servers.append(server)
        ready.set()

    def load_engine(*arguments, **options):
        engines.append(load(*arguments, **options))
        return engines[0]

    monkeypatch.setattr(serve, "load_engine", load_engine)
    arguments = dict(port=0, slots=SLOTS, max_request_bytes=MOST_BYTES, started=started)
    thread = threading.Thread(
        target=serve.serve, kwargs=dict(checkpoint=random_run(tmp_path, **SIZES), **arguments), daemon=True
    )
    thread.start()
    while not ready.wait(0.1):
        assert thread.is_alive(), "the server has ended"
    yield int(servers[0].url.rpartition(":")[2]), engines[0]
    servers[0].drain()
    thread.join()


def test_a_few_dozen_requests_leave_nothing_behind(served):
    port, engine = served
    done = asyncio.run(soak(port, 70, seed=1))
    found = asyncio.run(settled(port))
    assert engine.live == 0 and len(done) == 7
    assert_nothing_failed(found, done)


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


@pytest.mark.slow
def test_two_thousand_requests_leave_nothing_behind(tmp_path, root, plain_environment):
    command = [sys.executable, "-m", "qwen_jax.serve", "--checkpoint", random_run(tmp_path, **SIZES), "--port", "0"]
    command += ["--slots", str(SLOTS), "--max_request_bytes", str(MOST_BYTES), "--verbose"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=root, env=plain_environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        line = next(line for line in process.stdout if "ready at" in line)
        port = int(re.search(r":(\d+)", line)[1])
        done, memory, programs = collections.Counter(), [], []
        for part in range(8):
            # The second thousand is like the first, whose sizes are compiled by then.
            done += asyncio.run(soak(port, 250, seed=part % 4))
            found = asyncio.run(settled(port))
            memory.append(resident(process.pid))
            programs.append((tmp_path / "log").read_text().count("compiled "))
        print(f"requests {dict(done)}, resident MiB after each 250: {[round(one) for one in memory]}, {programs=}")
        assert_nothing_failed(found, done)
        # A compiled program stays, and takes about 4 MiB.
        assert memory[-1] - memory[3] < 8 + 6 * (programs[-1] - programs[3])
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == 0
