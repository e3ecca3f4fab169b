"""Answers in what models write: hard cases of numbers, boxes, stated answers, thinking, Chinese."""

import hypothesis
import pytest
from hypothesis import strategies

from qwen_jax.evaluation import extraction


@pytest.mark.parametrize(
    ("text", "number", "released"),
    [
        ("It costs $29.00", "29.00", "00"),
        ("The answer is 1,234", "1234", "234"),
        ("The answer is -3", "-3", "3"),
        ("That is 10 - 3 = 7.", "7", "7"),
        ("So 5-3", "3", "3"),
        ("He owes -$5", "-5", "5"),
        ("about $1,234.50.", "1234.50", "50"),
        ("12,345,678 people", "12345678", "678"),
        ("the numbers 1,2,3", "3", "3"),
        ("3/4 of it", "3/4", "4"),
        ("20/5 = 4", "4", "4"),
        ("a sum of 5.05", "5.05", None),
        ("x = .5", ".5", "5"),
        ("50%", "50", "50"),
        ("共有８个", "8", None),
        ("−7", "-7", "7"),
        ("1.5e3", "1.5e3", "3"),
        ("18\n\nQuestion: Tom has 5", "5", "5"),
        ("no answer here", None, None),
        ("", None, None),
    ],
)
def test_the_last_number_and_that_of_the_released_script(text, number, released):
    assert extraction.last_number(text) == number
    assert extraction.last_digits(text) == released


@hypothesis.given(strategies.integers(-(10**15), 10**15), strategies.sampled_from(["{:,}", "{}", "${:,}", "is {:,}."]))
def test_an_integer_is_found_in_any_of_its_forms(number, form):
    text = form.format(number).replace("$-", "-$")
    assert extraction.value(extraction.last_number(f"We get {text}")) == number


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1}, no, \boxed{2}", "2"),
        (r"\boxed{\left\{1, \{2\}\right\}} is", r"\left\{1, \{2\}\right\}"),
        (r"\boxed{\text{a}{b}}", r"\text{a}{b}"),
        (r"$\fbox{3}$", "3"),
        (r"\boxed 5$", "5"),
        (r"\boxed{1} then \boxed{2 is cut", "1"),
        (r"\boxed{cut", None),
        ("nothing", None),
    ],
)
def test_the_last_whole_box(text, content):
    assert extraction.boxed(text) == content


@hypothesis.given(strategies.text("ab{}", max_size=12).filter(lambda text: _balanced(text)))
def test_a_box_gives_back_what_is_in_it(text):
    assert extraction.boxed(rf"so \boxed{{{text}}}") == text.strip()


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        ("The answer is 3.5 because of it", "3.5"),
        ("the answer is 4. The answer is 5.", "5"),
        ("**Answer:** 12", "12"),
        ("work\n#### 1,234", "1,234"),
        ("所以答案是8。", "8"),
        ("答案：8", "8"),
        ("答：25天", "25天"),
        ("The answer is: 7\nQ: What is 8?", "7"),
        ("I do not know", None),
    ],
)
def test_stated_answers(text, answer):
    assert extraction.stated(text) == answer


@pytest.mark.parametrize(
    ("text", "stop", "rest"),
    [
        ("plan A\n\nplan B</think>\n\n42\n\nQ: next", ["\n\n"], "42"),
        (r"<think>\boxed{1}</think>\boxed{2}", [], r"\boxed{2}"),
        ("<think>it never ends", [], ""),
        ("no thinking\n\nQ: next", ["\n\n", "Q:"], "no thinking"),
    ],
)
def test_thinking_is_cut_before_stop_strings_count(text, stop, rest):
    assert extraction.without_thinking(text, stop) == rest


def test_a_box_in_the_thinking_is_no_answer():
    assert extraction.mathematical(r"<think>perhaps \boxed{1}</think>The answer is \boxed{2}.") == "2"
    assert extraction.mathematical(r"<think>perhaps \boxed{1}</think>So 3 of them.") == "3"
    assert extraction.mathematical("<think>perhaps 1") is None


def test_the_value_of_a_number_is_exact_and_bounded():
    assert extraction.value("2.5e3") == 2500 and extraction.value("1e-3") == extraction.value("1/1000")
    assert extraction.value("1e999") == 10**999
    # An exponent may have so many digits that the exact value has more than fit into memory.
    for number in ("1e1000", "1E+2345", "1e-1000", "3.5e-0001"):
        assert extraction.value(number) is None, number
