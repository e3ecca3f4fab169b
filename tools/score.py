"""Scores conversations with a reward model: JSON lines in, JSON lines out.

python tools/score.py --checkpoint runs/reward_tiny --input runs/courtesy/conversations.jsonl --output rewards.jsonl

Each line of the input has `messages`, the last of which is the assistant's. Each line of the output has its `line`
(FILE:LINE), the `reward`, the number of `tokens`, and the `id` of the input if there is one. A line that cannot be
scored has an `error` instead of a reward, and is named on standard error.

The output appears when it is whole. Until then the results lie beside it, and the same command goes on with them. All
devices of this machine work together; rewards do not depend on their number.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from qwen_jax import files
from qwen_jax.alignment.reward_model import RewardModel
from qwen_jax.command_line import path_argument, run
from qwen_jax.compilation_cache import programs_kept
from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.conversion.load import weight_files
from qwen_jax.data import react
from qwen_jax.data.chatml import DEFAULT_SYSTEM, encode_conversation
from qwen_jax.data.conversations import check, from_openai
from qwen_jax.data.tokenizer import Tokenizer
from qwen_jax.sharding import MeshConfig, make_mesh

# Conversations whose results are written together; those of similar lengths among them are computed together.
LINES_AT_ONCE = 2048


def load_reward_model(checkpoint: Path, dtype: str = "float32") -> tuple[RewardModel, Tokenizer]:
    """The reward model of a run folder or an exported folder, on all devices, and its tokenizer.

    Raises:
      ValueError, OSError: there is none, it is no reward model, or it has no tokenizer.
    """
    mesh = make_mesh(MeshConfig())
    model, params = load_pretrained(checkpoint, dtype, mesh)
    try:
        return RewardModel(model, params, mesh), load_tokenizer(checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error


def lines_of(path: Path) -> Iterator[tuple[str, object, str | None]]:
    """(FILE:LINE, value, None) or (FILE:LINE, None, error) of every line that is not blank."""
    with files.open_decompressed(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig")), None
            except (ValueError, RecursionError) as error:
                yield where, None, f"not JSON: {error}"


def encoded(value: object, tokenizer: Tokenizer, system: str) -> list[int]:
    """Token ids of the conversation of one line.

    Raises:
      ValueError: it has none.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with a list 'messages', found {type(value).__name__}")
    said = react.say(check(from_openai(value)))
    return encode_conversation(tokenizer, [{"role": one.role, "content": one.content} for one in said], system)


def scored(lines: Sequence, model: RewardModel, tokenizer: Tokenizer, system: str) -> list[dict]:
    """A row of the output for each of `lines`, in their order."""
    rows, conversations, places = [], [], []
    for where, value, problem in lines:
        row = {"line": where}
        if isinstance(value, dict) and "id" in value:
            row["id"] = value["id"]
        ids = []
        try:
            ids = encoded(value, tokenizer, system) if problem is None else []
            problem = problem or model.problem(ids)
        except ValueError as error:
            problem = str(error)
        if problem is None:
            conversations.append(ids)
            places.append(len(rows))
        rows.append(row | ({"tokens": len(ids)} if problem is None else {"error": problem}))
    for place, reward in zip(places, model.score(conversations).tolist(), strict=True):
        finite = math.isfinite(reward)
        rows[place] |= {"reward": reward} if finite else {"error": f"the reward is {reward}: the model is damaged"}
    return rows


class Results:
    """The rows of an unfinished output: `.NAME.unfinished` beside it, with its settings in the first line."""

    def __init__(self, output: Path, settings: dict):
        """Opens the file, after the whole rows that an interrupted command has written.

        Raises:
          ValueError: it was written with other settings, or the output exists.
        """
        if output.exists():
            raise ValueError(f"{output} exists: choose another --output, or remove it")
        self.output, self.path = output, output.with_name(f".{output.name}.unfinished")
        output.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict] = []
        head = files.json_line(settings).encode()
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = content[: content.rfind(b"\n") + 1]
        if kept and not kept.startswith(head):
            raise ValueError(
                f"{self.path} holds results of another checkpoint, input or setting: remove it, or choose another "
                f"--output"
            )
        self.rows = [json.loads(line) for line in kept[len(head) :].splitlines()]
        # An object of a bucket is written whole each time.
        self._object = bytearray(kept or head) if files.is_remote(self.path) else None
        if self._object is None:
            self._stream = open(self.path, "ab")  # what is there stays, whatever ends this process
            self._stream.truncate(len(kept))
            self._stream.write(b"" if kept else head)
            self._stream.flush()

    def add(self, rows: list[dict]) -> None:
        """Appends rows, which a kill no longer loses."""
        lines = "".join(map(files.json_line, rows)).encode()
        if self._object is not None:
            self._object += lines
            self.path.write_bytes(self._object)
        else:
            self._stream.write(lines)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self.rows += rows

    def finish(self) -> None:
        """Writes the output, whole, and removes the unfinished file."""
        if self._object is None:
            self._stream.close()
        files.write_text(self.output, "".join(map(files.json_line, self.rows)))
        self.path.unlink(missing_ok=True)


def settings_of(checkpoint: Path, source: Path, system: str, dtype: str) -> dict:
    """What decides the rewards: files of the weights and the input by name, size and time, and the options."""
    found = [*weight_files(checkpoint), source]
    # Of an object, the time has seconds alone.
    stats = [
        [str(path.absolute()), status.st_size, status.st_mtime_ns or status.st_mtime]
        for path, status in ((path, path.stat()) for path in found)
    ]
    return {"files": stats, "system": system, "dtype": dtype}


def score_file(checkpoint: Path, source: Path, output: Path, system: str = DEFAULT_SYSTEM, dtype: str = "float32"):
    """Scores a file; see the top of this file.

    Returns:
      All rows of the output.

    Raises:
      ValueError, OSError: the checkpoint, the input or the output cannot be used.
    """
    total = sum(1 for _ in lines_of(source))
    if not total:
        raise ValueError(f"{source} has no line")
    results = Results(output, settings_of(checkpoint, source, system, dtype))
    done = len(results.rows)
    if done:
        print(f"going on after {done:,} of {total:,} conversations", file=sys.stderr)
    model, tokenizer = load_reward_model(checkpoint, dtype)
    with tqdm(total=total, initial=done, unit="conversation", disable=None) as bar:
        window = []
        for number, line in enumerate(lines_of(source), start=1):
            if number > done:
                window.append(line)
            if window and (len(window) == LINES_AT_ONCE or number == total):
                results.add(scored(window, model, tokenizer, system))
                bar.update(len(window))
                window = []
    results.finish()
    return results.rows


@programs_kept()
def main(argv: list[str] | None = None) -> int:
    """Command line; returns 1 if a line could not be scored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=path_argument, required=True, help="reward model: a run folder, or one exported from it"
    )
    parser.add_argument(
        "--input", type=path_argument, required=True, metavar="FILE.jsonl", help="may end in .gz or .zst"
    )
    parser.add_argument("--output", type=path_argument, required=True, metavar="FILE.jsonl", help="must not exist")
    parser.add_argument(
        "--system", default=DEFAULT_SYSTEM, help="system message of conversations without one (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    args = parser.parse_args(argv)
    rows = score_file(args.checkpoint, args.input, args.output, args.system, args.dtype)
    bad = [row for row in rows if "error" in row]
    for row in bad:
        print(f"{row['line']}: {row['error']}", file=sys.stderr)
    rewards = [row["reward"] for row in rows if "reward" in row]
    if rewards:
        spread = f"mean reward {sum(rewards) / len(rewards):.4f}, from {min(rewards):.4f} to {max(rewards):.4f}"
        print(f"{args.output}: {len(rewards):,} conversations on {jax.device_count()} device(s), {spread}")
    if bad:
        print(f"error: {len(bad):,} of {len(rows):,} lines could not be scored", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    run(main)
