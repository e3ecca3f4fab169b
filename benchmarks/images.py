"""Pictures per second for training, at 448 pixels: our workers against torchvision with a DataLoader, in one run.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install torch torchvision numpy
    python benchmarks/images.py --peer_python=/tmp/peer/bin/python
    python benchmarks/images.py --peer_python=/tmp/peer/bin/python --pictures=FOLDER --processes=4

torchvision stays out of the project's environment: its wheels on PyPI need another torch. Both sides read the same JPEG
files and decode and resize them bicubically in the same number of processes:

    released     torchvision as the released Qwen-VL prepares pictures: Pillow, Resize, ToTensor, Normalize; float32
    v2 on uint8  torchvision's fastest: its own JPEG decoder and its resize of 8-bit levels, not normalized
    ours         `qwen_jax.data.image_workers`: uint8, equal to the released pixels before they are normalized, which
                 the model does on the device; with Numba (extra `images`) where it is installed
    ours, Pillow the same where Numba is not installed, and the same pixels
    ours, threads  Pillow in two threads of the process itself, without workers

Without `--pictures`, files are made: noise over smooth colors, in the sizes of COCO's photographs and about as large.
Measurements take turns; medians are printed, and how far the pixels of each are from Pillow's.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen_jax.command_line import path_argument, run  # noqa: E402
from qwen_jax.data.image_workers import ImageWorkers, fastest_resize  # noqa: E402
from qwen_jax.data.images import decode_images, open_image, squash  # noqa: E402

SIZES = ((640, 480), (640, 480), (480, 640), (640, 427), (500, 375), (640, 360))
PEER = """
import sys, time
import numpy as np, torch
from PIL import Image
from torchvision.io import decode_jpeg, read_file, ImageReadMode
from torchvision.transforms import v2, InterpolationMode, Compose, Resize, ToTensor, Normalize

size, processes, batch = map(int, sys.argv[1:4])
torch.set_num_threads(1)
bicubic = InterpolationMode.BICUBIC
released = Compose([Resize((size, size), interpolation=bicubic), ToTensor(),
                    Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))])
fast = v2.Resize((size, size), interpolation=bicubic, antialias=True)

class Files(torch.utils.data.Dataset):
    def __init__(self, paths, way):
        self.paths, self.way = paths, way
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, index):
        path = self.paths[index % len(self.paths)]
        if self.way == "released":
            return released(Image.open(path).convert("RGB"))
        return fast(decode_jpeg(read_file(path), mode=ImageReadMode.RGB))

for line in sys.stdin:  # released, or v2, and the files, or a file for the pixels
    way, seconds, *paths = line.rstrip("\\n").split("\\t")
    if not float(seconds):
        pixels = Files(paths[:1], way)[0]
        if way == "released":
            normalize = released.transforms[2]
            mean, deviation = (torch.tensor(one)[:, None, None] for one in (normalize.mean, normalize.std))
            pixels = ((pixels * deviation + mean) * 255).round()
        np.save(paths[1], pixels.permute(1, 2, 0).to(torch.uint8).numpy())
        print(0, flush=True)
        continue
    loader = torch.utils.data.DataLoader(Files(paths * 1000, way), batch_size=batch, num_workers=processes)
    batches = iter(loader)
    for _ in range(2 * processes):  # its workers start, and have batches ready
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < float(seconds):
        count += len(next(batches))
    print(count / (time.perf_counter() - began), flush=True)
    del batches, loader
"""


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Writes JPEG files of quality 90."""
    paths = []
    for number in range(count):
        generator = np.random.default_rng(number)
        width, height = SIZES[number % len(SIZES)]
        coarse = generator.integers(0, 256, (height // 24, width // 24, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + generator.integers(-14, 15, smooth.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number:04d}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=90)
    return paths


class Peer:
    """A process of the other environment that measures torchvision."""

    def __init__(self, python: Path, size: int, processes: int, batch: int):
        self._process = subprocess.Popen(
            [str(python), "-c", PEER, *map(str, (size, processes, batch))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )

    def ask(self, way: str, seconds: float, paths: list[Path | str]) -> float:
        """Pictures per second; with `seconds` 0, saves the pixels of the first path in the second."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(way, seconds, *paths, sep="\t", file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise ValueError("the peer's process ended: does --peer_python have torch and torchvision?")
        return float(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def ours(paths: list[Path], batch: int, decode: Callable[[list[bytes]], np.ndarray]) -> Iterator[int]:
    """Counts of the pictures of one batch after the other; two batches are made at a time, as for the peer more are."""

    def make(number: int) -> int:
        return len(decode([paths[(number * batch + index) % len(paths)].read_bytes() for index in range(batch)]))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(make, number) for number in range(2)]
        for number in itertools.count(2):
            yield ahead.pop(0).result()
            ahead.append(pool.submit(make, number))


def per_second(batches: Iterator[int], seconds: float) -> float:
    """After two batches, with which workers start."""
    next(batches), next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += next(batches)
    return count / (time.perf_counter() - began)


def deviations(
    peer: Peer, decoders: dict[str, Callable[[list[bytes]], np.ndarray]], paths: list[Path], size: int, folder: Path
) -> dict[str, tuple[int, float]]:
    """Largest difference from Pillow's pixels in levels of 255, and the share of values that differ."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("released", "v2 on uint8", *decoders)}
    for path in paths[:12]:
        expected = squash(open_image(path), size).astype(int)
        for name, way in (("released", "released"), ("v2 on uint8", "v2")):
            peer.ask(way, 0, [path, folder / "pixels.npy"])
            found[name].append(np.abs(np.load(folder / "pixels.npy") - expected))
        for name, decode in decoders.items():
            found[name].append(np.abs(decode([path.read_bytes()])[0] - expected))
    return {name: (max(map(np.max, some)), np.mean([(one > 0).mean() for one in some])) for name, some in found.items()}


def main(argv: list[str] | None = None) -> None:
    """Measures, prints a table with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer_python", type=path_argument, required=True, help="Python with torch and torchvision")
    parser.add_argument("--pictures", type=path_argument, help="folder with JPEG files (default: made ones)")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = sorted(arguments.pictures.glob("*.jp*g")) if arguments.pictures else make_pictures(folder, 96)
        if not given:
            raise ValueError(f"{arguments.pictures} has no .jpg or .jpeg file")
        _measure(arguments, given, folder)


def _measure(arguments: argparse.Namespace, paths: list[Path], folder: Path) -> None:
    size, processes, batch, seconds = arguments.size, arguments.processes, arguments.batch, arguments.seconds
    kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1e3
    print(f"{len(paths)} files of {kilobytes:.0f} kB to {size} pixels; {processes} processes, {os.cpu_count()} cores")
    with contextlib.ExitStack() as stack:
        peer = Peer(arguments.peer_python, size, processes, batch)
        stack.callback(peer.close)
        names = {"ours": True} if fastest_resize() is squash else {"ours": True, "ours, Pillow": False}
        workers = {name: stack.enter_context(ImageWorkers(size, processes, numba=use)) for name, use in names.items()}
        decoders = {name: some.decode for name, some in workers.items()}
        decoders["ours, threads"] = lambda images: decode_images(images, size)
        measured: dict[str, Callable[[], float]] = {
            "released": lambda: peer.ask("released", seconds, [*paths]),
            "v2 on uint8": lambda: peer.ask("v2", seconds, [*paths]),
        } | {
            name: lambda decode=decode: per_second(ours(paths, batch, decode), seconds)
            for name, decode in decoders.items()
        }
        speeds: dict[str, list[float]] = {name: [] for name in measured}
        for number in range(arguments.rounds):
            # Every other round backwards, so that a machine that others use favors none.
            for name in list(measured)[:: 1 if number % 2 == 0 else -1]:
                speeds[name].append(measured[name]())
        away = deviations(peer, decoders, paths, size, folder)
    base = statistics.median(speeds["released"])
    print(f"{'':14}{'pictures/s':>11}{'lowest':>9}{'highest':>9}{'ratio':>7}  from Pillow: levels, share")
    for name, values in speeds.items():
        middle = statistics.median(values)
        levels = f"{away[name][0]}, {away[name][1]:.3%}"
        print(f"{name:14}{middle:>11,.0f}{min(values):>9,.0f}{max(values):>9,.0f}{middle / base:>7.2f}  {levels}")


if __name__ == "__main__":
    run(main)
