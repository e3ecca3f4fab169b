"""Samples per second and peak memory of a PPO iteration, against trl's experimental PPO, in one run.

    python -m venv peer && peer/bin/pip install torch==2.13.0 transformers==5.24.0 trl==1.12.0
    python benchmarks/ppo.py --peer_python peer/bin/python                 # 34M parameters on CPUs, float32
    python benchmarks/ppo.py --peer_python peer/bin/python --preset tiny --rounds 1       # does it run?

An iteration is generation, scoring and the updates of all epochs. Both sides start from the same weights: policy and
reference from one model, value and reward model from another. Both draw responses of one length (temperature 1, no
filter) to prompts of one length, and use them in as many updates of equal minibatches, by AdamW with the same numbers.
Ours is the loop that `python -m qwen_jax.rlhf` runs, theirs `PPOTrainer`. How many rows a side computes at once is its
own matter: trl is measured with each of --peers, and the best counts. trl draws no end token; ours, one id of the
vocabulary, is drawn as often as any other, and saves no work: rows are computed as long as the longest of them.

Each side is a process of its own; they take turns, and medians are printed, also per CPU second, summed over threads,
which suffers less from other work on the machine. Peak memory is the most that was resident during measured iterations
(VmHWM, reset before each), so that loading and compiling do not count.

The first rollouts are compared: mean reward, entropy and KL per token, which agree as far as samples of one
distribution do. What differs by definition: our reward model reads the end token at the last position, whatever was
drawn there; our rewards lose their running mean; we clip the gradient's norm (at 1), trl does not.
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

from workers import Side, Worker, machine, take_turns  # noqa: E402

LEARNING_RATE, BETAS, EPSILON = 1e-6, (0.9, 0.95), 1e-8
KL, CLIP, VALUE_CLIP, VALUE_COEFFICIENT, DISCOUNT, DECAY = 0.04, 0.2, 0.15, 0.1, 1.0, 0.95
# Figures of the first rollout that both sides give, and how far they may differ: samples are not the same.
COMPARED = {"reward": 0.5, "entropy": 0.05, "kl": 1e-3}
PARTS = ("generation", "scoring", "update")


class LastUnit(Exception):
    """No further iteration is wanted: ends a loop that cannot be told to stop."""


# --- the two sides, each in its process ---------------------------------------------------------------------------


class FixedPrompts:
    """Prompts of one length, as `qwen_jax.training.batches.Examples`."""

    repeat, bytes_per_token, fingerprint = True, 1.0, "prompts"

    def __init__(self, prompts: list[list[int]]):
        from qwen_jax.batch_spec import token_columns

        self.prompts, self.columns = prompts, token_columns(len(prompts[0]), packed=True)

    def __len__(self) -> int:
        return len(self.prompts)

    def read(self, start: int, stop: int) -> dict:
        """As `Examples.read`."""
        import numpy as np

        tokens = np.asarray([self.prompts[index % len(self)] for index in range(start, stop)], np.int32)
        places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        ones = np.ones_like(tokens)
        return {"tokens": tokens, "loss_weights": ones.astype(np.float32), "segment_ids": ones, "positions": places}


def our_side(job: dict) -> None:
    """Serves iterations of the Trainer of `python -m qwen_jax.rlhf`."""
    import jax

    from qwen_jax.host_memory import keep_freed_memory
    from qwen_jax.training.callbacks import Callback

    if job["keep_memory"]:
        keep_freed_memory()  # as `python -m qwen_jax.rlhf` does
    trainer, rollouts = our_trainer(job)
    worker = Worker(job, about=f"jax {jax.__version__}, {job['rows_at_once']} rows at once, remat {job['remat']}")
    orders = worker.units()

    class Waiting(Callback):
        """Waits before each iteration, and records after each."""

        began = 0.0

        def before_step(self, trainer):
            """Waits for the next order, or stops."""
            if trainer.step % rollouts.steps:
                return
            if trainer.step:
                jax.block_until_ready(trainer.state)
                self.record(trainer.latest, time.perf_counter() - self.began)
            if next(orders, True):
                raise LastUnit
            self.began = time.perf_counter()

        def record(self, found, seconds):
            """Records figures of the rollout, and the parts of an iteration of so many seconds."""
            figures = {name: found[f"rollout/{name}"] for name in ("reward", "entropy")}
            parts = {part: found[f"rollout/seconds/{part}"] for part in ("generation", "scoring")}
            update = seconds - sum(parts.values()) - found["rollout/seconds/weights"]
            worker.record(**figures, kl=found["rollout/kl_per_token"], **parts, update=update)

    trainer.callbacks = [Waiting(), *trainer.callbacks]
    try:
        trainer.run()
    except LastUnit:
        pass


def our_trainer(job: dict):
    """(Trainer, its Rollouts) of a job."""
    from qwen_jax.alignment.actor_critic import ActorCritic, SeveralInitialWeights
    from qwen_jax.alignment.ppo import PPOConfig
    from qwen_jax.alignment.rollouts import RolloutConfig, Rollouts
    from qwen_jax.conversion.initial_weights import InitialWeights
    from qwen_jax.conversion.load import read_model_config
    from qwen_jax.distributed.watchdog import Activity
    from qwen_jax.sharding import MeshConfig, make_mesh
    from qwen_jax.training.goodput import Goodput
    from qwen_jax.training.optimizer import OptimizerConfig
    from qwen_jax.training.parameter_groups import ParameterGroup, ScheduleConfig
    from qwen_jax.training.run import Run
    from qwen_jax.training.trainer import Trainer
    from qwen_jax.training.trainer_config import TrainerConfig

    length, rows, mesh = job["prompt"] + job["response"], job["rows"], make_mesh(MeshConfig())
    same = {"dtype": "float32", "remat": job["remat"], "context_length": length}
    policy, reward = (dataclasses.replace(read_model_config(job[name]), **same) for name in ("policy", "reward"))
    models = ActorCritic(policy, reward, reward)
    weights = SeveralInitialWeights(
        InitialWeights(job["policy"], {"policy": "", "reference": ""}, policy),
        InitialWeights(job["reward"], {"value": "", "reward": ""}, reward),
    )
    algorithm = PPOConfig(0.0, 0.0, KL, value_clip=VALUE_CLIP, clip=CLIP, value_coefficient=VALUE_COEFFICIENT)
    config = RolloutConfig(
        length,
        job["prompt"],
        rows // job["responses"],
        job["responses"],
        epochs=job["epochs"],
        top_p=1.0,
        pretraining_rows=0,
        slots=rows,
    )
    batch = rows // job["minibatches"]
    parts = -(-batch // job["rows_at_once"])
    folder, endless = Path(job["scratch"]), config.steps(batch) * 10**6
    folder.mkdir()
    trainer = TrainerConfig(endless, batch, length, accumulation_steps=parts, checkpoint_every=endless)
    schedule = ScheduleConfig(LEARNING_RATE, schedule="constant")
    groups = (ParameterGroup("trained", "(policy|value)/.*", schedule), ParameterGroup("frozen", ".*", None))
    optimizer = OptimizerConfig(
        LEARNING_RATE, "constant", beta1=BETAS[0], beta2=BETAS[1], epsilon=EPSILON, weight_decay=0.0, groups=groups
    )
    rollouts = Rollouts(
        models,
        algorithm,
        config,
        mesh,
        folder,
        prompts=FixedPrompts(json.loads(Path(job["prompts"]).read_text())),
        pretraining=None,
        batch_size=batch,
        rows_at_a_time=batch // parts,
        tokenizer=Bytes(policy.vocab_size),
        stop_ids=(policy.vocab_size - 1,),
    )
    run = Run(folder, Activity(), Goodput(folder))
    objective = algorithm.objective(config.temperature, config.top_p, 0)
    arguments = (run, models, objective, optimizer, trainer, mesh, rollouts, [rollouts])
    return Trainer(*arguments, initial_weights=weights), rollouts


class Bytes:
    """A tokenizer whose ids stand for single bytes, several for the same."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def decode_bytes(self, ids) -> bytes:
        """Bytes of ids."""
        return bytes(token % 256 for token in ids)


def trl_side(job: dict) -> None:
    """Serves iterations of PPOTrainer: its own loop, which waits for the next order after each."""
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl
    from trl.experimental import ppo
    from trl.experimental.ppo import ppo_trainer

    prompts = json.loads(Path(job["prompts"]).read_text())
    prompts = [prompt for prompt in prompts for _ in range(job["responses"])]

    def load(kind, folder):
        return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")

    policy, reference = (load(transformers.AutoModelForCausalLM, job["policy"]) for _ in range(2))
    value, reward = (load(transformers.AutoModelForSequenceClassification, job["reward"]) for _ in range(2))
    # Ids that are none of the model's: no response is taken to end, and no token for filling.
    outside = policy.config.vocab_size
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": outside, "<end>": outside + 1}, "<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    rows, at_once = job["rows"], job["peer"]["update"]
    config = ppo.PPOConfig(
        output_dir=job["scratch"],
        per_device_train_batch_size=at_once if job["minibatches"] == 1 else rows,
        gradient_accumulation_steps=rows // at_once if job["minibatches"] == 1 else 1,
        num_mini_batches=job["minibatches"],
        num_ppo_epochs=job["epochs"],
        local_rollout_forward_batch_size=job["peer"]["forward"],
        total_episodes=rows * 10**6,
        response_length=job["response"],
        temperature=1.0,
        kl_coef=KL,
        cliprange=CLIP,
        cliprange_value=VALUE_CLIP,
        vf_coef=VALUE_COEFFICIENT,
        gamma=DISCOUNT,
        lam=DECAY,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        optim="adamw_torch_fused",
        gradient_checkpointing=job["peer"]["checkpointing"],
        num_sample_generations=0,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    worker = Worker(
        job, about=f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    orders, ends = worker.units(), [0.0] * 3

    def timed(function, place):
        """`function`, noting when it returns."""

        def noting(*arguments, **options):
            result = function(*arguments, **options)
            ends[place] = time.perf_counter()
            return result

        return noting

    # The last function of generation, and the last of scoring.
    ppo_trainer.batch_generation = timed(ppo_trainer.batch_generation, 1)
    ppo_trainer.masked_whiten = timed(ppo_trainer.masked_whiten, 2)

    class Waiting(transformers.TrainerCallback):
        """Waits before each iteration, and records after each."""

        def on_train_begin(self, arguments, state, control, **options):
            """Waits for the first order."""
            if next(orders, True):
                raise LastUnit
            ends[0] = time.perf_counter()

        def on_log(self, arguments, state, control, logs=None, **options):
            """Records figures of the rollout, per token."""
            names = {"reward": ("scores", 1), "entropy": ("entropy", job["response"]), "kl": ("kl", job["response"])}
            worker.record(**{ours: logs[f"objective/{theirs}"] / by for ours, (theirs, by) in names.items()})

        def on_step_end(self, arguments, state, control, **options):
            """Records the parts of the iteration, and waits for the next order."""
            times = [*ends, time.perf_counter()]
            worker.record(**{part: times[i + 1] - times[i] for i, part in enumerate(PARTS)})
            self.on_train_begin(arguments, state, control)

    trainer = ppo.PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
        data_collator=lambda found: {"input_ids": torch.tensor([row["input_ids"] for row in found])},
        callbacks=[Waiting()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    try:
        trainer.train()
    except LastUnit:
        pass


# --- the comparison ------------------------------------------------------------------------------------------------


def peer_settings(text: str, rows: int) -> dict:
    """Settings of trl, from `UPDATE[/FORWARD][/checkpointing]`."""
    first, *others = text.split("/")
    checkpointing = "checkpointing" in others
    numbers = [int(one) for one in (first, *others) if one != "checkpointing"]
    if len(numbers) > 2 or any(number < 1 or rows % number for number in numbers):
        raise ValueError(f"--peers {text}: expected UPDATE[/FORWARD][/checkpointing], numbers that divide {rows} rows")
    return {"update": numbers[0], "forward": numbers[-1], "checkpointing": checkpointing}


def report(sides: list[Side], rows: int) -> tuple[float, float]:
    """Prints the table; returns our samples per second and our peak memory over those of trl's fastest."""
    ours, *peers = sides
    rates = {side.name: rows * side.rate() for side in sides}
    memory = {side.name: max(one["peak_bytes"] or 0 for one in side.rounds) for side in sides}
    print(
        "| | samples/s | lowest to highest | ratio | ratio by CPU | peak memory, MiB | ratio | "
        "generation, scoring, update, s | reward, entropy, KL of the first rollout |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for side in sides:
        name, found = side.name, [rows * rate for rate in side.rates()]
        by_cpu = ours.rate("cpu") / side.rate("cpu")
        parts = [statistics.median(value for one in side.rounds for value in one[part]) for part in PARTS]
        first = [side.recorded(figure)[0] for figure in COMPARED]
        print(
            f"| {name} | {rates[name]:.3f} | {min(found):.3f} to {max(found):.3f} | "
            f"{rates[ours.name] / rates[name]:.2f} | {by_cpu:.2f} | {memory[name] / 2**20:,.0f} | "
            f"{memory[ours.name] / max(memory[name], 1):.2f} | {', '.join(f'{part:.1f}' for part in parts)} | "
            f"{', '.join(f'{figure:.3f}' for figure in first)} |"
        )
        for figure, allowed in COMPARED.items():
            mine, theirs = ours.recorded(figure)[0], side.recorded(figure)[0]
            if not abs(mine - theirs) <= allowed:
                print(f"NOT THE SAME ROLLOUT: {figure} of {name} is {theirs:.4f} where ours is {mine:.4f}")
    print("; ".join(f"{side.name}: {side.about['about']}" for side in sides))
    best = max(peers, key=lambda side: rates[side.name])
    speed, size = rates[ours.name] / rates[best.name], memory[ours.name] / max(memory[best.name], 1)
    least = memory[ours.name] / max(min(memory[side.name] for side in peers), 1)
    print(
        f"qwen_jax / fastest of trl ({best.name}): {speed:.2f} times the samples/s, {size:.2f} of the memory; "
        f"{least:.2f} of the memory of the smallest of trl"
    )
    return speed, size


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of the command line.

    Raises:
      ValueError: numbers that do not divide.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", metavar="PYTHON", help="interpreter of an environment with trl")
    parser.add_argument("--preset", choices=("tiny", "35m"), default="35m", help="of each of the four models (35m)")
    parser.add_argument("--rows", type=int, default=16, help="responses of an iteration (16)")
    parser.add_argument("--responses", type=int, default=2, help="of these to each prompt (2)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (128)")
    parser.add_argument("--response", type=int, default=128, help="tokens of a response (128)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the responses (4)")
    parser.add_argument("--minibatches", type=int, default=1, help="updates of a pass (1)")
    parser.add_argument("--rounds", type=int, default=5, help="measured iterations (5)")
    parser.add_argument("--warm_up", type=int, default=1, help="iterations before the first round (1)")
    parser.add_argument("--rows_at_once", type=int, default=4, help="ours: rows of a forward and backward pass (4)")
    parser.add_argument("--remat", default="none", help="ours: ModelConfig.remat (none)")
    parser.add_argument("--keep_memory", type=int, choices=(0, 1), default=1, help="ours: keep freed memory (1)")
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="UPDATE[/FORWARD][/checkpointing]",
        help="trl: rows of a forward and backward pass of updates (with one minibatch; else all of it), rows of other "
        "passes, whether layers are computed again (all rows, a fourth of them, the latter with checkpointing)",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.worker and not arguments.peer_python:
        parser.error("name the interpreter of an environment with trl: --peer_python (see --help)")
    rows = arguments.rows
    if rows % arguments.responses or rows % arguments.minibatches:
        raise ValueError(
            f"--rows {rows} must be a multiple of --responses {arguments.responses} and --minibatches "
            f"{arguments.minibatches}"
        )
    fourth = max(rows // 4, 1)
    texts = arguments.peers or [f"{rows}", f"{fourth}/{rows}", f"{fourth}/checkpointing"]
    arguments.peers = {f"trl, {text}": peer_settings(text, rows) for text in texts}
    return arguments


def job_of(config, folder: Path, arguments: argparse.Namespace) -> tuple[dict, list[dict]]:
    """(job of our side, jobs of trl in the order of `arguments.peers`), with models and prompts in `folder`."""
    import numpy as np
    from random_weights import write_model

    sizes = ("rows", "responses", "prompt", "response", "epochs", "minibatches", "rows_at_once", "remat", "keep_memory")
    prompts = np.random.default_rng(1).integers(256, config.vocab_size, (512, arguments.prompt)).tolist()
    (folder / "prompts.json").write_text(json.dumps(prompts))
    job = {name: getattr(arguments, name) for name in sizes} | {
        "policy": str(write_model(config, folder / "policy", spread=0.02)),
        "reward": str(write_model(dataclasses.replace(config, head="scalar"), folder / "reward", spread=0.02)),
        "prompts": str(folder / "prompts.json"),
    }
    ours = {**job, "side": "ours", "scratch": str(folder / "ours")}
    theirs = [
        {**job, "side": "trl", "peer": peer, "scratch": str(folder / f"trl_{number}")}
        for number, peer in enumerate(arguments.peers.values())
    ]
    return ours, theirs


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    arguments = parse(argv)
    if arguments.worker:
        job = json.loads(arguments.worker)
        return our_side(job) if job["side"] == "ours" else trl_side(job)
    from train_step import preset

    config = preset(arguments.preset, arguments.prompt + arguments.response)
    with tempfile.TemporaryDirectory() as temporary:
        ours, theirs = job_of(config, Path(temporary), arguments)
        sides = [Side("qwen_jax", __file__, ours)]
        for name, job in zip(arguments.peers, theirs, strict=True):
            sides.append(Side(name, __file__, job, arguments.peer_python))
        take_turns(sides, arguments.rounds, 1, arguments.warm_up)
        print(
            f"{arguments.preset} on {machine()}; float32, {arguments.rows} responses of {arguments.response} tokens to "
            f"prompts of {arguments.prompt}, {arguments.epochs} epochs of {arguments.minibatches} minibatch(es)\n"
        )
        report(sides, arguments.rows)


if __name__ == "__main__":
    if "--worker" in sys.argv:  # the peer's environment lacks our packages
        main()
    else:
        from qwen_jax.command_line import run

        run(main)
