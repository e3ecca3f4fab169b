"""Self-instruct: a model writes conversations with tools, rules and people filter them (docs/how_to/self_instruct.md).

python tools/self_instruct.py generate --seeds seeds.jsonl --checkpoint runs/chat --count 2000 --output runs/new
python tools/self_instruct.py generate --seeds seeds.jsonl --server http://127.0.0.1:8000 --model chat --output runs/new
python tools/self_instruct.py page runs/new/samples.jsonl --output runs/new/page.html
python tools/self_instruct.py accept runs/new/samples.jsonl --decisions decisions_*.jsonl --output accepted.jsonl

`generate` goes on where it was stopped. `accepted.jsonl` is what the SeqIO task `self_instruct` reads, and may be given
as --seeds of the next round, which a model trained on it writes, with another --seed: ids of samples begin with it.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qwen_jax import files
from qwen_jax.agents import self_instruct
from qwen_jax.agents.completion import Completer, engine_completer, server_completer
from qwen_jax.agents.self_instruct import Generation, Rules
from qwen_jax.command_line import path_argument, run
from qwen_jax.evaluation.review_page import make_page


def table(counts: Mapping[str, int]) -> str:
    """A Markdown table of attempts by verdict."""
    total = sum(counts.values())
    rows = [f"| {verdict} | {count:,} | {count / total:.1%} |" for verdict, count in counts.items()]
    return "\n".join(["| verdict | attempts | share |", "|---|--:|--:|", *rows])


def rows_of(path: Path) -> list[dict]:
    """The objects of a file of JSON lines.

    Raises:
      ValueError: a line is no object.
    """
    found = []
    for where, row in files.read_json_lines(path):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
        found.append(row)
    return found


def completer(arguments: argparse.Namespace, options: dict) -> tuple[Completer, str]:
    """The model that writes, and its name in the records."""
    options = {**options, "stop": [self_instruct.STOP]}
    if arguments.server:
        if not arguments.model:
            raise ValueError("--server needs --model, a name that the server knows")
        key = os.environ.get("OPENAI_API_KEY", "none")
        return server_completer(arguments.server, arguments.model, api_key=key, **options), arguments.model
    from qwen_jax.generate import load_engine

    logging.getLogger("qwen_jax.inference").setLevel(logging.WARNING)
    engine = load_engine(arguments.checkpoint, arguments.dtype, arguments.at_once)
    return engine_completer(engine, **options), arguments.model or str(arguments.checkpoint)


def generate(arguments: argparse.Namespace) -> None:
    """Makes samples in a folder, which no other process writes into meanwhile."""
    with files.locked(arguments.output):
        generate_in_folder(arguments)


def generate_in_folder(arguments: argparse.Namespace) -> None:
    """Makes samples, after those that the folder holds."""
    for name in ("count", "at_once"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}: it must be at least 1")
    rules = Rules(similarity=arguments.similarity, languages=tuple(arguments.languages.split(",")))
    generation = Generation(
        arguments.output,
        self_instruct.read_pool(arguments.seeds),
        rules=rules,
        evaluation=arguments.evaluation,
        tools=[tool for path in arguments.tools for tool in rows_of(path)],
        seed=arguments.seed,
    )
    if generation.attempts:
        print(f"going on after {len(generation.attempts):,} attempts, {len(generation.samples):,} samples")
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p", "max_new_tokens")}
    with contextlib.ExitStack() as stack:
        if arguments.checkpoint:
            from qwen_jax.compilation_cache import programs_kept  # loads JAX, as the engine does

            stack.enter_context(programs_kept())
        complete, model = completer(arguments, sampling)
        generation.extend(complete, arguments.count, model=model, sampling=sampling, at_once=arguments.at_once)
    text = table(generation.counts())
    files.write_text(arguments.output / "counts.md", text + "\n")
    print(text)
    print(f"{len(generation.samples):,} of {arguments.count:,} samples in {arguments.output / self_instruct.SAMPLES}")
    if len(generation.samples) < arguments.count:
        print("fewer than asked for: the counts say what was left out; the same command tries again")


def page(arguments: argparse.Namespace) -> None:
    """Makes the page for people."""
    samples = rows_of(arguments.samples)
    files.write_text(arguments.output, make_page(samples))
    print(f"wrote {arguments.output} with {len(samples):,} samples: open it in a browser, or send it to the reviewers")


def accept(arguments: argparse.Namespace) -> None:
    """Keeps what people accepted."""
    decisions = [one for path in arguments.decisions for one in rows_of(path)]
    kept, counts = self_instruct.keep_accepted(rows_of(arguments.samples), decisions)
    files.write_text(arguments.output, "".join(map(files.json_line, kept)))
    print(", ".join(f"{decision}: {count:,}" for decision, count in counts.items()))
    print(f"wrote {arguments.output} with {len(kept):,} samples")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="generate | page | accept")

    def command(name: str, call: Callable) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=call.__doc__, description=call.__doc__)
        made.set_defaults(call=call)
        return made

    one = command("generate", generate)
    one.add_argument("--seeds", nargs="+", type=path_argument, required=True, help="conversations with tools")
    model = one.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=path_argument, help="run folder, or converted folder")
    model.add_argument("--server", metavar="URL", help="a server of OpenAI's protocol; its key is OPENAI_API_KEY")
    one.add_argument("--model", help="name of the model on the server, and in the records")
    one.add_argument("--output", type=path_argument, required=True, metavar="FOLDER", help="all attempts and samples")
    one.add_argument("--count", type=int, default=2000, help="samples to make (default: %(default)s)")
    one.add_argument("--tools", nargs="*", type=path_argument, default=[], help="JSON lines of further tools")
    one.add_argument(
        "--evaluation", nargs="*", type=path_argument, default=[], help="files that no sample may resemble"
    )
    one.add_argument("--similarity", type=float, default=Rules.similarity, help="of near-duplicates")
    one.add_argument("--languages", default=",".join(Rules.languages), help="of the user (default: %(default)s)")
    one.add_argument("--temperature", type=float, default=0.7, help="default: %(default)s")
    one.add_argument("--top_p", type=float, default=0.9, help="default: %(default)s")
    one.add_argument("--max_new_tokens", type=int, default=1024, help="default: %(default)s")
    one.add_argument("--at_once", type=int, default=16, help="prompts in a batch (default: %(default)s)")
    one.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    one.add_argument("--seed", type=int, default=0, help="of the choice of examples and of the sampling")
    two = command("page", page)
    two.add_argument("samples", type=path_argument)
    two.add_argument("--output", type=path_argument, required=True, metavar="FILE.html")
    three = command("accept", accept)
    three.add_argument("samples", type=path_argument)
    three.add_argument("--decisions", nargs="+", type=path_argument, required=True, help="files of the page")
    three.add_argument("--output", type=path_argument, required=True, metavar="FILE.jsonl")
    arguments = parser.parse_args(argv)
    arguments.call(arguments)


if __name__ == "__main__":
    run(main)
