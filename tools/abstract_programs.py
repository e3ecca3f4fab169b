"""Programs of a run for devices that need not be here, made from shapes alone: training, inference and PPO."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import gin
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax import rlhf, train
from qwen_jax.alignment.actor_critic import ActorCritic
from qwen_jax.alignment.rollouts import rollout_columns
from qwen_jax.batch_spec import is_packed, row_length, token_columns
from qwen_jax.configuration import ConfigurationError
from qwen_jax.hardware import HardwareConfig
from qwen_jax.image_rows import check_images
from qwen_jax.inference import programs
from qwen_jax.inference.sampling import RowSampling
from qwen_jax.models.build import build_model, parameter_count
from qwen_jax.models.cache import KVCache
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.decoding import DecodingCache
from qwen_jax.models.transformer import abstract_params
from qwen_jax.programs.account import CollectiveTotal
from qwen_jax.programs.report import Work
from qwen_jax.sharding import make_mesh, spec, tree_shardings
from qwen_jax.training.optimizer import make_optimizer
from qwen_jax.training.program import (
    check_memory,
    check_run,
    compile_run,
    frozen_parts,
    least_between_slices,
    least_collectives,
    model_flops_per_token,
    shard_bytes,
    state_bytes_per_device,
    trained_count,
)
from qwen_jax.training.state import abstract_state
from qwen_jax.training.step import batch_shapes


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A program that can be compiled.

    Attributes:
      compile: compiles the program.
      mesh: devices along each axis.
      state_bytes: bytes on one device of the state alone, by part.
      attention: the attention kernel; inference has only XLA's.
      resident_bytes: bytes on one device that stay there while the program runs, and are none of its arguments.
    """

    compile: Callable[[], jax.stages.Compiled]
    work: Work
    mesh: dict[str, int]
    state_bytes: dict[str, int]
    attention: str = "xla"
    resident_bytes: int = 0


def prepare_train_step(hardware: HardwareConfig) -> Prepared:
    """The train step of `train.train`, as gin binds it.

    Raises:
      ValueError: lengths, batch, model, mesh or devices do not go together.
      TooLittleMemory: the state does not fit.
    """
    settings = gin.get_bindings("train")
    model, trainer, optimizer = settings["model"], settings["trainer"], settings["optimizer"]
    train.check_length(trainer, model)
    mesh = make_mesh(settings["mesh"], hardware.devices())
    accumulation = trainer.accumulation(mesh)
    packing, reference = settings.get("packing", "concat"), settings.get("reference")
    images_per_row = settings.get("images_per_row", 0)
    with_reference = reference is not None
    check_images(images_per_row, trainer.sequence_length, model, workers=None, with_reference=with_reference)
    columns = train.batch_columns(trainer.sequence_length, packing, reference, images_per_row, model)
    shape = {"batch_size": trainer.batch_size, "columns": columns, "accumulation": accumulation}
    state_bytes = check_run(
        build_model(model), optimizer, trainer.train_steps, mesh, memory=hardware.hbm_bytes, **shape
    )
    attention = build_model(model).attention(row_length(columns), is_packed(columns), mesh)

    def compile_step():
        return compile_run(
            build_model(model),
            settings["objective"],
            optimizer,
            trainer.train_steps,
            mesh,
            seed=trainer.seed,
            compiler_options=settings.get("compiler_options"),
            **shape,
        )

    tokens = trainer.batch_size * trainer.sequence_length
    trained = trained_count(build_model(model), optimizer, trainer.train_steps, mesh)
    frozen = frozen_parts(build_model(model), optimizer)
    flops = [
        model_flops_per_token(
            model, trainer.sequence_length, causal=causal, images_per_row=images_per_row, frozen=frozen
        ).total
        for causal in (True, False)
    ]
    work = Work(
        parameters=parameter_count(model),
        tokens=tokens,
        flops_per_token=flops[0],
        flops_per_token_all_keys=flops[1],
        least=least_collectives(model, mesh, tokens, accumulation, trained),
        parts=accumulation,
        between_slices=least_between_slices(model, mesh, hardware.slices, trained),
    )
    return Prepared(compile_step, work, dict(mesh.shape), state_bytes, attention)


# Stage of alignment to whether these settings of `train.train` are of one of its recipes.
_STAGES: dict[str, Callable[[dict], bool]] = {
    "sft": lambda settings: settings["packing"] == "whole" and not _of_pairs(settings),
    "reward": lambda settings: settings["model"].head == "scalar",
    "dpo": lambda settings: settings.get("reference") is not None,
}


def _of_pairs(settings: dict) -> bool:
    return _STAGES["reward"](settings) or _STAGES["dpo"](settings)


def prepare_stage(stage: str, hardware: HardwareConfig) -> Prepared:
    """The train step of a stage of alignment that `train.train` runs.

    Raises:
      ConfigurationError: the gin files are of another stage.
      ValueError, TooLittleMemory: as `prepare_train_step`.
    """
    if not _STAGES[stage](gin.get_bindings("train")):
        raise ConfigurationError(f"--program={stage} needs a run of that stage: --gin_file=gin/runs/{stage}_7b.gin")
    return prepare_train_step(hardware)


def prepare_prefill(hardware: HardwareConfig) -> Prepared:
    """The program of `qwen_jax.inference` that reads BATCH_SIZE prompts of SEQUENCE_LENGTH tokens into a cache.

    The engine reads longer prompts than `PREFILL_CHUNK` by another one, in chunks of so many tokens.

    Raises:
      ValueError: batch, model, mesh or devices do not go together.
      TooLittleMemory: weights and cache do not fit.
    """
    settings = gin.get_bindings("train")
    config, trainer, mesh = settings["model"], settings["trainer"], make_mesh(settings["mesh"], hardware.devices())
    rows, length = trainer.batch_size, trainer.sequence_length
    params, state_bytes = _for_inference(config, mesh, rows, length, hardware, {})
    tokens = _placed((rows, length), jnp.int32, mesh, "batch", None)
    lengths = _placed((rows,), jnp.int32, mesh, "batch")
    used = model_flops_per_token(config, length)
    head = 6.0 * config.vocab_size * config.hidden_size  # for the last token of a prompt alone
    matmuls = (used.matmuls - head + head / length) / 3
    work = Work(
        parameters=parameter_count(config),
        tokens=rows * length,
        flops_per_token=matmuls + used.attention / 3,
        flops_per_token_all_keys=matmuls + 2 * used.attention / 3,
        least={},
    )

    def compile_prefill():
        return programs.prefill.lower(mesh, config, params, tokens, lengths).compile()

    return Prepared(compile_prefill, work, dict(mesh.shape), state_bytes)


def prepare_decode(hardware: HardwareConfig) -> Prepared:
    """The program of `qwen_jax.inference` that generates for BATCH_SIZE rows with a cache of SEQUENCE_LENGTH slots.

    It is a loop that ends when rows do, so the report is that of one token of each row, with a full cache.

    Raises:
      ValueError, TooLittleMemory: as `prepare_prefill`.
    """
    settings = gin.get_bindings("train")
    config, trainer, mesh = settings["model"], settings["trainer"], make_mesh(settings["mesh"], hardware.devices())
    return _decode(config, mesh, trainer.batch_size, trainer.sequence_length, hardware, {})


def _decode(
    config: ModelConfig, mesh: Mesh, rows: int, slots: int, hardware: HardwareConfig, resident: dict[str, int]
) -> Prepared:
    """The decoding step, beside `resident` bytes of each device."""
    params, state_bytes = _for_inference(config, mesh, rows, slots, hardware, resident)

    def by_row(dtype):
        return _placed((rows,), dtype, mesh, "batch")

    entry = _placed((rows, config.num_kv_heads, slots, config.head_dim), config.compute_dtype, mesh, *_CACHE_AXES)
    cache = DecodingCache((KVCache(entry, entry),) * config.num_layers, by_row(jnp.float32))
    seen = _placed((rows, config.vocab_size), jnp.bool_, mesh, "batch", None)
    state = programs.BatchState(cache, by_row(jnp.int32), by_row(jnp.int32), seen)
    fields = {name: by_row(jnp.float32) for name in ("temperature", "top_p", "min_p")}
    fields |= {f"{name}_penalty": by_row(jnp.float32) for name in ("repetition", "presence", "frequency")}
    sampling = RowSampling(top_k=by_row(jnp.int32), seed=by_row(jnp.uint32), **fields)
    rules = programs.RowRules(sampling, _placed((rows, 1), jnp.int32, mesh, "batch", None), by_row(jnp.int32))
    count = _placed((), jnp.int32, mesh)
    used = model_flops_per_token(config, slots, causal=False)
    work = Work(
        parameters=parameter_count(config),
        tokens=rows,
        flops_per_token=used.total / 3,
        flops_per_token_all_keys=used.total / 3,
        least={},
    )

    def compile_decode():
        lowered = programs.generate.lower(
            mesh, config, params, state, by_row(jnp.bool_), rules, count, count, True, False
        )
        return lowered.compile()

    return Prepared(compile_decode, work, dict(mesh.shape), state_bytes, resident_bytes=sum(resident.values()))


_CACHE_AXES = ("batch", "kv_heads", None, None)


def _placed(shape, dtype, mesh: Mesh, *names: str | None) -> jax.ShapeDtypeStruct:
    """An array that does not exist, on the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(names)))


def _for_inference(
    config: ModelConfig, mesh: Mesh, rows: int, length: int, hardware: HardwareConfig, resident: dict[str, int]
):
    """(weights as inference keeps them, bytes of weights, cache and what is resident on a device)."""
    batch_shapes(mesh, rows, token_columns(length))
    boxed = abstract_params(build_model(config))
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, config.compute_dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        tree_shardings(boxed, mesh),
    )

    def of_one_layer(leaf):
        sharding = NamedSharding(mesh, PartitionSpec(*leaf.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=sharding)

    params = {**params, "layers": (jax.tree.map(of_one_layer, params["layers"]),) * config.num_layers}
    shape = (config.num_layers * 2, rows, config.num_kv_heads, length, config.head_dim)
    cache = _placed(shape, config.compute_dtype, mesh, None, *_CACHE_AXES)
    in_training = {f"training {name}": size for name, size in resident.items()}
    needed = {"parameters": shard_bytes(params), "cache": shard_bytes(cache)} | in_training
    check_memory(needed, hardware.hbm_bytes, parameter_count(config), mesh)
    return params, needed


def _ppo():
    """(settings of `rlhf.rlhf`, its models, all of the policy's size).

    Raises:
      ConfigurationError: the gin files are of no such run.
    """
    settings = gin.get_bindings("rlhf")
    if "algorithm" not in settings:
        raise ConfigurationError("--program=ppo_… needs a run of PPO or GRPO: --gin_file=gin/runs/ppo_7b.gin")
    model = settings["model"]
    train.check_length(settings["trainer"], model)
    scalar = dataclasses.replace(model, head="scalar", tie_embeddings=False)
    reward = None if settings.get("reward") is not None else scalar
    return settings, ActorCritic(model, scalar if settings["algorithm"].has_value else None, reward)


def prepare_ppo_update(hardware: HardwareConfig) -> Prepared:
    """The update of `rlhf.rlhf`: policy, value model and pretraining gradient, with the frozen models in memory.

    The reward model, whose checkpoint is not read, is taken to be of the policy's size.

    Raises:
      ValueError: lengths, batch, model, mesh or devices do not go together.
      TooLittleMemory: the state does not fit.
    """
    settings, models = _ppo()
    optimizer, algorithm, rollouts = settings["optimizer"], settings["algorithm"], settings["rollouts"]
    mesh = make_mesh(settings["mesh"], hardware.devices())
    trainer = rlhf.in_parts(settings["trainer"], algorithm, rollouts, mesh)
    accumulation, batch, length = trainer.accumulation(mesh), trainer.batch_size, rollouts.length
    beside = rollouts.pretraining_rows if algorithm.pretraining_coefficient else 0
    columns = rollout_columns(algorithm, length, beside, token_columns(length))
    shape = {"batch_size": batch, "columns": columns, "accumulation": accumulation}
    state_bytes = check_run(models, optimizer, trainer.train_steps, mesh, memory=hardware.hbm_bytes, **shape)
    passes = 1 + algorithm.has_value + beside  # rows of this length that a model trains on, for each response
    config, tokens = models.config, batch * length * passes
    flops = [model_flops_per_token(config, length, causal=causal).total for causal in (True, False)]

    def compile_update():
        return compile_run(
            models,
            algorithm.objective(rollouts.temperature, rollouts.top_p, beside),
            optimizer,
            trainer.train_steps,
            mesh,
            seed=trainer.seed,
            compiler_options=settings.get("compiler_options"),
            **shape,
        )

    least = [
        least_collectives(config, mesh, batch * length * (1 + beside), accumulation),
        *[least_collectives(config, mesh, batch * length, accumulation)] * algorithm.has_value,
    ]
    work = Work(
        parameters=parameter_count(config),
        tokens=tokens,
        flops_per_token=flops[0],
        flops_per_token_all_keys=flops[1],
        least=_summed(least),
        parts=accumulation,
        between_slices=len(least) * least_between_slices(config, mesh, hardware.slices),
    )
    attention = models.attention(row_length(columns), is_packed(columns), mesh)
    return Prepared(compile_update, work, dict(mesh.shape), state_bytes, attention)


def _summed(totals: list[dict[str, CollectiveTotal]]) -> dict[str, CollectiveTotal]:
    found: dict[str, CollectiveTotal] = {}
    for one in totals:
        for kind, total in one.items():
            there = found.setdefault(kind, CollectiveTotal())
            there.payload_bytes += total.payload_bytes
            there.wire_bytes += total.wire_bytes
    return found


def prepare_ppo_rollout(hardware: HardwareConfig) -> Prepared:
    """The decoding step of a rollout: one token of ROLLOUT_SLOTS responses at full length.

    The whole state of training (policy, value model, their optimizer states, reference and reward model) stays in
    memory meanwhile, and counts.

    Raises:
      ValueError, TooLittleMemory: as `prepare_ppo_update`.
    """
    settings, models = _ppo()
    optimizer, rollouts = settings["optimizer"], settings["rollouts"]
    mesh = make_mesh(settings["mesh"], hardware.devices())
    transform = make_optimizer(optimizer, settings["trainer"].train_steps)
    state = state_bytes_per_device(abstract_state(models, transform, mesh, optimizer.groups))
    state.pop("gradients")
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-rollouts.slots // ways) * ways
    return _decode(models.config, mesh, rows, rollouts.length, hardware, state)


PROGRAMS = {
    "train": prepare_train_step,
    **{stage: functools.partial(prepare_stage, stage) for stage in _STAGES},
    "prefill": prepare_prefill,
    "decode": prepare_decode,
    "ppo_update": prepare_ppo_update,
    "ppo_rollout": prepare_ppo_rollout,
}
