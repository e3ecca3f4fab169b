"""`python -m qwen_jax.train` with an OUTPUT_DIR in a bucket that cannot be used: one line, exit code 2."""

import pytest

from qwen_jax import files
from tests.object_stores import Fault, FaultProxy, environment, stores  # noqa: F401


@pytest.mark.parametrize(
    ("output", "kind", "message"),
    [
        ("gs://no-such-bucket/run", None, "there is no bucket gs://no-such-bucket"),
        ("s3://s3-bucket-of-tests//run", None, "two slashes in a row"),
        ("s3://s3-bucket-of-tests/other", None, "holds 'notes.txt' and is not a run folder"),
        ("hdfs://host/run", None, "unknown scheme hdfs://"),
        ("gs://gs-bucket-of-tests/run", "403", "no permission"),
        ("s3://s3-bucket-of-tests/run", "region", "another region: set AWS_REGION"),
    ],
)
def test_what_cannot_be_a_run_is_one_line(stores, run_main, output, kind, message):  # noqa: F811
    files.write_text("s3://s3-bucket-of-tests/other/notes.txt", "")
    store = stores[output[:2]] if output[:2] in stores else stores["s3"]
    with FaultProxy(store) as proxy, environment(store.through(proxy)):
        proxy.faults = [Fault("", kind, count=1_000_000)] if kind else []
        code, said = run_main(["--gin_file=gin/runs/pretrain_tiny.gin", f"--gin.OUTPUT_DIR={output}"])
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0]
