"""The interface of objectives: a loss, and the functions that turn its sums into metrics."""

import dataclasses
from collections.abc import Callable

import jax


def _nothing_else(sums: dict) -> dict:
    return {}


def _mean_loss(sums: dict[str, float], examples) -> dict[str, float]:
    return {"loss": sums["loss"] / sums["weight"]}


def _all_of_them(metrics: dict[str, float]) -> str:
    return "held-out " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss to minimize, and its report. The rest of `training` knows no name of a metric but "loss".

    Sums, not means, come from a loss: gradient accumulation and several hosts then give exactly the mean over the whole
    batch, however unevenly the loss-carrying tokens are spread.

    Attributes:
      loss: `(model, params, batch, rng) -> (loss_sum, sums)`. `params` are trained and frozen parameters in one tree;
        `rng` is None for a deterministic pass. `loss_sum` is a float32 sum over the batch and `sums` a dict of float32
        sums with at least "weight", the number that `loss_sum` is to be divided by. Gradients flow from `loss_sum`.
        Where `initial_extra` is given, the loss takes the running statistics as a fifth argument.
      summarize: `sums -> metrics` of a training step besides "loss". `sums` has "loss" as well, and a "weight" of at
        least 1. The function sees traced arrays, in the train step.
      evaluate: `(sums, examples) -> metrics` of held-out examples, from sums over all of them, as Python floats.
      describe: `metrics -> text` of a held-out evaluation, for the line that the run prints.
      counts: names of sums that count something, such as pictures: a run reports them for each step, and their pace.
      initial_extra: makes the running statistics of a new run, a dict of arrays; None keeps none.
      update_extra: `(extra, sums) -> extra` after each step.
    """

    loss: Callable
    summarize: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] = _nothing_else
    evaluate: Callable[[dict[str, float], object], dict[str, float]] = _mean_loss
    describe: Callable[[dict[str, float]], str] = _all_of_them
    counts: tuple[str, ...] = ()
    initial_extra: Callable[[], dict] | None = None
    update_extra: Callable[[dict, dict[str, jax.Array]], dict] | None = None

    def __post_init__(self):
        if (self.initial_extra is None) != (self.update_extra is None):
            raise ValueError("an Objective needs both initial_extra and update_extra, or neither")

    def sums(self, model, params, batch, rng, extra) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(sum to minimize, dict of all sums, with that one as "loss")."""
        loss, sums = self.loss(model, params, batch, rng, *(() if self.initial_extra is None else (extra,)))
        return loss, {"loss": loss, **sums}
