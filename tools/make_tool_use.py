"""Writes questions with tools made by rule: to train on, and to evaluate on with tools that training never saw.

    python tools/make_tool_use.py --output runs/tool_use/data --count 3000

Every example draws tools of its own: a subject such as "copper price", the name `copper_price` that says so, and an
argument. Some questions are about a listed tool's subject, some about another one, and some ask for no look-up at all:
the latter two are answered without a call. A model that is right names the subject of the question and finds out
whether it is in the list. Half of the examples are Chinese; names are English there, too.

    train.jsonl     conversations with calls, results and answers, in OpenAI's layout (task `chat_messages`); each has
                    several questions, so that much is learned from one list of tools
    one_tool.jsonl  one question with one tool, which is called whatever is asked: the form of a call, without a choice
    text.jsonl      plain text for a base model to begin with (task `local_files`): lists of names and what each is
                    about, with questions after them, from which a small model learns to look things up; and some
                    examples of one_tool.jsonl
    tool_use/       exam_plugin_made_react_{positive,negative}.jsonl: the layout of the publisher of Table 6, which the
                    benchmark `tool_use` reads

No subject and no name of a tool of `tool_use` is in the other files; their words are. No two tools of a list share
the second word of their subjects.
"""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.data.conversations import from_openai
from qwen_jax.data.react import DEFAULT_STYLE, TRAINED_STYLES, say

MOST_TOOLS = 5
HELD_OUT_SHARE = 0.2  # of the subjects
NEAR_SHARE = 0.15  # of the other tools that share the first word with what is asked; no two share the second
LIST_QUESTIONS = 8  # of a list in text.jsonl
CHAT_SHARE = 0.3  # of the questions without a call that ask for no look-up


@dataclasses.dataclass(frozen=True)
class Language:
    """Words and sentences of one language; {first} and {second} are the words of a subject.

    The words of both languages are in one order, so that a subject is a pair of indices.
    """

    firsts: tuple[str, ...]
    seconds: tuple[str, ...]
    subject: str
    places: tuple[str, ...]
    arguments: tuple[str, ...]
    descriptions: tuple[str, ...]
    questions: tuple[str, ...]
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
    found="The question needs {name}.",
    missing="The question needs {name}, and no API is about it.",
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
    found="问题需要 {name}。",
    missing="问题需要 {name}，但没有这样的工具。",
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
Subject = tuple[int, int]


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
        every = [(first, second) for first in range(len(ENGLISH.firsts)) for second in range(len(ENGLISH.seconds))]
        random.Random(seed).shuffle(every)
        cut = round(HELD_OUT_SHARE * len(every))
        self._subjects = every[:cut] if held_out else every[cut:]

    def example(self, *, tools: tuple[int, int], calls: Sequence[bool]) -> Made:
        """A conversation in which a question with a call is about a listed tool, and no other is.

        Args:
            tools: the smallest and the largest number of them.
            calls: of each question, whether it needs a call.
        """
        name, listed, definitions = self._listed(self._draw.randint(*tools))
        messages: list[dict] = []
        missing: list[Subject] = []
        for call in calls:
            if call:
                place = self._draw.randrange(len(listed))
                messages += self._called(LANGUAGES[name], listed[place], definitions[place]["function"])
            else:
                missing.append(self._other(listed + missing))
                messages += self._answered(LANGUAGES[name], missing[-1])
        return Made(name, tuple(definitions), tuple(messages))

    def unasked(self) -> Made:
        """One question and one tool, which is called although the question is about something else as a rule."""
        name, _, definitions = self._listed(1)
        question = self._draw.choice(self._subjects)
        return Made(name, tuple(definitions), self._called(LANGUAGES[name], question, definitions[0]["function"]))

    def catalog(self, questions: int) -> str:
        """Plain text: names with descriptions, a line each, and questions, half of them about no listed name."""
        name, listed, definitions = self._listed(self._draw.randint(1, MOST_TOOLS))
        language, missing = LANGUAGES[name], []
        lines = [f"{tool['function']['name']}: {tool['function']['description']}" for tool in definitions]
        for _ in range(questions):
            found = self._draw.random() < 0.5
            subject = self._draw.choice(listed) if found else self._other(listed + missing)
            missing += [] if found else [subject]
            words = self._words(language, subject)
            thought = (language.found if found else language.missing).format(**words)
            lines += [self._draw.choice(language.questions).format(**words), f"Thought: {thought}"]
            if found:
                (argument,) = definitions[listed.index(subject)]["function"]["parameters"]["required"]
                lines.append(f"{words['name']}: {json.dumps({argument: words['place']}, ensure_ascii=False)}")
        return "\n".join(lines)

    def _listed(self, count: int) -> tuple[str, list[Subject], list[dict]]:
        """A language, and tools with their subjects."""
        name = self._draw.choice(sorted(LANGUAGES))
        listed: list[Subject] = []
        while len(listed) < count:
            near = listed and self._draw.random() < NEAR_SHARE
            subject = self._other(listed, first=self._draw.choice(listed)[0] if near else None)
            listed.append(subject)
        return name, listed, [self._tool(LANGUAGES[name], subject) for subject in listed]

    def _other(self, listed: list[Subject], first: int | None = None) -> Subject:
        """A subject whose second word none of `listed` has, with the given first word where there is such a one."""
        seconds = {second for _, second in listed}
        others = [one for one in self._subjects if one[1] not in seconds]
        return self._draw.choice([one for one in others if one[0] == first] or others)

    def _tool(self, language: Language, subject: Subject) -> dict:
        argument = self._draw.choice(language.arguments)
        description = self._draw.choice(language.descriptions).format(
            subject=_written(language, subject), argument=argument
        )
        schema = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
        return {
            "type": "function",
            "function": {"name": _name(subject), "description": description, "parameters": schema},
        }

    def _words(self, language: Language, subject: Subject) -> dict[str, str]:
        """What the sentences of a language ask for."""
        words = {"subject": _written(language, subject), "name": _name(subject)}
        return words | {"place": self._draw.choice(language.places)}

    def _called(self, language: Language, subject: Subject, tool: dict) -> tuple[dict, ...]:
        """A question, the call of a tool and its result, and the answer."""
        words = self._words(language, subject) | {"name": tool["name"], "result": str(self._draw.randint(10, 99))}
        (argument,) = tool["parameters"]["required"]
        call = {"name": tool["name"], "arguments": json.dumps({argument: words["place"]}, ensure_ascii=False)}
        thought = f"Thought: {language.found.format(**words)}"
        return (
            {"role": "user", "content": self._draw.choice(language.questions).format(**words)},
            {"role": "assistant", "content": thought, "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": words["result"]},
            {"role": "assistant", "content": language.answer.format(**words)},
        )

    def _answered(self, language: Language, subject: Subject) -> tuple[dict, ...]:
        """A question that needs no call, and the answer."""
        words = self._words(language, subject) | {"person": self._draw.choice(language.people)}
        if self._draw.random() < CHAT_SHARE:
            (question, answer), thought = self._draw.choice(language.chats), language.no_lookup
        else:
            question, answer = self._draw.choice(language.questions), language.refusal
            thought = language.missing
        told = f"Thought: {thought}\nFinal Answer: {answer}"
        return (
            {"role": "user", "content": question.format(**words)},
            {"role": "assistant", "content": told.format(**words)},
        )


def _written(language: Language, subject: Subject) -> str:
    return language.subject.format(first=language.firsts[subject[0]], second=language.seconds[subject[1]])


def _name(subject: Subject) -> str:
    """The name of the tool for a subject."""
    return f"{ENGLISH.firsts[subject[0]]}_{ENGLISH.seconds[subject[1]]}"


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
    parser.add_argument("--without", type=float, default=0.5, help="share of questions without a call (%(default)s)")
    parser.add_argument("--style", choices=TRAINED_STYLES, default=DEFAULT_STYLE, help="of the prompts in tool_use/")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    counts = (arguments.count, arguments.questions, arguments.one_tool, arguments.texts, arguments.held_out)
    if min(counts) < 1 or not 0 <= arguments.without <= 1:
        raise ValueError(
            "--count, --questions, --one_tool, --texts and --held_out must be at least 1, and --without a share from 0 "
            "to 1"
        )
    most = len(ENGLISH.seconds) - MOST_TOOLS
    if arguments.questions > most:
        raise ValueError(
            f"--questions must be from 1 to {most}: no two subjects of a line share their second word, of which "
            f"there are {len(ENGLISH.seconds)}"
        )
    seed, style, every = arguments.seed, arguments.style, (1, MOST_TOOLS)
    kinds = random.Random(seed)

    def calls(count: int) -> list[bool]:
        return [kinds.random() >= arguments.without for _ in range(count)]

    maker = Maker(seed, "train")
    train = [maker.example(tools=every, calls=calls(arguments.questions)) for _ in range(arguments.count)]
    maker = Maker(seed, "one_tool")
    one_tool = [maker.unasked() for _ in range(arguments.one_tool)]
    texts = [maker.catalog(LIST_QUESTIONS) for _ in range(arguments.texts)]
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
