"""Prometheus' text format, version 0.0.4, written fast: the event loop waits for every scrape."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

type Labels = Mapping[str, str]


def text_of(labels: Labels) -> str:
    """Labels as they stand after a name, sorted; empty where there are none."""
    if not labels:
        return ""
    pairs = [f'{name}="{value.translate(_ESCAPES)}"' for name, value in sorted(labels.items())]
    return "{" + ",".join(pairs) + "}"


def family(name: str, kind: str, documentation: str, samples: Iterable[str]) -> str:
    """A series with all its samples, which end with a newline each.

    kind: counter, gauge or histogram. name: a counter's ends with _total.
    """
    return f"# HELP {name} {documentation}\n# TYPE {name} {kind}\n" + "".join(samples)


def sample(name: str, value: float, labels: Labels) -> str:
    """One line."""
    return f"{name}{text_of(labels)} {float(value)}\n"


class HistogramLines:
    """The samples of one histogram; all but the numbers is written once.

    bounds: of the buckets, ascending; the last one, for all that are larger, is not among them.
    """

    def __init__(self, name: str, bounds: Sequence[float], labels: Labels) -> None:
        ends = [*(repr(float(bound)) for bound in bounds), "+Inf"]
        self._heads = [f"{name}_bucket{text_of({**labels, 'le': end})} " for end in ends]
        self._sum = f"{name}_sum{text_of(labels)} "
        self._count = f"{name}_count{text_of(labels)} "

    def lines(self, counts: Sequence[int], total: float) -> str:
        """counts: values by bucket, the last one included; total: their sum."""
        sums = list(accumulate(counts))
        buckets = [f"{head}{n}\n" for head, n in zip(self._heads, sums, strict=True)]
        return f"{''.join(buckets)}{self._sum}{total}\n{self._count}{sums[-1]}\n"


class Histogram:
    """A histogram of what one thread observes."""

    def __init__(
        self, name: str, documentation: str, bounds: Sequence[float], labels: Labels
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = tuple(bounds)
        self._lines = HistogramLines(name, bounds, labels)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def render(self) -> str:
        """The whole family."""
        lines = self._lines.lines(self._counts, self._total)
        return family(self._name, "histogram", self._documentation, [lines])


class Counter:
    """The value of a counter that one thread keeps."""

    def __init__(self) -> None:
        self.value = 0

    def inc(self) -> None:
        """Counts one more."""
        self.value += 1
