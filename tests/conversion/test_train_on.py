"""Weights of others, trained on here and given back: as if torch had trained them."""

import dataclasses

import jax
import numpy as np
import pytest

from qwen_jax.checkpoints.run_folder import write_run_files
from qwen_jax.conversion import InitialWeights, convert, read_model_config
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.trainer_config import TrainerConfig
from tests.fakes import FakeExamples, prepared_trainer

STEPS, ROWS, LENGTH, RATE, DECAY = 3, 8, 16, 1e-3, 0.1


def trained_by_torch(torch, theirs, examples):
    """Three updates of AdamW on the batches that the trainer reads, on the loss that it minimises."""
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    for step in range(STEPS):
        batch = examples.read(step * ROWS, (step + 1) * ROWS)
        tokens, weights = torch.tensor(batch["tokens"]).long(), torch.tensor(batch["loss_weights"])[:, 1:]
        logits = theirs(tokens).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        optimizer.zero_grad()
        ((losses * weights.flatten()).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_newer_qwen_is_imported_trained_and_exported(tmp_path, tied):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    theirs.save_pretrained(tmp_path / "theirs")
    config = dataclasses.replace(read_model_config(tmp_path / "theirs"), dtype="float32")
    examples = FakeExamples(length=LENGTH, vocab_size=61)

    run = tmp_path / "run"
    write_run_files(run, config, None)
    prepared_trainer(
        Qwen(config),
        next_token_prediction(),
        OptimizerConfig(RATE, schedule="constant", weight_decay=DECAY, clip_norm=1.0),
        TrainerConfig(train_steps=STEPS, batch_size=ROWS, sequence_length=LENGTH),
        make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]),
        examples,
        None,
        run,
        InitialWeights(tmp_path / "theirs"),
    ).run()
    convert("orbax", run, "qwen2", tmp_path / "exported", progress=False)

    trained_by_torch(torch, theirs, examples)
    exported, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = theirs.state_dict()
    for name, found in exported.state_dict().items():
        if name.endswith("k_proj.bias"):  # its gradient is 0, so that Adam follows rounding
            continue
        np.testing.assert_allclose(found.numpy(), expected[name].detach().numpy(), atol=3e-5, err_msg=name)
