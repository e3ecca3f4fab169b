"""Commands on models, data and runs in a bucket say and write what they do on a local disk."""

import io
import json
import shutil
import threading
import urllib.request

import jax
import numpy as np
import pytest
from PIL import Image

import tasks  # noqa: F401  registers the benchmarks
from qwen_jax import chat, evaluate, files, generate, serve
from qwen_jax.checkpoints.bucket import open_checkpoints
from qwen_jax.checkpoints.run_folder import saved_steps
from qwen_jax.data.content import Picture, to_json
from qwen_jax.data.images import UnusableImageError, open_image
from qwen_jax.evaluation.benchmark_tasks import benchmarks, read_examples
from qwen_jax.evaluation.vision.prompts import asked
from qwen_jax.pictures import check_files, picture_paths, prompt_with
from tests.evaluation.published import FILES
from tests.fakes import random_run
from tests.object_stores import stores  # noqa: F401
from tests.test_evaluate import write_mmlu

SIZES = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=1024)
METADATA = {"positions": {"train": 8}, "fingerprints": {"train": "a"}, "skipped_examples": {}}


def fill(folder):
    """A run with three checkpoints and metrics, texts, and questions."""
    made = random_run(folder, **SIZES)
    shutil.rmtree(made / "checkpoints")
    rows = [{"step": n, "loss": 5.0 / n, "learning_rate": 1e-3, "tokens_per_second": 9.0} for n in (1, 2, 3)]
    (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts" / "en" / "books").mkdir(parents=True)
    (folder / "texts" / "en" / "books" / "1.txt").write_text("a book")
    (folder / "texts" / "rows.jsonl").write_text('{"text": "int x;", "language": "c"}\n')
    write_mmlu(folder / "data", test_rows=1)


def save_steps(folder, params):
    checkpoints = open_checkpoints(folder, 9, 0, None)
    for step in (1, 2, 3):
        checkpoints.save(step, {"params": params}, METADATA)
    checkpoints.close()


@pytest.fixture(scope="module")
def places(stores, tmp_path_factory):  # noqa: F811
    """The same folder on a disk, on S3 and on Cloud Storage, by name."""
    from qwen_jax.conversion import load_pretrained

    local = tmp_path_factory.mktemp("commands")
    params = load_pretrained(random_run(tmp_path_factory.mktemp("weights"), **SIZES))[1]
    params = jax.tree.map(np.asarray, params)
    fill(local)
    found = {"local": local, **{scheme: files.as_path(store.folder()) for scheme, store in stores.items()}}
    for name, folder in found.items():
        if name != "local":
            upload(local, folder)
    for folder in found.values():
        save_steps(folder / "run", params)
    return found


def upload(folder, url):
    local = [path for path in folder.rglob("*") if path.is_file()]
    files.in_parallel(lambda path: files.copy_file(path, url / path.relative_to(folder).as_posix()), local)


def contents(folder):
    """Bytes by name of what lies in a folder, with its own name taken out."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != files.LOCK_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def compare(places, capsys):
    """Runs a command in each place; `work` gets the folder. What it says and writes below `output` has to agree."""

    def run(work, output):
        results = {}
        for name, folder in places.items():
            work(folder)
            said = capsys.readouterr()
            home = str(folder).encode()
            written = {key: data.replace(home, b"HOME") for key, data in contents(folder / output).items()}
            results[name] = said.out.replace(str(folder), "HOME"), written
        assert results["s3"] == results["local"] == results["gs"]
        assert results["local"] != ("", {})
        return results["local"]

    return run


def test_evaluate_with_data_answers_and_model_in_a_bucket(compare, monkeypatch):
    def work(folder):
        flags = ("checkpoint", "run"), ("data_dir", "data"), ("output_dir", "scores")
        evaluate.main(["--benchmarks=mmlu", *(f"--{flag}={folder / name}" for flag, name in flags)])

    # The weights count by size and time of their files, and pages hold the time at which they were written.
    monkeypatch.setattr(evaluate, "weight_files", lambda checkpoint: [])
    said, written = compare(work, "scores/mmlu")
    assert "MMLU" in said and len(written["answers.jsonl"].splitlines()) == 2


def test_perplexity_of_texts_in_a_bucket(compare, tool):
    def work(folder):
        arguments = ["--checkpoint", folder / "run", "--texts", folder / "texts", "--output", folder / "perplexity"]
        tool("measure_perplexity").main([*map(str, arguments), "--context_length=16"])

    said, written = compare(work, "perplexity")
    assert "| en | books | 1 |" in said and written.keys() == {"perplexity.json", "perplexity.md"}


def test_chat_with_a_model_in_a_bucket(compare, monkeypatch):
    def work(folder):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello\n/save {folder}/data/chat.json\n"))
        chat.main(["--checkpoint", str(folder / "run"), "--max_new_tokens=4", "--temperature=0"])

    _, written = compare(work, "data")
    assert json.loads(written["chat.json"])["messages"][1] == {"role": "user", "content": "Hello"}


def test_generate_with_model_and_prompts_in_a_bucket(compare):
    def work(folder):
        files.write_text(folder / "prompts.jsonl", '{"prompt": "a b"}\n{"prompt": "c"}\n')
        paths = ["--checkpoint", str(folder / "run"), "--prompts", str(folder / "prompts.jsonl")]
        generate.main([*paths, "--max_new_tokens", "4"])

    said, _ = compare(work, "completions")
    assert len(said.splitlines()) == 2


def test_a_model_in_a_bucket_is_served(places):
    said = []

    def ask(server):
        body = json.dumps({"prompt": "abc", "max_tokens": 4, "temperature": 0}).encode()
        request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            said.append(json.load(response)["choices"])
        server.drain()

    for folder in places.values():
        threads = []

        def started(server, threads=threads):
            threads.append(threading.Thread(target=ask, args=[server]))
            threads[0].start()

        serve.serve(checkpoint=folder / "run", port=0, slots=1, started=started)
        threads[0].join()
    assert len(said) == 3 and said[0] == said[1] == said[2]


def test_the_curve_of_a_run_in_a_bucket_is_drawn_into_it(places, tool, capsys):
    for folder in places.values():
        tool("plot_run").main([str(folder / "run")])
        assert capsys.readouterr().out == f"wrote {folder / 'run' / 'loss.png'}\n"
        assert (folder / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_in_a_bucket_is_rewound(places, tool, capsys):
    said = set()
    for folder in places.values():
        tool("rewind").main(["--run", str(folder / "run"), "--to=1", "--skip_examples=4"])
        said.add(capsys.readouterr().out.replace(str(folder), "HOME"))
        assert saved_steps(folder / "run") == [1] and saved_steps(folder / "run/rewound_1") == [2, 3]
        assert not (folder / "run" / files.LOCK_FILE).is_file() or folder == places["local"]
    assert len(said) == 1 and "goes on after step 1 (was 3) and passes over examples 8 to 11" in said.pop()


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_the_files_of_all_benchmarks_are_read_from_a_bucket(stores, tmp_path, scheme):  # noqa: F811
    url = files.as_path(stores[scheme].folder())
    for name, published in FILES.items():
        place = tmp_path / benchmarks()[name].folder
        place.mkdir(exist_ok=True)
        published.write(place)
    upload(tmp_path, url)

    def read(benchmark, folder):
        left_out = []
        rows = [example.to_json() for example in read_examples(benchmark, folder, left_out)]
        return json.dumps([rows, [str(one) for one in left_out]]).replace(str(folder), "HOME")

    for benchmark in benchmarks().values():
        assert read(benchmark, url) == read(benchmark, tmp_path), benchmark.name


def test_pictures_in_a_bucket_are_shown(stores, tmp_path):  # noqa: F811
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)).save(tmp_path / "a.png")
    folder = files.as_path(stores["s3"].folder())
    files.copy_file(tmp_path / "a.png", folder / "a.png")
    files.write_text(folder / "b.png", "no picture")
    content = prompt_with([folder / "a.png"], "What?")
    found = picture_paths(content) + picture_paths((Picture("a.png"),), folder)
    assert found == [folder / "a.png"] * 2 and asked(folder / "a.png", "What?")["parts"][0]["image"] == str(found[0])
    assert to_json(content, tmp_path)[0] == {"type": "image", "image": f"{folder}/a.png"}
    np.testing.assert_array_equal(np.asarray(open_image(found[0])), np.asarray(Image.open(tmp_path / "a.png")))
    with pytest.raises(UnusableImageError, match=f"{folder}/b.png cannot be read as an image"):
        open_image(folder / "b.png")
    with pytest.raises(FileNotFoundError, match=f"there is no picture {folder}/c.png"):
        check_files([folder / "c.png"])
