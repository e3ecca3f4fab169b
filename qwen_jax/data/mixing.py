"""Mixing rates of SeqIO mixtures: the tasks that take part, and their proportions."""

import logging
import os
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np

from qwen_jax.data.quick_seqio import seqio

logger = logging.getLogger(__name__)

# Rates are turned into whole numbers; below this share of a mixture a task could not be told from rounding.
_SMALLEST_RATE = Fraction(1, 100_000)


class ConfiguredRate:
    """A rate of a mixture that gin sets; unlike other functions of a task, it is known before the task is cached."""

    def __init__(self, rates: Callable[[], Mapping[str, float]]):
        """`rates` gives the rate of each task by name."""
        self._rates = rates

    def __call__(self, task: seqio.Task) -> float:
        """The rate of a task, as SeqIO asks for it."""
        return self._rates()[task.name]


def used_tasks(mixture: seqio.Mixture) -> list[seqio.Task]:
    """Tasks of a mixture that may contribute examples, before any of them is cached.

    A task of rate 0 contributes nothing, as in SeqIO, so it is neither cached nor read. Rates that depend on the size
    of a cached task are not known yet, so such a task is used.

    Raises:
        ValueError: a rate is negative, too small or not a number, or all rates are 0. The message names the task.
    """
    rates = {task: _rate_before_caching(mixture, task) for task in mixture.tasks}
    known = {task.name: rate for task, rate in rates.items() if rate is not None}
    if len(known) == len(rates):
        check_rates(mixture.name, known)
    idle = sorted(name for name, rate in known.items() if not rate)
    if idle:
        logger.info("%s: %s contribute nothing, because their rate is 0", mixture.name, ", ".join(idle))
    return [task for task in mixture.tasks if rates[task] != 0]


def _rate_before_caching(mixture: seqio.Mixture, task: seqio.Task) -> Fraction | None:
    inner = [one for one in _inner_mixtures(mixture) if task in one.tasks]
    rate = mixture.rate_per_task_name.get(task.name)
    if (callable(rate) and not isinstance(rate, ConfiguredRate)) or any(map(_depends_on_size, inner)):
        return None
    return _fraction(mixture, task)


def _inner_mixtures(mixture: seqio.Mixture) -> list[seqio.Mixture]:
    names = set(mixture.rate_per_task_name) & set(seqio.MixtureRegistry.names())
    return [seqio.MixtureRegistry.get(name) for name in sorted(names)]


def _depends_on_size(mixture: seqio.Mixture) -> bool:
    own = any(callable(rate) for rate in mixture.rate_per_task_name.values())
    return own or any(map(_depends_on_size, _inner_mixtures(mixture)))


def _fraction(mixture: seqio.Mixture, task: seqio.Task) -> Fraction:
    try:
        return Fraction(mixture.get_rate(task))
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"mixture {mixture.name}: the rate of {task.name} is no finite number ({error})") from error


def rates_of(mixture: seqio.Mixture, cache_dir: str | os.PathLike) -> dict[str, Fraction]:
    """Task name to mixing rate of the tasks that contribute, sorted by name; rates by size read the caches there.

    Raises:
        ValueError: as `used_tasks`; or a cache lacks the statistic that a rate is computed from.
    """
    seqio.add_global_cache_dirs([str(cache_dir)])
    rates = {}
    for task in used_tasks(mixture):
        try:
            rates[task.name] = _fraction(mixture, task)
        except (KeyError, AssertionError) as error:
            raise ValueError(
                f"mixture {mixture.name}: the rate of {task.name} depends on {error}, which the statistics of its "
                f"cache in {cache_dir} do not have: delete the folder of the task there and cache it again"
            ) from error
    check_rates(mixture.name, rates)
    return dict(sorted((name, rate) for name, rate in rates.items() if rate))


def check_rates(name: str, rates: dict[str, Fraction]) -> None:
    """Refuses rates that cannot be turned into whole numbers.

    Raises:
        ValueError: the message names mixture, task and rate.
    """
    total = sum(rates.values())
    for task, rate in rates.items():
        if rate < 0 or (rate and rate < _SMALLEST_RATE * total):
            raise ValueError(
                f"mixture {name}: the rate of {task} is {float(rate)}: each must be 0 or at least "
                f"{float(_SMALLEST_RATE)} of their sum, which is {float(total)}"
            )
    if not total:
        raise ValueError(f"mixture {name}: all rates are 0, so it has no example")


def whole_weights(rates: list[Fraction]) -> list[int]:
    """The smallest whole numbers in (nearly) the ratio of `rates`; exact unless a rate needs a large denominator."""
    total = sum(rates)
    # Written rates such as 0.7 are binary fractions; the user meant the nearest fraction with a small denominator.
    shares = [(rate / total).limit_denominator(1_000_000) for rate in rates]
    scale = np.lcm.reduce([share.denominator for share in shares], dtype=object)
    whole = [int(share * scale) for share in shares]
    if sum(whole) > 1 << 24:  # keeps index * weight within 64 bits for 2**39 examples
        whole = [max(1, round(share * (1 << 24))) for share in shares]
    divisor = int(np.gcd.reduce(whole))
    return [weight // divisor for weight in whole]
