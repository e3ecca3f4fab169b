"""Writes questions with tools made by rule: to train on, and to evaluate on with tools that training never saw.

    python tools/make_tool_use.py --output runs/tool_use/data --count 3000

Every example draws tools of its own: a name without a meaning, a subject such as "copper price", and an argument. Only
the description says what a tool is about, so that the right one is found by reading. Some questions are about nothing
that a listed tool is about, and some ask for no look-up at all: they are answered without a call. Half of the examples
are Chinese.

    train.jsonl     conversations with calls, results and answers, in OpenAI's layout (task `chat_messages`); each has
                    several questions, so that much is learned from one list of tools
    one_tool.jsonl  one question with one tool, which is always called: the form of a call, without a choice
    text.jsonl      plain text for a base model to begin with (task `local_files`): lists of names and what each is
                    about, with questions after them, from which a small model learns to look things up; and some
                    examples of one_tool.jsonl
    tool_use/       exam_plugin_made_react_{positive,negative}.jsonl: the layout of the publisher of Table 6, which the
                    benchmark `tool_use` reads

No subject and no name of a tool of `tool_use` is in the other files; their words are.
"""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.data.conversations import from_openai
from qwen_jax.data.react import DEFAULT_STYLE, TRAINED_STYLES, say

MOST_TOOLS = 5
HELD_OUT_SHARE = 0.2  # of the subjects
NEAR_SHARE = 0.15  # of the other tools that share a word with what is asked
CHAT_SHARE = 0.3  # of the questions without a call that ask for no look-up
SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]


@dataclasses.dataclass(frozen=True)
class Language:
    """Words and sentences of one language; {first} and {second} are the words of a subject."""

    firsts: tuple[str, ...]
    seconds: tuple[str, ...]
    subject: str
    places: tuple[str, ...]
    arguments: tuple[str, ...]
    descriptions: tuple[str, ...]
    questions: tuple[str, ...]
    asked: str
    found: str
    missing: str
    answer: str
    refusal: str
    chats: tuple[tuple[str, str], ...]
    people: tuple[str, ...]
    no_lookup: str


ENGLISH = Language(
    firsts=tuple(
        (
            "copper river winter garden paper glass silver forest mountain harbor desert cotton sugar wheat coffee "
            "island marble timber bridge market castle engine rocket window leather rubber summer ocean valley orange"
        ).split()
    ),
    seconds=tuple(
        (
            "price height weight traffic quality schedule history owner color demand supply risk speed depth area age "
            "tax level index permit"
        ).split()
    ),
    subject="{first} {second}",
    places=tuple(
        "Rome Oslo Lima Cairo Delhi Paris Tokyo Quito Dakar Hanoi Milan Perth Sofia Turin Accra Kyoto".split()
    ),
    arguments=("city", "place", "town", "location"),
    descriptions=("Tells the {subject} of a {argument}.", "Looks up the {subject} in one {argument}."),
    questions=("What is the {subject} of {place}?", "I want to know the {subject} in {place}.", "{place}: {subject}?"),
    asked="The question is about the {subject}.",
    found="{name} is about it.",
    missing="No API is about it.",
    answer="The {subject} of {place} is {result}.",
    refusal="I cannot look up the {subject}.",
    chats=(
        ("Say hello to {person}.", "Hello, {person}!"),
        ("Thank {person} for me.", "Thank you, {person}!"),
        ("Wish {person} a good night.", "Good night, {person}!"),
    ),
    people=tuple("Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karin Lucas".split()),
    no_lookup="The question needs no API.",
)
CHINESE = Language(
    firsts=tuple(
        (
            "铜矿 河流 冬季 花园 纸张 玻璃 白银 森林 山地 港口 沙漠 棉花 食糖 小麦 咖啡 海岛 石材 木料 桥梁 市场 "
            "城堡 引擎 火箭 门窗 皮革 橡胶 夏季 海洋 山谷 橙子"
        ).split()
    ),
    seconds=tuple(
        "价格 高度 重量 流量 质量 日程 历史 业主 颜色 需求 供应 风险 速度 深度 面积 年龄 税率 水平 指数 许可".split()
    ),
    subject="“{first}{second}”",
    places=tuple("罗马 奥斯陆 利马 开罗 德里 巴黎 东京 基多 达喀尔 河内 米兰 珀斯 北京 上海 广州 成都".split()),
    arguments=("city", "place", "town", "location"),
    descriptions=("查询一个地方的{subject}。", "提供{subject}，按地方查找。"),
    questions=("{place} 的{subject}是多少？", "请告诉我 {place} 的{subject}。", "我想了解{subject}，地点是 {place}。"),
    asked="问题是{subject}。",
    found="可以用 {name}。",
    missing="没有合适的工具。",
    answer="{place} 的{subject}是 {result}。",
    refusal="我查不到{subject}。",
    chats=(
        ("请向{person}问好。", "你好，{person}！"),
        ("替我谢谢{person}。", "谢谢你，{person}！"),
        ("祝{person}晚安。", "晚安，{person}！"),
    ),
    people=tuple("安娜 鲍里 克拉 大卫 艾琳 小明 小红 王芳 李强 张伟 刘洋 陈静".split()),
    no_lookup="不需要工具。",
)
LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
Subject = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Made:
    """One example.

    Attributes:
        language: a key of `LANGUAGES`.
        tools: definitions in OpenAI's layout.
        messages: in OpenAI's layout.
    """

    language: str
    tools: tuple[dict, ...]
    messages: tuple[dict, ...]

    @property
    def row(self) -> dict:
        """The example in OpenAI's layout."""
        return {"messages": list(self.messages), "tools": list(self.tools)}


class Maker:
    """Makes examples of subjects that are for training, or held out."""

    def __init__(self, seed: int, part: str, held_out: bool = False):
        self._draw = random.Random(f"{seed}/{part}")
        self._held_out = held_out
        self._subjects: dict[str, list[Subject]] = {}
        for name, language in LANGUAGES.items():
            every = [(first, second) for first in language.firsts for second in language.seconds]
            random.Random(f"{seed}/{name}").shuffle(every)
            cut = round(HELD_OUT_SHARE * len(every))
            self._subjects[name] = every[:cut] if held_out else every[cut:]

    def example(self, *, tools: tuple[int, int], calls: Sequence[bool]) -> Made:
        """A conversation.

        Args:
            tools: the smallest and the largest number of them.
            calls: of each question, whether it needs a call.
        """
        draw, name = self._draw, self._draw.choice(sorted(LANGUAGES))
        count = draw.randint(*tools)
        asked = [draw.choice(self._subjects[name]) for _ in calls]
        listed: list[Subject] = []
        while len(listed) < count:
            near = draw.random() < NEAR_SHARE
            other = self._near(name, asked[0]) if near else draw.choice(self._subjects[name])
            if other not in listed:
                listed.append(other)
        definitions = [self._tool(LANGUAGES[name], subject, named) for named, subject in self._named(listed)]
        messages: list[dict] = []
        for subject, call in zip(asked, calls, strict=True):
            while not call and subject in listed:
                subject = draw.choice(self._subjects[name])
            if call:
                place = draw.randrange(count)
                messages += self._called(LANGUAGES[name], listed[place], definitions[place]["function"])
            else:
                messages += self._answered(LANGUAGES[name], subject)
        return Made(name, tuple(definitions), tuple(messages))

    def catalog(self, questions: int) -> str:
        """Plain text: names with descriptions, a line each, and questions that say which name is about them."""
        made = self.example(tools=(1, MOST_TOOLS), calls=[self._draw.random() < 0.8 for _ in range(questions)])
        lines = [f"{tool['function']['name']}: {tool['function']['description']}" for tool in made.tools]
        for question, reply in zip(made.messages, made.messages[1:], strict=False):
            if question["role"] == "user":
                lines += [f"Question: {question['content']}", reply["content"]]
                for call in reply.get("tool_calls", ()):
                    lines.append(f"{call['function']['name']}: {call['function']['arguments']}")
        return "\n".join(lines)

    def _named(self, listed: list[Subject]) -> Iterator[tuple[str, Subject]]:
        """Subjects with names that are not alike and, by their hash, belong to this part."""
        begun: set[str] = set()
        for subject in listed:
            while True:
                parts = self._draw.sample(SYLLABLES, 3)
                # The sum decides: no name is in both parts, and nobody needs a list of all names.
                if parts[0] not in begun and (sum(map(SYLLABLES.index, parts)) % 5 == 0) == self._held_out:
                    break
            begun.add(parts[0])
            yield "".join(parts), subject

    def _near(self, name: str, asked: Subject) -> Subject:
        """A subject that shares a word with `asked`, or any where there is none."""
        near = [one for one in self._subjects[name] if one != asked and (one[0] == asked[0] or one[1] == asked[1])]
        return self._draw.choice(near or self._subjects[name])

    def _tool(self, language: Language, subject: Subject, name: str) -> dict:
        argument = self._draw.choice(language.arguments)
        description = self._draw.choice(language.descriptions).format(
            subject=_written(language, subject), argument=argument
        )
        schema = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
        return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}

    def _called(self, language: Language, subject: Subject, tool: dict) -> tuple[dict, ...]:
        """A question, its call and result, and the answer."""
        words = {"subject": _written(language, subject), "place": self._draw.choice(language.places)}
        (argument,) = tool["parameters"]["required"]
        call = {"name": tool["name"], "arguments": json.dumps({argument: words["place"]}, ensure_ascii=False)}
        result = str(self._draw.randint(10, 99))
        thought = f"Thought: {language.asked.format(**words)} {language.found.format(name=tool['name'])}"
        return (
            {"role": "user", "content": self._draw.choice(language.questions).format(**words)},
            {"role": "assistant", "content": thought, "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": language.answer.format(**words, result=result)},
        )

    def _answered(self, language: Language, subject: Subject) -> tuple[dict, ...]:
        """A question that needs no call, and the answer."""
        if self._draw.random() < CHAT_SHARE:
            question, answer = self._draw.choice(language.chats)
            words = {"person": self._draw.choice(language.people)}
            thought = language.no_lookup
        else:
            words = {"subject": _written(language, subject), "place": self._draw.choice(language.places)}
            question, answer = self._draw.choice(language.questions), language.refusal
            thought = f"{language.asked.format(**words)} {language.missing}"
        told = f"Thought: {thought}\nFinal Answer: {answer.format(**words)}"
        return (
            {"role": "user", "content": question.format(**words)},
            {"role": "assistant", "content": told},
        )


def _written(language: Language, subject: Subject) -> str:
    return language.subject.format(first=subject[0], second=subject[1])


def exam_row(made: Made, style: str) -> dict:
    """The row of an example in the publisher's layout: the prompt, and the response up to the first result."""
    question, turn = say(from_openai(made.row), style)
    row = {"prompt": question.content, "response": turn.content, "language": made.language, "tools": len(made.tools)}
    return row


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path_argument, required=True, metavar="FOLDER", help="folder for all files")
    parser.add_argument("--count", type=int, default=3_000, help="lines of train.jsonl (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=6, help="of a line of train.jsonl (default: %(default)s)")
    parser.add_argument("--one_tool", type=int, default=1_500, help="lines of one_tool.jsonl (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=24_000, help="lists in text.jsonl (default: %(default)s)")
    parser.add_argument("--held_out", type=int, default=200, help="questions of each kind (default: %(default)s)")
    parser.add_argument("--without", type=float, default=0.4, help="share of questions without a call (%(default)s)")
    parser.add_argument("--style", choices=TRAINED_STYLES, default=DEFAULT_STYLE, help="of the prompts in tool_use/")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    counts = (arguments.count, arguments.questions, arguments.one_tool, arguments.texts, arguments.held_out)
    if min(counts) < 1 or not 0 <= arguments.without <= 1:
        raise ValueError(
            "--count, --questions, --one_tool and --held_out must be at least 1, and --without a share from 0 to 1"
        )
    seed, style, every = arguments.seed, arguments.style, (1, MOST_TOOLS)
    kinds = random.Random(seed)

    def calls(count: int) -> list[bool]:
        return [kinds.random() >= arguments.without for _ in range(count)]

    maker = Maker(seed, "train")
    train = [maker.example(tools=every, calls=calls(arguments.questions)) for _ in range(arguments.count)]
    maker = Maker(seed, "one_tool")
    one_tool = [maker.example(tools=(1, 1), calls=[True]) for _ in range(arguments.one_tool)]
    texts = [maker.catalog(arguments.questions) for _ in range(arguments.texts)]
    texts += [
        "\n".join(one.content for one in say(from_openai(made.row), style)) for made in one_tool[: len(texts) // 8]
    ]
    kinds.shuffle(texts)
    maker = Maker(seed, "exam", held_out=True)
    positive = [maker.example(tools=(2, MOST_TOOLS), calls=[True]) for _ in range(arguments.held_out)]
    negative = [maker.example(tools=every, calls=[False]) for _ in range(arguments.held_out)]
    for name, rows in {
        "train.jsonl": [made.row for made in train],
        "one_tool.jsonl": [made.row for made in one_tool],
        "text.jsonl": [{"text": text} for text in texts],
        "tool_use/exam_plugin_made_react_positive.jsonl": [exam_row(made, style) for made in positive],
        "tool_use/exam_plugin_made_react_negative.jsonl": [exam_row(made, style) for made in negative],
    }.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_text(arguments.output / name, lines)
        print(f"wrote {arguments.output / name}: {len(rows):,}")


if __name__ == "__main__":
    run(main)
