"""Tokens per second of the real train step against torch and transformers, on the same weights, in one run.

    python benchmarks/train_step.py                                   # 34M parameters on CPUs, float32 and bfloat16
    JAX_NUM_CPU_DEVICES=2 python benchmarks/train_step.py --remat minimal   # ours over two devices, one for each core
    python benchmarks/train_step.py --preset 1.8b --dtypes bfloat16 --batch 8 --length 2048 --remat minimal   # one GPU
    python benchmarks/train_step.py --preset tiny --rounds 1 --steps 1 --batch 2 --length 64     # does it run?

Ours is the step that `python -m qwen_jax.train` compiles. The peer is Qwen2ForCausalLM with torch's fused AdamW, weight
decay, clipping and fastest attention of its own (scaled_dot_product_attention), eager and, where it can, compiled by
torch.compile; in bfloat16 by autocast over float32 weights as ours, and with --bfloat16_weights also with weights and
moments in bfloat16. Both update the same weights on the same batch, and the losses after each update are compared.

Each side is a process of its own. On CPUs they take turns; on a GPU, which both would fill, one follows the other.
Medians are printed. Memory is the most that a process had resident on the host. Model operations: 6 per weight and
token, attention's causal products counted once.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from workers import Side, Worker, WorkerEnded, machine, take_turns  # noqa: E402

LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
# The most that losses after the last compared update may differ, as a part of them: rounding, and what it grows to.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
# Dense bfloat16 products by the makers' sheets, operations per second; found in the name of the device.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def preset(name: str, length: int):
    """The ModelConfig of a preset."""
    from qwen_jax.models.config import ModelConfig

    shapes = {
        "tiny": dict(vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, head_dim=16, ffn_size=128),
        "35m": dict(vocab_size=8192, hidden_size=512, num_layers=8, num_heads=8, head_dim=64, ffn_size=1408),
        "1.8b": dict(vocab_size=151936, hidden_size=2048, num_layers=24, num_heads=16, ffn_size=5504),
        "7b": dict(vocab_size=151936, hidden_size=4096, num_layers=32, num_heads=32, ffn_size=11008),
    }
    return ModelConfig(context_length=length, **shapes[name])


def batch_of(config: dict, batch: int, length: int):
    """int64 [batch, length] of random tokens, the same in every process."""
    import numpy as np

    return np.random.default_rng(1).integers(0, config["vocab_size"], (batch, length))


# --- the two sides, each in its process ---------------------------------------------------------------------------


def our_side(job: dict):
    """(what was set up, the function that makes one update and returns its loss)."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.batch_spec import token_columns
    from qwen_jax.conversion import load_pretrained
    from qwen_jax.host_memory import keep_freed_memory, return_freed_memory
    from qwen_jax.models.kernels import resolve_kernel
    from qwen_jax.models.transformer import Qwen
    from qwen_jax.sharding import MeshConfig, make_mesh
    from qwen_jax.training.objectives import next_token_prediction
    from qwen_jax.training.optimizer import OptimizerConfig, make_optimizer
    from qwen_jax.training.program import compile_run
    from qwen_jax.training.state import TrainState

    keep_freed_memory()  # as `python -m qwen_jax.train` does
    mesh = make_mesh(MeshConfig())
    model, params = load_pretrained(job["folder"], job["dtype"], mesh)
    model = Qwen(
        dataclasses.replace(
            model.config,
            remat=job["remat"],
            attention_kernel=job["attention_kernel"],
            context_length=job["length"],
        )
    )
    optimizer = OptimizerConfig(
        peak_learning_rate=LEARNING_RATE,
        schedule="constant",
        beta1=BETAS[0],
        beta2=BETAS[1],
        epsilon=EPSILON,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
    )
    began = time.perf_counter()
    step = compile_run(
        model,
        next_token_prediction(),
        optimizer,
        10**6,
        mesh,
        batch_size=job["batch"],
        columns=token_columns(job["length"]),
    )
    seconds = time.perf_counter() - began
    moments = jax.jit(make_optimizer(optimizer, 10**6).init)(params)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, moments, {})
    tokens = jnp.asarray(batch_of({"vocab_size": model.config.vocab_size}, job["batch"], job["length"]), jnp.int32)
    batch = {"tokens": tokens, "loss_weights": jnp.ones(tokens.shape, jnp.float32)}
    current = [jax.device_put(state, step.input_shardings[0][0])]
    batch = jax.device_put(batch, step.input_shardings[0][1])
    del state, params, moments
    return_freed_memory()  # as the trainer does before its first step

    def update() -> float:
        current[0], metrics = step(current[0], batch)
        return float(metrics["loss"])

    kernel = resolve_kernel(model.config, job["length"], mesh)
    about = f"jax {jax.__version__}, attention by {kernel}, remat {job['remat']}, compiled in {seconds:.1f} s"
    about += f", {mesh.size} device{'s' * (mesh.size > 1)}"
    return {"about": about, "device": jax.devices()[0].device_kind}, update


def torch_side(job: dict):
    """The same of torch; `job["variant"]` says with which weights, and whether compiled."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.bfloat16 if job["variant"]["weights"] == "bfloat16" else torch.float32
    torch.set_float32_matmul_precision("highest")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=weights, attn_implementation="sdpa"
    ).to(device)
    model.config.use_cache = False
    if job["variant"]["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
    tokens = torch.tensor(batch_of({"vocab_size": model.config.vocab_size}, job["batch"], job["length"]), device=device)
    autocast = job["dtype"] == "bfloat16" and weights == torch.float32
    forward = torch.compile(model) if job["variant"]["compiled"] else model

    def update() -> float:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    about = f"torch {torch.__version__}, transformers {transformers.__version__}"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"about": about, "device": name}, update


def serve(job: dict) -> None:
    """A worker: sets up, then makes updates."""
    set_up, update = (our_side if job["side"] == "ours" else torch_side)(job)
    worker = Worker(job, **set_up)
    for _ in worker.units():
        worker.record(losses=update())


# --- the comparison ------------------------------------------------------------------------------------------------


def variants(dtype: str, arguments) -> dict[str, dict]:
    """The peers to compare with, by name."""
    base = {"weights": "float32", "compiled": False, "checkpointing": arguments.peer_checkpointing}
    found = {"torch": base, "torch, compiled": {**base, "compiled": True}}
    found = {name: peer for name, peer in found.items() if ("eager", "compiled")[peer["compiled"]] in arguments.peers}
    if dtype == "bfloat16" and arguments.bfloat16_weights:
        found |= {f"{name}, bfloat16 weights": {**peer, "weights": "bfloat16"} for name, peer in list(found.items())}
    return found


def measure(dtype: str, folder: Path, arguments, taking_turns: bool) -> list[Side]:
    """All sides of one compute dtype, measured; ours first. A peer that fails is reported and left out."""
    job = {
        "folder": str(folder),
        "dtype": dtype,
        "batch": arguments.batch,
        "length": arguments.length,
        "remat": arguments.remat,
        "attention_kernel": arguments.attention_kernel,
    }
    jobs = {"qwen_jax": {**job, "side": "ours"}}
    for name, peer in variants(dtype, arguments).items():
        jobs[name] = {**job, "side": "torch", "variant": peer}
    sides: list[Side] = []
    for name, one in jobs.items():
        print(f"{dtype}: {name} …", file=sys.stderr, flush=True)
        try:
            side = Side(name, __file__, one, XLA_PYTHON_CLIENT_PREALLOCATE="false")
            side.run(arguments.warm_up, measured=False)
        except (WorkerEnded, BrokenPipeError) as error:
            if name == "qwen_jax":
                raise ValueError(f"{dtype}: {error}") from error
            print(f"{dtype}: {name} left out: {error}", file=sys.stderr, flush=True)
            continue
        sides.append(side)
        if not taking_turns:
            take_turns([side], arguments.rounds, arguments.steps)
    if taking_turns:
        take_turns(sides, arguments.rounds, arguments.steps)
    return sides


def report(dtype: str, sides: list[Side], config, arguments, peak: float | None) -> float:
    """Prints the table of one compute dtype; returns our tokens per second over the fastest peer's (NaN: no peer)."""
    from qwen_jax.training.program import model_flops_per_token

    tokens = arguments.batch * arguments.length
    flops = model_flops_per_token(config, arguments.length).total
    print(f"\n{dtype}, {arguments.batch} x {arguments.length} tokens a step, {flops / 1e9:.3f} GFLOP per token")
    last = "loss after the first and last common update"
    print(f"| | tokens/s | lowest to highest | TFLOP/s | MFU | ratio | by CPU time | peak MiB | {last} |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    rates = {side.name: tokens * side.rate() for side in sides}
    losses = {side.name: side.recorded("losses") for side in sides}
    common = min(map(len, losses.values())) - 1
    for side in sides:
        rate, lowest, highest = rates[side.name], min(side.rates()), max(side.rates())
        mfu = f"{100 * rate * flops / peak:.1f}%" if peak else ""
        memory = statistics.median(one["peak_bytes"] or float("nan") for one in side.rounds) / 2**20
        print(
            f"| {side.name} | {rate:,.0f} | {tokens * lowest:,.0f} to {tokens * highest:,.0f} | "
            f"{rate * flops / 1e12:.3f} | {mfu} | {rates['qwen_jax'] / rate:.2f} | "
            f"{sides[0].rate('cpu') / side.rate('cpu'):.2f} | {memory:,.0f} | "
            f"{losses[side.name][0]:.4f}, {losses[side.name][common]:.4f} |"
        )
    for name, theirs in losses.items():
        for ours, other in ((losses[sides[0].name][i], theirs[i]) for i in (0, common)):
            if abs(ours - other) > TOLERANCE[dtype] * abs(other):
                print(f"NOT THE SAME TRAINING: {name} has the loss {other:.5f} where ours is {ours:.5f}")
    print("; ".join(f"{side.name}: {side.about['about']}" for side in sides))
    peers = [rates[side.name] for side in sides[1:]]
    ratio = rates["qwen_jax"] / max(peers) if peers else float("nan")
    print(f"qwen_jax / fastest peer: {ratio:.2f}")
    return ratio


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "35m", "1.8b", "7b"), default="35m", help="(35m)")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCE), default=list(TOLERANCE), help="of compute")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (512)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements, of which the median is taken (5)")
    parser.add_argument("--steps", type=int, default=2, help="updates of a round (2)")
    parser.add_argument("--warm_up", type=int, default=2, help="updates before the first round (2)")
    parser.add_argument("--remat", default="full", help="ours: ModelConfig.remat (full)")
    parser.add_argument("--attention_kernel", default="auto", help="ours: ModelConfig.attention_kernel (auto)")
    parser.add_argument("--peer_checkpointing", action="store_true", help="torch: recompute layers to save memory")
    parser.add_argument("--bfloat16_weights", action="store_true", help="torch: also with bfloat16 weights and moments")
    peers = ("eager", "compiled")
    parser.add_argument("--peers", nargs="+", choices=peers, default=list(peers), help="(both)")
    parser.add_argument("--peak_tflops", type=float, help="of the device, for MFU; known for H100, H200 and A100")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        return serve(json.loads(arguments.worker))
    for name in ("batch", "length", "rounds", "steps", "warm_up"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, found {getattr(arguments, name)}")
    import jax
    from random_weights import write_model

    config = preset(arguments.preset, arguments.length)
    device = jax.devices()[0]
    peak = next((flops for name, flops in PEAKS.items() if name in device.device_kind), None)
    peak = arguments.peak_tflops * 1e12 if arguments.peak_tflops else peak
    with tempfile.TemporaryDirectory() as folder:
        written = write_model(config, Path(folder), spread=0.02)
        print(f"{arguments.preset} on {device.device_kind}; {machine()}")
        for dtype in arguments.dtypes:
            sides = measure(dtype, written, arguments, taking_turns=device.platform == "cpu")
            report(dtype, sides, dataclasses.replace(config, dtype=dtype), arguments, peak)


if __name__ == "__main__":
    from qwen_jax.command_line import run

    run(main)
