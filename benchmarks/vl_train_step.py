"""Speed of the train step with pictures against torch, on the same weights, in one run.

    python benchmarks/vl_train_step.py                                  # decoder of 34M, encoder of 11M, float32, CPUs
    python benchmarks/vl_train_step.py --preset tiny --rounds 1 --steps 1 --batch 2 --length 128    # does it run?

Ours is the step that `python -m qwen_jax.train` compiles for a Qwen-VL model whose parts all learn (stage 2). The peer
has an encoder and a resampler written here in torch after arXiv 2308.12966, with scaled_dot_product_attention, and
Qwen2ForCausalLM of transformers as its decoder, with torch's fused AdamW; eager and compiled by torch.compile. Both
update the same weights on the same batch: every row has --images pictures of 224 pixels, whose features stand in
--queries places each, and text between them. The losses after each update are compared.

Each side is a process of its own; they take turns, and medians are printed. A picture is counted once a step, and so is
a token, places of features included. Memory is the most that a process had resident.
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

from train_step import (  # noqa: E402
    BETAS,
    CLIP_NORM,
    EPSILON,
    LEARNING_RATE,
    TOLERANCE,
    WEIGHT_DECAY,
)
from workers import Side, Worker, WorkerEnded, machine, take_turns  # noqa: E402

IMAGE_SIZE = 224
# CLIP's, of the colors red, green and blue.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preset(name: str, length: int, queries: int):
    """The ModelConfig of a preset."""
    from qwen_jax.models.config import ModelConfig
    from qwen_jax.models.vision.config import VisionConfig

    decoder, encoder = {
        "tiny": (
            dict(vocab_size=512, hidden_size=128, num_layers=2, num_heads=2, head_dim=64, ffn_size=128),
            dict(width=64, num_layers=2, num_heads=2, mlp_size=128),
        ),
        "45m": (
            dict(vocab_size=8192, hidden_size=512, num_layers=8, num_heads=8, head_dim=64, ffn_size=1408),
            dict(width=384, num_layers=6, num_heads=6, mlp_size=1536),
        ),
    }[name]
    start = decoder["vocab_size"] - 8
    vision = VisionConfig(image_size=IMAGE_SIZE, num_queries=queries, image_start_id=start, **encoder)
    return ModelConfig(context_length=length, vision=vision, **decoder)


def batch_of(job: dict):
    """(tokens int64 [batch, length], loss weights float32 of that shape, pictures uint8), alike in every process."""
    import numpy as np

    random, queries, start = np.random.default_rng(1), job["queries"], job["start"]
    tokens = random.integers(0, start, (job["batch"], job["length"]))
    weights = np.ones(tokens.shape, np.float32)
    every = job["length"] // job["images"]
    for image in range(job["images"]):
        at = image * every + (every - queries - 2) // 2
        tokens[:, at], tokens[:, at + 1 + queries] = start, start + 1
        tokens[:, at + 1 : at + 1 + queries] = start + 2
        weights[:, at : at + 2 + queries] = 0
    shape = (job["batch"], job["images"], IMAGE_SIZE, IMAGE_SIZE, 3)
    return tokens, weights, random.integers(0, 256, shape, np.uint8)


# --- the two sides, each in its process ---------------------------------------------------------------------------


def our_side(job: dict):
    """(what was set up, the function that makes one update and returns its loss)."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.batch_spec import image_column, token_columns
    from qwen_jax.conversion import load_pretrained
    from qwen_jax.host_memory import keep_freed_memory, return_freed_memory
    from qwen_jax.models.build import build_model
    from qwen_jax.sharding import MeshConfig, make_mesh
    from qwen_jax.training.objectives import next_token_prediction
    from qwen_jax.training.optimizer import OptimizerConfig, make_optimizer
    from qwen_jax.training.program import compile_run
    from qwen_jax.training.state import TrainState

    keep_freed_memory()  # as `python -m qwen_jax.train` does
    mesh = make_mesh(MeshConfig())
    model, params = load_pretrained(job["run"], "float32", mesh)
    model = build_model(dataclasses.replace(model.config, remat=job["remat"], context_length=job["length"]))
    optimizer = OptimizerConfig(
        peak_learning_rate=LEARNING_RATE,
        schedule="constant",
        beta1=BETAS[0],
        beta2=BETAS[1],
        epsilon=EPSILON,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
    )
    columns = (*token_columns(job["length"]), image_column(job["images"], IMAGE_SIZE))
    began = time.perf_counter()
    objective = next_token_prediction()
    step = compile_run(model, objective, optimizer, 10**6, mesh, batch_size=job["batch"], columns=columns)
    seconds = time.perf_counter() - began
    moments = jax.jit(make_optimizer(optimizer, 10**6).init)(params)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, moments, {})
    tokens, weights, images = batch_of(job)
    batch = {"tokens": tokens.astype("int32"), "loss_weights": weights, "images": images}
    current = [jax.device_put(state, step.input_shardings[0][0])]
    batch = jax.device_put(batch, step.input_shardings[0][1])
    del state, params, moments
    return_freed_memory()  # as the trainer does before its first step

    def update() -> float:
        current[0], metrics = step(current[0], batch)
        return float(metrics["loss"])

    about = f"jax {jax.__version__}, remat {job['remat']}, compiled in {seconds:.1f} s"
    return {"about": f"{about}, {mesh.size} device{'s' * (mesh.size > 1)}"}, update


def torch_model(job: dict):
    """Encoder, resampler and decoder in torch; called with tokens, pictures and labels, it gives the loss."""
    import torch
    import transformers
    from safetensors.torch import load_file
    from torch import nn
    from torch.nn import functional

    tensors = {}
    for file in sorted(Path(job["visual"]).glob("*.safetensors")):
        tensors |= {n.partition("visual.")[2]: one for n, one in load_file(file).items() if "visual." in n}
    config = job["vision"]
    width, heads = config["width"], config["num_heads"]

    def linear(name, bias=True):
        made = nn.Linear(*reversed(tensors[f"{name}.weight"].shape), bias=bias)
        made.load_state_dict({part: tensors[f"{name}.{part}"] for part in ("weight", "bias")[: 1 + bias]})
        return made

    def norm(name):
        made = nn.LayerNorm(len(tensors[f"{name}.weight"]), eps=1e-6)
        made.load_state_dict({part: tensors[f"{name}.{part}"] for part in ("weight", "bias")})
        return made

    class Block(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.norms = nn.ModuleList([norm(f"{name}.ln_1"), norm(f"{name}.ln_2")])
            self.mix, self.out = linear(f"{name}.attn.in_proj"), linear(f"{name}.attn.out_proj")
            self.up, self.down = linear(f"{name}.mlp.c_fc"), linear(f"{name}.mlp.c_proj")

        def forward(self, x):
            mixed = self.mix(self.norms[0](x)).unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
            attended = functional.scaled_dot_product_attention(*mixed.unbind(0))
            x = x + self.out(attended.transpose(1, 2).flatten(2))
            return x + self.down(functional.gelu(self.up(self.norms[1](x))))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("conv1.weight", "positional_embedding", "attn_pool.query", "attn_pool.pos_embed", "proj"):
                self.register_parameter(name.replace(".", "_"), nn.Parameter(tensors[name]))
            blocks = (f"transformer.resblocks.{index}" for index in range(config["num_layers"]))
            self.blocks = nn.Sequential(*map(Block, blocks))
            self.before, self.after = norm("ln_pre"), norm("ln_post")
            self.wide = linear("attn_pool.kv_proj", bias=False)
            self.of_values, self.of_queries = norm("attn_pool.ln_kv"), norm("attn_pool.ln_q")
            hidden = self.proj.shape[0]
            self.pool = nn.MultiheadAttention(hidden, hidden // 128, batch_first=True)
            name = "attn_pool.attn."
            self.pool.load_state_dict({n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)})

        def forward(self, pixels):
            x = functional.conv2d(pixels, self.conv1_weight, stride=self.conv1_weight.shape[-1])
            grid = x.shape[-1]
            x = x.flatten(2).transpose(1, 2) + self.positional_embedding
            values = self.of_values(self.wide(self.blocks(self.before(x))))
            side = round(len(self.attn_pool_pos_embed) ** 0.5)
            positions = self.attn_pool_pos_embed.T.reshape(1, -1, side, side)
            if side != grid:
                positions = functional.interpolate(positions, size=(grid, grid), mode="bicubic", align_corners=False)
            keys = values + positions.flatten(2).transpose(1, 2)
            asked = (self.of_queries(self.attn_pool_query) + self.attn_pool_pos_embed).expand(len(x), -1, -1)
            return self.after(self.pool(asked, keys, values, need_weights=False)[0]) @ self.proj

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            decoder = transformers.AutoModelForCausalLM.from_pretrained
            self.decoder = decoder(job["decoder"], dtype=torch.float32, attn_implementation="sdpa")
            self.decoder.config.use_cache = False
            self.encoder = Encoder()

        def forward(self, tokens, pixels, labels):
            places = (tokens == job["start"] + 2)[..., None]
            features = self.encoder(pixels).flatten(0, 1)
            embedded = self.decoder.get_input_embeddings()(tokens).masked_scatter(places, features)
            return self.decoder(inputs_embeds=embedded, labels=labels).loss

    assert width == tensors["conv1.weight"].shape[0]
    return Model()


def torch_side(job: dict):
    """The same of torch, compiled where `job` says so."""
    import torch
    import transformers

    torch.set_float32_matmul_precision("highest")
    model = torch_model(job)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
    tokens, weights, images = (torch.tensor(one) for one in batch_of(job))
    labels = torch.where(weights > 0, tokens, -100)
    pixels = (images.flatten(0, 1) / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    forward = torch.compile(model) if job["compiled"] else model

    def update() -> float:
        loss = forward(tokens, pixels, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return {"about": f"torch {torch.__version__}, transformers {transformers.__version__}"}, update


def serve(job: dict) -> None:
    """A worker: sets up, then makes updates."""
    set_up, update = (our_side if job["side"] == "ours" else torch_side)(job)
    worker = Worker(job, **set_up)
    for _ in worker.units():
        worker.record(losses=update())


# --- the comparison ------------------------------------------------------------------------------------------------


def write_weights(config, folder: Path) -> dict[str, str]:
    """Random weights for both sides: a run folder, its `qwen` files for the encoder, and the decoder as `qwen2`."""
    import flax.linen as nn
    import jax
    import numpy as np
    from flax.traverse_util import flatten_dict, unflatten_dict

    from qwen_jax.checkpoints.arrays import save_params
    from qwen_jax.conversion import convert
    from qwen_jax.models.build import build_model

    shapes = jax.eval_shape(lambda: build_model(config).init_params(jax.random.key(0)))
    random = np.random.default_rng(0)
    flat = {
        path: random.standard_normal(leaf.shape, np.float32) * np.float32(0.02) + np.float32("scale" in path)
        for path, leaf in flatten_dict(nn.meta.unbox(shapes), sep="/").items()
    }
    save_params(folder / "run", config, unflatten_dict(flat, sep="/"), None)
    text = {path: one for path, one in flat.items() if not path.startswith("vision/")}
    save_params(folder / "text", dataclasses.replace(config, vision=None), unflatten_dict(text, sep="/"), None)
    return {
        "run": str(folder / "run"),
        "visual": str(convert("orbax", folder / "run", "qwen", folder / "qwen", progress=False)),
        "decoder": str(convert("orbax", folder / "text", "qwen2", folder / "qwen2", progress=False)),
    }


def measure(config, places: dict[str, str], arguments) -> list[Side]:
    """All sides, measured; ours first. A peer that fails is reported and left out."""
    job = {**places, "batch": arguments.batch, "length": arguments.length, "images": arguments.images}
    job |= {"queries": arguments.queries, "start": config.vision.image_start_id, "remat": arguments.remat}
    job |= {"vision": dataclasses.asdict(config.vision)}
    jobs = {"qwen_jax": job | {"side": "ours"}, "torch": job | {"side": "torch", "compiled": False}}
    if "compiled" in arguments.peers:
        jobs["torch, compiled"] = jobs["torch"] | {"compiled": True}
    if "eager" not in arguments.peers:
        del jobs["torch"]
    sides = []
    for name, one in jobs.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            side = Side(name, __file__, one)
            side.run(arguments.warm_up, measured=False)
        except (WorkerEnded, BrokenPipeError) as error:
            if name == "qwen_jax":
                raise ValueError(str(error)) from error
            print(f"{name} left out: {error}", file=sys.stderr, flush=True)
            continue
        sides.append(side)
    take_turns(sides, arguments.rounds, arguments.steps)
    return sides


def report(sides: list[Side], arguments) -> None:
    """Prints the table, what differs in the losses, and the ratios."""
    tokens, images = arguments.batch * arguments.length, arguments.batch * arguments.images
    print("| | tokens/s | pictures/s | lowest to highest | ratio | by CPU time | peak MiB | first loss, last loss |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    ours, ends = sides[0], {}
    common = min(len(side.recorded("losses")) for side in sides) - 1
    for side in sides:
        rates, losses = side.rates(), side.recorded("losses")
        peak = statistics.median(one["peak_bytes"] or float("nan") for one in side.rounds) / 2**20
        ends[side.name] = side.rate(), peak
        print(
            f"| {side.name} | {tokens * side.rate():,.0f} | {images * side.rate():.2f} | "
            f"{images * min(rates):.2f} to {images * max(rates):.2f} | {ours.rate() / side.rate():.2f} | "
            f"{ours.rate('cpu') / side.rate('cpu'):.2f} | {peak:,.0f} | {losses[0]:.4f}, {losses[common]:.4f} |"
        )
        for here, there in ((ours.recorded("losses")[at], losses[at]) for at in (0, common)):
            if abs(here - there) > TOLERANCE["float32"] * abs(there):
                print(f"NOT THE SAME TRAINING: {side.name} has the loss {there:.5f} where ours is {here:.5f}")
    print("; ".join(f"{side.name}: {side.about['about']}" for side in sides))
    if len(sides) > 1:
        fastest = max(ends[side.name][0] for side in sides[1:])
        least = min(ends[side.name][1] for side in sides[1:])
        speed, memory = ends["qwen_jax"][0] / fastest, ends["qwen_jax"][1] / least
        print(f"qwen_jax / fastest peer: {speed:.2f}; memory / least of a peer: {memory:.2f}")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "45m"), default="45m", help="(45m)")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step (4)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, features included (512)")
    parser.add_argument("--images", type=int, default=2, help="pictures of a row (2)")
    parser.add_argument("--queries", type=int, default=64, help="features of a picture, a square number (64)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements, of which the median is taken (5)")
    parser.add_argument("--steps", type=int, default=2, help="updates of a round (2)")
    parser.add_argument("--warm_up", type=int, default=2, help="updates before the first round (2)")
    peers = ("eager", "compiled")
    parser.add_argument("--peers", nargs="+", choices=peers, default=list(peers), help="(both)")
    parser.add_argument("--remat", default="none", help="ours: ModelConfig.remat (none)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        return serve(json.loads(arguments.worker))
    for name in ("batch", "length", "images", "queries", "rounds", "steps", "warm_up"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, found {getattr(arguments, name)}")
    if arguments.images * (arguments.queries + 4) > arguments.length:
        raise ValueError(
            f"{arguments.images} pictures of {arguments.queries} features do not fit in {arguments.length} tokens"
        )
    config = preset(arguments.preset, arguments.length, arguments.queries)
    with tempfile.TemporaryDirectory() as folder:
        places = write_weights(config, Path(folder))
        pictures = f"{arguments.images} pictures of {IMAGE_SIZE} pixels and {arguments.queries} features"
        print(f"{arguments.preset}: {arguments.batch} rows of {arguments.length} tokens with {pictures}, {machine()}")
        report(measure(config, places, arguments), arguments)


if __name__ == "__main__":
    from qwen_jax.command_line import run

    run(main)
