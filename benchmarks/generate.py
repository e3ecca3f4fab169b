"""Tokens per second of the generation engine against transformers' `generate`, on the same weights, in one run.

    python benchmarks/generate.py                          # a model of 134M parameters on CPUs, float32
    python benchmarks/generate.py --dtypes float32 bfloat16
    python benchmarks/generate.py --preset 1.8b --dtypes bfloat16 --batches 1 64 --prompt 256 --new 256    # one GPU
    python benchmarks/generate.py --preset tiny --rounds 1 --new 8 --prompt 16     # does it run?
    python benchmarks/generate.py --base ../before         # the engine of another checkout instead of transformers
    python benchmarks/generate.py --base ../before --samples 2     # two responses to each prompt, as PPO draws them

Random weights are written as a `qwen2` folder, which both load. Both first continue the same prompts greedily: the
tokens must be equal (in bfloat16, where rounding decides between near-equal logits, the share that is equal is
printed). Then they take turns; medians are printed. Prefill is the time to the first token; decoding is what the other
tokens take. With --bandwidth (or on a GPU whose figure is known), decoding is also put beside the least time that
reading the weights and the cache from memory takes.

With --base the engines of two checkouts take turns, each in a process of its own, on the same weights and prompts.
Their tokens must be equal. Several pairs of processes are started one after the other, and medians of their ratios are
printed: which memory a process gets makes it some per cent faster or slower for all of its life. CPU seconds, summed
over the threads of a process, suffer less from other work on the machine. With --samples each prompt is continued so
many times, by draws at temperature 1.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch lives on the same GPU

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from random_weights import write_model  # noqa: E402

from qwen_jax.command_line import path_argument  # noqa: E402
from qwen_jax.conversion import load_pretrained  # noqa: E402
from qwen_jax.conversion.mapping import parameter_shapes  # noqa: E402
from qwen_jax.inference import Engine, Request  # noqa: E402
from qwen_jax.models.config import ModelConfig  # noqa: E402

PRESETS = {
    "tiny": ModelConfig(vocab_size=500, hidden_size=64, num_layers=2, num_heads=4, head_dim=16, ffn_size=128),
    "100m": ModelConfig(vocab_size=32000, hidden_size=768, num_layers=12, num_heads=12, head_dim=64, ffn_size=2048),
    "1.8b": ModelConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_layers=24,
        num_heads=16,
        head_dim=128,
        ffn_size=5504,
        context_length=8192,
    ),
}
# Bytes per second between memory and processor, by the makers' sheets; found in the name of the device.
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}


@dataclasses.dataclass
class Contest:
    """One model in both libraries, in one compute dtype."""

    config: ModelConfig
    engine: Engine
    peer: transformers.PreTrainedModel
    prompts: np.ndarray  # [batch, length]

    def ours(self, new: int) -> list[tuple[int, ...]]:
        """New tokens of each prompt."""
        requests = [Request(prompt, new) for prompt in self.prompts]
        return [result.tokens for result in sorted(self.engine.generate(requests), key=lambda result: result.index)]

    def theirs(self, new: int) -> list[tuple[int, ...]]:
        """The same of transformers."""
        tokens = torch.tensor(self.prompts, device=self.peer.device)
        with torch.no_grad():
            whole = self.peer.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return [tuple(row) for row in whole[:, tokens.shape[1] :].tolist()]


def seconds(generate: Callable[[int], list], new: int) -> tuple[float, float]:
    """(to the first token, for each further one)."""
    begun = time.perf_counter()
    generate(1)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    generate(new)
    return first, (time.perf_counter() - begun - first) / (new - 1)


def least_bytes(config: ModelConfig, batch: int, length: float) -> float:
    """Bytes that one decoding step must read: the weights of all products, and the cache of `length` positions."""
    size = np.dtype(config.compute_dtype).itemsize
    weights = sum(int(np.prod(shape)) for name, shape in parameter_shapes(config).items() if name != "token_embedding")
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * length * batch
    return size * (weights + cache)


def bandwidth_of(device: str, given: float | None) -> float | None:
    """Bytes per second: as given, or those of a known GPU."""
    if given:
        return given * 1e9
    return next((value for name, value in BANDWIDTHS.items() if name in device), None)


def measure(contest: Contest, dtype: str, new: int, rounds: int, bandwidth: float | None) -> None:
    """Compares the tokens, then the times, and prints a line for each library."""
    batch, length = contest.prompts.shape
    ours, theirs = np.asarray(contest.ours(new)), np.asarray(contest.theirs(new))
    contest.ours(1)
    if dtype == "float32" and not np.array_equal(ours, theirs):
        raise ValueError(f"the tokens differ: {np.mean(ours == theirs):.2%} are equal")
    times = {"transformers": [], "qwen_jax": []}
    for _ in range(rounds):
        times["transformers"].append(seconds(contest.theirs, new))
        times["qwen_jax"].append(seconds(contest.ours, new))
    peer = [statistics.median(column) for column in zip(*times["transformers"], strict=True)]
    for name, rows in times.items():
        first, step = (statistics.median(column) for column in zip(*rows, strict=True))
        limit = ""
        if bandwidth:
            limit = f"{least_bytes(contest.config, batch, length + new / 2) / bandwidth / step:>10.0%}"
        print(
            f"{dtype:9} {batch:>5} {name:13} {batch * length / first:>12,.0f} {peer[0] / first:>6.2f} "
            f"{batch / step:>12,.1f} {peer[1] / step:>6.2f} {step * 1e3:>9.2f}{limit}"
        )
    print(f"{'':15} equal tokens: {np.mean(ours == theirs):.1%} of {ours.size}", flush=True)


# One engine: reads a line of prompts and number of new tokens, answers with wall seconds, CPU seconds and the tokens.
ENGINE = """
import json, sys, time
from qwen_jax.conversion import load_pretrained
from qwen_jax.inference import Engine, Request, SamplingConfig
engine = Engine(*load_pretrained(sys.argv[1], dtype=sys.argv[2]), slots=int(sys.argv[3]))
samples = int(sys.argv[4])
sampling = SamplingConfig(temperature=float(samples > 1))
for line in sys.stdin:
    prompts, new = json.loads(line)
    requests = [Request(prompt, new, sampling, seed=seed) for prompt in prompts for seed in range(samples)]
    wall, cpu = time.perf_counter(), time.process_time()
    results = sorted(engine.generate(requests), key=lambda result: result.index)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps([*seconds, [result.tokens for result in results]]), flush=True)
"""


@dataclasses.dataclass
class Turns:
    """Seconds of one pair of processes: of prefill and of each further token, by batch.

    Attributes:
      before, after: (batch, "prefill" or "decoding") to rows of (wall, CPU) seconds.
    """

    before: dict[tuple[int, str], list[np.ndarray]] = dataclasses.field(default_factory=dict)
    after: dict[tuple[int, str], list[np.ndarray]] = dataclasses.field(default_factory=dict)


def take_turns(
    base: Path, folder: Path, dtype: str, all_prompts: list[np.ndarray], new: int, rounds: int, samples: int
) -> Turns:
    """Has the engines of two checkouts, each in a new process, continue the same prompts in turns.

    Raises:
      ValueError: their tokens differ.
    """
    here = Path(__file__).resolve().parents[1]
    slots = max(map(len, all_prompts)) * samples
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ENGINE, folder, dtype, str(slots), str(samples)],
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for tree in (base, here)
    ]

    def ask(process, prompts, new):
        process.stdin.write(json.dumps([prompts.tolist(), new]) + "\n")
        process.stdin.flush()
        wall, cpu, tokens = json.loads(process.stdout.readline())
        return np.asarray([wall, cpu]), tokens

    turns = Turns()
    for prompts in all_prompts:
        for turn in range(rounds + 1):
            tokens = {}
            for place in (0, 1) if turn % 2 else (1, 0):
                first, _ = ask(processes[place], prompts, 1)
                whole, tokens[place] = ask(processes[place], prompts, new)
                if turn:  # the first compiles
                    times = (turns.before, turns.after)[place]
                    times.setdefault((len(prompts), "prefill"), []).append(first)
                    times.setdefault((len(prompts), "decoding"), []).append((whole - first) / (new - 1))
            if tokens[0] != tokens[1]:
                raise ValueError(f"the tokens of {base} and of this checkout differ")
    for process in processes:
        process.stdin.close()
        process.wait()
    return turns


def show_turns(dtype: str, pairs: list[Turns]) -> None:
    """Prints a line for each batch: medians of all times, and of the ratios of the pairs with their range.

    A process keeps the luck of its memory, some per cent of its speed, so that one pair says little.
    """
    print(
        f"{'dtype':9} {'batch':>5} {'':8} {'before, s':>10} {'after, s':>10} {'ratio':>6} {'CPU ratio':>10}  of pairs"
    )
    for of in pairs[0].before:
        sides = [np.asarray([np.median(side[of], axis=0) for side in (turns.before, turns.after)]) for turns in pairs]
        ratios = np.asarray([before / after for before, after in sides])  # [pairs, (wall, CPU)]
        before, after = np.median(sides, axis=0)
        wall, cpu = np.median(ratios, axis=0)
        print(
            f"{dtype:9} {of[0]:>5} {of[1]:8} {before[0]:>10.4f} {after[0]:>10.4f} {wall:>6.3f} {cpu:>10.3f}  "
            f"{ratios[:, 0].min():.3f} to {ratios[:, 0].max():.3f}, CPU {ratios[:, 1].min():.3f} to "
            f"{ratios[:, 1].max():.3f}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    """Writes the model, measures, prints a table with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="100m", choices=PRESETS)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="prompts that are continued together")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that are generated after each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bandwidth", type=float, help="of the memory, in GB/s")
    parser.add_argument("--samples", type=int, default=1, help="continuations of each prompt, with --base")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of new processes, with --base")
    parser.add_argument("--base", type=path_argument, metavar="FOLDER", help="another checkout, to compare the engines")
    arguments = parser.parse_args(argv)
    device = jax.devices()[0].device_kind
    gpu = jax.default_backend() == "gpu"
    bandwidth = bandwidth_of(device, arguments.bandwidth)
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as temporary:
        # Of a spread that makes greedy continuations wander.
        folder = write_model(PRESETS[arguments.preset], Path(temporary), spread=0.5)
        if arguments.base is not None:
            vocabulary = PRESETS[arguments.preset].vocab_size
            prompts = [random.integers(0, vocabulary, (batch, arguments.prompt)) for batch in arguments.batches]
            for dtype in arguments.dtypes:
                given = arguments.base, folder, dtype, prompts, arguments.new, arguments.rounds, arguments.samples
                pairs = []
                for number in range(1, arguments.pairs + 1):
                    pairs.append(take_turns(*given))
                    print(f"pair {number} of {arguments.pairs} of processes has ended", file=sys.stderr)
                show_turns(dtype, pairs)
            return
        print(
            f"{arguments.preset} on {device}, torch {torch.__version__} ({torch.get_num_threads()} threads), "
            f"transformers {transformers.__version__}, jax {jax.__version__}; prompts of {arguments.prompt} tokens, "
            f"{arguments.new} new, medians of {arguments.rounds}"
        )
        print(
            f"{'dtype':9} {'batch':>5} {'':13} {'prefill tok/s':>12} {'ratio':>5} {'decode tok/s':>12} {'ratio':>6} "
            f"{'ms/step':>9}{'of limit' if bandwidth else '':>10}"
        )
        for dtype in arguments.dtypes:
            model, params = load_pretrained(folder, dtype=dtype)
            engine = Engine(model, params, slots=max(arguments.batches))
            del params
            peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
            peer = peer.to("cuda") if gpu else peer
            for batch in arguments.batches:
                prompts = random.integers(0, model.config.vocab_size, (batch, arguments.prompt))
                contest = Contest(model.config, engine, peer, prompts)
                measure(contest, dtype, arguments.new, arguments.rounds, bandwidth)


if __name__ == "__main__":
    main()
