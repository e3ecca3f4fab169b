"""Pictures decoded by worker processes."""

import concurrent.futures
import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import textwrap

import numpy as np
import PIL
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_jax.data.image_workers import CHUNK, ImageWorkers, fastest_resize
from qwen_jax.data.images import UnusableImageError, decode_images, squash

SIZE = 28


def jpeg(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    stream = io.BytesIO()
    levels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(levels).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def workers():
    with ImageWorkers(SIZE, 2) as found:
        yield found


@pytest.mark.parametrize("count", [0, 1, 3, 5 * CHUNK + 1])
def test_pixels_are_those_of_one_process(workers, count):
    images = [jpeg(seed, (20 + seed % 50, 30)) for seed in range(count)]
    found = workers.decode(images)
    assert found.dtype == np.uint8 and found.shape == (count, SIZE, SIZE, 3)
    np.testing.assert_array_equal(found, decode_images(images, SIZE))


def test_several_threads_may_ask(workers):
    batches = [[jpeg(10 * batch + seed) for seed in range(1 + 7 * batch)] for batch in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for images, found in zip(batches, pool.map(workers.decode, batches), strict=True):
            np.testing.assert_array_equal(found, decode_images(images, SIZE))


def test_a_damaged_picture_is_named_and_the_workers_go_on(workers):
    images = [jpeg(seed) for seed in range(3 * CHUNK)]
    damaged = [*images]
    damaged[CHUNK + 3] = b"no picture"
    for decode in (workers.decode, lambda some: decode_images(some, SIZE)):
        with pytest.raises(UnusableImageError, match=f"picture {CHUNK + 3} of {3 * CHUNK} cannot be read") as caught:
            decode(damaged)
        assert caught.value.reason == "a damaged picture"
    np.testing.assert_array_equal(workers.decode(images), decode_images(images, SIZE))


def test_a_worker_that_dies_is_reported_and_replaced():
    images = [jpeg(seed) for seed in range(4)]
    with ImageWorkers(SIZE, 1) as workers:
        expected = workers.decode(images)
        worker = workers._idle.get()
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
        workers._idle.put(worker)
        with pytest.raises(UnusableImageError, match=r"pictures 0 to 1 of 4 ended the process .*exit status -9"):
            workers.decode(images)
        np.testing.assert_array_equal(workers.decode(images), expected)


def test_the_request_that_ended_a_worker_is_named_and_not_the_next_one():
    images = [jpeg(seed) for seed in range(4)]
    with ImageWorkers(SIZE, 1) as workers:
        workers.decode(images)
        worker = workers._idle.get()
        os.kill(worker._process.pid, signal.SIGSTOP)  # it has the first request, and gives no answer

        def chunks():
            yield 0, images[:2]
            worker._process.kill()
            worker._process.wait()
            yield 2, images[2:]

        try:
            with pytest.raises(UnusableImageError, match=r"pictures 0 to 1 of 4 ended the process"):
                worker.decode(chunks(), np.empty((4, SIZE, SIZE, 3), np.uint8), 4)
            assert worker.ended
        finally:
            worker.close()
            workers._idle.put(None)


def test_workers_end_with_the_process_that_started_them():
    program = textwrap.dedent(
        """
        import io, os, sys
        from PIL import Image
        from qwen_jax.data.image_workers import ImageWorkers
        stream = io.BytesIO()
        Image.new("RGB", (9, 9)).save(stream, "PNG")
        workers = ImageWorkers(28, 1)
        workers.decode([stream.getvalue()])
        worker = workers._idle.get()
        print(worker._process.pid, *sorted({"jax", "tensorflow"} & set(sys.modules)), flush=True)
        os.kill(os.getpid(), 9)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.wait()
    with contextlib.suppress(ProcessLookupError):  # it is gone already
        worker = os.pidfd_open(pid)
        assert select.select([worker], [], [], 60)[0], "the worker goes on without its parent"
        os.close(worker)


def test_the_compiled_resize_is_pillows_to_the_last_bit():
    fast_resize = pytest.importorskip(
        "qwen_jax.data.fast_resize", reason="Numba is not installed (extra images)", exc_type=ImportError
    )
    if int(PIL.__version__.split(".")[0]) >= 13:
        assert not fast_resize.agrees()  # its passes are in another order: workers use Pillow itself
        return
    assert fast_resize.agrees() and fastest_resize() is fast_resize.squash

    @settings(max_examples=60, deadline=None)
    @example(height=400, width=3, size=28, seed=0, edges=True)
    @given(
        height=st.integers(1, 300),
        width=st.integers(1, 300),
        size=st.sampled_from([1, 14, 28, 112, 224]),
        seed=st.integers(0, 99),
        edges=st.booleans(),
    )
    def check(height, width, size, seed, edges):
        levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        image = Image.fromarray(np.where(levels > 127, 255, 0).astype(np.uint8) if edges else levels)
        np.testing.assert_array_equal(fast_resize.squash(image, size), squash(image, size))

    check()


def test_without_numba_pillow_resizes(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "qwen_jax.data.fast_resize", raising=False)
    monkeypatch.delattr("qwen_jax.data.fast_resize", raising=False)
    assert fastest_resize() is squash


def test_without_workers_there_is_nothing_to_ask():
    with pytest.raises(ValueError, match="num_workers is 0"):
        ImageWorkers(SIZE, 0)
