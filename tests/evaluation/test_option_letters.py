"""Letters that replies of chat models choose."""

import pytest

from qwen_jax.evaluation.benchmark import Example
from qwen_jax.evaluation.option_letters import chinese_option, english_option

ENGLISH = ["the heart", "the liver.", "Kidneys and liver", "None"]
CHINESE = ["计算机软件", "网桥", "交换机。", "路由器"]
QUESTION = "子网分为两类。属于资源子网的设备是____。"


@pytest.mark.parametrize(
    ("reply", "index"),
    [
        ("B", 1),
        ("B. because blood is filtered there", 1),
        ("The answer is C.", 2),
        ("The correct answer is: D", 3),
        ("The answer isn't A, so B is correct.", 1),
        ("I would choose option (C), not A.", 2),
        ("A is not right. C is right.", 2),
        ("It is The Liver.", 1),
        ("Kidneys and liver", 2),
        ("The answer is the heart", 0),
        ("Let A=2; then D follows.", 3),
        ("Choice: A", 0),
        ("The answer is in the USA, so B.", 1),
        ("<think>The answer is A. No.</think>\n\nB", 1),
        ("<think>The answer is A", None),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_english_replies(reply, index):
    assert english_option(reply, Example(id="0", prompt="", target=0, extra={"options": ENGLISH})) == index


@pytest.mark.parametrize(
    ("reply", "index"),
    [
        ("答案是D。", 3),
        ("答案：B", 1),
        ("【答案】C", 2),
        ("应该选A选项。", 0),
        ("选择：B。", 1),
        ("A不正确，C选项正确。", 2),
        ("（D）因为……", 3),
        ("属于资源子网的设备是网桥", 1),
        ("交换机", 2),
        ("<think>答案是A。</think>\n\n选B。", 1),
        ("我不知道。", None),
    ],
)
def test_chinese_replies(reply, index):
    example = Example(id="0", prompt="", target=0, extra={"options": CHINESE, "question": QUESTION})
    assert chinese_option(reply, example) == index
