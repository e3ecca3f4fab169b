"""Gin files and flags: what is set arrives, and every mistake gets one short line that says how to mend it."""

import argparse
import itertools
import re
import subprocess
import sys
from pathlib import Path

import gin
import hypothesis
import pytest
from hypothesis import strategies as st

import qwen_jax.rlhf
import qwen_jax.train
from qwen_jax.configuration import ConfigurationError, by_parameters, check_recipe, files_read, load_gin, parse_args
from qwen_jax.models.build import parameter_count

gin.configurable(qwen_jax.train.train)
gin.configurable(qwen_jax.rlhf.rlhf)
ROOT = Path(__file__).resolve().parent.parent
TINY = ["gin/runs/pretrain_tiny.gin"]
BASE = ["gin/runs/pretrain.gin"]
HARDWARE = sorted(path.stem for path in (ROOT / "gin" / "hardware").glob("*.gin"))


def trainer_config(*bindings):
    load_gin(TINY, ["OUTPUT_DIR=/tmp/run", *bindings])
    return gin.get_configurable("TrainerConfig")()


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def test_flags_override_files_and_need_no_quotes():
    assert trainer_config().train_steps == 400
    assert trainer_config("TRAIN_STEPS=7").train_steps == 7
    assert trainer_config("TrainerConfig.seed=5").seed == 5
    trainer_config("OUTPUT_DIR=runs/with space/x-1.0", "MIXTURE_OR_TASK=local_files")
    assert gin.query_parameter("OUTPUT_DIR/gin.macro.value") == "runs/with space/x-1.0"


@pytest.mark.parametrize(
    ("size", "steps", "rate"), [("1_8b", 524_521, 3e-4), ("7b", 572_205, 3e-4), ("14b", 715_256, 3e-4)]
)
def test_the_reports_hyperparameters_come_with_the_size(size, steps, rate):
    load_gin([f"gin/runs/pretrain_{size}.gin"], ["OUTPUT_DIR=x"])
    made, optimizer = gin.get_configurable("TrainerConfig")(), gin.get_configurable("OptimizerConfig")()
    assert made.train_steps == steps and made.batch_size * made.sequence_length == 4_194_304
    assert optimizer.peak_learning_rate == rate
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert optimizer.schedule == "cosine" and optimizer.final_fraction == 0.1
    model = gin.get_configurable("ModelConfig")()
    assert model.dtype == "bfloat16" and model.context_length >= made.sequence_length


@pytest.mark.parametrize(
    ("files", "bindings", "message"),
    [
        (TINY, [], "OUTPUT_DIR is not set: add --gin.OUTPUT_DIR=VALUE"),
        (BASE, ["OUTPUT_DIR=x"], "BATCH_SIZE, .* and WARMUP_STEPS are not set: add the gin file that sets them"),
        (TINY, ["OUTPUT_DIR=x", "TRAIN_STEP=5"], "nothing in the gin files uses TRAIN_STEP.*Did you mean TRAIN_STEPS"),
        (TINY, ["OUTPUT_DIR=x", "OptimiserConfig.beta1=0.5"], "OptimiserConfig.*Did you mean OptimizerConfig"),
        (TINY, ["OUTPUT_DIR=x", "OptimizerConfig.beta3=0.5"], "beta3.*Did you mean beta2"),
        (TINY, ["OUTPUT_DIR=x", "ModelConfig.remate=full"], "remate.*Did you mean remat"),
        (TINY, ["OUTPUT_DIR=x", "TRAIN_STEPS"], "expected --gin.NAME=VALUE"),
        (TINY, ["OUTPUT_DIR=x", "ModelConfig.use_logn=false"], "use_logn must be True or False, found 'false'"),
        (TINY, ["OUTPUT_DIR=x", "SKIP_NONFINITE='no'"], "SKIP_NONFINITE must be True or False, found"),
        (["gin/runs/ppo_tiny.gin"], ["OUTPUT_DIR=x", "REWARD_SCALE=false"], "REWARD_SCALE must be True or False"),
        (["gin/models/tinny.gin"], [], "tinny.gin: no such file.*Did you mean gin/models/tiny.gin"),
        ([], ["OUTPUT_DIR=x"], "was a --gin_file forgotten"),
    ],
)
def test_mistakes_are_named(files, bindings, message):
    with pytest.raises(ConfigurationError, match=message):
        load_gin(files, bindings)


def test_files_without_a_recipe_are_named_as_such():
    load_gin(["gin/models/tiny.gin", "gin/hardware/cpu.gin"])
    with pytest.raises(ConfigurationError, match=r"set no model, .* and cache_dir of train: name a recipe of gin/runs"):
        check_recipe("train", qwen_jax.train.train)
    load_gin(TINY, ["OUTPUT_DIR=x"])
    check_recipe("train", qwen_jax.train.train)


def test_a_recipe_of_the_other_command_names_it(plain_environment):
    """In a process of its own: here, the other command may be imported already."""
    given = ["--gin_file=gin/runs/ppo_tiny.gin", "--gin.OUTPUT_DIR=x"]
    command = [sys.executable, "-m", "qwen_jax.train", *given]
    done = subprocess.run(command, cwd=ROOT, env=plain_environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: \S*rlhf.gin, line \d+: No configurable matching 'rlhf'. It is a recipe of python -m qwen_jax.rlhf\n",
        done.stderr,
    )


def test_a_broken_file_is_named_with_its_line(tmp_path):
    bad = write(tmp_path, "bad.gin", "TrainerConfig.seed = \n")
    with pytest.raises(ConfigurationError, match="bad.gin"):
        load_gin([bad])
    bad = write(tmp_path, "bad.gin", "TrainerConfig.seed = 1\nTrainerConfig.sede = 2\n")
    with pytest.raises(ConfigurationError, match="bad.gin, line 2: .*Did you mean seed"):
        load_gin([bad])


def test_a_setting_of_a_file_that_nothing_uses_is_refused(tmp_path):
    mine = write(tmp_path, "mine.gin", "include 'gin/runs/pretrain_tiny.gin'\n\nTRAIN_STEP = 5\n")
    with pytest.raises(ConfigurationError, match=r"mine.gin, line 3, sets TRAIN_STEP, .*Did you mean TRAIN_STEPS\?"):
        load_gin([mine], ["OUTPUT_DIR=x"])
    # Beside the recipe.
    beside = write(tmp_path, "beside.gin", "LORA_RANKS = 4\n")
    with pytest.raises(ConfigurationError, match="beside.gin, line 1, sets LORA_RANKS"):
        load_gin([*TINY, "gin/runs/lora.gin", beside], ["OUTPUT_DIR=x"])
    # What uses a macro may be set by a flag, and what the repository sets be of no use to a file.
    own = write(
        tmp_path,
        "own.gin",
        "include 'gin/runs/pretrain_tiny.gin'\nTRAIN_STEPS = 5\nMY_SEED = 3\nTrainerConfig.seed = %MY_SEED\n",
    )
    load_gin([own, "gin/hardware/h200.gin"], ["OUTPUT_DIR=x", "TrainerConfig.train_steps=7", "TrainerConfig.seed=4"])
    made = gin.get_configurable("TrainerConfig")()
    assert (made.train_steps, made.seed) == (7, 4)


def test_help_tells_of_gin(capsys):
    with pytest.raises(SystemExit):
        parse_args(argparse.ArgumentParser(), ["--help"])
    assert "--gin.NAME=VALUE" in capsys.readouterr().out


@pytest.mark.parametrize("hardware", HARDWARE)
def test_hardware_before_the_run_is_hardware_after_it(hardware):
    """Whatever the order, tokens per device, remat policy and mesh are the accelerator's."""
    for size in ("tiny", "7b"):
        files = [f"gin/runs/pretrain_{size}.gin", f"gin/hardware/{hardware}.gin", f"gin/models/{size}.gin"]
        texts = set()
        for order in itertools.permutations(files):
            load_gin(order, ["OUTPUT_DIR=x"])
            texts.add(gin.config_str())
        assert len(texts) == 1
        if hardware != "cpu":
            assert gin.get_configurable("TrainerConfig")().tokens_per_device >= 4096


def test_files_that_disagree_are_refused_in_any_order(tmp_path):
    mine = write(tmp_path, "mine.gin", "# half\n\nTOKENS_PER_DEVICE = 8192\n")
    for order in itertools.permutations([*TINY, "gin/hardware/v5p_64.gin", mine]):
        with pytest.raises(ConfigurationError) as raised:
            load_gin(order, ["OUTPUT_DIR=x"])
        message = str(raised.value)
        assert "mine.gin, line 3, sets TOKENS_PER_DEVICE to 8192" in message or "mine.gin, line 3, to 8192" in message
        assert "v5p_64.gin" in message and "16384" in message and "--gin.TOKENS_PER_DEVICE=VALUE" in message
        load_gin(order, ["OUTPUT_DIR=x", "TOKENS_PER_DEVICE=4096"])
        assert gin.get_configurable("TrainerConfig")().tokens_per_device == 4096
    # The same setting under two spellings; two files that agree.
    spelt = write(tmp_path, "spelt.gin", "qwen_jax.MeshConfig.fsdp = 4\n")
    with pytest.raises(ConfigurationError, match="MeshConfig.fsdp"):
        load_gin(["gin/hardware/v5p_64.gin", spelt])
    agrees = write(tmp_path, "agrees.gin", "MeshConfig.fsdp = -1\n")
    load_gin(["gin/models/tiny.gin", "gin/hardware/v5p_64.gin", agrees])


def test_a_file_overrides_what_it_includes_wherever_the_include_stands(tmp_path, monkeypatch):
    write(tmp_path, "a/base.gin", "include 'gin/runs/pretrain_tiny.gin'\nTRAIN_STEPS = 1\nSEED = 1\n")
    mine = write(tmp_path, "a/mine.gin", "TRAIN_STEPS = 2\ninclude 'base.gin'\n")
    monkeypatch.chdir(tmp_path)  # the repository and the folder of the file are found from anywhere
    for files in ([mine], ["a/mine.gin", "a/base.gin"], ["a/base.gin", "a/mine.gin", "gin/runs/pretrain.gin"]):
        load_gin(files, ["OUTPUT_DIR=x"])
        made = gin.get_configurable("TrainerConfig")()
        assert (made.train_steps, made.seed, made.batch_size) == (2, 1, 16)
    assert [path.name for path in files_read([mine])] == [
        "tiny.gin", "defaults.gin", "train.gin", "pretrain.gin", "pretrain_tiny.gin", "base.gin", "mine.gin"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include 'nowhere.gin'\n", r"a.gin, line 1: include 'nowhere.gin': no such file"),
        ("include 'b.gin'\n", "includes itself"),
    ],
)
def test_an_include_that_leads_nowhere_is_named(tmp_path, text, message):
    write(tmp_path, "b.gin", "include 'a.gin'\n")
    with pytest.raises(ConfigurationError, match=message):
        load_gin([write(tmp_path, "a.gin", text)])


FILES = ["zero.gin", "one.gin", "two.gin", "three.gin"]


@hypothesis.given(
    settings=st.lists(st.dictionaries(st.sampled_from("AB"), st.integers(0, 2)), min_size=4, max_size=4),
    includes=st.lists(st.sets(st.integers(0, 3)), min_size=4, max_size=4),
    given=st.lists(st.integers(0, 3), min_size=1, unique=True),
    data=st.data(),
)
@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_no_order_of_files_changes_what_is_loaded(tmp_path, settings, includes, given, data):
    """Any files that include each other: one result for all orders, or a refusal for all orders."""
    for number, name in enumerate(FILES):
        lines = [f"include '{FILES[other]}'" for other in sorted(includes[number]) if other < number]
        lines += [f"{macro} = {value}" for macro, value in settings[number].items()]
        write(tmp_path, name, "\n".join(data.draw(st.permutations(lines))) + "\n")

    def result(order):
        try:
            load_gin([str(tmp_path / FILES[number]) for number in order])
        except ConfigurationError as error:
            assert "neither file includes the other" in str(error)
            return "refused"
        return gin.config_str()

    assert len({result(order) for order in itertools.permutations(given)}) == 1


def test_a_setting_by_size_is_that_of_the_next_larger_limit():
    for size, count in (("tiny", 1_841_792), ("7b", 7_721_324_544)):
        load_gin([f"gin/runs/pretrain_{size}.gin"], ["OUTPUT_DIR=x"])
        for limits in ({2: "b", 0.1: "a", 8: "c"}, {count / 1e9: "exactly"}, {(count - 1) / 1e9: "less"}):
            fits = [limit for limit in limits if count <= limit * 1e9]
            assert by_parameters(limits, "beyond") == (limits[min(fits)] if fits else "beyond")
    # Shapes that flags change count too.
    load_gin(["gin/runs/pretrain_7b.gin", "gin/hardware/v5e_256.gin"], ["OUTPUT_DIR=x", "ModelConfig.num_layers=4"])
    model = gin.get_bindings("train")["model"]
    assert parameter_count(model) < 2.1e9 and model.remat == "qkv"
    gin.clear_config()
    with pytest.raises(ConfigurationError, match="no model is configured: add --gin_file"):
        by_parameters({}, "beyond")


def test_the_two_dropouts_are_apart():
    load_gin(TINY, ["OUTPUT_DIR=x", "EMBEDDING_DROPOUT=0.1"])
    model = gin.get_configurable("ModelConfig")()
    assert (model.embedding_dropout, model.attention_dropout) == (0.1, 0.0)


def test_lora_goes_onto_any_recipe():
    load_gin([*TINY, "gin/runs/lora.gin"], ["OUTPUT_DIR=x", "LORA_RANK=8", "LORA_TARGETS=('up', 'query')"])
    model = gin.get_configurable("ModelConfig")()
    assert (model.lora.rank, model.lora.alpha, model.lora.targets) == (8, 16.0, ("query", "up"))
    adapters, rest = gin.get_bindings("OptimizerConfig", resolve_references=True)["groups"]
    assert adapters.schedule.peak_learning_rate == 6e-3 and adapters.schedule.warmup_steps == 20
    assert rest.frozen and rest.dtype == "bfloat16"


@pytest.mark.parametrize("size", ["7b", "14b"])
def test_sft_is_the_reports(size):
    load_gin([f"gin/runs/sft_{size}.gin"], ["OUTPUT_DIR=x", "INITIAL_CHECKPOINT=base"])
    made, optimizer = gin.get_configurable("TrainerConfig")(), gin.get_configurable("OptimizerConfig")()
    assert (made.train_steps, made.batch_size, made.sequence_length) == (4000, 128, 2048)
    assert (optimizer.peak_learning_rate, optimizer.warmup_steps, optimizer.schedule) == (2e-6, 1430, "constant")
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.1, 1.0)
    model = gin.get_configurable("ModelConfig")()
    assert (model.embedding_dropout, model.attention_dropout, model.lora) == (0.1, 0.0, None)
    load_gin([f"gin/runs/sft_lora_{size}.gin"], ["OUTPUT_DIR=x", "INITIAL_CHECKPOINT=base"])
    lora = gin.get_configurable("ModelConfig")().lora
    assert (lora.rank, lora.alpha, lora.dropout) == (64, 16.0, 0.05)
    trained, frozen = gin.get_bindings("OptimizerConfig", resolve_references=True)["groups"]
    assert (trained.schedule.peak_learning_rate, trained.schedule.schedule, frozen.dtype) == (
        3e-4,
        "cosine",
        "bfloat16",
    )
