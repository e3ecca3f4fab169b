"""Log-probabilities of given continuations, many at a time: what prompts share is computed once."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.inference import programs
from qwen_jax.inference.admission import PREFILL_TOKENS, bucket
from qwen_jax.inference.images import checked_images, digest, image_places
from qwen_jax.inference.prefix_tree import PrefixTree, Reads, Step
from qwen_jax.inference.programs import Programs, ScoringStep
from qwen_jax.inference.requests import Ranking, Score, check_ids
from qwen_jax.models.config import ModelConfig
from qwen_jax.models.positions import dynamic_ntk_alpha
from qwen_jax.models.transformer import InputEmbeddings

# Tokens of a lane that are computed at once, and lanes of a device. CPUs are busy with few; and attention is computed
# between all tokens of a step, also those that must not see each other.
CPU_STEP_TOKENS, STEP_TOKENS, STEP_UNIT, LANES = 512, 1024, 64, 4
SMALLEST_SLOTS, SMALLEST_READS = 256, 16
# Steps that are computed before the host waits for the results of the first.
STEPS_AHEAD = 2


class Pictures:
    """The pictures of texts that are scored together.

    In a text, ids past the vocabulary stand in the places of a picture, others for each picture, so that texts with
    equal ids have equal hidden states.

    Args:
      config: of the model.
      features: gives the features [num_queries, hidden] of pictures.
    """

    def __init__(self, config: ModelConfig, features: Callable[[Sequence[np.ndarray]], list[np.ndarray]]):
        self._config, self._features = config, features
        self._numbers: dict[int, int] = {}  # by digest
        self._images: list[np.ndarray] = []

    def put(self, prompt: np.ndarray, images: Sequence[np.ndarray]) -> np.ndarray:
        """The ids of a prompt with ids of its pictures.

        Raises:
          ValueError: see `checked_images`.
        """
        images = checked_images(prompt, images, self._config)
        if not images:
            return prompt
        vision = self._config.vision
        assert vision is not None  # or `checked_images` refuses them
        prompt = prompt.copy()
        for image, places in zip(images, image_places(prompt, vision), strict=True):
            number = self._numbers.setdefault(digest(image), len(self._images))
            if number == len(self._images):
                self._images.append(image)
            first = self._config.vocab_size + number * vision.num_queries
            prompt[places] = np.arange(first, first + vision.num_queries)
        return prompt

    def embeddings(self, tokens: np.ndarray) -> InputEmbeddings | None:
        """What stands in the places of pictures in `tokens` [rows, length]; None: there are none."""
        given = tokens >= self._config.vocab_size
        if not given.any():
            return None
        assert self._config.vision is not None  # or there were no pictures
        numbers, places = np.divmod(tokens[given] - self._config.vocab_size, self._config.vision.num_queries)
        found, index = np.unique(numbers, return_inverse=True)
        features = np.stack(self._features([self._images[number] for number in found]))
        values = np.zeros((*tokens.shape, self._config.hidden_size), self._config.compute_dtype)
        values[given] = features[index, places]
        return InputEmbeddings(values, given)


def checked_pairs(
    prompts: Sequence,
    continuations: Sequence,
    images: Sequence | None,
    pictures: Pictures,
    config: ModelConfig,
    context_length: int,
    length_rule: str,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of prompt and continuation as int32 arrays; a prompt that comes several times in a row is checked once.

    Args:
      pictures: takes the pictures of the prompts, and gives the ids that stand for them.

    Raises:
      ValueError: naming the pair that is empty, too long, not of the model's ids, or whose pictures do not fit; or
        their numbers differ.
    """
    if len(prompts) != len(continuations):
        raise ValueError(f"one continuation for each prompt: found {len(continuations)} for {len(prompts)} prompts")
    images = [()] * len(prompts) if images is None else images
    if len(images) != len(prompts):
        raise ValueError(f"one list of pictures for each prompt: found {len(images)} for {len(prompts)} prompts")
    pairs = []
    last, ids = (None, None), np.zeros(0, np.int32)
    for index, (prompt, continuation, shown) in enumerate(zip(prompts, continuations, images, strict=True)):
        if prompt is not last[0] or shown is not last[1]:
            last = prompt, shown
            ids = np.asarray(check_ids(prompt, f"prompt {index}", config.vocab_size), np.int32)
            try:
                ids = pictures.put(ids, shown)
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from error
        after = np.asarray(check_ids(continuation, f"continuation {index}", config.vocab_size), np.int32)
        for name, found in (("prompt", ids), ("continuation", after)):
            if not len(found):
                raise ValueError(f"{name} {index} is empty: give at least one token, such as <|endoftext|>")
        # The model does not read the last token.
        if len(ids) + len(after) > context_length + 1:
            raise ValueError(
                f"prompt {index} of {len(ids)} tokens + its continuation of {len(after)}: both together may have at "
                f"most {context_length} tokens, {length_rule}, and one more; cut the prompt from the left"
            )
        pairs.append((ids, after))
    return pairs


def score(
    call: Programs, config: ModelConfig, params, ways: int, pairs: Sequence, pictures: Pictures, top: int = 0
) -> list[Score]:
    """The score of each of `checked_pairs`.

    Tokens that several texts begin with are computed once, whether they are of one prompt with several continuations or
    of prompts with the same examples before the question; `prefix_tree` has the plan.

    Args:
      params: as `weights.prepare` gives them.
      ways: into how many parts the mesh splits rows.
      pictures: of the pairs.
      top: how many of the most probable tokens are told in the place of each token.
    """
    if not pairs:
        return []
    texts, reads = _texts(pairs)
    targets = np.concatenate([continuation for _, continuation in pairs])
    log_probs, most_likely = np.empty(len(targets), np.float32), np.empty(len(targets), bool)
    ranked: list[Ranking] = [()] * len(targets)
    for group in _alike(config, texts):
        own = [texts[index] for index in group], [reads[index] for index in group]
        on = _Lanes(call, config, params, ways, *own, pictures)
        for ids, found_log_probs, found_most_likely, *found_ranked in on.results(targets, top > 0):
            log_probs[ids], most_likely[ids] = found_log_probs, found_most_likely
            if top:
                rows = zip(*(array[:, :top].tolist() for array in found_ranked), strict=True)
                for place, (tokens, values) in zip(ids.tolist(), rows, strict=True):
                    ranked[place] = tuple(zip(tokens, values, strict=True))
    stops = np.cumsum([len(continuation) for _, continuation in pairs]).tolist()
    parts = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
    return [Score(log_probs[part], most_likely[part], tuple(ranked[part]) if top else ()) for part in parts]


def _texts(pairs: Sequence) -> tuple[list[np.ndarray], list[Reads]]:
    """The tokens that the model reads, each text once, and where the continuations of all pairs are read in it."""
    places: dict[bytes, int] = {}
    texts: list[np.ndarray] = []
    found: list[list[tuple[int, int, int]]] = []
    number = 0
    for prompt, continuation in pairs:
        text = np.concatenate([prompt, continuation[:-1]])
        place = places.setdefault(text.tobytes(), len(texts))
        if place == len(texts):
            texts.append(text)
            found.append([])
        found[place].append((len(prompt) - 1, number, len(continuation)))
        number += len(continuation)
    reads = []
    for of_text in found:
        positions = np.concatenate([np.arange(at, at + count) for at, _, count in of_text])
        ids = np.concatenate([np.arange(first, first + count) for _, first, count in of_text])
        order = np.argsort(positions, kind="stable")
        reads.append(Reads(positions[order], ids[order]))
    return texts, reads


def _alike(config: ModelConfig, texts: Sequence[np.ndarray]) -> list[list[int]]:
    """Indices of texts in groups within which equal tokens have equal keys: with dynamic NTK, lengths decide, too."""
    if not config.use_dynamic_ntk:
        return [list(range(len(texts)))]
    alphas = np.asarray(dynamic_ntk_alpha(jnp.asarray([len(text) for text in texts]), config.context_length))
    return [np.flatnonzero(alphas == alpha).tolist() for alpha in np.unique(alphas)]


def _size(count: int, smallest: int) -> int:
    """`count` rounded up to a power of two or one and a half times one: few programs, little padding."""
    power = max(smallest, 1 << (count - 1).bit_length())
    return power * 3 // 4 if power > smallest and count <= power * 3 // 4 else power


class _Lanes:
    """Texts on the devices, in lanes that are computed side by side: rows of a batch, each with its own cache.

    Args:
      call, config, params, ways, pictures: as in `score`.
      texts, reads: those of one group of `_alike`.
    """

    def __init__(
        self, call: Programs, config: ModelConfig, params, ways: int, texts: list, reads: list, pictures: Pictures
    ):
        self.call, self.config, self.params, self.pictures = call, config, params, pictures
        longest = max(map(len, texts))
        platform = jax.default_backend() if call.mesh is None else call.mesh.devices.flat[0].platform
        cpu = platform == "cpu"
        most, lanes = (CPU_STEP_TOKENS, 1) if cpu else (STEP_TOKENS, max(1, min(LANES, PREFILL_TOKENS // longest)))
        self.text_length = np.full(lanes * ways, longest, np.int32)
        tree = PrefixTree(texts, reads, most, STEP_UNIT)
        self.steps = list(itertools.zip_longest(*tree.lanes(lanes * ways)))

    def results(self, targets: np.ndarray, top: bool) -> Iterator[tuple[np.ndarray, ...]]:
        """(ids, log-probabilities, whether the target is the most likely token) of reads, each once.

        Args:
          targets: token of each read, by its id.
          top: whether the ids and log-probabilities of the most probable tokens follow, [reads, tokens] each.
        """
        rows = len(self.text_length)
        lengths = [_size(max(len(step.tokens) for step in steps if step), STEP_UNIT) for steps in self.steps]
        last = max(
            length + max(step.start for step in steps if step)
            for length, steps in zip(lengths, self.steps, strict=True)
        )
        slots = bucket(last, SMALLEST_SLOTS)  # attention reads those in use, so that fewer sizes cost memory alone
        shape = (f"{rows} rows", f"{slots} slots")
        cache = self.call(programs.empty_cache, ("empty", *shape), self.config, rows, slots)
        waiting: deque = deque()
        for steps, length in zip(self.steps, lengths, strict=True):
            reads = SMALLEST_READS
            while reads < max(len(step.ids) for step in steps if step):
                reads *= 4
            step = self._step(steps, targets, length, reads)
            embeddings = self.pictures.embeddings(np.asarray(step.tokens))
            with_them = ["with embeddings"] * (embeddings is not None) + ["with alternatives"] * top
            key = ("score", *shape, f"{length} tokens", f"{reads} reads", *with_them)
            *found, cache = self.call(programs.score, key, self.config, self.params, cache, step, embeddings, top)
            waiting.append((steps, found))
            if len(waiting) > STEPS_AHEAD:
                yield from _read(*waiting.popleft())
        for one in waiting:
            yield from _read(*one)

    def _step(self, steps: Sequence[Step | None], targets: np.ndarray, length: int, reads: int) -> ScoringStep:
        rows = len(steps)
        tokens, positions, ends = (np.zeros((rows, length), np.int32) for _ in range(3))
        at, wanted = (np.zeros((rows, reads), np.int32) for _ in range(2))
        for row, step in enumerate(steps):
            if step is None:
                continue
            count = len(step.tokens)
            tokens[row, :count], positions[row, :count], ends[row, :count] = step.tokens, step.depths, step.ends
            at[row, : len(step.ids)], wanted[row, : len(step.ids)] = step.slots, targets[step.ids]
        return ScoringStep(tokens, positions, ends, self.text_length, at, wanted)


def _read(steps: Sequence[Step | None], found: Sequence) -> Iterator[tuple[np.ndarray, ...]]:
    log_probs, most_likely, ranked = jax.device_get(found)
    for row, step in enumerate(steps):
        if step is not None and len(step.ids):
            part = row, slice(len(step.ids))
            yield step.ids, log_probs[part], most_likely[part] > 0, *(array[part] for array in ranked or ())
