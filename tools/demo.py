"""The whole life of a small model on this machine, in under ten minutes on two CPU cores.

Vocabulary, data, training with a stop and a resume, loss curve, completion, conversion, reload: every step is one
command, printed before it runs, that works the same on its own. Everything lies in runs/demo, which is made anew.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from shown_commands import ROOT, call, run, show, title

FOLDER = Path("runs/demo")
VOCABULARY, CACHE, RUN, CONVERTED = (FOLDER / name for name in ("vocabulary.tiktoken", "cache", "run", "qwen2"))
STOP_AT = 200
PROMPT = "class Reader:\n    def __init__(self, path):\n        self."
TRAIN = [
    "-m",
    "qwen_jax.train",
    "--gin_file=gin/runs/pretrain_tiny.gin",
    "--gin_file=gin/hardware/cpu.gin",
    f"--gin.OUTPUT_DIR={RUN}",
    f"--gin.CACHE_DIR={CACHE}",
    f"--gin.VOCABULARY={VOCABULARY}",
]


def output_of(*arguments) -> str:
    """Runs a command, showing its output as it comes, and returns it."""
    process = subprocess.Popen(show(list(arguments)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    text = ""
    while piece := process.stdout.read(1):
        text += piece
        print(piece, end="", flush=True)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return text


def metrics() -> list[dict]:
    """Rows of the run's metrics so far."""
    file = ROOT / RUN / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def train_and_stop() -> None:
    """Starts training, and sends SIGTERM halfway, as a scheduler would."""
    process = subprocess.Popen(show(TRAIN), cwd=ROOT)
    while process.poll() is None and not any(row["step"] >= STOP_AT for row in metrics()):
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)


def main(argv: list[str] | None = None) -> None:
    """Runs all steps and says what lies where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    began = time.monotonic()
    shutil.rmtree(ROOT / FOLDER, ignore_errors=True)
    (ROOT / FOLDER).mkdir(parents=True)
    title("1. a vocabulary of 4,096 tokens, from this machine's Python library and documentation")
    call("tools/build_tokenizer.py", "--size=4096", f"--output={VOCABULARY}")
    title("2. the same text as a SeqIO task, tokenized and packed into examples of 256 tokens")
    call(
        "tools/cache_task.py",
        "python_corpus",
        f"--cache_dir={CACHE}",
        "--sequence_length=256",
        f"--gin.vocabulary_path.path={VOCABULARY}",
    )
    title(f"3. training, stopped by SIGTERM soon after step {STOP_AT}")
    train_and_stop()
    title("4. the same command again: it goes on where it stopped")
    call(*TRAIN)
    title("5. the loss curve")
    call("tools/plot_run.py", RUN, f"--output={FOLDER / 'loss.png'}")
    title("6. the model completes a line of Python")
    speak = ["--prompt", PROMPT, "--max_new_tokens", "16"]
    spoken = output_of("-m", "qwen_jax.generate", "--checkpoint", RUN, *speak)
    title("7. as Qwen2ForCausalLM, which transformers, vLLM, SGLang and llama.cpp load")
    call("tools/convert_checkpoint.py", "--from", f"orbax:{RUN}", "--to", f"qwen2:{CONVERTED}")
    title("8. read back from that format, it says the same")
    if output_of("-m", "qwen_jax.generate", "--checkpoint", CONVERTED, *speak) != spoken:
        sys.exit("error: the converted model says something else")
    closing(time.monotonic() - began)


def closing(seconds: float) -> None:
    """Prints the figures, where things are, and what to try next."""
    held_out = [row for row in metrics() if "eval/loss" in row]
    first, last = held_out[0], held_out[-1]
    before, after = first["eval/bits_per_byte"], last["eval/bits_per_byte"]
    print(f"""
== done in {seconds / 60:.1f} minutes
held-out text: {before:.3f} bits per byte at the start, {after:.3f} after {last["step"]} steps

{RUN}          the run: checkpoints/, metrics.jsonl, tensorboard/, config.gin
{FOLDER}/loss.png     the loss curve
{CONVERTED}        the model for PyTorch: AutoModelForCausalLM.from_pretrained("{CONVERTED}")
{CACHE}        the tokenized and packed corpus

next: train longer      make the demo's training command again with --gin.TRAIN_STEPS=2000 and another --gin.OUTPUT_DIR
      your own text     --gin.MIXTURE_OR_TASK=local_files --gin.local_files.pattern='FOLDER OR GLOB'
      your own task     docs/how_to/add_a_task.md
      another size      --gin_file=gin/runs/pretrain_1_8b.gin, on hardware for it
""")


if __name__ == "__main__":
    run(main)
