"""Benchmarks as SeqIO tasks: the source of examples, the registry, and scoring by SeqIO's evaluator."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.data.quick_seqio import seqio, tf
from qwen_jax.evaluation.benchmark import Benchmark, Example, LeftOut, Outcome, judged, scores

SPLIT = "test"
# Text, one string each: the checkpoint's own tokenizer makes tokens of it, when a model answers.
_TEXT = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string)
_BENCHMARKS: dict[str, Benchmark] = {}
# What a task yields in place of the files' examples, while `evaluate` is given them.
_GIVEN: dict[str, Sequence[Example]] = {}


class _Unchanged(seqio.FeatureConverter):
    """Features of a task as they are: SeqIO's own converter of this kind lacks what its evaluator reads."""

    TASK_FEATURES = dict.fromkeys(("inputs", "targets"), seqio.FeatureConverter.FeatureSpec(dtype=tf.string))
    MODEL_FEATURES = TASK_FEATURES
    PACKING_FEATURE_DTYPES = {}

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        del task_feature_lengths
        return ds

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        return task_feature_lengths


def read_examples(
    benchmark: Benchmark, data_dir: Path | None, left_out: list[LeftOut] | None = None
) -> Iterator[Example]:
    """The examples of a benchmark.

    Args:
        data_dir: has the folder of the benchmark with its publisher's files. None: its TFDS dataset.
        left_out: gets the rows that are left out, as they are met.

    Raises:
        FileNotFoundError: the folder, or a file in it, is not there.
        ValueError: a file is not as published (the message has file and line), an id comes twice, or there is neither a
            data directory nor a TFDS dataset.
    """
    if data_dir is None:
        if benchmark.tfds is None:
            raise ValueError(
                f"{benchmark.name} has no TFDS dataset: give --data_dir, a folder with {benchmark.folder}/, "
                f"which holds {benchmark.files}"
            )
        examples = benchmark.tfds.read(functools.partial(_tfds_rows, benchmark.tfds.name))
    else:
        folder = data_dir / benchmark.folder
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; {benchmark.name} expects {benchmark.files} there")
        examples = _named(benchmark, folder)
    seen = set()
    for example in examples:
        if isinstance(example, LeftOut):
            if left_out is not None:
                left_out.append(example)
            continue
        if example.id in seen:
            raise ValueError(f"{benchmark.name}: two examples have the id {example.id}: is a file there twice?")
        seen.add(example.id)
        yield example
    if not seen:
        raise ValueError(f"{benchmark.name}: no example in {data_dir or 'its TFDS dataset'}")


def _named(benchmark: Benchmark, folder: Path) -> Iterator[Example | LeftOut]:
    """What a benchmark reads; a file that is not there is named together with those that are expected."""
    try:
        yield from benchmark.read(folder)
    except FileNotFoundError as error:
        if error.filename is None:
            raise
        expected = f"{benchmark.name} expects {benchmark.files} in {folder}"
        raise FileNotFoundError(f"{error.filename}: no such file; {expected}") from error


def _tfds_rows(name: str, split: str) -> Iterator[dict]:
    # Imported late: it takes seconds.
    import tensorflow_datasets as tfds

    for row in tfds.as_numpy(tfds.load(name, split=split)):
        yield python_values(row)


def python_values(value: Any) -> Any:
    """Values of TFDS as Python's: text for bytes, lists for arrays, numbers for scalars."""
    if isinstance(value, Mapping):
        return {name: python_values(one) for name, one in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return python_values(value.tolist())
    if isinstance(value, list):
        return [python_values(one) for one in value]
    return value.decode() if isinstance(value, bytes) else value


def add_benchmark(benchmark: Benchmark, data_dir: Callable[[], Path | None]) -> None:
    """Registers a benchmark as the SeqIO task of its name, with the split `test`.

    Args:
        data_dir: called when examples are read.
    """

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        given = _GIVEN.get(benchmark.name)

        def rows():
            for example in read_examples(benchmark, data_dir()) if given is None else given:
                yield {"inputs": [example.prompt], "targets": [example.to_json()]}

        one = tf.TensorSpec([1], tf.string)
        return tf.data.Dataset.from_generator(rows, output_signature={"inputs": one, "targets": one})

    def score(targets: Sequence[Example], predictions: Sequence[Outcome]) -> Mapping[str, float]:
        return scores(benchmark, predictions, targets)

    _BENCHMARKS[benchmark.name] = benchmark
    seqio.TaskRegistry.add(
        benchmark.name,
        source=seqio.FunctionDataSource(dataset, splits=[SPLIT]),  # ty: ignore[invalid-argument-type]  as in data/records.py
        preprocessors=[],
        output_features={"inputs": _TEXT, "targets": _TEXT},
        postprocess_fn=functools.partial(_postprocess, benchmark),
        metric_fns=[score],
    )


def benchmarks() -> Mapping[str, Benchmark]:
    """All registered benchmarks by name."""
    return _BENCHMARKS


def _postprocess(benchmark: Benchmark, value: Sequence[bytes | str], *, example, is_target: bool) -> Example | Outcome:
    """A target becomes its example, a prediction (JSON of `output` and `chat`, or of an outcome) its outcome."""
    if is_target:
        return Example.from_json(value[0])
    prediction = json.loads(value[0])
    if "score" in prediction:
        return Outcome(**prediction)
    of = Example.from_json(example["targets"][0])
    return judged(benchmark, of, prediction["output"], prediction.get("chat", False))


def evaluate(name: str, predictions: Sequence[Any], examples: Sequence[Example] | None = None) -> dict[str, float]:
    """Scores of a benchmark by SeqIO's evaluator.

    Args:
        name: of a registered benchmark.
        predictions: for each example in order, an object of JSON types: `{"output": …, "chat": …}` as `judged` takes
            them, or the fields of an `Outcome` that was judged before.
        examples: those that there are predictions for. None: all that the task reads.

    Raises:
        ValueError: there is not one prediction for each example.
    """

    def predict(dataset: tf.data.Dataset) -> list[tuple[int, list[str]]]:
        count = int(dataset.cardinality())
        if count != len(predictions):
            raise ValueError(f"{name}: {len(predictions):,} predictions for {count:,} examples")
        return [(index, [json.dumps(prediction)]) for index, prediction in enumerate(predictions)]

    if examples is not None:
        _GIVEN[name] = examples
    try:
        evaluator = seqio.Evaluator(name, _Unchanged(pack=False), eval_split=SPLIT, async_compute_metrics=False)
        # SeqIO calls the function with the dataset alone.
        found, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)  # ty: ignore[invalid-argument-type]
    finally:
        _GIVEN.pop(name, None)
    return {key: float(value) for key, value in found.result()[name].items()}
