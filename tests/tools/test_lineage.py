"""tools/lineage.py: its steps hang together, its claims can fail, and its page shows what was measured and no more."""

import json
import re
from pathlib import Path

import gin
import pytest
from PIL import Image

from qwen_jax import files, rlhf, train
from qwen_jax.configuration import load_gin
from tests.browser import browser

gin.configurable(train.train)
gin.configurable(rlhf.rlhf)
MARK = '<script>alert("owl")</script>'


@pytest.fixture
def claims(tool):
    return tool("lineage_claims")


@pytest.fixture
def steps(tool, tmp_path):
    return tool("lineage").Story(tmp_path, 0, False).steps()


def settings(words) -> dict[str, str]:
    """The gin bindings of a command."""
    return dict(word.removeprefix("--gin.").split("=", 1) for word in words if word.startswith("--gin."))


def test_every_model_starts_from_its_parent_and_each_file_is_made_before_it_is_read(steps, claims, tmp_path):
    made, parents = [], {}
    for step in steps:
        # A heading is a step's own; paths of this folder that it reads were outputs of earlier ones.
        words, bound = list(step.words), settings(step.words)
        outputs = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--output", "--output_dir")]
        outputs += [word.split("=", 1)[1] for word in words if word.startswith("--output=")]
        outputs += [bound[name] for name in ("OUTPUT_DIR", "CACHE_DIR") if name in bound]
        outputs += [words[words.index("--to") + 1].split(":", 1)[1]] if "--to" in words else []
        read = {path for word in words for path in re.findall(rf"{tmp_path}/[\w./]*", word)} - {*outputs}
        for path in sorted(read):
            assert any(path.startswith(one.removesuffix(".tiktoken")) or one.startswith(path) for one in made), path
        made += outputs
        if "OUTPUT_DIR" in bound:
            name = bound["OUTPUT_DIR"].rpartition("/")[2]
            parents[name] = bound.get("INITIAL_CHECKPOINT", "/").rpartition("/")[2]
    assert parents == {name: model.parent for name, model in claims.MODELS.items()}


@pytest.mark.parametrize("rehearse", [False, True])
def test_commands_are_of_recipes_that_set_what_they_name(tool, tmp_path, rehearse):
    vocabulary, decoders = set(), set()
    steps = tool("lineage").Story(tmp_path, 0, rehearse).steps()
    trained = [step.words for step in steps if step.words[1] in ("qwen_jax.train", "qwen_jax.rlhf")]
    for words in trained:
        recipes = [word.removeprefix("--gin_file=") for word in words if word.startswith("--gin_file=")]
        load_gin(recipes, [word.removeprefix("--gin.") for word in words if word.startswith("--gin.")])
        # A recipe that it includes has folders of its own, which no step of this one makes.
        assert not re.findall(r"= .*'(runs/[^']*)'", gin.config_str()), words
        model = gin.get_bindings("rlhf" if words[1].endswith("rlhf") else "train")["model"]
        vocabulary.add(gin.query_parameter("vocabulary_path.path"))
        decoders.add(tuple(getattr(model, name) for name in "num_layers num_heads ffn_size init_std".split()))
        gin.clear_config()
    assert len(trained) == 11 and len(vocabulary) == len(decoders) == 1


# What was measured of a family that is as it should be.
GOOD = {
    "base": {"bits/code": 2.6, "arithmetic": 0.0},
    "chat": {"stories/ended": 1.0, "stories/formatted": 0.95, "gold": -0.6},
    "rlhf": {"gold": 0.6},
    "reward": {"pairs": 0.9},
    "code": {"bits/code": 2.0},
    "code_chat": {"modules/formatted": 0.95},
    "math_chat": {"arithmetic": 0.8},
    "vl": {"questions": 0.9, "boxes": 0.7},
    "gray": {"questions": 0.2},
}


def good(**changes) -> dict[str, dict[str, float]]:
    """The figures, with changes such as `math_chat="arithmetic=0.1"`."""
    found = {name: dict(one) for name, one in GOOD.items()}
    for name in ("chat", "rlhf"):
        found[name] |= {f"bits/{kind}": 2.0 for kind in ("text", "web", "stories", "scenes")}
    for name, change in changes.items():
        key, value = change.split("=")
        found[name][key] = float(value)
    return found


@pytest.mark.parametrize(
    ("model", "change", "failed"),
    [
        ("chat", "gold=-0.6", []),
        ("chat", "stories/ended=0.5", [0]),
        ("chat", "stories/formatted=0.5", [1]),
        ("reward", "pairs=0.7", [2]),
        ("rlhf", "gold=-0.5", [3]),
        ("rlhf", "bits/web=3.0", [4]),
        ("code", "bits/code=2.5", [5]),
        ("code_chat", "modules/formatted=0.1", [6]),
        ("base", "arithmetic=0.3", [7]),
        ("math_chat", "arithmetic=0.1", [8]),
        ("vl", "questions=0.1", [9]),
        ("vl", "boxes=0.1", [10]),
        ("gray", "questions=0.9", [11]),
    ],
)
def test_each_claim_can_fail(claims, model, change, failed):
    held = claims.claims(good(**{model: change}))
    assert [place for place, one in enumerate(held) if not one.holds] == failed


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def pretend(folder, claims, tool) -> None:
    """What the steps of a lineage leave, as far as its page reads it."""
    measured = folder / "measured"
    for place, name in enumerate(claims.READERS):
        groups = [{"domain": kind, "bits_per_byte": 2.0 - 0.1 * place} for kind in claims.KINDS]
        (measured / name).mkdir(parents=True)
        files.write_json(measured / name / "perplexity.json", {"groups": groups})
    asked = [{"role": "user", "content": "Tell me about the owl."}]
    says = {"base": MARK, "chat": "The owl sings at night.", "rlhf": "The owl kindly sings at night. " * 3}
    says |= {"code": "\u202eimport", "code_chat": "Answer: os."}
    for kind, names in (("stories", ("base", "chat", "rlhf")), ("modules", ("base", "code", "code_chat"))):
        rows = [{"instruction": "1", "model": name, "messages": asked, "answer": says[name]} for name in names]
        write_lines(measured / f"{kind}.jsonl", [row | {"ended": True} for row in rows])
    for name in claims.CALCULATORS:
        scored = measured / f"{name}_arithmetic" / "arithmetic"
        row = {"id": "1", "prompt": "27+58=", "output": "85", "target": "85", "right": name == "math_chat"}
        write_lines(scored / "answers.jsonl", [row])
        files.write_json(scored / "scores.json", {"metrics": {"score": 85.0 if row["right"] else 0.0}})
    rewards = {title: {"stories": {"accuracy": share}} for title, share in (("PMP", 0.85), ("RM", 0.95))}
    (measured / "rewards").mkdir()
    files.write_json(measured / "rewards" / "results.json", rewards)
    make, measure = tool("make_pictures"), tool("measure_vision")
    flags = "--pairs=1 --tasks=1 --dialogues=1 --texts=1 --held_out=3".split()
    make.main(["--output", f"{folder}/data/pictures", *flags])
    questions = measure.read_questions(folder / "data/pictures/held_out/questions.jsonl")
    for name in claims.SIGHT:
        answers = ["?" if name == "gray" else one["reference"] for one in questions]
        measure.write(measured / name, questions, answers)
    (folder / "said").mkdir()
    for name, model in claims.MODELS.items():
        runs = [{"step": step, "loss": 4 - step / 10, "eval/loss": 4 - step / 11} for step in range(0, 30, 3)]
        for row in runs if name == "rlhf" else ():
            row |= {"rollout/reward": row["step"] / 5, "rollout/watched/gold": 0.4, "rollout/kl": 1.0 + row["step"]}
            row["eval/perplexity"] = 5.0
        write_lines(folder / name / "metrics.jsonl", runs)
        files.write_text(folder / name / "config.gin", "BATCH_SIZE = 16\nSEQUENCE_LENGTH = 256\n")
        if model.said:
            turns = [{"role": "user", "content": model.said[1]}, {"role": "assistant", "content": says.get(name, "85")}]
            files.write_json(folder / "said" / f"{name}.json", {"messages": turns})
    Image.linear_gradient("L").save(measured / "long_context.png")
    words = [["-m", "qwen_jax.train", f"--gin.OUTPUT_DIR={folder / name}"] for name in claims.MODELS]
    write_lines(folder / "steps.jsonl", [{"words": one, "seconds": 61.0} for one in [*words, ["tools/answer.py", "x"]]])


@pytest.fixture(scope="module")
def written(tool, tmp_path_factory):
    """A lineage's folder with its page, and what was found."""
    folder, claims = tmp_path_factory.mktemp("lineage"), tool("lineage_claims")
    pretend(folder, claims, tool)
    found = claims.figures(folder)
    tool("lineage_report").write_report(folder, found, claims.claims(found), False)
    return folder, found


def test_figures_come_from_what_the_steps_write(written):
    found = written[1]
    assert found["chat"]["stories/formatted"] == 0.0 and found["code_chat"]["modules/formatted"] == 1.0
    # Three kind words are best, and none is three away.
    assert found["rlhf"]["gold"] == 1.0 and found["chat"]["gold"] == 0.0
    assert found["math_chat"]["arithmetic"] == 0.85 and found["reward"]["pairs"] == 0.95
    assert found["vl"]["boxes"] == found["vl"]["questions"] == 1.0 and found["gray"]["questions"] == 0.0
    assert found["code"]["bits/code"] == pytest.approx(1.7)


def test_the_page_loads_nothing_and_shows_texts_as_texts(written, claims):
    page = (written[0] / "report.html").read_text()
    assert MARK not in page and "&lt;script&gt;" in page and "\u202e" not in page
    assert not re.search(r"<script|https?://", page) and "default-src 'none'" in page
    assert set(re.findall(r'(?:src|href)="(\w+):', page)) == {"data"}
    assert all(f"<b>{model.title}</b>" in page for model in claims.MODELS.values())
    assert page.count('class="card"') == 11 and page.count('class="drawn"') >= 2
    assert "12:12" in page  # 12 steps of 61 seconds
    assert ">95%<" in page


def test_the_page_knows_the_time_of_each_model_however_its_folder_is_named(written, tool, claims, monkeypatch):
    folder, report = written[0], tool("lineage_report")
    monkeypatch.chdir(folder.parent)
    found = report.seconds_by_model(Path(folder.name))
    assert found == dict.fromkeys(claims.MODELS, 61.0)
    runs = {name: report.Run(folder / name) for name in claims.MODELS}
    assert "qwen_jax.train" not in report.costs(Path(folder.name), runs, found)  # none counts as another tool, too


def test_the_page_fits_wide_and_narrow_screens(written, tmp_path):
    with browser(tmp_path / "profile", tmp_path) as page:
        for width in (400, 1280):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            page.call("Emulation.setDeviceMetricsOverride", **size)
            page.open((written[0] / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.problems == []
