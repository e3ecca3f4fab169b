"""The command, started and ended as a user does, and what it says of wrong values."""

import json
import re
import signal
import socket
import subprocess
import urllib.request
from unittest import mock

import pytest

from qwen_jax.serve import sampling_of, serve
from qwen_jax.serving.app import Service
from qwen_jax.serving.server import Server, bind
from tests.fakes import random_run
from tests.warm_python import python


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, ffn_size=48, context_length=128)
    return random_run(tmp_path_factory.mktemp("serve"), **sizes)


@pytest.mark.parametrize(("devices", "flags"), [(1, []), (2, ["--mesh", "data=2"])])
def test_the_command_answers_until_sigterm(run_folder, plain_environment, devices, flags):
    command = [python(), "-m", "qwen_jax.serve", "--checkpoint", str(run_folder), "--port", "0", "--slots", "2", *flags]
    environment = plain_environment | {"QWEN_JAX_API_KEY": "secret", "JAX_NUM_CPU_DEVICES": str(devices)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            lines = []
            while not (lines and lines[-1].startswith("ready at")):
                lines.append(process.stdout.readline())
                assert lines[-1], process.stderr.read()
            url = re.match(r"ready at (http://127\.0\.0\.1:\d+) \(model run, 2 rows of 128 tokens\)", lines[-1])[1]
            assert [line.split()[0] for line in lines] == ["loading", "compiling", "ready"]
            body = json.dumps({"prompt": "def ", "max_tokens": 5}).encode()
            headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
            request = urllib.request.Request(f"{url}/v1/completions", body, headers)
            with urllib.request.urlopen(request) as response:
                assert json.load(response)["usage"]["completion_tokens"] <= 5
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate()
            assert process.returncode == 0 and "Traceback" not in err
        finally:
            process.kill()


def test_wrong_values_are_told_in_one_line(run_folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("jax.process_count", lambda: 2)
        with pytest.raises(ValueError, match="runs in one process"):
            serve(checkpoint=run_folder, port=0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"--port {port}: Address already in use; --port 0 takes any free port"):
            serve(checkpoint=run_folder, port=port)
    for options, message in (
        ({"host": "no.such.host.invalid"}, r"--host no.such.host.invalid --port 0: [^;]*$"),
        ({"port": 2**20}, "--port must be"),
        ({"max_waiting": -1}, "--max_waiting must not be negative"),
        ({"grace_seconds": float("nan")}, "--grace_seconds must not be negative, infinite or nan, found nan"),
        ({"slots": 100_000_000}, "--slots must be from 1 to 4096, found 100000000"),
        ({"max_images": 0}, "--max_images must be positive"),
        ({"max_request_bytes": 0}, "--max_request_bytes must be positive"),
        ({"api_key": ""}, "the API key must be"),
        ({"checkpoint": "nowhere"}, "nowhere"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            serve(**{"checkpoint": run_folder, "port": 0} | options)


def test_of_two_servers_of_one_port_the_second_ends():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=rf"--port {port}: Address already in use"):
            bind("127.0.0.1", port)
        # Where a port can be bound twice, the second server is told when it listens.
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with socket.create_server(("127.0.0.1", port)):
            service = mock.create_autospec(Service, instance=True)
            server = Server(service, first, 1.0, lambda url: pytest.fail("it is not ready"))
            with pytest.raises(OSError, match=rf"--port {port}: Address already in use; --port 0"):
                server.serve_until_told()


def test_sampling_is_that_of_the_folder_or_of_openai(run_folder, tmp_path):
    assert (sampling_of(run_folder).temperature, sampling_of(run_folder).top_p) == (1.0, 1.0)
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5, "do_sample": true, "max_new_tokens": 9}')
    found = sampling_of(tmp_path)
    assert (found.top_p, found.repetition_penalty) == (0.5, 1.0)
    # Folders that we export state ids alone: they answer as the run that they were made of, and as other servers do.
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "pad_token_id": 2}')
    assert sampling_of(tmp_path) == sampling_of(run_folder)
