"""The models of Figure 1 as `tools/lineage.py` makes them, what was measured of each, and what is claimed of it."""

import dataclasses
from pathlib import Path

from make_rlhf_data import PATTERN
from shown_commands import ROOT  # noqa: F401  makes the repository importable

from qwen_jax import files
from qwen_jax.alignment.rewards import match_count
from qwen_jax.evaluation.answers import Answered, Question, tally

LIMITS = {
    "ended": 0.9,
    "formatted": 0.8,
    "reward": 0.8,
    "gold": 0.3,
    "tax": 0.1,
    "code": 0.10,
    "math_before": 0.05,
    "math": 0.5,
    "question": 0.8,
    "box": 0.6,
    "gray": 0.4,
}
# What the tool asserts at its end, as its help lists it.
LISTED = """    chat     at least {ended:.0%} of the answers end, at least {formatted:.0%} have the form
    reward   at least {reward:.0%} of held-out pairs ranked rightly
    PPO      the known (gold) reward of held-out answers rises by at least {gold:g}; bits per byte of the base model's
             held-out texts at most {tax:g} above those of the chat model
    code     at least {code:.0%} fewer bits per byte of code than the base model; of the answers of its chat model at
             least {formatted:.0%} have the form
    math     at most {math_before:.0%} of the calculations right before, at least {math:.0%} after
    pictures at least {question:.0%} of questions and {box:.0%} of boxes (IoU above 0.5), at most {gray:.0%} of the
             questions with gray pictures
""".format(**LIMITS)

TEXTS = ("qwen2", "gguf")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the family.

    Attributes:
      title: as the report calls it.
      parent: name of the model that its weights come from; empty: none.
      made: how, in a few words.
      section: of the report.
      formats: that it is converted to; the first is served.
      said: ("complete" or "say", text) of the conversation; None: it does not speak.
      image: of the pictures' folder, shown with it.
    """

    title: str
    parent: str
    made: str
    section: str
    formats: tuple[str, ...] = TEXTS
    said: tuple[str, str] | None = None
    image: str = ""


ANIMAL = ("say", "Tell me about the owl.")
SEEN = ("say", "Describe the picture.")
# By folder, each after its parent.
MODELS = {
    "base": Model("Qwen", "", "pretraining", "2", said=("complete", "The old library of")),
    "chat": Model("Qwen-Chat", "base", "supervised fine-tuning", "3.1", said=ANIMAL),
    "rlhf": Model("Qwen-Chat-RLHF", "chat", "PPO against Qwen-RM", "3.2.2", said=ANIMAL),
    "pmp": Model("Qwen-PMP", "base", "many comparisons", "3.2.1", ("qwen2_reward",)),
    "reward": Model("Qwen-RM", "pmp", "better comparisons", "3.2.1", ("qwen2_reward",)),
    "code": Model("Code-Qwen", "base", "pretraining on code", "4", said=("complete", "def __init__(self, ")),
    "code_chat": Model(
        "Code-Qwen-Chat", "code", "supervised fine-tuning", "4", said=("say", "Repeat this name: asyncio")
    ),
    "math_chat": Model("Math-Qwen-Chat", "base", "supervised fine-tuning", "5", said=("say", "27+58=")),
    "vl_stage1": Model("Qwen-VL, stage 1", "base", "captions; decoder frozen", "VL 3.1", ("qwen",)),
    "vl": Model("Qwen-VL", "vl_stage1", "seven tasks", "VL 3.2", ("qwen",), SEEN, "pictures/held_out/describe_0.png"),
    "vl_chat": Model(
        "Qwen-VL-Chat", "vl", "dialogues; encoder frozen", "VL 3.3", ("qwen",), SEEN, "pictures/held_out/describe_0.png"
    ),
}
# What the answers of the world of stories look like: two to four sentences, each ending in a place.
STORY = r"(?:The \w+(?: \w+)? \w+ (?:in|by|on|under|near|at) [\w ]+\. ?){2,4}"
MODULE = r"Answer: .*\."
# Models whose text is measured, and those that calculate.
READERS = ("base", "chat", "rlhf", "code", "code_chat", "math_chat", "vl_chat")
CALCULATORS = {"base": False, "chat": True, "math_chat": True}
QUESTIONS = ("color", "shape", "count", "place")
SIGHT = ("vl_stage1", "vl", "vl_chat", "gray")
KINDS = ("text", "code", "web", "stories", "scenes")
# Kinds of text that the base model was made of.
OF_BASE = ("text", "web", "stories", "scenes")


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is claimed of a model, with its figures, and whether it holds."""

    model: str
    text: str
    holds: bool


def gold(text: str) -> float:
    """The known reward of an answer, as gin/runs/ppo_family.gin has it: 1 for three kind words."""
    return match_count("", text, None, pattern=PATTERN)


def answered(path: Path) -> dict[str, list[dict]]:
    """Answers by model, in the order of the questions."""
    found: dict[str, list[dict]] = {}
    for _, row in files.read_json_lines(path):
        found.setdefault(row["model"], []).append(row)
    return found


def shares(path: Path, pattern: str) -> dict[str, dict[str, float]]:
    """Of each model: shares of answers that ended and that have the form."""
    found = {}
    for name, rows in answered(path).items():
        made = [Answered(Question(row["instruction"], (), None), row["answer"], row["ended"]) for row in rows]
        counts = tally(made, pattern)
        found[name] = {
            "ended": counts.ended / counts.answers,
            "formatted": (counts.formatted or 0) / counts.answers,
        }
    return found


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """What was measured of each model: bits per byte as `bits/KIND`, and shares and rewards by name."""
    measured = folder / "measured"
    found: dict[str, dict[str, float]] = {name: {} for name in (*MODELS, "gray")}
    for name in READERS:
        groups = files.read_json(measured / name / "perplexity.json")["groups"]
        found[name] |= {f"bits/{one['domain']}": one["bits_per_byte"] for one in groups}
    for kind, pattern in (("stories", STORY), ("modules", MODULE)):
        for name, counted in shares(measured / f"{kind}.jsonl", pattern).items():
            found[name] |= {f"{kind}/{key}": value for key, value in counted.items()}
    for name, rows in answered(measured / "stories.jsonl").items():
        found[name]["gold"] = sum(gold(row["answer"]) for row in rows) / len(rows)
    for name in CALCULATORS:
        entry = files.read_json(measured / f"{name}_arithmetic" / "arithmetic" / "scores.json")
        found[name]["arithmetic"] = entry["metrics"]["score"] / 100
    for title, of_set in files.read_json(measured / "rewards" / "results.json").items():
        found[{"PMP": "pmp", "RM": "reward"}[title]]["pairs"] = of_set["stories"]["accuracy"]
    for name in SIGHT:
        kinds = files.read_json(measured / name / "scores.json")["kinds"]
        found[name] |= {
            "captions": kinds["describe"]["right"],
            "questions": sum(kinds[one]["right"] for one in QUESTIONS) / len(QUESTIONS),
            "boxes": kinds["find"]["right"],
            "signs": kinds["read"]["right"],
        }
    return found


def claims(found: dict[str, dict[str, float]]) -> list[Claim]:
    """What is claimed of a run with these figures."""
    made = []

    def share(model: str, key: str, limit: str, what: str, most: bool = False) -> None:
        value, bound = found[model][key], LIMITS[limit]
        title = MODELS[model].title if model in MODELS else "gray pictures"
        rule = f"at {'most' if most else 'least'} {bound:.0%} expected"
        holds = value <= bound if most else value >= bound
        made.append(Claim(model, f"{title}: {value:.1%} {what}, {rule}", holds))

    share("chat", "stories/ended", "ended", "of the answers end")
    share("chat", "stories/formatted", "formatted", "of the answers have the form")
    share("reward", "pairs", "reward", "of the held-out pairs ranked rightly")
    gain = found["rlhf"]["gold"] - found["chat"]["gold"]
    told = f"Qwen-Chat-RLHF: gold reward {gain:+.2f}, at least {LIMITS['gold']:+g} expected"
    made.append(Claim("rlhf", told, gain >= LIMITS["gold"]))
    before, after = (sum(found[name][f"bits/{kind}"] for kind in OF_BASE) / len(OF_BASE) for name in ("chat", "rlhf"))
    told = f"Qwen-Chat-RLHF: {after - before:+.3f} bits per byte of the base model's texts, "
    made.append(Claim("rlhf", f"{told}at most {LIMITS['tax']:+g} expected", after - before <= LIMITS["tax"]))
    fewer = 1 - found["code"]["bits/code"] / found["base"]["bits/code"]
    told = f"Code-Qwen: {fewer:.1%} fewer bits per byte of code, at least {LIMITS['code']:.0%} expected"
    made.append(Claim("code", told, fewer >= LIMITS["code"]))
    share("code_chat", "modules/formatted", "formatted", "of the answers have the form")
    share("base", "arithmetic", "math_before", "of the calculations right", most=True)
    share("math_chat", "arithmetic", "math", "of the calculations right")
    share("vl", "questions", "question", "of the questions about pictures right")
    share("vl", "boxes", "box", "of the boxes right")
    share("gray", "questions", "gray", "of the questions right", most=True)
    return made
