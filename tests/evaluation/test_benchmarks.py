"""Every registered benchmark, on hand-made files in its publisher's layout, and on the copies in ../shared/data."""

import os
import re
from pathlib import Path

import gin
import pytest

import tasks  # noqa: F401
from qwen_jax.evaluation.benchmark import Benchmark, Choices, Example, LeftOut, judged, scores
from qwen_jax.evaluation.benchmark_tasks import benchmarks, evaluate, read_examples
from tests.evaluation.published import FILES

SHARED = Path(os.environ.get("QWEN_JAX_SHARED", Path(__file__).parents[3] / "shared")) / "data"
NAMES = sorted(benchmarks())


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data directory with files of every benchmark."""
    folder = tmp_path_factory.mktemp("published")
    for name, published in FILES.items():
        place = folder / benchmarks()[name].folder
        place.mkdir(exist_ok=True)
        published.write(place)
    gin.bind_parameter("benchmark_files.data_dir", str(folder))
    yield folder
    gin.clear_config()


def read(name: str, data_dir: Path) -> tuple[Benchmark, list[Example], list[LeftOut]]:
    left_out: list[LeftOut] = []
    benchmark = benchmarks()[name]
    return benchmark, list(read_examples(benchmark, data_dir, left_out)), left_out


def outputs(name: str, data_dir: Path, *, right: bool, chat: bool = False) -> list[dict]:
    """What an oracle, or its opposite, answers to every example."""
    benchmark, examples, _ = read(name, data_dir)
    found = []
    for example in examples:
        if isinstance(benchmark.answered_by(example, chat), Choices):
            liked = [float(index == example.target) * (1 if right else -1) for index in range(len(example.choices))]
            output = {"log_likelihoods": liked, "tokens": [1] * len(example.choices)}
        else:
            output = (FILES[name].right if right else FILES[name].false)(example)
        found.append({"output": output, "chat": chat})
    return found


def test_every_benchmark_has_hand_made_files():
    assert sorted(FILES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_examples_and_rows_left_out_are_all_rows(name, data_dir):
    benchmark, examples, left_out = read(name, data_dir)
    assert (len(examples), len(left_out)) == (FILES[name].examples, FILES[name].left_out)
    assert len({example.id for example in examples}) == len(examples)
    assert [example.to_json() for example in read(name, data_dir)[1]] == [example.to_json() for example in examples]
    assert all(str(data_dir / benchmark.folder) in one.where and one.reason for one in left_out)
    for example in examples:
        assert Example.from_json(example.to_json()) == example
        if isinstance(benchmark.answered_by(example), Choices):
            assert example.target in range(len(example.choices)) and len(set(example.choices)) == len(example.choices)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_has_its_number_of_shots(name, data_dir):
    benchmark, examples, _ = read(name, data_dir)
    assert {example.prompt.count(FILES[name].shot) for example in examples} == {benchmark.shots + 1}


JUDGED = [pytest.param(name, marks=pytest.mark.slow) if name in FILES and FILES[name].slow else name for name in NAMES]


@pytest.mark.parametrize("name", JUDGED)
def test_an_oracle_scores_100_and_its_opposite_0(name, data_dir):
    if missing := FILES[name].missing():
        pytest.skip(missing)
    right = evaluate(name, outputs(name, data_dir, right=True))
    assert right["score"] == pytest.approx(FILES[name].oracle) and right["examples"] == FILES[name].examples
    assert all(score == pytest.approx(100) for key, score in right.items() if key.startswith(("subject/", "group/")))
    wrong = evaluate(name, outputs(name, data_dir, right=False))
    assert (wrong["score"], wrong["no_answer"]) == (0, 0)


CHAT = [name for name in NAMES if benchmarks()[name].written]


@pytest.mark.parametrize("name", CHAT)
def test_a_chat_model_writes_its_choice(name, data_dir):
    benchmark, examples, _ = read(name, data_dir)
    for right, score in ((True, 100), (False, 0)):
        given = zip(examples, outputs(name, data_dir, right=right, chat=True), strict=True)
        outcomes = [judged(benchmark, example, output["output"], chat=True) for example, output in given]
        assert scores(benchmark, outcomes)["score"] == pytest.approx(score)


@pytest.fixture
def copied(tmp_path):
    """Writes the files of a benchmark into a folder of this test; gives the data directory and the file to damage."""

    def write(name: str) -> tuple[Path, Path]:
        folder = tmp_path / benchmarks()[name].folder
        folder.mkdir()
        FILES[name].write(folder)
        return tmp_path, folder / FILES[name].file

    return write


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_is_refused_by_name_and_line(name, copied):
    data_dir, file = copied(name)
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}(:|: row |: item )\d+|{file.stem}.*cut\?"):
        read(name, data_dir)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(str(file))):
        read(name, data_dir)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_not_as_published_is_refused_by_name_and_line(name, copied):
    data_dir, file = copied(name)
    text, (published, instead) = file.read_text(encoding="utf-8"), FILES[name].wrong
    assert published in text
    file.write_text(text.replace(published, instead), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}(:|: row |: item )\d+: .*(expected|no column)"):
        read(name, data_dir)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_or_folder_that_is_missing_is_named(name, copied, tmp_path):
    data_dir, file = copied(name)
    file.unlink()
    try:
        _, _, left_out = read(name, data_dir)
    except FileNotFoundError as error:
        assert file.name in str(error) or str(file.parent) in str(error)
    else:
        assert str(file) in {one.where for one in left_out}
    with pytest.raises(FileNotFoundError, match=f"{benchmarks()[name].folder}: no such folder"):
        read(name, tmp_path / "elsewhere")


COPIES = [name for name in NAMES if FILES[name].data]


@pytest.mark.parametrize("name", COPIES)
def test_the_publishers_files_are_read_whole(name):
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: the publishers' files are not here")
    expected = FILES[name].data
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read(name, SHARED)
        return
    _, examples, left_out = read(name, SHARED)
    found = len(examples), len(left_out)
    assert (sum(found) if isinstance(expected, int) else found) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_what_it_is(name):
    benchmark = benchmarks()[name]
    assert benchmark.title and benchmark.files and benchmark.source and benchmark.shots >= 0
    subjects = [subject for group in benchmark.groups.values() for subject in group]
    assert all(subject == subject.strip() and subject for subject in subjects)
