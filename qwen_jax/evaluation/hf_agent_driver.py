"""Runs in the sandbox, beside the benchmark's own modules: calls their scoring with given replies (see `hf_agent.py`).

Reads JSON from standard input: `mode` ("run" or "chat") and `replies`, or null for the tasks alone. Writes one line of
JSON to standard output.
"""

import contextlib
import importlib
import io
import json
import signal
import sys
from typing import Any

benchmark: Any = importlib.import_module("bench.evaluate_agent")
EVALUATION_S = 2.0  # of one reply's code; the benchmark itself has no limit


class Scripted:
    """Stands for an agent: it has the tools of the benchmark, and says what it was given."""

    def __init__(self, replies):
        self.toolbox = dict.fromkeys(benchmark.TEST_TOOLS)
        self.replies = replies
        self.chat_history = None
        self.conversations = []
        self.said = 0

    def prepare_for_new_chat(self):
        self.conversations.append([])

    def format_prompt(self, task, chat_mode=False):
        if not chat_mode:
            self.conversations.append([])
        self.conversations[-1].append(task)
        return task

    def generate_one(self, prompt, stop):
        self.said += 1
        return "Answer:\n```\n```" if self.replies is None else self.replies[self.said - 1]

    def generate_many(self, prompts, stop):
        return [self.generate_one(prompt, stop) for prompt in prompts]


def well_formed(reply, mode):
    """The reply in a form that the benchmark can take apart, and whether it had that form."""
    if mode == "run":
        parts = reply.split("Answer:")
        if len(parts) == 2:
            return reply, True
        return f"{parts[0]}\nAnswer:{parts[1] if len(parts) > 1 else ''}", False
    fences = sum(line.lstrip().startswith("```") for line in reply.split("\n"))
    if fences > 1:
        return reply, True
    return reply + ("\n```" if fences else "\n```\n```"), False


def stop(*_):
    raise TimeoutError


def main():
    asked = json.load(sys.stdin)
    mode, replies, malformed = asked["mode"], asked["replies"], 0
    if replies is not None:
        checked = [well_formed(reply, mode) for reply in replies]
        replies, malformed = [reply for reply, _ in checked], sum(not good for _, good in checked)
    evaluate = benchmark.evaluate

    def evaluate_in_time(*arguments, **options):
        signal.setitimer(signal.ITIMER_REAL, EVALUATION_S)
        try:
            return evaluate(*arguments, **options)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    signal.signal(signal.SIGALRM, stop)
    benchmark.evaluate = evaluate_in_time
    agent = Scripted(replies)
    run = benchmark.evaluate_agent if mode == "run" else benchmark.evaluate_chat_agent
    with contextlib.redirect_stdout(io.StringIO()):
        scores, *errors = run(agent, return_errors=True)
    wrong = [{task: {key: repr(value) for key, value in one.items()} for task, one in kind.items()} for kind in errors]
    conversations = {"conversations": agent.conversations, "tools": list(benchmark.TEST_TOOLS)}
    print(json.dumps({**conversations, "scores": scores, "errors": wrong, "malformed": malformed}))


main()
