"""The metrics of the server, in Prometheus' text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # bounds of the buckets
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """A histogram of durations in seconds."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        """Return the lines of the metric `name`."""
        lines, below = [], 0
        for border, count in zip([*map(str, SECONDS), "+Inf"], self._counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{border}"}} {below}')
        return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {below}"]


class Metrics:
    """Counters of the requests so far. The event loop alone changes them."""

    def __init__(self) -> None:
        self.requests = Counter[tuple[str, int]]()  # by route and status
        self.prompt_tokens = self.completion_tokens = 0
        self.seconds, self.first_token_seconds = Histogram(), Histogram()

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Return all metrics as text. `gauges` adds current values by name, each as (help text, value)."""
        counted = sorted(self.requests.items())
        requests = [f'{{route="{route}",status="{status}"}} {n}' for (route, status), n in counted]
        blocks = [
            _block("requests_total", "counter", "Requests by route and status.", requests),
            _block("prompt_tokens_total", "counter", "Tokens of prompts.", [f" {self.prompt_tokens}"]),
            _block("completion_tokens_total", "counter", "Tokens of answers.", [f" {self.completion_tokens}"]),
        ]
        blocks += [_block(name, "gauge", told, [f" {value:g}"]) for name, (told, value) in gauges.items()]
        for name, told, histogram in (
            ("request_seconds", "Time from a request to the end of its response.", self.seconds),
            ("first_token_seconds", "Time from a request to the first token of its answer.", self.first_token_seconds),
        ):
            head = _block(name, "histogram", told, [])
            blocks.append("\n".join([head, *histogram.lines(f"softprompt_{name}")]))
        return "\n".join(blocks) + "\n"


def _block(name: str, kind: str, told: str, samples: Sequence[str]) -> str:
    head = [f"# HELP softprompt_{name} {told}", f"# TYPE softprompt_{name} {kind}"]
    return "\n".join([*head, *(f"softprompt_{name}{sample}" for sample in samples)])
