"""Scores a model on the Hugging Face agent benchmark (report, Table 9; docs/how_to/hf_agent.md).

pip download --no-deps transformers==4.33.3
python tools/evaluate_hf_agent.py --wheel transformers-4.33.3-py3-none-any.whl --checkpoint runs/chat --chat_model \\
    --mode run --output runs/hf_agent
python tools/evaluate_hf_agent.py --wheel transformers-4.33.3-py3-none-any.whl --replies replies.jsonl --mode chat \\
    --output runs/hf_agent

`replies.jsonl` has one object a line with `reply`, in the order of the benchmark; the first command writes such a file.
"""

import argparse
import contextlib
import logging
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qwen_jax import files
from qwen_jax.agents.completion import Completer, engine_completer, server_completer
from qwen_jax.command_line import path_argument, run
from qwen_jax.evaluation import hf_agent


def completer(arguments: argparse.Namespace) -> Completer:
    """The model that is scored."""
    options = {
        "max_new_tokens": arguments.max_new_tokens,
        "stop": hf_agent.STOPS[arguments.mode],
        "chat": arguments.chat_model,
    }
    if arguments.server:
        if not arguments.model:
            raise ValueError("--server needs --model, a name that the server knows")
        return server_completer(
            arguments.server, arguments.model, api_key=os.environ.get("OPENAI_API_KEY", "none"), **options
        )
    from qwen_jax.generate import load_engine  # loads JAX, which nothing else here needs

    logging.getLogger("qwen_jax.inference").setLevel(logging.WARNING)
    return engine_completer(load_engine(arguments.checkpoint, arguments.dtype), **options)


def read_replies(path: Path) -> list[str]:
    """The replies of a file.

    Raises:
      ValueError: a line is no object with a text `reply`.
    """
    found = []
    for where, row in files.read_json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("reply"), str):
            raise ValueError(f'{where}: expected an object with a text "reply"')
        found.append(row["reply"])
    return found


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=path_argument, required=True, help="of transformers 4.33.3")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=path_argument, help="run folder, or converted folder")
    model.add_argument("--server", metavar="URL", help="a server of OpenAI's protocol; its key is OPENAI_API_KEY")
    model.add_argument("--replies", type=path_argument, metavar="FILE", help="score these replies")
    parser.add_argument("--model", help="name of the model on the server")
    parser.add_argument("--mode", choices=hf_agent.MODES, default="run", help="default: %(default)s")
    parser.add_argument("--output", type=path_argument, required=True, metavar="FOLDER")
    parser.add_argument("--chat_model", action="store_true", help="the prompt is a user's message in ChatML")
    parser.add_argument("--template", type=path_argument, metavar="FILE", help="of prompts; default: one of ours")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="of a reply (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    arguments = parser.parse_args(argv)
    benchmark = hf_agent.read_wheel(arguments.wheel)
    if arguments.replies:
        replies = read_replies(arguments.replies)
    else:
        template = None if arguments.template is None else arguments.template.read_text(encoding="utf-8")
        with contextlib.ExitStack() as stack:
            if arguments.checkpoint:
                from qwen_jax.compilation_cache import programs_kept  # loads JAX, as the engine does

                stack.enter_context(programs_kept())
            replies = hf_agent.ask(benchmark, arguments.mode, completer(arguments), template=template)
    tasks = [task for conversation in benchmark.conversations(arguments.mode) for task in conversation]
    folder = arguments.output / arguments.mode
    if len(replies) == len(tasks):  # else the next call says what is wrong
        # First: replies took a model long, and scoring runs them.
        rows = [{"task": task, "reply": reply} for task, reply in zip(tasks, replies, strict=True)]
        files.write_text(folder / "replies.jsonl", "".join(map(files.json_line, rows)))
    found = benchmark.score(arguments.mode, replies)
    files.write_json(folder / "scores.json", found)
    print(f"| mode {arguments.mode}, {len(replies)} tasks | % |\n|---|--:|")
    for name, value in found["scores"].items():
        print(f"| {name} | {value:.1f} |")
    if found["malformed"]:
        print(f"{found['malformed']} replies could not be taken apart, and are scored without the missing part")
    print(f"wrote {folder / 'replies.jsonl'} and scores.json beside it")


if __name__ == "__main__":
    run(main)
