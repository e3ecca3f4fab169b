"""Direct preference optimization: log-probabilities of responses, the loss against torch's and trl's."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from qwen_jax.alignment.dpo import REFERENCE_COLUMN, direct_preference, response_log_probs
from qwen_jax.alignment.preferences import pairwise_loss
from qwen_jax.conversion import load_pretrained
from qwen_jax.conversion.mapping import FORMATS, external_tensors, to_external
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import MeshConfig, make_mesh, use_mesh
from qwen_jax.training.batches import global_batch
from qwen_jax.training.step import batch_shapes
from tests.alignment.hand_made_pairs import PairExamples, random_pairs, rows_of
from tests.fakes import outputs_of_row, random_params, small_model

TRL = Path(__file__).parents[1] / "golden" / "trl"
MODEL = Qwen(small_model(vocab_size=64))
log_probs = jax.jit(response_log_probs, static_argnums=0)
log_softmax = jax.jit(jax.nn.log_softmax)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL.config, 0.02)


def test_log_probabilities_of_responses_are_those_of_the_conversation_alone(params):
    """Packed or not, each token of a response has its own; prompts and filling have 0."""
    pairs = random_pairs(3)
    found = np.asarray(log_probs(MODEL, params, batch := rows_of([pairs], 120)))[0]
    expected = np.zeros(120, np.float32)
    start = 0
    for prompt, response in (side for pair in pairs for side in pair):
        ids = [*prompt, *response]
        logs = np.asarray(log_softmax(outputs_of_row(MODEL, params, ids, 20)))
        for place in range(len(prompt), len(ids)):
            expected[start + place] = logs[place - 1, ids[place]]
        start += len(ids)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.count_nonzero(found) == batch["loss_weights"].sum()


def test_a_response_from_the_first_token_on_counts_what_can_be_predicted(params):
    batch = rows_of([random_pairs(2)], 80)
    batch["loss_weights"] = (batch["segment_ids"] > 0).astype(np.float32)
    found = np.asarray(log_probs(MODEL, params, batch))
    assert (found[batch["positions"] == 0] == 0).all() and (found[batch["positions"] > 0] < 0).all()


@pytest.mark.parametrize(("label_smoothing", "sft_weight"), [(0.0, 0.0), (0.1, 0.0), (0.2, 0.5)])
def test_loss_and_gradients_equal_a_computation_in_torch(params, label_smoothing, sft_weight):
    torch = pytest.importorskip("torch", reason="compares with torch's logsigmoid and its gradients")
    pairs = random_pairs(4)
    batch = rows_of([pairs[:2], pairs[2:]], 80)
    reference = np.random.default_rng(1).standard_normal((2, 80)).astype(np.float32) * batch["loss_weights"]
    batch[REFERENCE_COLUMN] = reference
    beta = 0.3
    objective = direct_preference(beta, label_smoothing, sft_weight)
    loss, sums = jax.jit(lambda batch: objective.loss(MODEL, params, batch, None))(batch)
    found = torch.tensor(np.asarray(log_probs(MODEL, params, batch)))
    ids = torch.tensor(batch["segment_ids"])
    weighted = torch.tensor(batch["loss_weights"])
    expected, margins = 0.0, 0.0
    for row, pair in [(row, pair) for row in range(2) for pair in range(2)]:
        chosen, rejected = ((ids[row] == 2 * pair + side) for side in (1, 2))
        ratio = found[row] - torch.tensor(reference[row])
        margin = beta * (ratio[chosen].sum() - ratio[rejected].sum())
        logsigmoid = torch.nn.functional.logsigmoid
        expected -= logsigmoid(margin) * (1 - label_smoothing) + logsigmoid(-margin) * label_smoothing
        expected -= sft_weight * found[row][chosen].sum() / weighted[row][chosen].sum()
        margins += margin
    assert float(sums["weight"]) == 4
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(sums["margin"], margins, rtol=1e-4, atol=1e-5)


def test_the_loss_of_the_reference_itself_is_log_2(params):
    batch = rows_of([random_pairs(2)], 80)
    batch[REFERENCE_COLUMN] = log_probs(MODEL, params, batch)
    loss, sums = jax.jit(lambda batch: direct_preference().loss(MODEL, params, batch, None))(batch)
    assert float(loss) == pytest.approx(2 * math.log(2), rel=1e-6) and float(sums["margin"]) == 0


def golden_batch():
    """The pairs of tests/golden/trl as one row each."""
    pairs = json.loads((TRL / "pairs.json").read_text())
    return rows_of([[[(prompt, chosen), (prompt, rejected)]] for prompt, chosen, rejected in pairs], 64)


def assert_trl_gradients(name, table, model, gradients):
    expected = np.load(TRL / "expected.npz")
    flat = flatten_dict(gradients, sep="/")
    for tensor in external_tensors(FORMATS[table], model.config):
        (part,) = tensor.mapping.parts
        ours = np.asarray(flat[part] if tensor.layer is None else flat[part][tensor.layer])
        theirs = expected[f"{name}_gradient/{tensor.name}"]
        found = to_external(tensor.mapping.layout, ours)
        np.testing.assert_allclose(found, theirs, atol=2e-6 * max(1.0, np.abs(theirs).max()), err_msg=tensor.name)


def test_trls_reward_trainer_has_the_same_loss_and_gradients():
    """Recorded from trl 1.16 on padded batches; ours are packed rows."""
    model, params = load_pretrained(TRL / "reward")
    batch, expected = golden_batch(), np.load(TRL / "expected.npz")

    def mean(params):
        loss, sums = pairwise_loss(model, params, batch, None)
        return loss / sums["weight"], sums

    (loss, sums), gradients = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    np.testing.assert_allclose(loss, expected["reward_loss"], rtol=2e-6)
    np.testing.assert_allclose(sums["margin"] / sums["weight"], expected["reward_margin"], rtol=1e-5)
    assert_trl_gradients("reward", "qwen2_reward", model, gradients)


def test_trls_dpo_trainer_has_the_same_loss_and_gradients():
    """Recorded from trl 1.16 with both models in memory; ours has the reference as a column."""
    model, params = load_pretrained(TRL / "policy")
    _, reference = load_pretrained(TRL / "reference")
    batch, expected = golden_batch(), np.load(TRL / "expected.npz")
    batch[REFERENCE_COLUMN] = log_probs(model, reference, batch)
    objective = direct_preference(beta=0.1)

    def mean(params):
        loss, sums = objective.loss(model, params, batch, None)
        return loss / sums["weight"], sums

    (loss, sums), gradients = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    np.testing.assert_allclose(loss, expected["dpo_loss"], rtol=2e-6)
    np.testing.assert_allclose(sums["margin"] / sums["weight"], expected["dpo_margin"], rtol=1e-5)
    assert_trl_gradients("dpo", "qwen2", model, gradients)


def test_a_mesh_gives_the_same_sums(params):
    examples = PairExamples()
    batch = examples.read(0, 8)
    reference = np.where(batch["loss_weights"] > 0, -3.0, 0.0).astype(np.float32)
    objective = direct_preference(sft_weight=0.5)
    compute = jax.jit(lambda params, batch: objective.loss(MODEL, params, batch, None))
    expected = compute(params, batch | {REFERENCE_COLUMN: reference})
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, sequence=2))
    with use_mesh(mesh):
        placed = global_batch(examples, 0, batch_shapes(mesh, 8, examples.columns)) | {REFERENCE_COLUMN: reference}
        found = jax.jit(lambda params, batch: objective.loss(MODEL, params, batch, None))(params, placed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, expected)


def test_values_out_of_range_and_a_missing_column_are_named(params):
    for wrong in (dict(beta=0.0), dict(label_smoothing=0.5), dict(sft_weight=-1.0)):
        with pytest.raises(ValueError, match="needs beta > 0"):
            direct_preference(**wrong)
    with pytest.raises(ValueError, match="'reference_log_probs': bind train.reference"):
        direct_preference().loss(MODEL, params, rows_of([random_pairs(1)], 40), None)
