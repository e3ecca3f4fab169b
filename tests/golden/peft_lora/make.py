"""Makes the files beside it with peft: a small base model, two LoRA adapters on it, and what they compute.

    pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2
    python tests/golden/peft_lora/make.py

The adapters' matrices are random, not trained. `adapter` is of task CAUSAL_LM with `lm_head` trained whole,
`adapter_seq_cls` of task SEQ_CLS with its `score`. The tests fill in the path of `base`.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
TOKENS = torch.tensor(np.random.default_rng(0).integers(1, 64, (2, 9)))


def adapted(model, name: str, **options):
    """A model with random adapters, saved under `name`."""
    config = LoraConfig(r=4, lora_alpha=9, lora_dropout=0.0, **options)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or ("modules_to_save" in key and parameter.requires_grad):
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(HERE / name)
    (HERE / name / "README.md").unlink(missing_ok=True)
    file = HERE / name / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base"}, indent=1) + "\n")
    return model.eval()


def main() -> None:
    """Writes everything."""
    os.chdir(HERE)
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained("base")
    targets = ["q_proj", "v_proj", "o_proj", "up_proj"]
    base = AutoModelForCausalLM.from_pretrained("base")
    with torch.no_grad():
        base_logits = base(TOKENS).logits.numpy()
        model = adapted(base, "adapter", target_modules=targets, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        logits = model(TOKENS).logits.numpy()
        scorer = AutoModelForSequenceClassification.from_pretrained("base", num_labels=1)
        scorer = adapted(scorer, "adapter_seq_cls", target_modules=targets, task_type="SEQ_CLS")
        scores = scorer(TOKENS).logits.numpy()[:, 0]
    np.savez("expected.npz", tokens=TOKENS.numpy(), base_logits=base_logits, logits=logits, scores=scores)


if __name__ == "__main__":
    main()
