"""Converts a checkpoint between run folders and the formats of other software; see docs/how_to/convert.md."""

import argparse
import os
import sys
from pathlib import Path

# Converting needs no accelerator, and must not take the memory of one that is training.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from qwen_jax.host_memory import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages(on_cpus=True)  # here, because it begins again with the imports

from qwen_jax import command_line, files
from qwen_jax.conversion.adapters import CONFIG_FILE as ADAPTER_CONFIG
from qwen_jax.conversion.check import compare_logits
from qwen_jax.conversion.checksums import ChecksumError
from qwen_jax.conversion.converter import convert
from qwen_jax.conversion.load import FORMAT_NAMES
from qwen_jax.conversion.run_folder import LAYOUTS, SCANNED
from qwen_jax.conversion.tokenizer import TOKENIZER_FILE

EXAMPLES = """\
formats:
  orbax   our run folder (OUTPUT_DIR of a run: its newest checkpoint), or OUTPUT_DIR/checkpoints/STEP
  qwen    QWenLMHeadModel, as Qwen was released in 2023
  qwen2   Qwen2ForCausalLM, which transformers, vLLM and SGLang read with no code of ours
  qwen2_reward  Qwen2ForSequenceClassification with one label: a reward model for transformers
  gguf    a file with its tokenizer, for llama.cpp and software on top of it (needs the package gguf)
  peft    a LoRA adapter, which peft loads on its base model; every other target gets the adapters merged

examples:
  # serve a run
  python tools/convert_checkpoint.py --from orbax:runs/sft --to qwen2:exports/sft --dtype bfloat16
  # train on from released weights
  python tools/convert_checkpoint.py --from qwen:Qwen-7B --to orbax:runs/qwen_7b
  # use a reward model elsewhere
  python tools/convert_checkpoint.py --from orbax:runs/reward --to qwen2_reward:exports/reward
  # give released weights to a current server, read back and compared
  python tools/convert_checkpoint.py --from qwen:Qwen-7B --to qwen2:exports/qwen_7b --verify --check
  # the adapter of a LoRA run for peft, and one that peft wrote as a whole model
  python tools/convert_checkpoint.py --from orbax:runs/sft_lora --to peft:exports/adapter --base exports/base
  python tools/convert_checkpoint.py --from peft:adapter --to qwen2:exports/merged
  # from a bucket to another (extras gcs and s3)
  python tools/convert_checkpoint.py --from orbax:gs://BUCKET/runs/sft --to qwen2:s3://BUCKET/sft --dtype bfloat16

exit status: 0; 1 if --verify or --check found a difference; 2 for any other error, with one line about it
"""


# Classes of transformers that load a written folder.
LOADERS = {"qwen2": "AutoModelForCausalLM", "qwen2_reward": "AutoModelForSequenceClassification"}


def loading(name: str, folder: Path) -> str:
    """Lines of Python that load the written model."""
    if files.is_remote(folder) and name in (*LOADERS, "gguf", "peft"):
        return f"load it: copy {folder} to a local disk, from which other software reads it"
    lines = ["from qwen_jax.conversion import load_pretrained", f'model, params = load_pretrained("{folder}")']
    if name == "gguf":
        lines = ["from llama_cpp import Llama", f'model = Llama("{folder}", n_ctx=0)']
    if name == "peft":
        scores = files.read_json(folder / ADAPTER_CONFIG)["task_type"] == "SEQ_CLS"
        loader = f"AutoPeftModelFor{'SequenceClassification' if scores else 'CausalLM'}"
        labels = ", num_labels=1" * scores
        lines = [f"from peft import {loader}", f'model = {loader}.from_pretrained("{folder}"{labels})']
    if name in LOADERS:
        lines = [
            f"from transformers import {LOADERS[name]}, AutoTokenizer",
            f'model = {LOADERS[name]}.from_pretrained("{folder}", dtype="auto")',
        ]
        if (folder / TOKENIZER_FILE).is_file():
            lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{folder}")')
    return "\n".join(["load it:", *("  " + line for line in lines)])


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str):
        """Raises ValueError."""
        raise ValueError(f"{message}; see --help")


def located(text: str) -> tuple[str, Path]:
    """FORMAT and PATH of `FORMAT:PATH`."""
    name, colon, path = text.partition(":")
    if not colon or not path or name not in FORMAT_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not FORMAT:PATH with FORMAT one of {', '.join(FORMAT_NAMES)}")
    return name, command_line.path_argument(path)


def main(arguments: list[str] | None = None) -> int:
    """Converts with the arguments of the command line; prints the written files and the code that loads them.

    Returns:
      The exit status.

    Raises:
      FileNotFoundError, ValueError, OSError: see `qwen_jax.conversion.convert`, which then leaves nothing behind.
    """
    parser = Parser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=located, required=True, metavar="FORMAT:PATH", help="source")
    parser.add_argument(
        "--to",
        dest="target",
        type=located,
        required=True,
        metavar="FORMAT:PATH",
        help="target; must not exist, or be an empty folder",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the written weights (default: that of the source; a run has float32)",
    )
    parser.add_argument(
        "--max_shard_size", default="5GB", help="largest size of a safetensors file (default: %(default)s)"
    )
    parser.add_argument(
        "--tokenizer",
        type=command_line.path_argument,
        metavar="FILE.tiktoken",
        help="tokenizer to write (default: that of the source)",
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        metavar="ROWS",
        help="rows of the vocabulary to write, padded or cut past the tokenizer's ids (default: those of the source)",
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default=SCANNED,
        help="layout of an orbax target: blocks stacked, for training, or each with its own arrays (default: scanned)",
    )
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="base model of a peft adapter: to read one, its folder (default: the one that the adapter names); to "
        "write one, the folder or name that peft is to load it on",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all tensors back from disk and compare hashes before the target appears",
    )
    parser.add_argument("--check", action="store_true", help="compare the logits of source and target on 128 tokens")
    parsed = parser.parse_args(arguments)
    (source_format, source), (target_format, target) = parsed.source, parsed.target
    try:
        written = convert(
            source_format,
            source,
            target_format,
            target,
            parsed.dtype,
            parsed.max_shard_size,
            parsed.tokenizer,
            vocab_size=parsed.vocab_size,
            layout=parsed.layout,
            verify=parsed.verify,
            base=parsed.base,
        )
    except ChecksumError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {target_format} to {target}:")
    for file in sorted(written.iterdir()) if written.is_dir() else [written]:
        size = sum(path.stat().st_size for path in [file, *file.rglob("*")] if path.is_file())
        print(f"  {file.name:<36}{size:>16,} bytes")
    print(loading(target_format, target))
    return check(source, written, parsed.dtype, parsed.base) if parsed.check else 0


def check(source: Path, target: Path, dtype: str | None, base: str | None) -> int:
    """Prints the difference of the logits of two folders; returns 1 if they differ and nothing was rounded."""
    comparison = compare_logits(source, target, progress=True, base=base)
    print(f"check: {comparison}")
    if comparison.same:
        return 0
    if dtype == "bfloat16":
        print("the weights were rounded to bfloat16: if the source had more than that, a difference is expected")
        return 0
    print(f"error: {target} is not the model of {source}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    command_line.run(main)
