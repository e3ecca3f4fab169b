"""Self-instruct for tool use: a model writes further conversations after the pattern of a few (report 3.4).

The report makes about 2,000 samples: few-shot prompting, a filter of rules, a filter by people, retraining, and again.
This module prompts and filters; `tools/self_instruct.py` is its command, `evaluation/review_page.py` the page for
people, and the SeqIO task `self_instruct` reads what they accepted. The method is that of Self-Instruct (Wang et al.,
2023).

A folder holds `attempts.jsonl`: each attempt with its seeds, tools, model, sampling, reply and verdict. It is all of
the state; whoever starts again goes on after its last line.
"""

import collections
import dataclasses
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jsonschema
import numpy as np
import referencing
import referencing.exceptions

from qwen_jax import files
from qwen_jax.agents.completion import Completer
from qwen_jax.curation import normalize
from qwen_jax.curation.contamination import benchmark_texts
from qwen_jax.curation.language import identify
from qwen_jax.data.conversations import Conversation, Unusable, check, from_openai, tool_definition, tool_name

ATTEMPTS = "attempts.jsonl"
SAMPLES = "samples.jsonl"
ACCEPTED = "accepted"
# Verdict where the model got no prompt, and the number of such attempts after which no other is made.
_TOO_LONG, _HOPELESS = "prompt too long", 16
# In a prompt of `qwen_jax.data.react`: the names of all tools, and each tool with its description.
_NAMES = re.compile(r"should be one of \[([^\]]+)\]")
_DESCRIBED = re.compile(r"^([^\s:]+): Call this tool .*? useful for\? (.*?) Parameters: ", re.MULTILINE | re.DOTALL)
# A sample ends with an empty line; JSON in one line holds none.
STOP = "\n\n"
_HEADING = (
    "Each sample below lists tools and then, as JSON in one line, a conversation between a user and an assistant who "
    "may call these tools. The user never names a tool. Requests, tools and arguments differ from sample to sample."
)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Filters and sizes of self-instruct.

    Attributes:
      examples: conversations in a prompt.
      generated: how many of them may be generated ones, the rest being seeds (Self-Instruct: 2 of 8).
      tools: most tools of a sample (report: up to five candidates).
      languages: codes that the user's words may be in.
      least, most: characters of the user's words.
      most_answer: characters of everything that the assistant and the tools say.
      similarity: a sample whose words of the user have this Jaccard similarity, of sets of pairs of words (or of
        Chinese characters), to those of another sample, a seed or an evaluation is left out; also tools to those of an
        evaluation.
      calls: least number of calls of tools.
    """

    examples: int = 4
    generated: int = 1
    tools: int = 5
    languages: Sequence[str] = ("en", "zh")
    least: int = 5
    most: int = 2000
    most_answer: int = 8000
    similarity: float = 0.6
    calls: int = 1

    def __post_init__(self):
        if not 0 <= self.generated < self.examples:
            raise ValueError(f"generated is {self.generated}: it must be from 0 to examples - 1, {self.examples - 1}")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity is {self.similarity}: it must be in (0, 1]")
        if self.tools < 1:
            raise ValueError(f"tools is {self.tools}: a sample needs at least 1")


class Neighbors:
    """Texts by their shingles; finds the most similar one by exact Jaccard similarity."""

    def __init__(self) -> None:
        self._sets: list[tuple[str, int]] = []  # name and number of shingles
        self._having: dict[int, list[int]] = collections.defaultdict(list)

    def add(self, name: str, text: str) -> None:
        """Remembers a text under a name."""
        shingles = _shingles(text)
        for one in shingles:
            self._having[one].append(len(self._sets))
        self._sets.append((name, len(shingles)))

    def nearest(self, text: str) -> tuple[str, float]:
        """Name and similarity, in [0, 1], of the most similar text; ("", 0.0) without any."""
        shingles = _shingles(text)
        shared = collections.Counter(place for one in shingles for place in self._having.get(one, ()))
        best = ("", 0.0)
        for place, common in shared.items():
            name, size = self._sets[place]
            similarity = common / (size + len(shingles) - common)
            if similarity > best[1]:
                best = (name, similarity)
        return best


def _shingles(text: str) -> list[int]:
    shingles, _ = normalize.shingles(normalize.tokenize([text]), 2)
    return np.unique(shingles).tolist()


def read_pool(paths: Iterable[str | Path]) -> list[dict]:
    """Conversations with tools to start from, in OpenAI's layout, each with an `id` (by default FILE:LINE).

    Raises:
      OSError: no such file.
      ValueError: a row is no conversation with tools, or an id is there twice; the message has file and line.
    """
    found: dict[str, dict] = {}
    for path in paths:
        for where, row in files.read_json_lines(path):
            try:
                if not isinstance(row, Mapping):
                    raise ValueError(f"expected an object, found {type(row).__name__}")
                tools = check(from_openai(row)).tools
                if not tools:
                    raise ValueError("a seed needs tools")
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            name = str(row.get("id") or f"{Path(path).name}:{where.rpartition(':')[2]}")
            if name in found:
                raise ValueError(f"{where}: the id {name} is there twice")
            # Some files have them as text, or as `functions`.
            found[name] = {**row, "id": name, "tools": list(tools)}
    return list(found.values())


def prompt(examples: Sequence[Mapping], tools: Sequence[Mapping]) -> str:
    """The text that a model continues by a conversation about `tools`, in one line of JSON."""
    shown = [f"{_HEADING}\n"]
    for number, example in enumerate(examples, 1):
        listed, said = (json.dumps(value, ensure_ascii=False) for value in (example["tools"], example["messages"]))
        shown.append(f"Sample {number}\nTools: {listed}\nConversation: {said}\n")
    listed = json.dumps(list(tools), ensure_ascii=False)
    return "\n".join([*shown, f"Sample {len(examples) + 1}\nTools: {listed}\nConversation:"])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Result of the filter for a reply.

    Attributes:
      reason: "accepted", or the first rule that the sample breaks; one of few, by which samples are counted.
      detail: what exactly.
      row: the conversation in OpenAI's layout, or None where the reply is none.
    """

    reason: str
    detail: str = ""
    row: Mapping | None = None


class Filter:
    """The rules, and what samples must not resemble."""

    def __init__(self, rules: Rules, seeds: Sequence[Mapping], evaluation: Iterable[str | Path] = ()):
        """`evaluation`: files whose texts and tools no sample may resemble (JSON, JSON lines, text, Parquet).

        Raises:
          OSError, ValueError: a file cannot be read.
        """
        self.rules = rules
        self._asked, self._tools = Neighbors(), Neighbors()
        self._names: dict[str, str] = {}
        for seed in seeds:
            self._asked.add(f"seed {seed['id']}", _asked(from_openai(seed)))
        for path in evaluation:
            where = f"evaluation {Path(path).name}"
            for text in benchmark_texts(str(path)):
                question, tools = _react_parts(text)
                self._asked.add(where, question)
                for name, description in tools:
                    self._names[name.casefold()] = where
                    self._tools.add(where, description)
                if not tools:
                    self._tools.add(where, text)
            for tool in _tools_in(path):
                self._names[tool_name(tool).casefold()] = where

    def add(self, name: str, row: Mapping) -> None:
        """Later samples must differ from this one."""
        self._asked.add(name, _asked(from_openai(row)))

    def usable(self, tool: Mapping) -> bool:
        """Whether a tool is none of an evaluation."""
        return self._of_evaluation(tool) is None

    def _of_evaluation(self, tool: Mapping) -> str | None:
        description = str(tool_definition(tool).get("description", ""))
        near, similarity = self._tools.nearest(description)
        if similarity >= self.rules.similarity:
            return near
        return self._names.get(tool_name(tool).casefold())

    def judge(self, reply: str, tools: Sequence[Mapping]) -> Verdict:
        """Whether a reply to `prompt` with these tools is a new sample."""
        try:
            return self._judged(reply.split(STOP)[0].strip(), tools)
        except RecursionError:
            return Verdict("nested too deeply")

    def _judged(self, text: str, tools: Sequence[Mapping]) -> Verdict:
        try:
            messages = json.loads(text)
        except ValueError as error:
            return Verdict("not JSON", str(error))
        try:
            json.dumps(messages, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # an escape such as \ud83d alone: no file can hold it, and no prompt show it
            return Verdict("half a character", "a surrogate without its other half")
        row = {"tools": list(tools), "messages": messages}
        try:
            conversation = check(from_openai(row))
        except Unusable as error:
            return Verdict(error.reason, str(error))
        except ValueError as error:
            return Verdict("no conversation", str(error))
        for rule in (self._calls, self._lengths, self._language, self._near):
            if found := rule(conversation):
                return Verdict(*found, row)
        return Verdict(ACCEPTED, row=row)

    def _calls(self, conversation: Conversation) -> tuple[str, str] | None:
        validators = {tool_name(tool): _validator(tool) for tool in conversation.tools}
        calls = [call for message in conversation.messages for call in message.calls]
        if len(calls) < self.rules.calls:
            return "too few calls", f"{len(calls)}"
        last = conversation.messages[-1]
        if last.role != "assistant" or last.calls or not last.content.strip():
            return "no final answer", last.role
        for call in calls:
            try:
                arguments = json.loads(call.arguments)
            except ValueError as error:
                return "arguments are not JSON", f"{call.name}: {error}"
            try:
                wrong = next(validators[call.name].iter_errors(arguments), None)
            except referencing.exceptions.Unresolvable as error:
                return "a schema that cannot be applied", f"{call.name}: {error}"[:300]
            if wrong is not None:
                return "arguments break the schema", f"{call.name}: {wrong.message}"[:300]
        return None

    def _lengths(self, conversation: Conversation) -> tuple[str, str] | None:
        for message in conversation.messages:
            if message.role == "user" and not self.rules.least <= len(message.content.strip()) <= self.rules.most:
                return "length of the request", f"{len(message.content)} characters"
        answer = sum(len(message.content) for message in conversation.messages if message.role != "user")
        return ("length of the answer", f"{answer} characters") if answer > self.rules.most_answer else None

    def _language(self, conversation: Conversation) -> tuple[str, str] | None:
        code, share = identify(_asked(conversation))
        return None if code in self.rules.languages else ("language", f"{code} ({share:.2f})")

    def _near(self, conversation: Conversation) -> tuple[str, str] | None:
        for tool in conversation.tools:
            if near := self._of_evaluation(tool):
                return "a tool of an evaluation", f"{tool_name(tool)}: {near}"
        near, similarity = self._asked.nearest(_asked(conversation))
        if similarity < self.rules.similarity:
            return None
        kind = "near-duplicate of an evaluation" if near.startswith("evaluation ") else "near-duplicate"
        return kind, f"{near} ({similarity:.2f})"


def _validator(tool: Mapping) -> jsonschema.protocols.Validator:
    """Checks arguments of a tool; its schema refers to nothing outside.

    Raises:
      ValueError: the schema is none.
    """
    schema = tool_definition(tool).get("parameters", {})
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"tool {tool_name(tool)}: its parameters are no JSON schema: {error.message}") from error
    return jsonschema.Draft202012Validator(schema, registry=referencing.Registry())


def _asked(conversation: Conversation) -> str:
    return "\n".join(message.content for message in conversation.messages if message.role == "user")


def _react_parts(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Question and (name, description) of the tools of a prompt in the ReAct form, as files of Table 6 have them.

    Any other text is all of the question, without tools.
    """
    listed, begins, asked = text.rpartition("\nBegin!")
    names = _NAMES.findall(listed)
    if not begins or not names:
        return text, []
    question = asked.partition("Question:")[2].partition("\nThought:")[0].strip()
    described = dict(_DESCRIBED.findall(listed))
    return question, [(one.strip(), described.get(one.strip(), "")) for one in names[-1].split(",")]


def _tools_in(path: str | Path) -> list[Mapping]:
    """Definitions of tools in the rows of a JSON file."""
    if ".json" not in Path(path).name:
        return []
    rows = [row for _, row in files.read_json_rows(path) if isinstance(row, Mapping)]
    listed = [row.get(field) for row in rows for field in ("tools", "functions", "plugins")]
    found = [tool for tools in listed if isinstance(tools, list) for tool in tools if isinstance(tool, Mapping)]
    return [tool for tool in found if tool_name(tool)]


class Generation:
    """Attempts in a folder, made in batches; whoever opens it again goes on.

    Attributes:
      attempts: all records so far, oldest first.
      samples: those that were accepted.
    """

    def __init__(
        self,
        folder: str | Path,
        seeds: Sequence[Mapping],
        *,
        rules: Rules = Rules(),
        evaluation: Sequence[str | Path] = (),
        tools: Sequence[Mapping] = (),
        seed: int = 0,
    ):
        """Reads what the folder holds.

        Args:
          folder: made with the first attempt.
          seeds: as `read_pool` gives them.
          tools: definitions that samples may be about, besides those of the seeds.
          seed: of the choice of examples and tools, and of the sampling.

        Raises:
          OSError, ValueError: a file cannot be read, there are too few seeds, or one has the id of a sample.
        """
        needed = rules.examples - rules.generated
        if len(seeds) < needed:
            raise ValueError(f"{len(seeds)} seed conversation(s): a prompt shows {needed} of them; give more")
        taken = re.compile(rf"{seed}-\d+")
        if same := [row["id"] for row in seeds if taken.fullmatch(row["id"])]:
            raise ValueError(
                f"seed {same[0]} has an id of this generation's samples: give another --seed than {seed}, so that "
                "records tell which of both a prompt showed"
            )
        self.folder, self.rules, self.seed = Path(folder), rules, seed
        self.filter = Filter(rules, seeds, evaluation)
        self._seeds = [dict(row) for row in seeds]
        known: dict[str, Mapping] = {tool_name(tool): tool for row in seeds for tool in row["tools"]}
        known |= {tool_name(tool): tool for tool in tools}
        for tool in known.values():
            if not tool_name(tool):
                raise ValueError(f"a tool without a name: {str(tool)[:200]}")
            _validator(tool)
        self._tools = [tool for tool in known.values() if self.filter.usable(tool)]
        if not self._tools:
            raise ValueError("every tool is one of the evaluation's: give others by --tools")
        self.attempts: list[dict] = []
        self.samples: list[dict] = []
        if (self.folder / ATTEMPTS).exists():
            self._drop_torn_line()
            for _, record in files.read_json_lines(self.folder / ATTEMPTS):
                assert isinstance(record, dict)
                self._note(record)

    def _drop_torn_line(self) -> None:
        content = (self.folder / ATTEMPTS).read_bytes()
        if content and not content.endswith(b"\n"):  # killed while it was written
            files.write_text(self.folder / ATTEMPTS, content[: content.rfind(b"\n") + 1].decode())

    def _note(self, record: dict) -> None:
        self.attempts.append(record)
        if record["verdict"] == ACCEPTED:
            self.samples.append(record)
            self.filter.add(f"sample {record['id']}", record["row"])

    def draw(self, index: int) -> tuple[list[dict], list[Mapping]]:
        """Examples and tools of an attempt; a function of the seed, its index and the samples so far."""
        choice = random.Random(f"{self.seed}-{index}")
        generated = min(self.rules.generated, len(self.samples))
        examples = choice.sample(self._seeds, min(len(self._seeds), self.rules.examples - generated))
        examples += [dict(one["row"], id=one["id"]) for one in choice.sample(self.samples, generated)]
        choice.shuffle(examples)
        tools = choice.sample(self._tools, choice.randint(1, min(self.rules.tools, len(self._tools))))
        return examples, tools

    def extend(self, complete: Completer, count: int, *, model: str, sampling: Mapping, at_once: int = 16) -> None:
        """Makes attempts until there are `count` samples, at most ten times as many attempts in this call.

        Args:
          complete: the model; it gets prompts and the seeds of their sampling.
          model, sampling: kept with each attempt.
          at_once: prompts of one batch. Samples of a batch do not see each other as examples.

        Raises:
          ValueError: no prompt fits into the context of the model.
          OSError: an attempt cannot be written, or the model is not there.
        """
        start, end, fits = len(self.attempts), len(self.attempts) + 10 * count, False
        while len(self.samples) < count and len(self.attempts) < end:
            drawn = {index: self.draw(index) for index in range(len(self.attempts), len(self.attempts) + at_once)}
            numbers = [(self.seed * 1_000_003 + index) % (1 << 32) for index in drawn]
            prompts = [prompt(*one) for one in drawn.values()]
            made = zip(drawn.items(), prompts, numbers, complete(prompts, numbers), strict=True)
            lines = []
            for (index, (examples, tools)), text, number, reply in made:
                if reply is None:
                    verdict = Verdict(_TOO_LONG, f"{len(text):,} characters")
                else:
                    verdict, fits = self.filter.judge(reply, tools), True
                record = {
                    "id": f"{self.seed}-{index}",
                    "verdict": verdict.reason,
                    "detail": verdict.detail,
                    "row": verdict.row,
                    "seeds": [one["id"] for one in examples],
                    "tools": [tool_name(tool) for tool in tools],
                    "model": model,
                    "sampling": {**sampling, "seed": number},
                    "reply": reply,
                }
                self._note(record)
                lines.append(files.json_line(record))
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / ATTEMPTS, "a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())
            if not fits and len(self.attempts) - start >= _HOPELESS:
                raise ValueError(
                    f"none of {len(self.attempts) - start} prompts fits into the context of the model, with room for a "
                    "reply: take a model with a longer one, shorter seeds and tools, or lower --max_new_tokens"
                )
        self.write_samples()

    def write_samples(self) -> Path:
        """Writes the samples with their provenance, for `review_page`, as pool, or as the task `self_instruct`."""
        lines = (
            {
                **record["row"],
                "id": record["id"],
                "provenance": {field: record[field] for field in ("seeds", "model", "sampling")},
            }
            for record in self.samples
        )
        files.write_text(self.folder / SAMPLES, "".join(map(files.json_line, lines)))
        return self.folder / SAMPLES

    def counts(self) -> dict[str, int]:
        """Attempts by verdict, most frequent first."""
        return dict(collections.Counter(record["verdict"] for record in self.attempts).most_common())


def keep_accepted(samples: Iterable[Mapping], decisions: Iterable[Mapping]) -> tuple[list[Mapping], dict[str, int]]:
    """Samples that people accepted, and the number of samples by decision.

    Where reviewers disagree, "reject" wins over "accept"; "unsure" counts as no acceptance.

    Args:
      samples: rows with `id`.
      decisions: rows with `id` and `decision` ("accept", "reject" or "unsure"), as the review page writes them.

    Raises:
      ValueError: a sample without an id of its own, a decision for one that is not there, or an unknown decision.
    """
    rows: dict[str, Mapping] = {}
    for number, row in enumerate(samples):
        name = str(row.get("id") or "")
        if not name or name in rows:
            raise ValueError(f"sample {number} has no id" if not name else f"the id {name} is there twice")
        rows[name] = row
    given: dict[str, set[str]] = collections.defaultdict(set)
    for one in decisions:
        name, decision = str(one.get("id")), one.get("decision")
        if name not in rows:
            raise ValueError(f"a decision for sample {name}, which is not among the samples: another file's page?")
        if decision not in ("accept", "reject", "unsure"):
            raise ValueError(f"sample {name}: decision {decision!r} is none of accept, reject, unsure")
        given[name].add(decision)
    kept, counts = [], collections.Counter()
    for name, row in rows.items():
        said = given.get(name, set())
        verdict = next((one for one in ("reject", "unsure", "accept") if one in said), "not reviewed")
        counts[verdict] += 1
        if verdict == "accept":
            kept.append(row)
    return kept, dict(counts)
