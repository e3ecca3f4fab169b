"""Records losses and gradients of trl's RewardTrainer and DPOTrainer on random models; see README.md beside it."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

FOLDER = Path(__file__).parent
VOCABULARY, PAIRS = 64, 6


def tokenizer() -> PreTrainedTokenizerFast:
    """Words t00 … t63 to their numbers, none within another; t01 ends a text, t00 pads."""
    made = Tokenizer(WordLevel({f"t{i:02}": i for i in range(VOCABULARY)}, unk_token="t02"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="t01", pad_token="t00", unk_token="t02")


def model(kind, seed: int):
    """A random model of one layer, with biases and norms that are not those of a fresh one."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    labels = {"num_labels": 1, "problem_type": "regression"} if kind is Qwen2ForSequenceClassification else {}
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        intermediate_size=24,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **sizes,
        **labels,
    )
    made = kind(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return made.float()


class Gradients(TrainerCallback):
    """Keeps the gradients before the update."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.detach().numpy().copy() for name, p in model.named_parameters()}


def one_step(trainer_class, config_class, model, rows, **options) -> tuple[dict, dict]:
    """(figures of the first row of the log, gradients) of one step over all rows."""
    gradients = Gradients()
    extra = options.pop("config", {})
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            per_device_train_batch_size=PAIRS,
            max_steps=1,
            logging_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            disable_dropout=True,
            gradient_checkpointing=False,
            max_length=None,
            **extra,
        )
        trainer = trainer_class(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            callbacks=[gradients],
            **options,
        )
        trainer.train()
    return trainer.state.log_history[0], gradients.found


def words(ids) -> str:
    """The text whose ids are these."""
    return " ".join(f"t{i:02}" for i in ids)


def main() -> None:
    """Writes the models, the pairs and what trl computed."""
    random = np.random.default_rng(0)
    pairs = [
        [random.integers(3, VOCABULARY, random.integers(2, 8)).tolist() + end for end in ([], [1], [1])]
        for _ in range(PAIRS)
    ]
    (FOLDER / "pairs.json").write_text(json.dumps(pairs) + "\n")
    reward, policy, reference = (
        model(kind, seed)
        for seed, kind in enumerate((Qwen2ForSequenceClassification, Qwen2ForCausalLM, Qwen2ForCausalLM))
    )
    for name, made in (("reward", reward), ("policy", policy), ("reference", reference)):
        made.save_pretrained(FOLDER / name)
    rows = [{"chosen": words(p + c), "rejected": words(p + r)} for p, c, r in pairs]
    log, gradients = one_step(RewardTrainer, RewardConfig, reward, rows)
    expected = {"reward_loss": log["loss"], "reward_margin": log["margin"]}
    expected |= {f"reward_gradient/{name}": value for name, value in gradients.items()}
    # A blank ends the prompt, so that its last word is a word of its own.
    rows = [{"prompt": words(p) + " ", "chosen": words(c), "rejected": words(r)} for p, c, r in pairs]
    log, gradients = one_step(DPOTrainer, DPOConfig, policy, rows, ref_model=reference, config={"beta": 0.1})
    expected |= {"dpo_loss": log["loss"], "dpo_margin": log["rewards/margins"]}
    expected |= {f"dpo_gradient/{name}": value for name, value in gradients.items()}
    np.savez(FOLDER / "expected.npz", **expected)
    print({name: value for name, value in expected.items() if "gradient" not in name})


if __name__ == "__main__":
    main()
