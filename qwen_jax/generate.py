"""Continues prompts with a trained or converted model: one prompt on the screen, or a file of prompts.

python -m qwen_jax.generate --checkpoint runs/tiny --prompt "def main("
python -m qwen_jax.generate --checkpoint runs/tiny --prompts prompts.jsonl > continuations.jsonl
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen_jax import files
from qwen_jax.command_line import path_argument, quick_imports, run

with quick_imports():
    from qwen_jax.compilation_cache import programs_kept
    from qwen_jax.conversion import check_rows, load_for_decoding, load_tokenizer
    from qwen_jax.inference import Engine, Request, Result, SamplingConfig


def load_engine(
    checkpoint: str | Path, dtype: str = "float32", slots: int = 16, prefix_cache_tokens: int = 0
) -> Engine:
    """An engine with the model and the tokenizer of a folder in any known format, on one device.

    Args:
      slots, prefix_cache_tokens: see `Engine`.

    Raises:
      ValueError, OSError: there is no such checkpoint, or it has no tokenizer.
    """
    tokenizer = load_tokenizer(checkpoint)
    model, params = load_for_decoding(checkpoint, dtype=dtype)
    check_rows(tokenizer, model.config)
    return Engine(model, params, tokenizer, slots=slots, prefix_cache_tokens=prefix_cache_tokens)


def text_request(
    tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> Request:
    """A request to continue text until the document or the turn ends.

    Args:
      prompt: text; names of control tokens in it stay text.
      stop: further strings that end the continuation.
      max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed: see `Request` and `SamplingConfig`.

    Raises:
      ValueError: a value is out of range.
    """
    sampling = SamplingConfig(temperature, top_k, top_p, repetition_penalty)
    stop_ids = (tokenizer.endoftext_id, tokenizer.im_end_id)
    return Request(tokenizer.encode(prompt), max_new_tokens, sampling, stop_ids, tuple(stop), seed)


def generate(*, checkpoint: str | Path, prompt: str, dtype: str = "float32", **options) -> Iterator[str]:
    """Yields the continuation of `prompt` in pieces of text.

    Args:
      checkpoint: run folder (Orbax), or a folder converted to `qwen` or `qwen2`.
      prompt, options: see `text_request`.
      dtype: compute dtype, "float32" or "bfloat16".

    Raises:
      ValueError, OSError: no such checkpoint, or a value out of range.
    """
    engine = load_engine(checkpoint, dtype, slots=1)
    pieces = engine.stream(text_request(engine.tokenizer, prompt, **options))
    return (piece.text for piece in pieces if piece.text)


def read_prompts(path: str | Path) -> list[str]:
    """The `prompt` of each line of a JSON lines file.

    Raises:
      OSError: no such file.
      ValueError: a line is no object with a text `prompt`; the message names it.
    """
    prompts = []
    for where, content in files.read_json_lines(path):
        if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
            raise ValueError(f'{where}: expected an object with a text "prompt"')
        prompts.append(content["prompt"])
    return prompts


def generate_all(
    *, checkpoint: str | Path, prompts: Sequence[str], dtype: str = "float32", slots: int = 16, seed: int = 0, **options
) -> Iterator[Result]:
    """Yields the results of many prompts as they finish; prompt i has seed + i. Arguments as in `generate`."""
    engine = load_engine(checkpoint, dtype, slots)
    return engine.generate(
        [text_request(engine.tokenizer, text, seed=seed + i, **options) for i, text in enumerate(prompts)]
    )


@programs_kept()
def main(argv=None) -> None:
    """Command line of `python -m qwen_jax.generate`."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_jax.generate",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", type=path_argument, required=True, help="run folder, or converted folder (qwen or qwen2)"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue")
    what.add_argument(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help='JSON lines with a "prompt" each; results are JSON lines as they finish',
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="largest number of new tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample from the fewest tokens whose probabilities sum to this"
    )
    parser.add_argument("--top_k", type=int, default=0, help="sample from the k most probable tokens; 0: from all")
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1: earlier tokens become less probable"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the continuation at this text; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument("--slots", type=int, default=16, help="number of prompts in one batch (with --prompts)")
    parser.add_argument("--verbose", action="store_true", help="log each compiled program")
    options = vars(parser.parse_args(argv))
    if not options.pop("verbose"):
        logging.getLogger("qwen_jax.inference").setLevel(logging.WARNING)
    file, slots = options.pop("prompts"), options.pop("slots")
    if file is None:
        for piece in generate(**options):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        return
    del options["prompt"]
    for result in generate_all(prompts=read_prompts(file), slots=slots, **options):
        line = {
            "index": result.index,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "log_prob": float(result.log_probs.sum()),
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    run(main)
