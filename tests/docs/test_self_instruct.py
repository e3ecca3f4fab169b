"""Runs the commands of docs/how_to/self_instruct.md, in order, against a small server of OpenAI's protocol."""

import http.server
import json
import threading

import pytest

from tests.pages import blocks, copy_repository, shell

THINGS = ("tulips", "bicycles", "penguins", "violins", "pancakes", "rockets", "castles", "marbles", "lanterns", "owls")
VALUES = {"string": "x", "number": 1.5, "integer": 2}


def reply(prompt: str, seed: int) -> str:
    """A conversation about the first tool of the prompt; of four seeds, two give one that is kept."""
    tool = json.loads(prompt.rpartition("Tools: ")[2].partition("\n")[0])[0]
    arguments = {name: VALUES[one["type"]] for name, one in tool["parameters"]["properties"].items()}
    things = " ".join(THINGS[seed * factor % 10] for factor in (1, 3, 7))
    request = "Do I need an umbrella in Paris tomorrow?" if seed % 4 == 0 else f"{things} worry my uncle"
    messages = [
        {"role": "user", "content": request},
        {
            "role": "assistant",
            "content": "",
            "function_call": {"name": tool["name"], "arguments": json.dumps(arguments)},
        },
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "It is done."},
    ]
    return "I would rather not." if seed % 4 == 1 else f" {json.dumps(messages)}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/v1/completions" and asked["model"] == "chat" and asked["stop"] == ["\n\n"]
        choice = {"index": 0, "text": reply(asked["prompt"], asked["seed"]), "finish_reason": "stop", "logprobs": None}
        body = json.dumps({"id": "1", "object": "text_completion", "created": 0, "model": "chat", "choices": [choice]})
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_commands_of_the_page(tmp_path, url):
    copy_repository(tmp_path)
    page = blocks("self_instruct.md")
    shown = [shell(text, tmp_path, SERVER=url).stdout for kind, text in page if kind == "sh"]
    (expected,) = [text for kind, text in page if kind == ""]
    _, generated, made, accepted, inspected = shown
    assert generated == expected
    assert made.startswith("wrote runs/self_instruct/page.html with 8 samples")
    assert accepted.splitlines() == [
        "accept: 2, reject: 1, not reviewed: 5",
        "wrote runs/self_instruct/accepted.jsonl with 2 samples",
    ]
    assert "worry my uncle" in inspected and "Observation:⟧ done" in inspected
    attempt = json.loads((tmp_path / "runs/self_instruct/attempts.jsonl").read_text().splitlines()[0])
    assert attempt["model"] == "chat" and attempt["sampling"]["temperature"] == 0.7 and len(attempt["seeds"]) == 4
