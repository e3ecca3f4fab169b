#!/usr/bin/env bash
# optax takes the label -100, by which torch and transformers mark "no loss", for a token: the 100th from the end of
# the vocabulary. It does so without a warning, and the model is trained to say that token.
#
# One expects: -100 is ignored (as in torch's cross_entropy), or NaN, or an error.
# What happens: negative labels count from the end like Python's indices. The loss is finite and plausible, and the
#   gradient raises the logit of token V - 100. Only a label beyond the range on either side (V, or -V - 1) gives NaN,
#   so a test with a tiny vocabulary shows NaN where the real one of 151,936 trains on rubbish.
# Who suffers: whoever feeds labels prepared for torch (finetune.py of Qwen, trl, datasets with a `labels` column).
# qwen_jax: its objectives take tokens and loss weights apart, so no label is negative; readers of label columns
#   must turn -100 into weight 0. `training/objectives.py` does not use optax's loss.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  'jax[cpu]==0.10.2' 'optax==0.2.8' 'numpy==2.4.6'
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax

print(f"optax {optax.__version__}, jax {jax.__version__}")
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def loss_and_pushed(vocabulary, label):
    """The loss of one label on equal logits, and the token whose logit the gradient raises most."""
    labels = jnp.array([label])
    loss, gradient = jax.value_and_grad(lambda x: cross_entropy(x, labels).sum())(jnp.zeros((1, vocabulary)))
    return float(loss), int(jnp.argmin(gradient))


real, pushed = loss_and_pushed(151936, -100)
tiny, _ = loss_and_pushed(64, -100)
above, _ = loss_and_pushed(151936, 151936)
print(f"vocabulary 151936, label -100: loss {real:.3f}, trains token {pushed}")
print(f"vocabulary 64, label -100: loss {tiny}; vocabulary 151936, label 151936: loss {above}")
assert abs(real - 11.931) < 1e-2 and pushed == 151936 - 100, "negative labels are no longer counted from the end"
assert tiny != tiny and above != above, "labels beyond the range no longer give NaN"
print("as described: -100 is neither ignored nor refused")
PYTHON
