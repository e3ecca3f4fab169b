"""The page of a lineage: tree, curves, samples, evaluations, pictures, time and tokens in one file that loads nothing.

    python tools/lineage_report.py runs/lineage

`tools/lineage.py` writes it at its end; this writes it again. All texts of models stand in it escaped.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lineage_charts import bars, boxes_on, chart, data_uri, escape, sparkline
from lineage_claims import MODELS, Claim, claims, figures
from lineage_style import STYLE
from shown_commands import clock, finished

from qwen_jax import files
from qwen_jax.command_line import path_argument, run
from qwen_jax.data.boxes import find_boxes
from qwen_jax.evaluation.records import ANSWERS
from qwen_jax.training.metrics import read_metrics

REPORT = "report.html"
# Column to (head of the table, form, whether more is better).
COLUMNS = {
    "bits/text": ("docs", ".2f", False),
    "bits/web": ("web", ".2f", False),
    "bits/stories": ("stories", ".2f", False),
    "bits/scenes": ("scenes", ".2f", False),
    "bits/code": ("code", ".2f", False),
    "stories/ended": ("ends", ".0%", True),
    "stories/formatted": ("form", ".0%", True),
    "gold": ("gold reward", "+.2f", True),
    "pairs": ("pairs", ".0%", True),
    "modules/formatted": ("code form", ".0%", True),
    "arithmetic": ("sums", ".0%", True),
    "captions": ("captions", ".0%", True),
    "questions": ("questions", ".0%", True),
    "boxes": ("boxes", ".0%", True),
    "signs": ("signs", ".0%", True),
}
GROUPS = (("bits per byte, less is better", 5), ("chat", 3), ("reward", 1), ("code", 1), ("math", 1), ("pictures", 4))
# Of each model, the figure on its card: (column, what it is).
HEADLINES = {
    "base": ("bits/text", "bits per byte of documentation"),
    "chat": ("stories/formatted", "of answers in form"),
    "rlhf": ("gold", "gold reward"),
    "pmp": ("pairs", "of pairs ranked rightly"),
    "reward": ("pairs", "of pairs ranked rightly"),
    "code": ("bits/code", "bits per byte of code"),
    "code_chat": ("modules/formatted", "of answers in form"),
    "math_chat": ("arithmetic", "of sums right"),
    "vl_stage1": ("captions", "of captions right"),
    "vl": ("questions", "of questions right"),
    "vl_chat": ("questions", "of questions right"),
}
_SHOWN_PICTURES = 8


def shown(name: str, value: float | None) -> str:
    """A figure of a column."""
    return "" if value is None else format(value, COLUMNS[name][1])


class Run:
    """What a run folder tells of its training."""

    def __init__(self, folder: Path):
        self.rows = read_metrics(folder)
        config = folder / "config.gin"
        text = config.read_text() if config.exists() else ""
        sizes = [re.search(rf"^{name} = (\d+)$", text, re.MULTILINE) for name in ("BATCH_SIZE", "SEQUENCE_LENGTH")]
        self.steps = max((row["step"] for row in self.rows), default=0)
        self.tokens = self.steps * int(sizes[0][1]) * int(sizes[1][1]) if all(sizes) else 0

    def line(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a metric."""
        return [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]


def tree(name: str, found: Mapping[str, Mapping[str, float]], runs: Mapping[str, Run], seconds: Mapping) -> str:
    """The card of a model, and those of its children."""
    model, (key, told) = MODELS[name], HEADLINES[name]
    line = runs[name].line("rollout/reward" if name == "rlhf" else "loss")
    tokens = f"{runs[name].tokens / 1e6:.1f}M tokens, " if runs[name].tokens >= 1e5 else ""
    also = '<span class="from">reward: Qwen-RM</span>' if name == "rlhf" else ""
    card = (
        f'<a class="card" href="{name}/"><b>{escape(model.title)}</b><span class="made">{escape(model.made)}'
        f"</span>{also}{sparkline(line)}"
        f'<span class="big">{shown(key, found[name].get(key)) or "–"}</span> <span class="told">{escape(told)}</span>'
        f'<span class="cost">{tokens}{clock(seconds.get(name, 0))}</span></a>'
    )
    children = [child for child, one in MODELS.items() if one.parent == name]
    below = "".join(tree(child, found, runs, seconds) for child in children)
    return f"<li>{card}{f'<ul>{below}</ul>' if below else ''}</li>"


def evaluations(found: Mapping[str, Mapping[str, float]]) -> str:
    """The table of all models and all that was measured; the best of a column is marked."""
    groups = "".join(f'<th colspan="{count}">{escape(title)}</th>' for title, count in GROUPS)
    heads = "".join(f"<th>{escape(head)}</th>" for head, _, _ in COLUMNS.values())
    best = {}
    for key, (_, _, more) in COLUMNS.items():
        values = [one[key] for one in found.values() if key in one]
        best[key] = (max if more else min)(values) if len(set(values)) > 1 else None
    lines = []
    for name, one in found.items():
        title = MODELS[name].title if name in MODELS else "Qwen-VL-Chat, gray pictures"
        cells = "".join(
            f"<td{' class=best' if key in one and one[key] == best[key] else ''}>{shown(key, one.get(key))}</td>"
            for key in COLUMNS
        )
        lines.append(f"<tr><td>{escape(title)}</td>{cells}</tr>")
    return (
        f'<div class="wide"><table class="all"><thead><tr><th></th>{groups}</tr><tr><th>model</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def curves(runs: Mapping[str, Run]) -> str:
    """Loss of each model, training and held out."""
    drawn = []
    for name, one in runs.items():
        if name == "rlhf":
            continue
        what = "preference loss" if name in ("pmp", "reward") else "nats per token"
        lines = {"training": one.line("loss"), "held out": one.line("eval/loss")}
        drawn.append(chart(f"{MODELS[name].title}: {what}", lines))
    return f'<div class="grid">{"".join(drawn)}</div>'


def reinforcement(one: Run) -> str:
    """Reward that is trained on, known reward, KL, and what it costs elsewhere."""
    charts = (
        ("Reward by Qwen-RM", {"reward": one.line("rollout/reward")}, "what PPO is trained on"),
        ("Gold reward", {"gold": one.line("rollout/watched/gold")}, "known here, and never shown to PPO"),
        ("KL from Qwen-Chat", {"KL": one.line("rollout/kl")}, "nats of a response"),
        ("Perplexity", {"held out": one.line("eval/perplexity")}, "of the base model's held-out texts"),
    )
    drawn = "".join(chart(title, lines, below=told, width=270) for title, lines, told in charts)
    return f'<div class="grid four">{drawn}</div>'


def said(question: str, answers: Sequence[tuple[str, str, bool | None]]) -> str:
    """A question with the answers of several models: (name, text, right, or None where that is not asked)."""
    rows = []
    for name, text, right in answers:
        mark = {None: "", True: " right", False: " wrong"}[right]
        title = MODELS[name].title if name in MODELS else name
        rows.append(f'<dt>{escape(title)}</dt><dd class="says{mark}">{escape(text.strip() or "(nothing)")}</dd>')
    return f'<article class="sample"><h4>{escape(question)}</h4><dl>{"".join(rows)}</dl></article>'


def samples(folder: Path, count: int = 3) -> str:
    """Answers to held-out questions before and after each stage."""
    measured, parts = folder / "measured", []
    for kind, heading in (("stories", "Chat and RLHF"), ("modules", "Code")):
        by_model: dict[str, list[dict]] = {}
        for _, row in files.read_json_lines(measured / f"{kind}.jsonl"):
            by_model.setdefault(row["model"], []).append(row)
        first = next(iter(by_model.values()))
        cards = [
            said(
                row["messages"][-1]["content"], [(name, rows[place]["answer"], None) for name, rows in by_model.items()]
            )
            for place, row in enumerate(first[:count])
        ]
        parts.append(f'<h3>{heading}</h3><div class="grid">{"".join(cards)}</div>')
    sums = {}
    for name in ("base", "math_chat"):
        rows = files.read_json_lines(measured / f"{name}_arithmetic" / "arithmetic" / ANSWERS)
        sums[name] = {row["id"]: row for _, row in rows}
    cards = []
    for identity, row in list(sums["base"].items())[:count]:
        other = sums["math_chat"][identity]
        question = f"{row['prompt'].strip().splitlines()[-1]} (right: {row['target']})"
        answers = [(name, one["output"], bool(one["right"])) for name, one in (("base", row), ("math_chat", other))]
        cards.append(said(question, answers))
    return f'{"".join(parts)}<h3>Mathematics</h3><div class="grid">{"".join(cards)}</div>'


def conversations(folder: Path) -> str:
    """What was said through the server."""
    cards = []
    for name, model in MODELS.items():
        if model.said is None:
            continue
        held = files.read_json(folder / "said" / f"{name}.json")
        turns = held["messages"]
        picture = boxes_on(folder / "data/pictures" / model.image, []) if model.image else ""
        text = said(turns[0]["content"], [(name, turns[1]["content"], None)])
        cards.append(text.replace("<dl>", f"{picture}<dl>", 1))
    return f'<div class="grid">{"".join(cards)}</div>'


def pictures(folder: Path) -> str:
    """Held-out pictures with the boxes that Qwen-VL drew, and questions answered by Qwen-VL-Chat."""
    cards = []
    for name in ("vl", "vl_chat"):
        rows = [row for _, row in files.read_json_lines(folder / "measured" / name / "answers.jsonl")]
        rows = [row for row in rows if row["kind"] != "compare"]
        kinds = ("find", "find", "name", "describe", "place") if name == "vl" else ("color", "count", "read")
        for number, kind in enumerate(kinds):
            chosen = [row for row in rows if row["kind"] == kind]
            if len(chosen) <= number:
                continue
            row = chosen[number]
            drawn = [
                (one.region.points, style)
                for text, style in (
                    (row["question"].split("</img>")[-1] + row["reference"], "asked"),
                    (row["answer"], "drawn"),
                )
                for one in find_boxes(text)[0]
            ]
            asked = re.sub(r"<box>.*?</box>", "the box", row["question"].split("</img>")[-1])
            asked = re.sub(r"<[^>]*>", "", asked).strip()
            told = "the box" if find_boxes(row["answer"])[0] else row["answer"]
            text = said(asked, [(name, told, row["right"])])
            image = boxes_on(Path(row["images"][0]), drawn)
            cards.append(text.replace("<dl>", f"{image}<dl>", 1))
    return f'<div class="grid small">{"".join(cards[:_SHOWN_PICTURES])}</div>'


def trained(words: Sequence[str]) -> str | None:
    """The model that a step trains, by the folder of its run; None: it trains none."""
    named = [Path(word.partition("=")[2]).name for word in words if word.startswith("--gin.OUTPUT_DIR=")]
    return next((name for name in named if name in MODELS), None)


def seconds_by_model(folder: Path) -> dict[str, float]:
    """Seconds of the training of each model."""
    return {name: seconds for words, seconds in finished(folder).items() if (name := trained(words)) is not None}


def costs(folder: Path, runs: Mapping[str, Run], seconds: Mapping[str, float]) -> str:
    """Time of trainings, and of all else by tool; tokens beside."""
    rows = []
    for name, took in seconds.items():
        rows.append(
            (MODELS[name].title, took, f"{clock(took)}, {runs[name].steps:,} updates, {runs[name].tokens:,} tokens")
        )
    others: dict[str, list[float]] = {}
    for words, took in finished(folder).items():
        if trained(words) is None:
            tool = words[1] if words[0] == "-m" else Path(words[0]).name
            others.setdefault(tool, []).append(took)
    rows += [(tool, sum(took), f"{clock(sum(took))}, {len(took)}×") for tool, took in others.items()]
    return bars(rows)


def links(folder: Path) -> str:
    """Files beside the page."""
    named = {
        "curation report": "data/corpus/report.html",
        "vocabulary": "vocabulary.tiktoken",
        "all answers of chat models": "measured/stories.jsonl",
        "rewards": "measured/rewards/table.md",
        "wrong sums": "measured/math_chat_arithmetic/results.html",
        "answers about pictures": "measured/vl_chat/answers.jsonl",
        "rollouts of PPO": "rlhf/rollouts/",
        "models for transformers, vLLM, SGLang and llama.cpp": "served/",
        "steps and seconds": "steps.jsonl",
    }
    there = [(title, path) for title, path in named.items() if (folder / path).exists()]
    return "<p>" + " · ".join(f'<a href="{path}">{escape(title)}</a>' for title, path in there) + "</p>"


def claim_list(held: Sequence[Claim]) -> str:
    """The claims, with what was seen."""
    lines = "".join(f'<li class="{"holds" if one.holds else "fails"}">{escape(one.text)}</li>' for one in held)
    return f'<ul class="claims">{lines}</ul>'


def images(folder: Path) -> str:
    """Pictures that other tools drew."""
    named = (("measured/long_context.png", "Perplexity of the base model past its training length"),)
    named += (("measured/rewards/calibration.png", "Preference and reward model: what they predict, and what is so"),)
    drawn = [
        f'<figure class="chart"><img src="{data_uri(folder / path)}" alt="{escape(told)}">'
        f"<figcaption>{escape(told)}</figcaption></figure>"
        for path, told in named
        if (folder / path).exists()
    ]
    return f'<div class="grid large">{"".join(drawn)}</div>'


def page(folder: Path, found: Mapping[str, Mapping[str, float]], held: Sequence[Claim], rehearse: bool) -> str:
    """The whole page."""
    runs = {name: Run(folder / name) for name in MODELS}
    seconds = seconds_by_model(folder)
    spent, tokens = sum(finished(folder).values()), sum(one.tokens for one in runs.values())
    kept = sum(one.holds for one in held)
    banner = '<p class="banner">A rehearsal: toys of two updates. Its figures mean nothing.</p>' if rehearse else ""
    body = (
        "<header><div><h1>A family of models, from a crawl to a chat</h1>"
        f"<p>Figure 1 of the Qwen report on one machine: {len(MODELS)} models, {tokens / 1e6:.1f} million tokens, "
        f"{clock(spent)} minutes. {kept} of {len(held)} claims hold.</p>{banner}</div></header>",
        f'<section><ul class="tree">{tree("base", found, runs, seconds)}</ul></section>',
        f"<section><h2>What is claimed, and what was seen</h2>{claim_list(held)}</section>",
        f"<section><h2>Evaluations</h2><p class=note>Held-out texts and questions; the best of a column is marked."
        f"</p>{evaluations(found)}</section>",
        f"<section><h2>Before and after</h2>{samples(folder)}</section>",
        f"<section><h2>Reinforcement learning</h2>{reinforcement(runs['rlhf'])}</section>",
        "<section><h2>Pictures</h2><p class=note>Boxes that were asked for are dashed, those that the model drew are "
        f"magenta.</p>{pictures(folder)}</section>",
        f"<section><h2>Said through the server</h2>{conversations(folder)}</section>",
        f"<section><h2>Curves</h2>{curves(runs)}</section>",
        f"<section><h2>Length and rewards</h2>{images(folder)}</section>",
        f"<section><h2>Time and tokens</h2>{costs(folder, runs, seconds)}</section>",
        f"<section><h2>Files</h2>{links(folder)}</section>",
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>A family of models</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def write_report(folder: Path, found: Mapping[str, Mapping[str, float]], held: Sequence[Claim], rehearse: bool) -> Path:
    """Writes the page, whole or not at all, and returns where it is.

    Raises:
      OSError, ValueError: a file of a step is missing or broken.
    """
    files.write_text(folder / REPORT, page(folder, found, held, rehearse))
    return folder / REPORT


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=path_argument, help="folder of `tools/lineage.py`")
    parser.add_argument("--rehearse", action="store_true", help="say that it was a rehearsal")
    arguments = parser.parse_args(argv)
    found = figures(arguments.folder)
    print(write_report(arguments.folder, found, claims(found), arguments.rehearse))


if __name__ == "__main__":
    sys.exit(run(main))
