"""A chat model answers a question with tools, and everything that happens is shown.

    python -m qwen_jax.agent --checkpoint exports/chat --query "What is 12.5 * 37?"
    python -m qwen_jax.agent --checkpoint exports/chat --tools my_tools.py --save traces.jsonl

Without --query, questions are read from standard input, one a line, and are one conversation. Without --tools there are
a calculator, a small table of countries and, with --date, a date. --tools takes a Python file with a list TOOLS
(docs/how_to/tools.md), which is run, or a JSON file of definitions, whose results you are asked for.
"""

import argparse
import datetime
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

from qwen_jax.command_line import add_mesh, escape, path_argument, quick_imports, run
from qwen_jax.data.chatml import DEFAULT_SYSTEM
from qwen_jax.data.react import DEFAULT_STYLE, STYLES
from qwen_jax.files import PathLike

with quick_imports():
    from qwen_jax.agents import react
    from qwen_jax.agents.agent import ANSWERED, Agent, Event, Transcript
    from qwen_jax.agents.builtin import builtin_tools
    from qwen_jax.agents.models import of_engine
    from qwen_jax.agents.tools import Tools, load_tools
    from qwen_jax.chat import valid_text
    from qwen_jax.compilation_cache import programs_kept
    from qwen_jax.generate import load_engine
    from qwen_jax.inference import SamplingConfig
    from qwen_jax.sharding import MeshConfig


def show(events: Iterable[Event], out: TextIO) -> None:
    """Writes what happens as it does: what the model says, and the result of each call after `Observation:`.

    Characters that control a terminal are written as escapes: tools and models repeat what others wrote.
    """
    last = "\n"
    for event in events:
        line = "" if last == "\n" else "\n"
        text = ""
        if event.kind == "text":
            text = escape(event.text)
        elif event.kind == "observation":
            # Further lines of a result are indented: none of them looks like a step of the model.
            result = escape(event.text).replace("\n", "\n    ")
            text = f"{line}Observation: {result}\nThought:"
        elif event.kind == "end":
            text = line
        out.write(text)
        out.flush()
        last = (last + text)[-1]


def ask(name: str, arguments: dict) -> str:
    """Asks the person at the terminal for the result of a call.

    Raises:
        ValueError: standard input has ended.
    """
    print(f"\nresult of {escape(name)} for {escape(json.dumps(arguments, ensure_ascii=False))}:", file=sys.stderr)
    line = sys.stdin.readline()
    if not line:
        raise ValueError("nobody gave a result: standard input has ended")
    return line.rstrip("\n")


def answer(
    *,
    checkpoint: PathLike,
    questions: Iterable[str],
    tools: Tools,
    out: TextIO,
    system: str = DEFAULT_SYSTEM,
    style: str = DEFAULT_STYLE,
    rule: str | None = None,
    most_calls: int = 8,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "float32",
    mesh: MeshConfig | None = None,
) -> Transcript:
    """Answers questions, which are one conversation, and shows it.

    Args:
        checkpoint: run folder, or a folder converted to `qwen` or `qwen2`.
        tools: that the model may call.
        out: where the trace goes.
        system, style, rule, most_calls: see `Agent`.
        max_new_tokens, temperature, top_p, seed: of each reply of the model.
        dtype, mesh: see `load_engine`.

    Raises:
        ValueError, OSError: no such checkpoint, or a value out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    engine = load_engine(checkpoint, dtype, slots=1, mesh=mesh)
    sampling = SamplingConfig(temperature=temperature, top_p=top_p)
    model = of_engine(engine, sampling=sampling, max_new_tokens=max_new_tokens, seed=seed)
    agent = Agent(model, tools, system=valid_text(system), style=style, rule=rule, most_calls=most_calls)
    transcript = agent.begin()
    for question in map(valid_text, questions):
        print(f"Question: {escape(question)}", file=out)
        try:
            show(agent.run(question, transcript), out)
        except KeyboardInterrupt:
            transcript.problem = "stopped"
        if transcript.ended != ANSWERED:
            print(f"note: no final answer: {escape(transcript.problem)}", file=sys.stderr, flush=True)
            break
    return transcript


def _questions(query: str | None) -> Iterator[str]:
    if query is not None:
        yield query
        return
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no date such as 2023-09-25: {error}") from error


@programs_kept()
def main(argv=None) -> int:
    """Command line of `python -m qwen_jax.agent`; returns 1 if a question has no final answer."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_jax.agent", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=path_argument, required=True, help="run folder, or converted folder (qwen or qwen2)"
    )
    parser.add_argument("--query", help="the question; default: standard input, one a line")
    parser.add_argument("--tools", type=path_argument, metavar="FILE", help="a .py with TOOLS, or a .json; see above")
    parser.add_argument("--date", type=_date, metavar="YYYY-MM-DD", help="what `date` says")
    parser.add_argument("--save", type=path_argument, metavar="FILE", help="add the conversation to this .jsonl")
    parser.add_argument("--style", choices=STYLES, default=DEFAULT_STYLE, help="of the prompt; default: %(default)s")
    parser.add_argument("--rule", choices=react.RULES, help="which of several calls counts; default: by the style")
    parser.add_argument("--most_calls", type=int, default=8, help="of the model, for a question; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=30.0, help="that a tool may take; default: %(default)s")
    parser.add_argument("--longest", type=int, default=4_000, help="characters of a result; default: %(default)s")
    parser.add_argument("--system", default=DEFAULT_SYSTEM, help=f"system message; default: {DEFAULT_SYSTEM!r}")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="of one reply; default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token, the default")
    parser.add_argument("--top_p", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling; default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    add_mesh(parser)
    parser.add_argument("--verbose", action="store_true", help="log each compiled program")
    options = vars(parser.parse_args(argv))
    if not options.pop("verbose"):
        logging.getLogger("qwen_jax.inference").setLevel(logging.WARNING)
    query, file, save, date = (options.pop(name) for name in ("query", "tools", "save", "date"))
    seconds, longest = options.pop("seconds"), options.pop("longest")
    if file is None:
        found = builtin_tools(date)
    else:
        found = load_tools(file, ask)
        seconds = None if file.suffix == ".json" else seconds  # a person takes any time
        if query is None and file.suffix == ".json":
            raise ValueError("--tools with a .json asks for results on standard input: give the question with --query")
    tools = Tools(found, seconds=seconds, longest=longest)
    transcript = answer(questions=_questions(query), tools=tools, out=sys.stdout, **options)
    if save is not None:
        transcript.save(save)
        print(f"added the conversation to {save}", file=sys.stderr)
    return 0 if transcript.ended == ANSWERED else 1


if __name__ == "__main__":
    run(main)
