"""Continues a prompt with a trained or converted model, printing text as it comes.

    python -m qwen_jax.generate --checkpoint runs/tiny --prompt "def main("
"""

import argparse
import codecs
import sys
from collections.abc import Iterator
from pathlib import Path

from qwen_jax.command_line import run
from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.inference.generate import Generator
from qwen_jax.inference.sampling import SamplingConfig


def text_pieces(tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Text of token ids as it becomes complete: a character that is split over tokens comes with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        piece = decoder.decode(tokenizer.decode_bytes([token]) if token < tokenizer.vocab_size else b"\xef\xbf\xbd")
        if piece:
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def generate(
    *, checkpoint: str | Path, prompt: str, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0,
    top_k: int = 0, seed: int = 0, dtype: str = "float32",
) -> Iterator[str]:
    """Yields the continuation of `prompt` in pieces of text.

    Args:
      checkpoint: run folder (Orbax), or a folder converted to `qwen` or `qwen2`.
      prompt: text; whatever looks like a control token in it stays text.
      max_new_tokens, temperature, top_p, top_k, seed: see `SamplingConfig` and `Generator.stream`.
      dtype: compute dtype, "float32" or "bfloat16".

    Raises:
      ValueError, OSError: no such checkpoint, or a value out of range.
    """
    sampling = SamplingConfig(temperature, top_k, top_p)
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(prompt)
    model, params = load_pretrained(checkpoint, dtype=dtype)
    stop_ids = (tokenizer.endoftext_id, tokenizer.im_end_id)
    return text_pieces(tokenizer, Generator(model, params, sampling).stream(ids, max_new_tokens, stop_ids, seed))


def main(argv=None) -> None:
    """Command line of `python -m qwen_jax.generate`."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_jax.generate", description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="run folder, or converted folder (qwen or qwen2)")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="at most so many")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the most probable tokens of this mass")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k most probable tokens; 0: from all")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    args = parser.parse_args(argv)
    for piece in generate(**vars(args)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


if __name__ == "__main__":
    run(main)
