"""The whole family of Figure 1 from one command: from a crawl to chat models, specialists and a model that sees.

    make lineage
    python tools/lineage.py --output runs/lineage

Crawl, curation, vocabulary, one base model, its context extended; from it the chat model, the preference and the reward
model, PPO with a pretraining gradient; the code model and its chat model; the math model; the model that sees, in three
stages. All of them are measured on texts and questions that none was trained on, converted to the formats that others
serve, and talked with through the server. Every step is one command, printed before it runs, that works the same on its
own. Killed at any moment, the same call goes on, and repeats nothing that was finished. At the end stands report.html
in the folder: one page with curves, samples, tables and pictures, which loads nothing; and a claim that does not hold
ends the call with an error:

"""

import json
from collections.abc import Sequence
from pathlib import Path

import lineage_claims
from lineage_claims import CALCULATORS, MODULE, READERS, STORY
from lineage_report import write_report
from shown_commands import Step, clock, finished, run, tell

# Windows of the length that the base model was trained on, so that no model is measured past its own.
WINDOW, STRIDE = 256, 128
REHEARSAL = ("num_layers=1", "ffn_size=64")


class Story:
    """The commands, in order. Folders of models are named as in `lineage_claims.MODELS`."""

    def __init__(self, folder: Path, seed: int, rehearse: bool):
        self.folder, self.seed, self.rehearse = folder, seed, rehearse
        self.data, self.measured = folder / "data", folder / "measured"
        self.vocabulary = folder / "vocabulary.tiktoken"

    def steps(self) -> list[Step]:
        """All of them."""
        return [
            *self.texts(),
            *self.base(),
            *self.alignment(),
            *self.specialists(),
            *self.pictures(),
            *self.measures(),
            *self.served(),
        ]

    def size(self, whole: Sequence[str], rehearsed: Sequence[str]) -> Sequence[str]:
        """Flags of how much is made."""
        return rehearsed if self.rehearse else whole

    def train(self, heading: str, recipe: str, name: str, *bindings: str, module: str = "train") -> Step:
        """A training; the names of files are those of this folder."""
        corpus = [self.data / "corpus/documents", self.data / "packages/text"]
        corpus += [self.data / "world/text.jsonl", self.data / "pictures/text.jsonl"]
        places = [
            f"VOCABULARY={self.vocabulary}",
            f"CACHE_DIR={self.folder / 'cache' / name}",
            f"OUTPUT_DIR={self.folder / name}",
        ]
        if recipe in ("pretrain", "ppo"):
            places.append(f"local_files.pattern={json.dumps([str(path) for path in corpus])}")
        rehearsed = self.rehearsal(recipe) if self.rehearse else []
        names = (*places, *bindings, f"SEED={self.seed}", *rehearsed)
        recipes = (f"--gin_file=gin/runs/{recipe}_family.gin", "--gin_file=gin/hardware/cpu.gin")
        return Step(heading, ("-m", f"qwen_jax.{module}", *recipes, *(f"--gin.{one}" for one in names)))

    def rehearsal(self, recipe: str) -> list[str]:
        """Bindings of a toy and two updates."""
        ppo, vision = recipe == "ppo", recipe.startswith("vl")
        found = [f"ModelConfig.{one}" for one in REHEARSAL]
        found += [f"TRAIN_STEPS={8 if ppo else 2}", "EVAL_BATCHES=1", "BATCH_SIZE=4", f"EVAL_EVERY={8 if ppo else 1}"]
        if ppo:
            return [*found, "POLICY_START_STEP=2", "ROLLOUT_PROMPTS=4"]
        return [*found, "WARMUP_STEPS=1", *(["VisionConfig.num_layers=1"] if vision else [])]

    def texts(self) -> list[Step]:
        """Crawl, curation, the other texts, and the vocabulary."""
        crawl, held_out, corpus = self.data / "crawl", self.data / "held_out_crawl", self.data / "corpus"
        pages, few = self.size(["--pages", "700"], ["--pages", "60"]), ("--pages", "60")
        packages = self.size(
            ["--text_size=220000", "--code_size=250000"],
            ["--text_size=20000", "--code_size=15000", "--held_out_size=3000"],
        )
        pictures = self.size(
            ["--texts=16000"], ["--pairs=24", "--tasks=24", "--dialogues=24", "--texts=200", "--held_out=2"]
        )
        return [
            Step(
                "a crawl with the defects of the web, and another one to measure on",
                ("tools/make_crawl.py", "--output", f"{crawl}", *pages),
            ),
            Step("", ("tools/make_crawl.py", "--output", f"{held_out}", *few, "--seed", "1")),
            Step(
                "curation: text out of pages, languages, duplicates, rules, benchmarks; read its report.html",
                (
                    *("tools/curate.py", "--input", f"books={crawl / 'books'}", f"--input=web={crawl / 'web'}/**"),
                    *("--output", f"{corpus}", "--config=gin/curation/english_and_chinese.gin"),
                    *(f"--gin.benchmarks.patterns={crawl / 'benchmark.jsonl'}", "--max_unread_share=1"),
                ),
            ),
            Step(
                "documentation and code of installed packages, and both of packages to measure on",
                ("tools/make_specialist_data.py", "--output", f"{self.data / 'packages'}", *packages),
            ),
            Step(
                "",
                (
                    *("tools/make_code_corpus.py", "--input", f"{self.data / 'packages/repositories'}"),
                    *("--output", f"{self.data / 'code'}"),
                ),
                self.data / "code",
            ),
            Step(
                "a world of stories whose best answers are known: text, conversations, comparisons",
                ("tools/make_rlhf_data.py", "--output", f"{self.data / 'world'}", *self.rows(2000)),
            ),
            Step("", self.world("many_comparisons", 4000, "--noise", "0.25", "--seed", "1")),
            Step("", self.world("held_out_world", 200, "--noise", "0", "--seed", "2")),
            Step(
                "pictures with captions, questions and dialogues, and their scenes in words",
                ("tools/make_pictures.py", "--output", f"{self.data / 'pictures'}", f"--seed={self.seed}", *pictures),
            ),
            Step(
                "arithmetic with its working, and questions about lines of code",
                (
                    *("tools/make_arithmetic.py", "--output", f"{self.data / 'arithmetic'}", "--kinds", "add"),
                    *("--levels", "2", "--worked"),
                    *self.size(["--count=14000", "--held_out=300"], ["--count=200", "--held_out=8"]),
                ),
            ),
            Step(
                "",
                (
                    *("tools/make_conversations.py", "--output", f"{self.data / 'questions'}"),
                    *self.size([], ["--count=60", "--held_out=8"]),
                ),
            ),
            Step(
                "one vocabulary for the family",
                (
                    *("tools/build_tokenizer.py", "--size=2288", "--input", f"web:{corpus / 'documents'}"),
                    *(f"text:{self.data / 'packages/text'}", f"code:{self.data / 'code/documents'}"),
                    *(f"world:{self.data / 'world/text.jsonl'}", f"scenes:{self.data / 'pictures/text.jsonl'}"),
                    *(f"frame:{self.data / 'pictures/frame.jsonl'}:1000", f"--output={self.vocabulary}"),
                ),
            ),
        ]

    def rows(self, count: int) -> tuple[str, ...]:
        """How many rows of the world of stories."""
        return ("--rows", str(24 if self.rehearse else count))

    def world(self, name: str, rows: int, *flags: str) -> tuple[str, ...]:
        """More of the world of stories."""
        return ("tools/make_rlhf_data.py", "--output", f"{self.data / name}", *self.rows(rows), *flags)

    def base(self) -> list[Step]:
        """The base model, and how far it reads."""
        long = self.size(["--tokens", "16384"], ["--tokens", "256", "--training_length", "16"])
        books = self.data / "held_out_crawl/books"
        return [
            self.train("Qwen: the base model", "pretrain", "base"),
            Step(
                "context extension: the base model reads up to eight times its training length",
                (
                    *("tools/long_context.py", "--checkpoint", f"{self.folder / 'base'}", "--text", f"{books}"),
                    *self.size(["--training_length", str(WINDOW)], []),
                    *(*long, "--output", f"{self.measured / 'long_context.png'}"),
                ),
            ),
        ]

    def start(self, name: str) -> str:
        """The weights that a run starts from."""
        return f"INITIAL_CHECKPOINT={self.folder / name}"

    def alignment(self) -> list[Step]:
        """SFT, preference model, reward model, PPO."""
        world, many = self.data / "world", self.data / "many_comparisons/comparisons.jsonl"
        said, pairs = f"chat_messages.pattern={world / 'conversations.jsonl'}", "preference_pairs.pattern="
        asked = f"queries.pattern={world / 'prompts.jsonl'}"
        reward = f"REWARD_CHECKPOINT={self.folder / 'reward'}"
        return [
            self.train("Qwen-Chat: the base model learns to answer", "sft", "chat", self.start("base"), said),
            self.train(
                "Qwen-PMP: the base model learns what is preferred, from many comparisons, some of them wrong",
                *("pmp", "pmp", self.start("base"), f"{pairs}{many}"),
            ),
            self.train(
                "Qwen-RM: it goes on with fewer and better comparisons",
                *("reward", "reward", self.start("pmp"), f"{pairs}{world / 'comparisons.jsonl'}"),
            ),
            self.train(
                "Qwen-Chat-RLHF: PPO against that reward, with a gradient of the base model's text",
                *("ppo", "rlhf", self.start("chat"), reward, asked),
                module="rlhf",
            ),
        ]

    def specialists(self) -> list[Step]:
        """Code model, its chat model, math model."""
        code = f"code_files.pattern={self.data / 'code/documents'}"
        text = f"local_files.pattern={self.data / 'packages/text'}"
        said = f"chat_messages.pattern={self.data / 'questions/train.jsonl'}"
        sums = f"math_instructions.pattern={self.data / 'arithmetic/train.jsonl'}"
        return [
            self.train("Code-Qwen: the base model goes on with code", "code", "code", self.start("base"), code, text),
            self.train(
                "Code-Qwen-Chat: the code model learns to answer", "code_sft", "code_chat", self.start("code"), said
            ),
            self.train(
                "Math-Qwen-Chat: the base model learns to calculate", "math_sft", "math_chat", self.start("base"), sums
            ),
        ]

    def pictures(self) -> list[Step]:
        """The three stages of Qwen-VL."""
        found = []
        for number, name, before, rows, heading in (
            (1, "vl_stage1", "base", "pairs", "Qwen-VL, stage 1: an image encoder learns from captions"),
            (2, "vl", "vl_stage1", "tasks", "Qwen-VL, stage 2: all of it learns to answer, to find and to read"),
            (3, "vl_chat", "vl", "dialogues", "Qwen-VL-Chat, stage 3: dialogues, and two pictures at once"),
        ):
            kind = "pairs" if number == 1 else "chat"
            patterns = [f"vision_{kind}.pattern={self.data / 'pictures' / rows}.jsonl"]
            if number > 1:
                patterns.append(f"vision_text.pattern={self.data / 'pictures/replay.jsonl'}")
            found.append(self.train(heading, f"vl_stage{number}", name, self.start(before), *patterns))
        return found

    def measures(self) -> list[Step]:
        """Every model on what none was trained on."""
        packages, texts = self.data / "packages/held_out", self.data / "pictures/held_out/text.jsonl"
        held_out = (
            *(f"text={packages / 'text.jsonl'}", f"code={packages / 'code.jsonl'}"),
            *(f"web={self.data / 'held_out_crawl/books'}", f"stories={self.data / 'held_out_world/text.jsonl'}"),
            f"scenes={texts}",
        )
        windows = ("--context_length", str(WINDOW), "--stride", str(STRIDE), "--limit", "4" if self.rehearse else "40")
        found = []
        for name in READERS:
            where = ("--checkpoint", f"{self.folder / name}", "--output", f"{self.measured / name}")
            words = ("tools/measure_perplexity.py", *where, "--texts", *held_out, *windows)
            found.append(Step("" if found else "bits per byte of held-out text of five kinds", words))
        return [*found, *self.rewards(), *self.answers(), *self.sight()]

    def rewards(self) -> list[Step]:
        """Preference and reward model on comparisons with right labels."""
        held_out = self.data / "held_out_world/comparisons.jsonl"
        models = [("--model", f"{name}={self.folder / folder}") for name, folder in (("PMP", "pmp"), ("RM", "reward"))]
        words = [word for model in models for word in model]
        return [
            Step(
                "held-out comparisons: which answer is preferred",
                (
                    *("tools/evaluate_rewards.py", *words, "--set", f"stories={held_out}"),
                    *("--output", f"{self.measured / 'rewards'}"),
                ),
            )
        ]

    def answers(self) -> list[Step]:
        """Answers of chat models to held-out questions, and arithmetic."""
        limit = ("--limit", "4" if self.rehearse else "100")
        found = []
        for kind, names, pattern, questions in (
            ("stories", ("base", "chat", "rlhf"), STORY, "held_out_world/conversations.jsonl"),
            ("modules", ("base", "code", "code_chat"), MODULE, "questions/held_out.jsonl"),
        ):
            models = [f"{name}={self.folder / name}" for name in names]
            heading = "held-out questions: answers that end and have the form" if kind == "stories" else ""
            asked = ("--questions", f"{self.data / questions}", *limit, "--format", pattern, "--max_new_tokens", "80")
            output = ("--output", f"{self.measured / kind}.jsonl")
            found.append(Step(heading, ("tools/answer.py", *models, *asked, *output)))
        for name, chat in CALCULATORS.items():
            where = ("--checkpoint", f"{self.folder / name}", "--output_dir", f"{self.measured / name}_arithmetic")
            what = ("--benchmarks", "arithmetic", "--data_dir", f"{self.data}", *(("--chat",) if chat else ()))
            heading = "held-out arithmetic" if name == "base" else ""
            found.append(Step(heading, ("-m", "qwen_jax.evaluate", *where, *what)))
        return found

    def sight(self) -> list[Step]:
        """Questions about held-out pictures, after each stage and with gray pictures."""
        questions = self.data / "pictures/held_out/questions.jsonl"
        found = []
        for name, of, flag in (
            ("vl_stage1", "vl_stage1", ("--plain",)),
            ("vl", "vl", ()),
            ("vl_chat", "vl_chat", ()),
            ("gray", "vl_chat", ("--blank",)),
        ):
            where = ("--checkpoint", f"{self.folder / of}", "--output", f"{self.measured / name}")
            heading = "held-out questions about pictures" if name == "vl_stage1" else ""
            found.append(Step(heading, ("tools/measure_vision.py", *where, "--questions", f"{questions}", *flag)))
        return found

    def served(self) -> list[Step]:
        """Every model in the formats that others serve, and a conversation with each that speaks."""
        found = []
        for name, model in lineage_claims.MODELS.items():
            for number, form in enumerate(model.formats):
                target = self.folder / "served" / (f"{name}.gguf" if form == "gguf" else name)
                words = ("--from", f"orbax:{self.folder / name}", "--to", f"{form}:{target}")
                heading = "every model in the formats that others serve" if name == "base" and not number else ""
                found.append(Step(heading, ("tools/convert_checkpoint.py", *words), target))
        heading = "a conversation with each through the server"
        for name, model in lineage_claims.MODELS.items():
            if model.said is None:
                continue
            flag = "--complete" if model.said[0] == "complete" else "--say"
            image = ("--image", f"{self.data / 'pictures' / model.image}") if model.image else ()
            where = ("--checkpoint", f"{self.folder / 'served' / name}")
            output = ("--output", f"{self.folder / 'said' / name}.json")
            found.append(Step(heading, ("tools/ask_server.py", *where, flag, model.said[1], *image, *output)))
            heading = ""
        return found


def closing(folder: Path, seconds: float, rehearse: bool) -> bool:
    """Writes the page, prints the claims; returns whether all hold."""
    found = lineage_claims.figures(folder)
    held = lineage_claims.claims(found)
    page = write_report(folder, found, held, rehearse)
    spent = sum(finished(folder).values())
    print(f"\n== done in {clock(seconds)}; all steps together took {clock(spent)}\n")
    for claim in held:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.text}")
    print(f"\n{page}\nnext: docs/how_to/lineage.md")
    return all(claim.holds for claim in held)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 1 if a claim does not hold."""
    return tell(
        argv,
        __doc__ + lineage_claims.LISTED,
        "runs/lineage",
        lambda given: Story(given.output, given.seed, given.rehearse).steps(),
        lambda given, seconds: closing(given.output, seconds, given.rehearse),
    )


if __name__ == "__main__":
    run(main)
