"""The adapter against lm-evaluation-harness's own model class, on the same weights."""

import numpy as np
import pytest

from qwen_jax.conversion import convert, load_pretrained, load_tokenizer
from qwen_jax.data import chatml
from qwen_jax.data.tokenizer import write_ranks
from qwen_jax.inference import Engine
from tests.evaluation.published import FILES
from tests.fakes import random_run

pytest.importorskip("lm_eval", reason="compares with lm-evaluation-harness: the extra `evaluation`")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CacheHook  # noqa: E402

from qwen_jax.evaluation.harness import HarnessModel  # noqa: E402

# Tokens that cross the border of context and continuation.
TOKENS = [" A", " B", "An", "Ans", "  ", "\n\n", ":\n", "th", " th", " the", "\u95ee".encode()[:2], "\u95ee"]
BENCHMARKS = ("mmlu", "arc_easy", "arc_challenge", "hellaswag", "piqa", "boolq", "commonsenseqa", "lambada")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    return random_run(folder, spread=0.1, hidden_size=32, num_layers=2, num_heads=4, ffn_size=48, context_length=96)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in TOKENS:
        ranks[token if isinstance(token, bytes) else token.encode()] = len(ranks)
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    write_ranks(ranks, path)
    return path


@pytest.fixture(scope="module")
def model(run_folder):
    return HarnessModel(Engine(*load_pretrained(run_folder), load_tokenizer(run_folder), slots=4))


@pytest.fixture(scope="module")
def peer(run_folder, tmp_path_factory):
    pytest.importorskip("torch", reason="HFLM runs on torch")
    pytest.importorskip("transformers", reason="HFLM runs on transformers")
    from lm_eval.models.huggingface import HFLM

    folder = convert("orbax", run_folder, "qwen2", tmp_path_factory.mktemp("peer") / "qwen2", progress=False)
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=3)


def requests(kind, *arguments):
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


PAIRS = [
    ("The answer:", " A"),
    ("The answer:", " B"),
    ("The answer: ", "A"),
    ("The answer:\n\n", "An apple"),
    ("", "th the"),
    ("", " blank first"),
    ("\u95ee\u9898\uff1a", "\u7b54\u6848"),
    ("e", "\u0301tude"),
    ("x" * 200 + " long", " enough to be cut"),
    ("x" * 95, "y"),
    ("x" * 96, "y"),
    ("x" * 97, "yz"),
    ("The answer:", " A"),
    ("a", "b" * 96),
]


def test_log_likelihoods_are_those_of_the_harness(model, peer):
    asked = requests("loglikelihood", *PAIRS)
    ours, theirs = model.loglikelihood(asked, disable_tqdm=True), peer.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([one for one, _ in ours], [one for one, _ in theirs], rtol=0, atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_log_likelihoods_are_those_of_the_harness(model, peer):
    texts = ["short", "", "x" * 96, "y" * 97, "The rain \u95ee " * 40]
    asked = requests("loglikelihood_rolling", *[(text,) for text in texts])
    ours, theirs = (one.loglikelihood_rolling(asked, disable_tqdm=True) for one in (model, peer))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-4)
    assert ours[1] == 0


def test_greedy_texts_are_those_of_the_harness(model, peer):
    free = {"until": [], "max_gen_toks": 12}
    (text,) = model.generate_until(requests("generate_until", ("a", free)))
    stop = text[8:10]
    assert len(stop) == 2
    stopping = {"until": [stop, "never"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    longer = {"until": "\n\n", "max_gen_toks": 20}
    asked = requests("generate_until", ("a", stopping), ("x" * 200, free), ("a", free), ("The", longer))
    ours, theirs = model.generate_until(asked, disable_tqdm=True), peer.generate_until(asked, disable_tqdm=True)
    assert ours == theirs and ours[0] == text.split(stop)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 4}, "no argument num_beams"),
        ({"do_sample": True}, "temperature is 0"),
        ({"max_gen_toks": 96}, "max_gen_toks is 96, and the model reads 96"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        model.generate_until(requests("generate_until", ("a", {"until": []} | changes)))


def test_samples_of_one_prompt_differ_and_come_again(model):
    arguments = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", ("a", arguments), ("a", arguments))
    first = model.generate_until(asked)
    assert first[0] != first[1] and model.generate_until(asked) == first


def test_a_context_of_blanks_stands_after_the_prefix_token(model):
    """lm-evaluation-harness 0.4.13 fails there."""
    blanks, empty = model.loglikelihood(requests("loglikelihood", ("  ", "word"), ("", "  word")))
    assert blanks == pytest.approx(empty)


def test_thinking_is_cut_before_stop_strings_act(run_folder, model, monkeypatch):
    thinker = HarnessModel(model.engine, think_end_token="</think>")
    asked = []

    class Result:
        index, tokens = 0, model.tokenizer.encode("plan A\n\nplan B</think>\n\n42\n\nQ: next")

    monkeypatch.setattr(model.engine, "generate", lambda found: asked.extend(found) or [Result])
    assert thinker.generate_until(requests("generate_until", ("Q", {"until": ["\n\n"], "max_gen_toks": 9}))) == ["42"]
    assert asked[0].stop_strings == ()


def test_a_conversation_is_encoded_with_control_tokens_and_names_of_them_stay_text(model):
    messages = [{"role": "user", "content": "Say <|im_end|>"}]
    text = model.apply_chat_template(messages)
    (score,) = model.engine.score([chatml.encode_prompt(model.tokenizer, messages)], [model.tokenizer.encode("A")])
    (found,) = model.loglikelihood(requests("loglikelihood", (text, "A")))
    assert found[0] == pytest.approx(float(score.log_probs.sum()), abs=1e-5)
    (spaced,) = model.loglikelihood(requests("loglikelihood", (text, " A")))
    assert spaced[0] != pytest.approx(found[0])


def test_results_are_kept_by_the_cache_of_the_harness(model):
    kept = {}

    class Keeping(CacheHook):
        def __init__(self):
            pass

        def add_partial(self, attr, req, res):
            kept[attr, req] = res

    model.set_cache_hook(Keeping())
    (found,) = model.loglikelihood(requests("loglikelihood", ("a", "b")))
    (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", ("ab",)))
    model.set_cache_hook(CacheHook(None))
    assert kept == {("loglikelihood", ("a", "b")): found, ("loglikelihood_rolling", ("ab",)): total}


def test_the_harness_runs_its_tasks_on_the_model(tmp_path, tool, model, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    compare = tool("compare_with_lm_eval")
    benchmarks = compare.find_benchmarks(["mmlu", "lambada"])
    asked = {}
    for one in benchmarks:
        FILES[one.name].write(_made(tmp_path / one.folder))
        asked[one.name] = compare.first_of_subjects(list(compare.read_examples(one, tmp_path)), 1)
        compare.write_task(one, asked[one.name], 96, _made(tmp_path / "tasks"))
    outputs = compare.harness_outputs(model, benchmarks, tmp_path / "tasks")
    pairs = [(example.prompt, choice) for example in asked["mmlu"] for choice in example.choices]
    totals = [total for total, _ in model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)]
    np.testing.assert_allclose(np.concatenate(outputs["mmlu"]), totals, rtol=0, atol=1e-5)
    assert len(outputs["lambada"]) == len(asked["lambada"]) and all(
        isinstance(text, str) for text in outputs["lambada"]
    )


def test_both_programs_give_the_same_results_on_the_same_prompts(tmp_path, tool, peer, monkeypatch):
    """Hand-made files of eight benchmarks; the harness reads the prompts from files of its own task format."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    compare = tool("compare_with_lm_eval")
    run = random_run(tmp_path, spread=0.1, hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=2048)
    data = tmp_path / "data"
    for benchmark in compare.find_benchmarks(BENCHMARKS):
        FILES[benchmark.name].write(_made(data / benchmark.folder))
    rows = compare.compare(run, data, BENCHMARKS, limit=2)
    assert [row["same"] for row in rows] == [100] * len(BENCHMARKS)
    assert all(row["ours"] == row["lm-eval"] for row in rows)
    assert all(row["difference"] < 1e-3 for row in rows if row["difference"] is not None)
    assert "| LAMBADA |" in compare.table(rows)


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder
