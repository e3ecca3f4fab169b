"""Self-instruct: what the filters leave out, that a stopped generation goes on, and what people accept."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from qwen_jax import files
from qwen_jax.agents.self_instruct import (
    ACCEPTED,
    ATTEMPTS,
    SAMPLES,
    Filter,
    Generation,
    Neighbors,
    Rules,
    keep_accepted,
    prompt,
    read_pool,
)
from qwen_jax.data import react
from qwen_jax.data.chat import ChatRows
from qwen_jax.data.react import TRAINED_STYLES

WEATHER = {
    "name": "weather",
    "description": "Forecast for a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "maximum": 7}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
MUSIC = {
    "name": "music",
    "description": "Plays a song.",
    "parameters": {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]},
}
RULES = Rules(examples=2, generated=1)


def messages(request, call="weather", arguments='{"city": "Oslo"}', answer="It will be sunny and warm.", result="sun"):
    return [
        {"role": "user", "content": request},
        {"role": "assistant", "content": "", "function_call": {"name": call, "arguments": arguments}},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    ]


SEEDS = [
    {"id": "a", "tools": [WEATHER], "messages": messages("Do I need an umbrella in Paris tomorrow morning?")},
    {"id": "b", "tools": [MUSIC, WEATHER], "messages": messages("今天北京的天气怎么样，需要带伞吗？")},
    {"id": "c", "tools": [MUSIC], "messages": messages("Put on something calm, please.", "music", '{"title": "Air"}')},
]


def said(request="Should my children wear a coat in Oslo this week?", **changes):
    return json.dumps(messages(request, **changes), ensure_ascii=False)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (said() + "\n\nSample 4\nTools: []", ACCEPTED),
        (said("请告诉我明天上海会不会下雨，谢谢。"), ACCEPTED),
        (said(arguments='{"city": "Oslo", "days": 7}'), ACCEPTED),
        ("Of course! Here is one", "not JSON"),
        (said()[:-9], "not JSON"),
        ('{"role": "user"}', "no conversation"),
        ('[{"role": "user", "content": "Is it going to rain here?"}]', "no turn of the assistant"),
        (said(call="stocks"), "a call of an unknown tool"),
        (said(arguments="city Oslo"), "arguments are not JSON"),
        (said(arguments='{"days": 3}'), "arguments break the schema"),
        (said(arguments='{"city": "Oslo", "days": 8}'), "arguments break the schema"),
        (said(arguments='{"city": "Oslo", "unit": "K"}'), "arguments break the schema"),
        (said(answer=""), "empty turn of the assistant"),
        (json.dumps(messages("Should I wear a coat today?")[:3]), "no final answer"),
        (json.dumps([messages("Should I wear a coat today?")[0], messages("")[3]]), "too few calls"),
        (said("Hm?"), "length of the request"),
        (said("word " * 500), "length of the request"),
        (said(result="x" * 9000), "length of the answer"),
        (said("Brauche ich morgen früh in Hamburg einen Regenschirm oder nicht?"), "language"),
        (said("Do I need an umbrella in Paris tomorrow afternoon?"), "near-duplicate"),
        (said("今天北京的天气怎么样，要不要带伞？"), "near-duplicate"),
        (said("Should my children wear a coat in Oslo XX?").replace("XX", "\\ud83d\\ude00"), ACCEPTED),
        (said("Should my children wear a coat in Oslo XX?").replace("XX", "\\ud83d"), "half a character"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_each_rule_leaves_out_what_it_names(reply, reason):
    verdict = Filter(RULES, SEEDS).judge(reply, [WEATHER, MUSIC])
    assert verdict.reason == reason, verdict
    if reason == ACCEPTED:
        ChatRows().group(verdict.row)
        assert verdict.row["tools"] == [WEATHER, MUSIC]


def test_nothing_that_resembles_an_evaluation_is_kept(tmp_path):
    held_out = {"tools": [MUSIC], "query": "Should my children wear a coat in Oslo this whole week?"}
    other = {"functions": [], "text": "Plays one song."}
    for name, row in (("tools.jsonl", held_out), ("texts.jsonl", other)):
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    judge = Filter(RULES, SEEDS, [tmp_path / "tools.jsonl"])
    assert judge.judge(said(), [WEATHER]).reason == "near-duplicate of an evaluation"
    verdict = judge.judge(said("Will there be snow in the mountains of Norway?"), [WEATHER, MUSIC])
    assert (verdict.reason, verdict.detail) == ("a tool of an evaluation", "music: evaluation tools.jsonl")
    assert not judge.usable(MUSIC) and judge.usable(WEATHER)
    renamed = {**MUSIC, "name": "player"}
    assert not judge.usable(renamed)
    with pytest.raises(ValueError, match="every tool is one of the evaluation's"):
        Generation(tmp_path / "out", [SEEDS[2]] * 2, rules=RULES, evaluation=[tmp_path / "tools.jsonl"])


@pytest.mark.parametrize("style", TRAINED_STYLES)
def test_tools_and_questions_are_found_in_the_prompts_of_table_6(tmp_path, style):
    """The publisher has prompts in the ReAct form: a question is compared with the question, not the prompt."""
    asked = "Should my children wear a coat in Oslo this week?"
    text = f"{react.instructions([WEATHER, MUSIC], style)}\n\nQuestion: {asked}"
    file = tmp_path / "exam_plugin_x_react_positive.jsonl"
    file.write_text(json.dumps({"prompt": text, "response": "Thought: …\nAction: weather", "tools": 2}) + "\n")
    judge = Filter(RULES, SEEDS, [file])
    assert not judge.usable(WEATHER) and not judge.usable({**MUSIC, "name": "player"})
    other = {**WEATHER, "name": "stars", "description": "Which stars can be seen."}
    assert judge.usable(other)
    assert judge.judge(said(call="stars"), [other]).reason == "near-duplicate of an evaluation"


@hypothesis.given(st.lists(st.lists(st.sampled_from("ab cd ef gh".split()), max_size=6), max_size=6), st.data())
def test_the_nearest_text_is_that_of_the_largest_jaccard_similarity(texts, data):
    def pairs(words):
        return {tuple(words[i : i + 2]) for i in range(max(len(words) - 1, bool(words)))}

    asked = data.draw(st.lists(st.sampled_from("ab cd ef gh".split()), max_size=6))
    neighbors = Neighbors()
    for index, words in enumerate(texts):
        neighbors.add(str(index), " ".join(words))
    expected = [len(pairs(asked) & pairs(w)) / max(1, len(pairs(asked) | pairs(w))) for w in texts]
    name, similarity = neighbors.nearest(" ".join(asked))
    assert similarity == pytest.approx(max(expected, default=0.0))
    assert name == "" if similarity == 0 else expected[int(name)] == pytest.approx(similarity)


class Writer:
    """A model that writes one good sample in two attempts, and counts how often it was asked."""

    THINGS = ("tulips", "bicycles", "penguins", "violins", "pancakes", "rockets", "castles", "marbles", "lanterns")

    def __init__(self):
        self.prompts = []

    def __call__(self, prompts, seeds):
        assert len(prompts) == len(seeds)
        replies = []
        for text in prompts:
            self.prompts.append(text)
            tool = json.loads(text.rpartition("Tools: ")[2].partition("\n")[0])[0]
            arguments = json.dumps({"city": "Rome"} if tool["name"] == "weather" else {"title": "x"})
            thing = self.THINGS[len(self.prompts) % len(self.THINGS)]
            request = f"My uncle sells {thing} near the {thing} market, what about {thing} today?"
            replies.append(said(request, call=tool["name"], arguments=arguments) if len(self.prompts) % 2 else "no")
        return replies


def test_samples_are_made_with_their_provenance_and_a_stopped_generation_goes_on(tmp_path):
    def made(folder, count):
        generation = Generation(tmp_path / folder, SEEDS, rules=RULES, seed=3)
        generation.extend(writer, count, model="writer", sampling={"temperature": 0.7}, at_once=2)
        return generation

    writer = Writer()
    whole = made("whole", 4)
    assert len(whole.samples) == 4 and whole.counts()[ACCEPTED] == 4 and whole.counts()["not JSON"] >= 4
    writer = Writer()
    made("parts", 2)
    path = tmp_path / "parts" / ATTEMPTS
    with open(path, "a") as file:
        file.write('{"id": "3-4", "verd')  # killed here
    made("parts", 4)
    assert path.read_text() == (tmp_path / "whole" / ATTEMPTS).read_text()
    rows = [json.loads(line) for line in (tmp_path / "parts" / SAMPLES).read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 4
    provenance = rows[-1]["provenance"]
    assert provenance["model"] == "writer" and set(provenance["sampling"]) == {"temperature", "seed"}
    # A later prompt shows one of the earlier samples, as its record says.
    assert {"a", "b", "c"} & set(provenance["seeds"]) and {row["id"] for row in rows[:-1]} & set(provenance["seeds"])
    assert read_pool([tmp_path / "parts" / SAMPLES])[0]["id"] == rows[0]["id"]
    assert "\n\nSample 3\nTools: [" in prompt(SEEDS[:2], [WEATHER])


def test_wrong_seeds_are_named(tmp_path):
    file = tmp_path / "seeds.jsonl"
    file.write_text(json.dumps({"messages": messages("Is it cold?")[:1]}) + "\n")
    with pytest.raises(ValueError, match=r"seeds.jsonl:1: no turn of the assistant"):
        read_pool([file])
    file.write_text((json.dumps(SEEDS[0]) + "\n") * 2)
    with pytest.raises(ValueError, match="seeds.jsonl:2: the id a is there twice"):
        read_pool([file])
    with pytest.raises(ValueError, match=r"1 seed conversation\(s\): a prompt shows 3 of them"):
        Generation(tmp_path, SEEDS[:1])
    broken = {**SEEDS[0], "tools": [{**WEATHER, "parameters": {"type": "nonsense"}}]}
    with pytest.raises(ValueError, match="tool weather: its parameters are no JSON schema"):
        Generation(tmp_path, [broken], rules=Rules(examples=1, generated=0))


def test_only_what_people_accept_is_kept():
    samples = [{"id": name} for name in "abcd"]
    decisions = [("a", "accept"), ("a", "accept"), ("b", "accept"), ("b", "reject"), ("c", "unsure"), ("c", "accept")]
    kept, counts = keep_accepted(samples, [{"id": name, "decision": one} for name, one in decisions])
    assert kept == [{"id": "a"}] and counts == {"accept": 1, "reject": 1, "unsure": 1, "not reviewed": 1}
    with pytest.raises(ValueError, match="a decision for sample z"):
        keep_accepted(samples, [{"id": "z", "decision": "accept"}])
    with pytest.raises(ValueError, match="decision 'yes' is none of"):
        keep_accepted(samples, [{"id": "a", "decision": "yes"}])


def test_two_processes_do_not_write_into_one_folder(tool, tmp_path):
    seeds, output = tmp_path / "seeds.jsonl", tmp_path / "out"
    seeds.write_text("".join(json.dumps(one) + "\n" for one in SEEDS))
    flags = [
        "generate",
        "--seeds",
        f"{seeds}",
        "--server",
        "http://127.0.0.1:1",
        "--model",
        "m",
        "--output",
        f"{output}",
    ]
    with files.locked(output), pytest.raises(ValueError, match="out is in use by process"):
        tool("self_instruct").main(flags)


def test_seeds_in_the_older_layout_are_read(tmp_path):
    """As OpenAI's `functions`, or with the tools as text, both of which training reads."""
    (seed, *_) = SEEDS
    rows = [
        {"id": "old", "functions": seed["tools"], "messages": seed["messages"]},
        {"id": "text", "tools": json.dumps(seed["tools"]), "messages": messages("今天北京的天气怎么样？")},
    ]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generation = Generation(tmp_path / "out", read_pool([tmp_path / "seeds.jsonl"]), rules=RULES)
    generation.extend(Writer(), 1, model="writer", sampling={}, at_once=2)
    assert generation.samples[0]["row"]["tools"] == [WEATHER]


def test_a_reference_that_leads_nowhere_ends_no_run():
    nowhere = {**WEATHER, "parameters": {"$ref": "http://127.0.0.1:1/schema"}}
    assert Filter(RULES, SEEDS).judge(said(), [nowhere]).reason == "a schema that cannot be applied"


def test_a_tool_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a tool without a name: {'description': 'Plays a song.'}"):
        Generation(tmp_path, SEEDS, rules=RULES, tools=[{"description": "Plays a song."}])


@pytest.mark.parametrize(("flag", "value"), [("count", 0), ("at_once", 0)])
def test_numbers_below_one_are_refused(tool, tmp_path, flag, value):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(one) + "\n" for one in SEEDS))
    flags = ["generate", "--seeds", f"{seeds}", "--server", "http://127.0.0.1:1", "--model", "m"]
    with pytest.raises(ValueError, match=f"--{flag} is 0: it must be at least 1"):
        tool("self_instruct").main([*flags, "--output", f"{tmp_path / 'out'}", f"--{flag}={value}"])


def test_samples_have_other_ids_than_seeds_of_an_earlier_round(tmp_path):
    """A row says by ids which seeds its prompt showed."""
    Generation(tmp_path / "one", SEEDS, rules=RULES).extend(Writer(), 2, model="w", sampling={}, at_once=2)
    pool = [*SEEDS, *read_pool([tmp_path / "one" / SAMPLES])]
    with pytest.raises(ValueError, match="seed 0-0 has an id of this generation's samples: give another --seed than 0"):
        Generation(tmp_path / "two", pool, rules=RULES)
    Generation(tmp_path / "two", pool, rules=RULES, seed=1)


def test_a_row_without_an_id_is_no_sample_to_accept():
    with pytest.raises(ValueError, match="sample 1 has no id"):
        keep_accepted([{"id": "a"}, {"messages": []}], [])
    with pytest.raises(ValueError, match="the id a is there twice"):
        keep_accepted([{"id": "a"}, {"id": "a"}], [])


def test_a_prompt_that_does_not_fit_is_an_attempt_as_others(tmp_path):
    """Or each start would end at the same one."""
    writer = Writer()

    def complete(prompts, seeds):
        return [None if number % 2 else reply for number, reply in enumerate(writer(prompts, seeds))]

    generation = Generation(tmp_path, SEEDS, rules=RULES)
    generation.extend(complete, 2, model="writer", sampling={}, at_once=4)
    assert len(generation.samples) == 2
    long = [one for one in generation.attempts if one["verdict"] == "prompt too long"]
    assert len(long) == len(generation.attempts) // 2
    assert all(one["reply"] is None and one["detail"].endswith(" characters") for one in long)
    assert Generation(tmp_path, SEEDS, rules=RULES).attempts == generation.attempts
    hopeless = Generation(tmp_path / "hopeless", SEEDS, rules=RULES)
    for tried in (16, 32):  # the second start goes on after the first
        with pytest.raises(ValueError, match="none of 16 prompts fits into the context of the model"):
            hopeless.extend(lambda prompts, _: [None] * len(prompts), 9, model="writer", sampling={}, at_once=4)
        assert len(hopeless.attempts) == tried
