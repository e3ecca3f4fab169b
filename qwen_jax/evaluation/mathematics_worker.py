"""The process that compares answers for `mathematics`: JSON lines in, JSON lines out, until its input ends.

A line in is `[prediction, gold, seconds]`, a line out `true` or `false`; the first line out is `"ready"`. The library
(math-verify, on sympy) has no time limit of its own here: the system ends this process when a comparison has taken
`seconds` of processor time or too much memory. So it outlives its parent by no more than that.
"""

import json
import logging
import math
import resource
import sys

_MAX_BYTES = 4 << 30


def main() -> None:
    """Answers requests until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, _MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)  # the library warns on each call that it has no time limit
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    ways = (LatexExtractionConfig(), ExprExtractionConfig())

    def same(prediction: str, gold: str) -> bool:
        # LaTeX is found between dollars only. Gold comes first: the order decides what is taken for what.
        read = [parse(f"${text}$", ways, parsing_timeout=None) for text in (gold, prediction)]  # ty: ignore[invalid-argument-type]
        return all(read) and verify(*read, timeout_seconds=None)

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        prediction, gold, seconds = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            result = same(prediction, gold)
        except Exception:  # sympy raises anything on what it cannot read
            result = False
        print(json.dumps(bool(result)), flush=True)


if __name__ == "__main__":
    main()
