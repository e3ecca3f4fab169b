"""Code interpreter: time to a kernel that answers, and of a snippet, against jupyter_client with ipykernel.

    python benchmarks/interpreter.py --kernels=10 --snippets=200

The peer starts the same ipykernel without any isolation, as code interpreters do: `KernelManager.start_kernel`, then
its blocking client. Both alternate in one run. A start ends with the result of `1 + 1`; the first figure imports
matplotlib and draws a line. Prints medians, and the ratios of the peer's times to ours.
"""

import argparse
import statistics
import time

from jupyter_client.manager import KernelManager

from qwen_jax.agents.interpreter import Interpreter

FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"


class Ours:
    """One kernel of ours."""

    def __init__(self):
        self.interpreter = Interpreter()

    def run(self, code: str) -> int:
        """Number of outputs."""
        done = self.interpreter.execute(code)
        assert done.ok, done
        return len(done.outputs)

    def close(self) -> None:
        """Ends it."""
        self.interpreter.close()


class Peer:
    """One kernel of jupyter_client."""

    def __init__(self):
        self.manager = KernelManager()
        self.manager.start_kernel()
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def run(self, code: str) -> int:
        """Number of outputs."""
        outputs = []
        reply = self.client.execute_interactive(code, output_hook=outputs.append, timeout=120)
        assert reply["content"]["status"] == "ok", reply
        return sum(one["msg_type"] in ("execute_result", "display_data") for one in outputs)

    def close(self) -> None:
        """Ends it."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=int, default=10, help="starts of each")
    parser.add_argument("--snippets", type=int, default=200, help="in one kernel of each")
    arguments = parser.parse_args()
    sides = {"ours": Ours, "peer": Peer}
    times: dict[tuple[str, str], list[float]] = {}

    def timed(what: str, name: str, call):
        began = time.perf_counter()
        result = call()
        times.setdefault((what, name), []).append(time.perf_counter() - began)
        return result

    def start(side):
        made = side()
        assert made.run("1 + 1") == 1
        return made

    timed("first start of the process", "ours", lambda: start(Ours)).close()
    timed("first start of the process", "peer", lambda: start(Peer)).close()
    for _ in range(arguments.kernels):
        for name, side in sides.items():
            made = timed("start", name, lambda side=side: start(side))
            assert timed("first figure after it", name, lambda made=made: made.run(FIGURE)) == 1
            timed("end", name, made.close)
    kernels = {name: start(side) for name, side in sides.items()}
    for index in range(arguments.snippets):
        for name, made in kernels.items():
            timed("snippet", name, lambda made=made, index=index: made.run(f"{index} + 1"))
    for made in kernels.values():
        made.close()
    print("| median of | ours, s | peer, s | ratio |\n|---|--:|--:|--:|")
    for what in dict.fromkeys(what for what, _ in times):
        ours, peer = (statistics.median(times[what, name]) for name in sides)
        print(f"| {what} | {ours:.4f} | {peer:.4f} | {peer / ours:.1f} |")


if __name__ == "__main__":
    main()
