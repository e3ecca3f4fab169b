"""Loss-carrying tokens per second of SFT on packed conversations, against trl's SFTTrainer, in one run.

    python -m venv peer && peer/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0
    python benchmarks/sft.py --peer_python peer/bin/python                 # 34M parameters on CPUs, float32
    python benchmarks/sft.py --peer_python peer/bin/python --preset tiny --rounds 1 --length 128     # does it run?

Both sides start from the same weights and train on the same conversations, of lengths that are mixed as chat data are
(log-normal, mean about a fifth of a row), with loss on about half of their tokens. Each packs them with its own
best-fit packing into rows of the same length, and updates with the same AdamW on the same number of rows: ours by the
step that `python -m qwen_jax.train` compiles, theirs by SFTTrainer with `packing=True`, which joins the rows of a batch
into one (padding-free) and attends within each conversation. Each side is measured with each of --rows_at_once rows at
once, and the rest by accumulation; the best of each counts.

Each side is a process of its own; they take turns, and medians are printed, also per CPU second, summed over threads,
which suffers less from other work on the machine. The first losses are compared: batches differ, since the packings
do, so they agree only as far as batches of one data set do.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from workers import Side, Worker, machine, take_turns  # noqa: E402

LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIP_NORM = 1e-5, (0.9, 0.95), 1e-8, 0.1, 1.0
# Mean losses of the first updates, on batches that each side packed for itself.
TOLERANCE = 0.05
OURS = "qwen_jax"


def make_conversations(vocab_size: int, length: int, count: int):
    """Random conversations: a list of (token ids, loss weights), each an int list of up to `length`.

    A conversation is a header, then turns by user and assistant; what the assistant says carries loss.
    """
    import numpy as np

    random, found = np.random.default_rng(2), []
    for _ in range(count):
        wanted = int(np.clip(random.lognormal(np.log(length / 7), 0.8), 16, length))
        weights = np.zeros(wanted, int)
        place = 8
        while place < wanted:
            asked, answered = random.integers(4, 24), random.integers(4, 64)
            weights[place + asked : place + asked + answered] = 1
            place += asked + answered
        found.append((random.integers(1, vocab_size, wanted).tolist(), weights.tolist()))
    return found


# --- the two sides, each in its process ---------------------------------------------------------------------------


def our_side(job: dict) -> None:
    """Serves updates of qwen_jax."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qwen_jax.batch_spec import token_columns
    from qwen_jax.conversion import load_pretrained
    from qwen_jax.data.packers import Document, whole
    from qwen_jax.host_memory import keep_freed_memory
    from qwen_jax.models.transformer import Qwen
    from qwen_jax.sharding import MeshConfig, make_mesh
    from qwen_jax.training.objectives import next_token_prediction
    from qwen_jax.training.optimizer import OptimizerConfig, make_optimizer
    from qwen_jax.training.program import compile_run
    from qwen_jax.training.state import TrainState

    keep_freed_memory()  # as `python -m qwen_jax.train` does
    conversations = json.loads(Path(job["data"]).read_text())
    documents = [Document(np.asarray(ids), np.asarray(weights)) for ids, weights in conversations]
    examples = list(whole(documents, sequence_length=job["length"], eos_id=0))
    order = np.random.default_rng(3).permutation(len(examples))
    mesh = make_mesh(MeshConfig())
    model, params = load_pretrained(job["folder"], "float32", mesh)
    model = Qwen(dataclasses.replace(model.config, remat=job["remat"], context_length=job["length"]))
    optimizer = OptimizerConfig(
        peak_learning_rate=LEARNING_RATE,
        schedule="constant",
        beta1=BETAS[0],
        beta2=BETAS[1],
        epsilon=EPSILON,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
    )
    columns = token_columns(job["length"], packed=True)
    parts = {"batch_size": job["rows"], "accumulation": job["rows"] // job["at_once"]}
    step = compile_run(model, next_token_prediction(), optimizer, 10**6, mesh, columns=columns, **parts)
    moments = jax.jit(make_optimizer(optimizer, 10**6).init)(params)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, moments, {})
    state = jax.device_put(state, step.input_shardings[0][0])
    filled = sum(int((one["segment_ids"] > 0).sum()) for one in examples)
    worker = Worker(
        job,
        about=f"jax {jax.__version__}, remat {job['remat']}",
        filled=filled / len(examples) / job["length"],
        carrying=sum(int(one["loss_weights"].sum()) for one in examples),
        rows=len(examples),
    )
    place = 0
    for _ in worker.units():
        rows = [examples[order[(place + row) % len(order)]] for row in range(job["rows"])]
        place += job["rows"]
        dtypes = {column.name: column.dtype for column in columns}
        batch = {name: np.stack([row[name] for row in rows]).astype(dtypes[name]) for name in dtypes}
        state, metrics = step(state, jax.device_put(batch, step.input_shardings[0][1]))
        worker.record(losses=float(metrics["loss"]), targets=int(batch["loss_weights"].sum()))


def trl_side(job: dict) -> None:
    """Serves updates of SFTTrainer: its own loop, which waits for the next order before each update."""
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl

    conversations = json.loads(Path(job["data"]).read_text())
    dataset = datasets.Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in conversations],
            "labels": [
                [token if weight else -100 for token, weight in zip(ids, weights, strict=True)]
                for ids, weights in conversations
            ],
        }
    )
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.float32, attn_implementation="sdpa"
    )
    rows = job["at_once"]
    config = trl.SFTConfig(
        output_dir=job["scratch"],
        max_steps=10**6,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=job["rows"] // rows,
        max_length=job["length"],
        packing=True,
        packing_strategy="bfd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        max_grad_norm=CLIP_NORM,
        optim="adamw_torch_fused",
        gradient_checkpointing=job["remat"] != "none",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        disable_tqdm=True,
    )

    class Counting(trl.SFTTrainer):
        """Counts the targets with loss of each update."""

        targets = 0

        def compute_loss(self, model, inputs, *arguments, **options):
            """As SFTTrainer."""
            self.targets += int((inputs["labels"][..., 1:] != -100).sum())
            return super().compute_loss(model, inputs, *arguments, **options)

    trainer = Counting(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
    packed = trainer.train_dataset
    worker = Worker(
        job,
        about=f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        filled=sum(len(ids) for ids in packed["input_ids"]) / len(packed) / job["length"],
        carrying=sum(label != -100 for labels in packed["labels"] for label in labels),
        rows=len(packed),
    )
    orders = worker.units()

    class Waiting(transformers.TrainerCallback):
        """Waits before each update, and tells after each."""

        def on_step_begin(self, arguments, state, control, **options):
            """Waits for the next order, or stops."""
            trainer.targets = 0
            if next(orders, True):
                control.should_training_stop = True

        def on_log(self, arguments, state, control, logs=None, **options):
            """Tells the loss of the update."""
            if logs and "loss" in logs:
                worker.record(losses=float(logs["loss"]), targets=trainer.targets)

    trainer.add_callback(Waiting())
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


# --- the comparison ------------------------------------------------------------------------------------------------


def report(sides: list[Side]) -> float:
    """Prints the table; returns our best loss-carrying tokens per second over the best peer's."""
    rates = {side.name: side.rate(of="targets") for side in sides}
    ours, *others = sorted(sides, key=lambda side: (not side.name.startswith(OURS), -rates[side.name]))
    by_cpu = {side.name: side.rate("cpu", of="targets") for side in sides}
    losses = {side.name: side.recorded("losses") for side in sides}
    print("| | loss-carrying tokens/s | lowest to highest | ratio | ratio by CPU | rows | filled | first losses |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for side in sides:
        name, found = side.name, side.rates(of="targets")
        ratio, of_cpu = rates[ours.name] / rates[name], by_cpu[ours.name] / by_cpu[name]
        first = ", ".join(f"{loss:.4f}" for loss in losses[name][:2])
        print(
            f"| {name} | {rates[name]:,.0f} | {min(found):,.0f} to {max(found):,.0f} | {ratio:.2f} | {of_cpu:.2f} | "
            f"{side.about['rows']} | {side.about['filled']:.1%} | {first} |"
        )
    for side in others:
        if side.about["carrying"] != ours.about["carrying"]:
            print(
                f"NOT THE SAME DATA: {side.name} has {side.about['carrying']} loss-carrying tokens, we "
                f"{ours.about['carrying']}"
            )
        if abs(losses[side.name][0] - losses[ours.name][0]) > TOLERANCE * losses[ours.name][0]:
            print(f"NOT THE SAME TRAINING: {side.name} begins with the loss {losses[side.name][0]:.4f}")
    print("; ".join(f"{side.name}: {side.about['about']}" for side in sides))
    ratio = rates[ours.name] / max(rates[side.name] for side in others if not side.name.startswith(OURS))
    print(f"best of {OURS} / best of trl: {ratio:.2f}")
    return ratio


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", metavar="PYTHON", help="interpreter of an environment with trl")
    parser.add_argument("--preset", choices=("tiny", "35m"), default="35m", help="model (35m)")
    parser.add_argument("--rows", type=int, default=8, help="packed rows of an update (8)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--conversations", type=int, default=2000, help="in the data set (2000)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements, of which the median is taken (5)")
    parser.add_argument("--steps", type=int, default=1, help="updates of a round (1)")
    parser.add_argument("--warm_up", type=int, default=1, help="updates before the first round (1)")
    parser.add_argument("--remat", default="none", choices=("none", "full"), help="full: both compute layers again")
    parser.add_argument(
        "--rows_at_once", type=int, nargs="+", default=[1, 8], help="rows that each side takes at once (1 8)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        job = json.loads(arguments.worker)
        return our_side(job) if job["side"] == "ours" else trl_side(job)
    if not arguments.peer_python:
        parser.error("name the interpreter of an environment with trl: --peer_python (see --help)")
    from random_weights import write_model
    from train_step import preset

    config = preset(arguments.preset, arguments.length)
    with tempfile.TemporaryDirectory() as temporary:
        folder, data = write_model(config, Path(temporary), spread=0.02), Path(temporary) / "conversations.json"
        data.write_text(json.dumps(make_conversations(config.vocab_size, arguments.length, arguments.conversations)))
        job = {"folder": str(folder), "data": str(data), "length": arguments.length, "rows": arguments.rows}
        job |= {"remat": arguments.remat, "scratch": str(Path(temporary) / "trl")}
        sides = [
            Side(f"{name}, {rows} row(s) at once", __file__, {**job, "side": side, "at_once": rows}, python)
            for name, side, python in ((OURS, "ours", sys.executable), ("trl", "trl", arguments.peer_python))
            for rows in dict.fromkeys(min(rows, arguments.rows) for rows in arguments.rows_at_once)
        ]
        take_turns(sides, arguments.rounds, arguments.steps, arguments.warm_up)
        print(
            f"{arguments.preset} on {machine()}; float32, {arguments.rows} rows of {arguments.length} tokens "
            f"an update, {arguments.conversations} conversations, remat {arguments.remat}\n"
        )
        report(sides)


if __name__ == "__main__":
    if "--worker" in sys.argv:  # the peer's environment lacks our packages
        main()
    else:
        from qwen_jax.command_line import run

        run(main)
