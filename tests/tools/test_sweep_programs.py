"""The sweep over compiled variants, with a stand-in for the compiler: resumable, ranked, honest. 12 seconds."""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest


@pytest.fixture
def tool(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tools"))
    return importlib.import_module("sweep_programs")


def report(low, high, gib, limit=15):
    return {
        "fits": gib <= limit,
        "memory_need_bytes": gib * 2**30,
        "memory_limit_bytes": limit * 2**30,
        "seconds": {"low": low, "high": high},
        "tokens_per_second_per_chip": {"low": 1, "high": 2},
        "mfu": {"low": 0.4, "high": 0.5},
        "wire_bytes": 3,
        "least_wire_bytes": 2,
        "executed_flops": 5,
        "model_flops": 4,
    }


COMPILED = {
    "remat=none": report(1.0, 1.1, 20),
    "remat=minimal": report(1.3, 1.4, 14),
    "remat=full": report(1.2, 2.0, 5),
    "remat=dots": {"error": "the compiler gave up: INTERNAL"},
}


def test_what_fits_is_ranked_and_the_rest_is_told(tool, tmp_path, capsys):
    variants = [tool.Variant(name, (f"ModelConfig.{name}",)) for name in COMPILED]
    results = tool.Results(tmp_path / "results.jsonl", "a")
    tool.sweep(variants, lambda variant: dict(COMPILED[variant.name]), results)
    told = capsys.readouterr().out
    assert "1 of 4: remat=none: does not fit, 20.00 of 15.00 GiB" in told and "4 of 4: remat=dots: the compiler" in told
    assert [row["variant"] for row in tool.ranked(list(results.by_name.values()))] == ["remat=minimal", "remat=full"]
    lines = tool.table(variants, results).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| remat=minimal",
        "| remat=full",
        "| remat=none",
        "| remat=dots",
    ]


def test_results_are_used_again_only_for_the_same_question(tool, tmp_path):
    variants = [tool.Variant(name, ()) for name in COMPILED]
    tool.sweep(variants[:2], lambda v: dict(COMPILED[v.name]), tool.Results(tmp_path / "r.jsonl", "a"))
    with open(tmp_path / "r.jsonl", "a") as file:
        file.write('{"variant": "remat=full", "of": "a", "fi')  # killed while it wrote
    asked = []
    again = tool.Results(tmp_path / "r.jsonl", "a")
    tool.sweep(variants, lambda v: asked.append(v.name) or dict(COMPILED[v.name]), again)
    assert asked == ["remat=full", "remat=dots"]
    assert set(tool.Results(tmp_path / "r.jsonl", "a").by_name) == set(COMPILED)
    other = tool.Results(tmp_path / "r.jsonl", "b")
    assert other.by_name == {} and other.others == 4


def test_what_may_succeed_the_next_time_is_tried_again(tool, tmp_path):
    variant = tool.Variant("remat=none", ())
    tool.sweep([variant], lambda _: {"error": "died", "transient": True}, tool.Results(tmp_path / "r.jsonl", "a"))
    assert tool.Results(tmp_path / "r.jsonl", "a").by_name == {}


def test_a_sweep_that_is_killed_goes_on(tool, root, tmp_path):
    program = textwrap.dedent(f"""
        import pathlib, sys, time
        sys.path.insert(0, {str(root / "tools")!r})
        import sweep_programs as tool
        def compile_one(variant):
            print("compiling", variant.name, file=open({str(tmp_path / "asked")!r}, "a"))
            while variant.name == "5" and not pathlib.Path({str(tmp_path / "killed")!r}).exists():
                time.sleep(0.02)
            return {{"error": "no"}}
        variants = [tool.Variant(str(n), ()) for n in range(60)]
        tool.sweep(variants, compile_one, tool.Results(pathlib.Path({str(tmp_path / "r.jsonl")!r}), "a"))
    """)
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len((tmp_path / "r.jsonl").read_text().splitlines() if (tmp_path / "r.jsonl").exists() else []) < 5:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "killed").touch()
    before = len((tmp_path / "r.jsonl").read_text().splitlines())
    assert before == 5
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 60
    rows = [json.loads(line)["variant"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert rows == [str(n) for n in range(60)]
    assert len((tmp_path / "asked").read_text().splitlines()) <= 61


def test_the_variants_are_all_combinations(tool):
    axes = [
        tool.remat_choices("full,none"),
        tool.accumulation_choices("1,2"),
        tool.block_choices("512,256x1024"),
        tool.other_choices("MeshConfig.tensor=1|2"),
    ]
    variants = tool.all_variants(axes)
    assert len(variants) == len({variant.name for variant in variants}) == 16
    assert variants[-1].name == "remat=none accumulation=2 blocks=256x1024 tensor=2"
    assert {
        "ModelConfig.remat=none",
        "ACCUMULATION_STEPS=2",
        "MeshConfig.tensor=2",
        "AttentionBlocks.query=256",
        "AttentionBlocks.backward_key_step=1024",
    } <= set(variants[-1].bindings)
    assert tool.all_variants([tool.remat_choices("full"), tool.block_choices(None)])[0].name == "remat=full"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--remat=everything"], "no policy 'everything'; there are none, dots"),
        (["--accumulation=1,0"], "found '0'"),
        (["--blocks=100"], "multiples of 128, found '100'"),
        (["--vary=MeshConfig.tensor"], "expected NAME=VALUE"),
        (["--timeout=0"], "positive number of seconds"),
    ],
)
def test_wrong_choices_are_named_before_anything_is_compiled(tool, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        tool.main(["--output", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


FILES = ["--gin_file=gin/runs/pretrain_tiny.gin"]


def test_what_cannot_be_compiled_as_asked_ends_the_sweep_with_one_line(tmp_path, compiler_environment, root):
    done = subprocess.run(
        [
            sys.executable,
            "tools/sweep_programs.py",
            *FILES,
            "--gin_file=gin/hardware/h200.gin",
            "--remat=full",
            f"--output={tmp_path}",
        ],
        capture_output=True,
        text=True,
        env=compiler_environment,
        cwd=root,
    )
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "remat=full: NVIDIA H200" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "results.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (jax[tpu])")
def test_a_sweep_for_sixteen_chips(tmp_path, compiler_environment, root):
    command = [
        sys.executable,
        "tools/sweep_programs.py",
        *FILES,
        "--gin_file=gin/hardware/v5e_16.gin",
        "--remat=full,none",
        f"--output={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=compiler_environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "fastest that fits: remat=" in done.stdout and "use it with --gin.ModelConfig.remat=" in done.stdout
    results = tmp_path / "results.jsonl"
    before = results.read_bytes(), results.stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, env=compiler_environment, cwd=root)
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert (tmp_path / "table.md").read_text() in again.stdout
    assert (results.read_bytes(), results.stat().st_mtime_ns) == before  # nothing was compiled again
