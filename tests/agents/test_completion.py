"""What continues prompts: an engine, and the real client against a server that is busy at first."""

import http.server
import json
import threading

import numpy as np
import openai
import pytest

from qwen_jax.agents import completion
from qwen_jax.agents.completion import engine_completer, server_completer
from qwen_jax.data.tokenizer import Tokenizer, write_ranks
from qwen_jax.inference import Result


class Backwards:
    """An engine that says what it was asked, and finishes the last request first."""

    context_length = 1024

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, requests):
        for index, request in reversed(list(enumerate(requests))):
            text = f"{self.tokenizer.decode(request.prompt)} {request.seed}"
            yield Result(index, request, (), np.zeros(0), np.zeros(0), text, "length")


def test_the_engine_gives_one_reply_a_prompt_in_order(tmp_path):
    write_ranks({bytes([byte]): byte for byte in range(256)}, tmp_path / "bytes.tiktoken")
    engine = Backwards(Tokenizer(tmp_path / "bytes.tiktoken"))
    complete = engine_completer(engine, temperature=0.8, max_new_tokens=5, stop=["\n\n"])
    prompts = ["one", "two", "three <|im_end|>"]
    assert complete(prompts, [1, 2, 3]) == ["one 1", "two 2", "three <|im_end|> 3"]
    chat = engine_completer(engine, chat=True)(["<|im_end|>"], [4])[0]
    assert chat.endswith("<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n 4")


def test_a_prompt_that_does_not_fit_costs_no_other_reply(tmp_path):
    write_ranks({bytes([byte]): byte for byte in range(256)}, tmp_path / "bytes.tiktoken")
    engine = Backwards(Tokenizer(tmp_path / "bytes.tiktoken"))
    complete = engine_completer(engine, max_new_tokens=6)
    assert complete(["a" * 1018, "b" * 1019, "c"], [1, 2, 3]) == [f"{'a' * 1018} 1", None, "c 3"]


class Busy(http.server.BaseHTTPRequestHandler):
    statuses: list[int] = []

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status = self.statuses.pop(0) if self.statuses else 200
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
        if self.path == "/v1/chat/completions":
            choice["message"] = {"role": "assistant", "content": f"chat {asked['messages'][-1]['content']}"}
        else:
            choice["text"] = f"{asked['prompt']} {asked['seed']}"
        answer = {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
        status, code = status if isinstance(status, tuple) else (status, None)
        error = {"error": {"message": "later", "code": code}}
        body = json.dumps(answer if status == 200 else error).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_busy_server_is_asked_again_and_one_that_refuses_is_not(monkeypatch):
    waited = []
    monkeypatch.setattr(completion.time, "sleep", waited.append)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        complete = server_completer(f"http://127.0.0.1:{server.server_port}", "m", at_once=2)
        Busy.statuses = [429, 503]
        assert complete(["a", "b", "c"], [1, 2, 3]) == ["a 1", "b 2", "c 3"] and len(waited) == 2
        assert server_completer(f"http://127.0.0.1:{server.server_port}/v1", "m", chat=True)(["a"], [1]) == ["chat a"]
        Busy.statuses = [400]
        with pytest.raises(OSError, match=rf"^http://127.0.0.1:{server.server_port}/v1: .*400.*later") as refused:
            complete(["a"], [1])
        assert isinstance(refused.value.__cause__, openai.BadRequestError)
        assert len(waited) == 2
        Busy.statuses = [429] * 9
        with pytest.raises(OSError, match="429") as refused:
            complete(["a"], [1])
        assert isinstance(refused.value.__cause__, openai.RateLimitError)
        Busy.statuses = [(400, "context_length_exceeded"), 200]
        assert server_completer(f"http://127.0.0.1:{server.server_port}", "m", at_once=1)(["a", "b"], [1, 2]) == [
            None,
            "b 2",
        ]
    finally:
        server.shutdown()
        server.server_close()
