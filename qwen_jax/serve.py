"""Serves a model by OpenAI's protocol, with a chat page at the same address.

    python -m qwen_jax.serve --checkpoint runs/tiny
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello!"}]}'

Paths: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics. SIGTERM and Ctrl-C end the server after the
replies under way, the second one at once. docs/how_to/openai_server.md says more.
"""

import argparse
import ipaddress
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qwen_jax import files
from qwen_jax.chat import stated
from qwen_jax.command_line import add_mesh, path_argument, quick_imports, run
from qwen_jax.data.react import DEFAULT_STYLE, TRAINED_STYLES

with quick_imports():
    import jax
    import numpy as np

    from qwen_jax.compilation_cache import programs_kept
    from qwen_jax.generate import load_engine
    from qwen_jax.inference import Engine, Request, SamplingConfig
    from qwen_jax.sharding import MeshConfig

if TYPE_CHECKING:
    from qwen_jax.serving.server import Server

API_KEY_VARIABLE = "QWEN_JAX_API_KEY"
MOST_SLOTS = 4096
_LARGEST_BODY, _LARGEST_WITH_PICTURES = 4 << 20, 32 << 20


def sampling_of(checkpoint: files.PathLike) -> SamplingConfig:
    """Sampling of requests that say nothing: as the folder's generation_config.json states, else OpenAI's defaults."""
    settings: dict[str, Any] = {"temperature": 1.0, **stated(checkpoint)}
    settings.pop("max_new_tokens", None)
    return SamplingConfig(**settings)


def compile_first(engine: Engine, sampling: SamplingConfig) -> None:
    """Generates a few tokens, so that no client waits for the programs of a short prompt or a picture."""
    length = min(16, engine.context_length - 1)
    requests = [Request([0] * length, min(4, engine.context_length - length), sampling)]
    vision = engine.model.config.vision
    if vision is not None and vision.num_queries + 2 < engine.context_length:
        shown = [vision.image_start_id, *[vision.image_pad_id] * vision.num_queries, vision.image_end_id]
        black = np.zeros((vision.image_size, vision.image_size, 3), np.uint8)
        requests.append(Request(shown, 1, sampling, images=[black]))
    for request in requests:
        engine.submit(request, streaming=True)
        while engine.live:
            engine.step()


def _check_limits(max_waiting: int, grace_seconds: float, slots: int, api_key: str | None, **positive) -> None:
    for name, value in (("max_waiting", max_waiting), ("grace_seconds", grace_seconds)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"--{name} must not be negative, infinite or nan, found {value}")
    if not 1 <= slots <= MOST_SLOTS:
        raise ValueError(
            f"--slots must be from 1 to {MOST_SLOTS}, found {slots}: each has memory for the keys of its tokens"
        )
    for name, value in positive.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be positive, found {value}")
    if api_key is not None and (not api_key or not api_key.isascii() or not api_key.isprintable()):
        raise ValueError("the API key must be printable ASCII characters, and not empty")


def serve(
    *,
    checkpoint: files.PathLike,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    model_name: str | None = None,
    dtype: str = "float32",
    mesh: MeshConfig | None = None,
    slots: int = 16,
    prefix_cache_tokens: int = 4096,
    max_waiting: int = 64,
    max_request_bytes: int | None = None,
    max_images: int = 16,
    max_image_pixels: int = 20_000_000,
    grace_seconds: float = 30.0,
    tool_style: str = DEFAULT_STYLE,
    started: Callable[["Server"], None] = lambda server: None,
) -> None:
    """Serves until SIGTERM, SIGINT, or `Server.drain`; lines on standard output say how far it is.

    Args:
        checkpoint: run folder, or converted folder.
        host, port: where; port 0 takes any free one.
        api_key: key that clients must send; None: none.
        model_name: name of the model; by default that of the folder.
        dtype: compute dtype, "float32" or "bfloat16".
        mesh: arrangement of all devices, which share weights and rows; None: one device.
        slots: the largest number of replies that are generated together.
        prefix_cache_tokens: tokens of prompts and replies whose keys and values are kept, so that what begins alike is
            computed once; 0: none.
        max_waiting: how many more may wait; further ones are refused with 429.
        max_request_bytes: the largest body of a request; None: 4 MiB, with an image encoder 32 MiB.
        max_images, max_image_pixels: the largest number of pictures of a request, and of pixels of a picture.
        grace_seconds: how long replies under way may take at the end.
        tool_style: how tools are described to the model: that of its fine-tuning.
        started: called with the server when it answers requests.

    Raises:
        ValueError, OSError: no such checkpoint, a value out of range, or the address cannot be used.
    """
    # In here, as they need the extra `serve`: `run` then names it.
    from qwen_jax.serving.app import Service
    from qwen_jax.serving.engine_thread import EngineThread
    from qwen_jax.serving.protocol import Served
    from qwen_jax.serving.server import Server, bind

    if jax.process_count() > 1:
        raise ValueError("the server runs in one process, this job has several: start one server on each host")
    sizes = {"max_request_bytes": max_request_bytes, "max_images": max_images, "max_image_pixels": max_image_pixels}
    _check_limits(max_waiting, grace_seconds, slots, api_key, **sizes)
    with bind(host, port) as sock:
        print(f"loading {checkpoint}", flush=True)
        engine = load_engine(checkpoint, dtype, slots, prefix_cache_tokens, mesh=mesh)
        sampling = sampling_of(checkpoint)
        print("compiling", flush=True)
        compile_first(engine, sampling)
        served = Served(
            model_name or files.as_path(checkpoint).absolute().name,
            engine.tokenizer,
            engine.model.config.vocab_size,
            engine.context_length,
            engine.slots + max_waiting,
            sampling,
            tool_style=tool_style,
            vision=engine.model.config.vision,
            max_images=max_images,
            max_image_pixels=max_image_pixels,
        )
        thread = EngineThread(engine, max_waiting)

        def ready(url: str) -> None:
            print(f"ready at {url} (model {served.model}, {engine.slots} rows of {engine.context_length} tokens)")
            print("end with Ctrl-C", flush=True)
            started(server)

        local = ipaddress.ip_address(sock.getsockname()[0]).is_loopback
        largest = max_request_bytes or (_LARGEST_BODY if served.vision is None else _LARGEST_WITH_PICTURES)
        service = Service(thread, served, api_key, largest, local)
        server = Server(service, sock, grace_seconds, ready)
        thread.start()
        try:
            server.serve_until_told()
        finally:
            thread.stop()


@programs_kept()
def main(argv=None) -> None:
    """Command line of `python -m qwen_jax.serve`."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen_jax.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=path_argument, required=True, help="run folder, or converted folder (qwen or qwen2)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port, which is printed; default: 8000")
    parser.add_argument("--model_name", help="name of the model for clients; default: the folder's")
    parser.add_argument(
        "--api_key",
        help=f"key that clients must send; better in the environment, where no other user sees it: {API_KEY_VARIABLE}",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    add_mesh(parser)
    parser.add_argument("--slots", type=int, default=16, help="replies that are generated together; default: 16")
    parser.add_argument(
        "--prefix_cache_tokens",
        type=int,
        default=4096,
        help="tokens whose keys and values are kept for prompts that begin alike; 0: none; default: 4096",
    )
    parser.add_argument(
        "--max_waiting", type=int, default=64, help="replies that may wait; others get status 429; default: 64"
    )
    parser.add_argument(
        "--max_request_bytes",
        type=int,
        help="largest body of a request; default: 4 MiB, and 32 MiB with an image encoder",
    )
    parser.add_argument("--max_images", type=int, default=16, help="most pictures of a request; default: 16")
    parser.add_argument(
        "--max_image_pixels", type=int, default=20_000_000, help="most pixels of a picture; default: 20 million"
    )
    parser.add_argument(
        "--grace_seconds", type=float, default=30.0, help="time for replies under way at the end; default: 30"
    )
    parser.add_argument(
        "--tool_style",
        default=DEFAULT_STYLE,
        choices=TRAINED_STYLES,
        help=f"how tools are described to the model: that of its fine-tuning; default: {DEFAULT_STYLE}",
    )
    parser.add_argument("--verbose", action="store_true", help="log each compiled program")
    options = vars(parser.parse_args(argv))
    if not options.pop("verbose"):
        logging.getLogger("qwen_jax.inference").setLevel(logging.WARNING)
    if options["api_key"] is None:
        options["api_key"] = os.environ.get(API_KEY_VARIABLE)
    serve(**options)


if __name__ == "__main__":
    run(main)
