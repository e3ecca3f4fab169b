"""Two processes that share a mesh give the tokens and scores of one."""

import json

import numpy as np

from qwen_jax.conversion import load_pretrained, load_tokenizer
from qwen_jax.distributed.hosts import JobConfig, connect
from qwen_jax.inference import Engine, Request, SamplingConfig
from qwen_jax.sharding import MeshConfig, make_mesh
from tests.fakes import random_vision_run
from tests.jobs import outputs_of_job, start_job


def answers(engine: Engine) -> dict:
    """What an engine says to a list, an iterable, requests that come and go, pictures, and given continuations."""
    requests = [
        Request([i, 200 - i, 7] * (1 + i % 3), 8 + i, SamplingConfig(temperature=float(i % 2)), seed=i, stop_ids=[300])
        for i in range(6)
    ]
    listed = sorted(engine.generate(requests), key=lambda result: result.index)
    iterated = sorted(engine.generate(iter(requests[:5])), key=lambda result: result.index)
    kept, cancelled = (engine.submit(request, streaming=True) for request in requests[:2])
    chunks = engine.step()
    engine.cancel(cancelled)
    while engine.live:
        chunks += engine.step()
    alike = sorted(engine.generate([Request([9] * 40 + [i], 4) for i in range(3)]), key=lambda result: result.index)
    pictures = [np.full((28, 28, 3), value, np.uint8) for value in (0, 90, 250)]
    prompt = [*range(20), 470, 472, 472, 472, 472, 471, 7, 8]
    shown = [Request(prompt, 6, images=[picture]) for picture in pictures for _ in range(2)]
    seen = sorted(engine.generate(shown), key=lambda result: result.index)
    scores = engine.score([request.prompt for request in requests], [result.tokens for result in listed])
    return {
        "listed": [result.tokens for result in listed],
        "iterated": [result.tokens for result in iterated],
        "alike": [(result.cached_tokens, *result.tokens) for result in alike],
        "shown": [result.tokens for result in seen],
        "text": "".join(chunk.text for chunk in chunks if chunk.handle is kept),
        "scores": [score.log_probs.tolist() for score in scores],
    }


def main(address: str, index: str, folder: str, output: str) -> None:
    """One of two processes with two devices each."""
    connect(JobConfig(address, 2, int(index)))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    engine = Engine(
        *load_pretrained(folder, mesh=mesh),
        load_tokenizer(folder),
        mesh,
        slots=4,
        prefix_cache_tokens=256,
        prefill_chunk=16,  # pictures and prompts that begin alike are longer
    )
    with open(output, "w") as file:
        json.dump(answers(engine), file)


def test_two_processes_give_what_one_gives(tmp_path, plain_environment):
    folder = random_vision_run(tmp_path, context_length=128)
    program = "import sys; from tests.inference.test_processes import main; main(*sys.argv[1:])"
    outputs = [tmp_path / f"{index}.json" for index in range(2)]
    processes = start_job(program, plain_environment, [[folder, output] for output in outputs], devices=2)
    expected = answers(Engine(*load_pretrained(folder), load_tokenizer(folder), slots=4))
    outputs_of_job(processes)
    for output in outputs:
        found = json.loads(output.read_text())
        assert found["text"] == expected["text"]
        assert [one[0] for one in found["alike"]] == [0, 32, 32] and [one[0] for one in expected["alike"]] == [0, 0, 0]
        assert [one[1:] for one in found["alike"]] == [list(one[1:]) for one in expected["alike"]]
        for name in ("listed", "iterated", "shown"):
            assert list(map(tuple, found[name])) == expected[name]
        for one, other in zip(found["scores"], expected["scores"], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)
