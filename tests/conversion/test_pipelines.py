"""Stages that overlap keep order, errors and the limit of what waits between them."""

import threading

import pytest

from qwen_jax.conversion.pipelines import staged


def test_items_come_in_order_and_few_wait_at_a_time():
    made, taken = 0, 0

    def items():
        nonlocal made
        for number in range(200):
            # Three threads hold one each, and after each at most two of 10 bytes and one beyond wait.
            assert made - taken <= 3 + 3 * 3
            made += 1
            yield number

    found = []
    for one in staged(items(), (lambda x: x + 1, lambda x: 2 * x), lambda item: 10, limit=20):
        taken += 1
        found.append(one)
    assert found == [2 * (number + 1) for number in range(200)]


@pytest.mark.parametrize("place", ["items", "first", "last"])
def test_an_error_comes_in_the_place_of_its_item(place):
    def failing(where):
        def stage(number):
            if number == 3 and where == place:
                raise ValueError(f"{where} fails")
            return number

        return stage

    found = []
    with pytest.raises(ValueError, match=f"{place} fails"):
        for one in staged(map(failing("items"), range(9)), (failing("first"), failing("last")), lambda item: 1):
            found.append(one)
    assert found == [0, 1, 2]


def test_closing_ends_the_threads_and_frees_what_waits():
    before = threading.active_count()
    stages = staged(iter(int, 1), (lambda x: x,), lambda item: 1, limit=5)
    assert next(stages) == 0
    stages.close()
    assert threading.active_count() == before
