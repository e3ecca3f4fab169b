#!/usr/bin/env bash
# seqio.Evaluator cannot be given seqio's own PassThroughFeatureConverter, the one that leaves a dataset as it is.
#
# One expects: a task whose features need no conversion, such as text that a metric reads, is evaluated with it. It is a
#   FeatureConverter, and takes the arguments of one.
# What happens: AttributeError, that it has no TASK_FEATURES, and then that it has no _pack, while the evaluator measures
#   the examples. The base class asks its subclasses for the first and sets the second in __init__, which this one does
#   not call, so nothing says so before. seqio.get_dataset takes the same converter.
# Who suffers: whoever evaluates on text, or on features that are already those of the model.
# qwen_jax: `evaluation/benchmark_tasks.py` has a converter of its own with TASK_FEATURES.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --no-compile --disable-pip-version-check 2>/dev/null \
  'seqio==0.0.20' 'tensorflow==2.21.0' 'tensorflow-text==2.21.1' 'tensorflow-datasets==4.9.10' 'jax[cpu]==0.10.2' \
  'numpy==2.4.6' 'sentencepiece==0.2.1'
TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES= "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import importlib.metadata

import seqio
import tensorflow as tf

print(f"seqio {importlib.metadata.version('seqio')}, tensorflow {tf.__version__}")


def numbers(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"targets": [[1], [2], [3]]})


def count(targets, predictions):
    return {"count": len(targets)}


seqio.TaskRegistry.add(
    "numbers",
    source=seqio.FunctionDataSource(numbers, splits=["test"]),
    preprocessors=[],
    output_features={"targets": seqio.Feature(seqio.PassThroughVocabulary(10), add_eos=False)},
    metric_fns=[count],
)


class Completed(seqio.PassThroughFeatureConverter):
    TASK_FEATURES = {"targets": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)}
    pack = False


def evaluated(converter):
    """The metric, or the attribute that is missed."""
    try:
        evaluator = seqio.Evaluator("numbers", converter, eval_split="test", async_compute_metrics=False)
    except AttributeError as error:
        return str(error)
    predict = lambda dataset: [(index, [index]) for index, _ in enumerate(dataset)]
    found, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    return found.result()["numbers"]["count"]


plain = seqio.PassThroughFeatureConverter()
dataset = seqio.get_dataset("numbers", {"targets": 1}, dataset_split="test", shuffle=False, feature_converter=plain)
print("get_dataset with PassThroughFeatureConverter:", len(list(dataset)), "examples")
print("Evaluator with it:", evaluated(plain))
print("Evaluator with a subclass that has TASK_FEATURES and pack: count", evaluated(Completed()))
assert len(list(dataset)) == 3
assert "TASK_FEATURES" in str(evaluated(plain)), "the evaluator takes the converter now"
assert evaluated(Completed()) == 3
print("as described: the evaluator refuses the converter that leaves a dataset as it is")
PYTHON
