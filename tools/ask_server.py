"""Serves a converted model for one conversation, as a client of OpenAI's protocol sees it, and keeps what was said.

    python tools/ask_server.py --checkpoint runs/lineage/served/chat --say "Tell me about the owl." --output said.json
    python tools/ask_server.py --checkpoint DIR --complete "The library has" --output said.json
    python tools/ask_server.py --checkpoint DIR --image cat.png --say "What do you see?" --output said.json

The server is `python -m qwen_jax.serve` in a process of its own, on a free port; it is ended afterwards. --say may be
given several times, for several turns. Answers are greedy. The output has `model`, `format` (files of the folder),
`messages`, and `seconds` of all requests together.
"""

import argparse
import base64
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qwen_jax import files
from qwen_jax.command_line import path_argument, run

_READY = "ready at "


@contextmanager
def server(checkpoint: Path) -> Iterator[str]:
    """While open, a server of the checkpoint; yields its address.

    Raises:
      ValueError: the server ends before it answers; its own message is on the standard error.
    """
    command = [sys.executable, "-m", "qwen_jax.serve", "--checkpoint", str(checkpoint), "--port", "0", "--slots", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(_READY):
                yield line.removeprefix(_READY).split()[0]
                break
        else:
            raise ValueError(f"the server of {checkpoint} ended with exit code {process.wait()}; its message is above")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.stdout.read()
        process.wait()


def post(address: str, path: str, body: dict) -> dict:
    """The reply to a request.

    Raises:
      ValueError: the server refuses it, with its reason.
    """
    data = json.dumps(body | {"temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/v1/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise ValueError(
            f"{address}/v1/{path} answers {error.code}: {error.read().decode(errors='replace')}"
        ) from error


def picture(path: Path) -> dict:
    """A part of a message with the picture in it."""
    kind = {".jpg": "jpeg", ".jpeg": "jpeg"}.get(path.suffix.lower(), path.suffix.lower().removeprefix("."))
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def converse(address: str, said: list[str], images: list[Path], max_tokens: int) -> list[dict]:
    """A conversation of as many questions as `said` has, the pictures before the first; texts alone are kept."""
    sent, kept = [], []
    for number, text in enumerate(said):
        shown = [picture(path) for path in images] if number == 0 else []
        sent.append({"role": "user", "content": [*shown, {"type": "text", "text": text}] if shown else text})
        reply = post(address, "chat/completions", {"messages": sent, "max_tokens": max_tokens})
        answer = reply["choices"][0]
        sent.append({"role": "assistant", "content": answer["message"]["content"]})
        kept += [{"role": "user", "content": text}, sent[-1] | {"finish_reason": answer["finish_reason"]}]
    return kept


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=path_argument, required=True, help="run folder, or converted folder")
    parser.add_argument("--say", action="append", default=[], metavar="TEXT", help="a message of the user")
    parser.add_argument("--complete", metavar="TEXT", help="a beginning for a base model to go on with")
    parser.add_argument("--image", type=path_argument, action="append", default=[], help="shown with the first message")
    parser.add_argument("--max_tokens", type=int, default=64, help="limit of a reply (default: %(default)s)")
    parser.add_argument("--output", type=path_argument, required=True, metavar="FILE", help="JSON of what was said")
    arguments = parser.parse_args(argv)
    if bool(arguments.say) == (arguments.complete is not None):
        parser.error("give either --say or --complete")
    if arguments.image and not arguments.say:
        parser.error("--image needs --say")
    if missing := [path for path in arguments.image if not path.is_file()]:
        raise FileNotFoundError(f"no picture {missing[0]}")
    with server(arguments.checkpoint) as address:
        began = time.monotonic()
        if arguments.complete is None:
            messages = converse(address, arguments.say, arguments.image, arguments.max_tokens)
        else:
            body = {"prompt": arguments.complete, "max_tokens": arguments.max_tokens}
            (choice,) = post(address, "completions", body)["choices"]
            messages = [
                {"role": "prompt", "content": arguments.complete},
                {"role": "completion", "content": choice["text"], "finish_reason": choice["finish_reason"]},
            ]
        seconds = time.monotonic() - began
    held = sorted(path.name for path in arguments.checkpoint.iterdir())
    made = {"model": arguments.checkpoint.name, "format": held, "messages": messages, "seconds": round(seconds, 2)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(arguments.output, made)
    for message in messages:
        print(f"{message['role']}: {message['content']}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run(main)
