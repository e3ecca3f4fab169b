"""LoRA runs in every format: merged once, as adapters of peft, and adapters that peft wrote."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from qwen_jax.checkpoints.arrays import StoredParams, load_params, save_params
from qwen_jax.checkpoints.run_folder import CheckpointError, write_run_files
from qwen_jax.conversion import InitialWeights, convert, detect_format, load_pretrained, load_tokenizer
from qwen_jax.conversion.check import compare_logits
from qwen_jax.conversion.load import open_weights
from qwen_jax.conversion.mapping import parameter_shapes
from qwen_jax.models.lora import LoraConfig, merge
from qwen_jax.models.transformer import Qwen
from qwen_jax.sharding import MeshConfig, make_mesh
from qwen_jax.training.objective import Objective
from qwen_jax.training.objectives import next_token_prediction
from qwen_jax.training.optimizer import OptimizerConfig
from qwen_jax.training.parameter_groups import ParameterGroup, ScheduleConfig
from qwen_jax.training.trainer_config import TrainerConfig
from tests.conversion.test_initial_weights import abstract_of
from tests.fakes import FakeExamples, outputs, prepared_trainer

LORA = LoraConfig(rank=3, alpha=7.0, dropout=0.1)
GOLDEN = Path(__file__).parents[1] / "golden" / "peft_lora"
PLAIN = {"use_dynamic_ntk": False, "use_logn": False}
COMPUTE = {"dtype": "float32", "remat": "none", **PLAIN}
TOKENS = np.arange(3, 19).reshape(2, 8)
WHOLE = ParameterGroup("trained", ".*/lora_[ab]|token_embedding|output", ScheduleConfig(1e-2, "constant"))
FROZEN = ParameterGroup("frozen", ".*", None, dtype="bfloat16")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the runs lie; tests do not change them."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def base(made, config, random_params, tokenizer_file):
    """A run folder of a base model whose numbers are exact in bfloat16."""
    plain = dataclasses.replace(config, **PLAIN)
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), random_params(plain))
    save_params(made / "base", plain, params, str(tokenizer_file))
    return made / "base"


def train(folder, config, initial, groups, objective=None, subtree=None):
    """A run of two steps."""
    write_run_files(folder, config, initial / "tokenizer.tiktoken")
    prepared_trainer(
        Qwen(config),
        objective or next_token_prediction(),
        OptimizerConfig(1.0, groups=groups),
        TrainerConfig(train_steps=2, batch_size=4, sequence_length=8),
        make_mesh(MeshConfig(), jax.devices()[:1]),
        FakeExamples(length=8),
        None,
        folder,
        InitialWeights(initial, subtree, config),
    ).run()


@pytest.fixture(scope="module")
def run(made, base, config):
    """A LoRA run from that base, which trained embedding and output whole."""
    train(made / "lora", dataclasses.replace(config, lora=LORA, **COMPUTE), base, (WHOLE, FROZEN))
    return made / "lora"


@pytest.fixture(scope="module")
def theirs(made, base):
    """The base as peft loads it."""
    return convert("orbax", base, "qwen2", made / "qwen2", progress=False)


def logits(path, **options):
    model, params = load_pretrained(path, **options)
    return np.asarray(outputs(model, params, jnp.asarray(TOKENS)))


def unmerged(run):
    """Logits of the run with its adapters as they are."""
    config, params = load_params(run)
    model = Qwen(dataclasses.replace(config, dtype="float32"))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return np.asarray(outputs(model, params, jnp.asarray(TOKENS)))


def test_a_run_with_adapters_trains_them_alone_and_describes_itself(run, base):
    stored, (before, start) = StoredParams(run), load_params(base)
    trained = {path for path in stored.shapes if "/lora_" in path} | {"token_embedding", "output"}
    assert stored.trained == trained and len(trained) == 16
    config, after = load_params(run)
    assert config.lora == LORA and before.lora is None
    flat = flatten_dict(after, sep="/")
    for path, leaf in flatten_dict(start, sep="/").items():
        same = np.array_equal(np.asarray(flat[path], np.float32), leaf)
        assert same != (path in trained), path
        kept = stored.read(path, slice(0, 1)).dtype
        assert kept == (np.float32 if path in trained else ml_dtypes.bfloat16), path
    assert all(np.any(leaf) for path, leaf in flat.items() if path.endswith("lora_b"))


def test_merged_and_unmerged_logits_agree_in_every_format(run, tmp_path):
    expected = unmerged(run)
    scale = np.abs(expected).max()
    assert np.abs(logits(run) - expected).max() < 1e-5 * scale
    for form in ("orbax", "qwen", "qwen2"):
        written = convert("orbax", run, form, tmp_path / form, progress=False, verify=True)
        assert np.abs(logits(written) - expected).max() < 1e-5 * scale
        assert open_weights(written).config.lora is None
    assert compare_logits(run, tmp_path / "qwen2").same
    # Of bfloat16 the export is what counts: sums in float32, rounded once.
    half = load_file(
        convert("orbax", run, "qwen2", tmp_path / "half", "bfloat16", progress=False) / "model.safetensors"
    )
    whole = load_file(tmp_path / "qwen2" / "model.safetensors")
    for name, array in half.items():
        np.testing.assert_array_equal(array, whole[name].astype(ml_dtypes.bfloat16), err_msg=name)


def test_a_run_with_adapters_starts_other_runs(run, base):
    """With the same adapters it goes on from them; without any, from the merged kernels; a base leaves them fresh."""
    lora = load_params(run)[0]
    plain = dataclasses.replace(lora, lora=None)
    weights = InitialWeights(run)
    merged = flatten_dict(weights.load(abstract_of(plain)), sep="/")
    expected = flatten_dict(
        merge(jax.tree.map(lambda x: np.asarray(x, np.float32), load_params(run)[1]), LORA), sep="/"
    )
    assert set(merged) == set(expected)
    for path, leaf in merged.items():
        np.testing.assert_allclose(np.asarray(leaf), expected[path], rtol=1e-6, err_msg=path)
    kept = flatten_dict(weights.load(abstract_of(lora)), sep="/")
    assert set(kept) == set(parameter_shapes(lora)) and np.any(kept["layers/mlp/up/lora_b"])
    fresh = flatten_dict(InitialWeights(base).load(abstract_of(lora)), sep="/")
    assert set(fresh) == set(parameter_shapes(plain))
    with pytest.raises(CheckpointError, match=r"lora_a is \[3, 40, 3\] there and \[3, 40, 4\] in the model"):
        InitialWeights(run).check(abstract_of(dataclasses.replace(lora, lora=LoraConfig(4))))


def test_another_scale_is_a_warning(run, caplog):
    lora = dataclasses.replace(load_params(run)[0], lora=dataclasses.replace(LORA, alpha=14.0))
    with caplog.at_level("WARNING"):
        InitialWeights(run, model=lora).check(abstract_of(lora))
    assert "alpha / rank = 2.33333, and this run computes with 4.66667: set LoraConfig.alpha to 7" in caplog.text


def test_an_adapter_in_peft_s_layout(run, base, theirs, tmp_path):
    folder = convert("orbax", run, "peft", tmp_path / "adapter", base=theirs, progress=False, verify=True)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    content = json.loads((folder / "adapter_config.json").read_text())
    assert (content["peft_type"], content["task_type"], content["r"], content["lora_alpha"]) == (
        "LORA",
        "CAUSAL_LM",
        3,
        7,
    )
    assert content["base_model_name_or_path"] == str(theirs)
    assert content["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert content["modules_to_save"] == ["embed_tokens", "lm_head"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 3 + 2
    prefix = "base_model.model.model.layers.1.mlp.down_proj"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (3, 40) and tensors[f"{prefix}.lora_B.weight"].shape == (48, 3)
    assert "base_model.model.lm_head.weight" in tensors
    # Read back, it is the run.
    assert detect_format(folder) == "peft" and load_tokenizer(folder).num_ranks == load_tokenizer(base).num_ranks
    for path, shape in parameter_shapes(open_weights(folder).config).items():
        for layer in range(shape[0]) if path.startswith("layers/") else (None,):
            one, other = (
                np.asarray(w.read(path, layer), np.float32) for w in (open_weights(folder), open_weights(run))
            )
            np.testing.assert_array_equal(one, other, err_msg=path)
    assert np.abs(logits(folder) - unmerged(run)).max() < 1e-5


def test_an_adapter_knows_its_base(run, base, tmp_path, config, random_params, caplog):
    other = tmp_path / "other"
    save_params(other, dataclasses.replace(config, **PLAIN), random_params(config, seed=5), None)
    with pytest.raises(ValueError, match="other is not the base of this run: final_norm/scale differs. Name the model"):
        convert("orbax", run, "peft", tmp_path / "adapter", base=other, progress=False)
    with pytest.raises(ValueError, match="name the base model of the adapter"):
        convert("orbax", run, "peft", tmp_path / "adapter", progress=False)
    with caplog.at_level("WARNING"):
        folder = convert("orbax", run, "peft", tmp_path / "adapter", base="Qwen/Some-7B", progress=False)
    assert "Qwen/Some-7B is no folder here" in caplog.text
    for read in (load_pretrained, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="holds a LoRA adapter of Qwen/Some-7B, which is no folder here"):
            read(folder)
    merged = convert("peft", folder, "qwen2", tmp_path / "merged", base=base, progress=False)
    assert np.abs(logits(merged) - unmerged(run)).max() < 1e-5
    with pytest.raises(ValueError, match="the source has no LoRA adapters"):
        convert("orbax", base, "peft", tmp_path / "none", base=base, progress=False)


def test_what_an_adapter_cannot_hold_is_refused(base, config, random_params, tmp_path):
    """A run in which nothing was frozen: norms are no part of an adapter, and peft would untie tied embeddings."""
    for tied, message in (
        (
            False,
            "an adapter cannot hold final_norm/scale, layers/attention/key/bias, .* and 8 more, which this run",
        ),
        (True, "the run trained the embedding, which is also the output projection"),
    ):
        lora = dataclasses.replace(config, lora=LORA, tie_embeddings=tied, **COMPUTE)
        save_params(tmp_path / str(tied), lora, random_params(lora), None)
        with pytest.raises(ValueError, match=message):
            convert("orbax", tmp_path / str(tied), "peft", tmp_path / "out", base="some/base", progress=False)


@pytest.fixture
def golden(tmp_path):
    """A copy of what peft wrote (tests/golden/peft_lora), its adapters with the base beside them."""
    folder = shutil.copytree(GOLDEN, tmp_path / "golden")
    for name in ("adapter", "adapter_seq_cls"):
        file = folder / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(folder / "base")}))
    return folder


def test_adapters_that_peft_wrote_are_read(golden, tmp_path):
    expected = np.load(golden / "expected.npz")
    model, params = load_pretrained(golden / "adapter")
    found = np.asarray(outputs(model, params, jnp.asarray(expected["tokens"])))
    assert np.abs(found - expected["logits"]).max() < 1e-5 * np.abs(expected["logits"]).max()
    assert np.abs(expected["logits"] - expected["base_logits"]).max() > 0.1
    assert open_weights(golden / "adapter").config.lora == LoraConfig(4, 9.0, ("query", "value", "output", "up"))
    model, params = load_pretrained(golden / "adapter_seq_cls")
    scores = np.asarray(outputs(model, params, jnp.asarray(expected["tokens"]), method="scalars"))
    np.testing.assert_allclose(scores[:, -1], expected["scores"], atol=1e-5)
    # As the start of a run with the same adapters.
    config = open_weights(golden / "adapter").config
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here)
        for path, shape in parameter_shapes(config).items()
    }
    loaded = InitialWeights(golden / "adapter").load(unflatten_dict(abstract, sep="/"))
    assert set(flatten_dict(loaded, sep="/")) == set(abstract)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA is read"),
        ({"use_dora": True}, "use_dora is True, which is not computed here"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern is \{'q_proj': 2\}, which is not computed here"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', .* changes the kernels"),
        ({"task_type": "TOKEN_CLS"}, "task_type is 'TOKEN_CLS', expected CAUSAL_LM or SEQ_CLS"),
        ({"r": 0}, "LoraConfig.rank must be a positive integer, found 0"),
        ({"r": 2}, r"lora_B.weight is \[32, 4\], expected \[32, 2\] for rank 2"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(golden, changes, message):
    file = golden / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_pretrained(golden / "adapter")


@pytest.mark.parametrize(("start", "plain"), [("gaussian", True), ("orthogonal", True), ("olora", False)])
def test_adapters_are_read_as_peft_computes_them_or_refused(golden, tmp_path, start, plain):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    base = transformers.AutoModelForCausalLM.from_pretrained(golden / "base", dtype=torch.float32)
    torch.manual_seed(0)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=start)
    model = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.1 * torch.randn(weight.shape)
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    model.save_pretrained(tmp_path / "adapter")
    if plain:
        found = logits(tmp_path / "adapter")
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    else:
        with pytest.raises(ValueError, match=f"init_lora_weights is {start!r}"):
            load_pretrained(tmp_path / "adapter")


def renamed(name):
    return name.removeprefix("base_model.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors | {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 32), np.float32)},
            r"lm_head.lora_A.weight. Adapters of embeddings and lm_head are not computed here",
        ),
        (
            lambda tensors: {renamed(name): array for name, array in tensors.items()},
            "names begin with 'base_model.model.'",
        ),
        (
            lambda tensors: {name: array for name, array in tensors.items() if "layers.0.self_attn.q_proj" not in name},
            "has no layers/attention/query/lora_a of layer 0: all layers must have the same adapters",
        ),
        (
            lambda tensors: {name: array for name, array in tensors.items() if "lora_B" not in name},
            "has no layers/.*/lora_b of layer 0",
        ),
        (lambda tensors: {}, "holds no adapter of a projection: it changes nothing"),
    ],
)
def test_adapter_files_that_do_not_fit_are_refused(golden, change, message):
    file = golden / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        load_pretrained(golden / "adapter")


def test_an_adapter_with_an_output_of_its_own_is_refused_on_a_tied_base(golden, random_params, tmp_path):
    tied = dataclasses.replace(open_weights(golden / "base").config, tie_embeddings=True)
    save_params(tmp_path / "tied", tied, random_params(tied), None)
    with pytest.raises(ValueError, match="holds an embedding or lm_head of its own, and its base ties the two"):
        convert("peft", golden / "adapter", "qwen2", tmp_path / "out", base=tmp_path / "tied", progress=False)


def test_a_reward_adapter_without_its_head_is_refused(golden):
    file = golden / "adapter_seq_cls" / "adapter_model.safetensors"
    save_file({name: array for name, array in load_file(file).items() if "score" not in name}, file)
    with pytest.raises(ValueError, match=r"has no base_model.model.score.weight: the trained head is lost"):
        load_pretrained(golden / "adapter_seq_cls")


def squared_score(model, params, batch, rng, extra=None):
    scores = model.apply({"params": params}, batch["tokens"], method="scalars")
    return jnp.square(scores - 1).sum(), {"weight": jnp.float32(scores.size)}


def test_peft_loads_our_adapters(run, base, theirs, config, tmp_path, tool):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokens = torch.tensor(TOKENS)
    folder = convert("orbax", run, "peft", tmp_path / "adapter", base=theirs, progress=False)
    with torch.no_grad():
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found = model(tokens).logits.numpy()
        plain = transformers.AutoModelForCausalLM.from_pretrained(theirs)(tokens).logits.numpy()
        merged = model.merge_and_unload()(tokens).logits.numpy()
    expected = unmerged(run)
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 1e-5 * scale and np.abs(plain - expected).max() > 1e-2 * scale
    assert np.abs(merged - logits(run)).max() < 1e-5 * scale

    # A reward model: its head, trained whole, is in the file, and peft finds it.
    reward = dataclasses.replace(config, lora=LORA, head="scalar", **COMPUTE)
    train(
        tmp_path / "reward",
        reward,
        base,
        (dataclasses.replace(WHOLE, pattern=".*/lora_[ab]|score"), FROZEN),
        Objective(squared_score, lambda sums: {}, lambda sums, examples: {}),
        ["layers", "token_embedding", "final_norm"],
    )
    folder = convert("orbax", tmp_path / "reward", "peft", tmp_path / "reward_adapter", base=theirs, progress=False)
    content = json.loads((folder / "adapter_config.json").read_text())
    assert content["task_type"] == "SEQ_CLS" and content["modules_to_save"] == ["score"]
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(theirs, num_labels=1, pad_token_id=0)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(scorer, folder)(tokens).logits.numpy()[:, 0]
    model, params = load_pretrained(tmp_path / "reward")
    scores = np.asarray(outputs(model, params, jnp.asarray(TOKENS), method="scalars"))[:, -1]
    np.testing.assert_allclose(found, scores, atol=1e-5)
    # By the lines that the tool prints.
    _, *lines = tool("convert_checkpoint").loading("peft", folder).splitlines()
    names: dict = {}
    exec("\n".join(line.strip() for line in lines), names)
    with torch.no_grad():
        found = [names["model"](row[None]).logits.item() for row in tokens]
    np.testing.assert_allclose(found, scores, atol=1e-5)


def test_the_tool_converts_adapters(run, theirs, tmp_path, tool, capsys):
    main = tool("convert_checkpoint").main
    arguments = ["--from", f"orbax:{run}", "--to", f"peft:{tmp_path / 'adapter'}", "--base", str(theirs), "--check"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "AutoPeftModelForCausalLM.from_pretrained" in shown
    assert re.search(r"check: logits differ by 0 at most", shown)
