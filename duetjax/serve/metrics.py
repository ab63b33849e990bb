"""The series at /metrics: vLLM's names and buckets where vLLM has them, our own as duetjax_*."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from duetjax.engine import Engine
from duetjax.policy.request import FinishReason

_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Metrics:
    """One app's registry: what it observes per request, and the engine's own counts at scrape."""

    def __init__(self, client: Engine, model_name: str, compilations: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(client, model_name, compilations))
        self._model_name = model_name
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's arrival", _TTFT_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between consecutive outputs", _PER_TOKEN_BUCKETS
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "A request's mean time per token after its first",
            _PER_TOKEN_BUCKETS,
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", _REQUEST_BUCKETS
        )
        finished = Counter(
            "vllm:request_success",
            "Generations by how they ended",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.finished = {r: finished.labels(model_name, r.value) for r in FinishReason}
        self._refused = Counter(
            "duetjax_refused_requests",
            "Requests turned away or given up, by the limit they met or the error's code",
            ["reason"],
            registry=self.registry,
        )
        self._refused.labels("queue_full")

    def refuse(self, reason: str) -> None:
        """Counts a request that was turned away or given up."""
        self._refused.labels(reason).inc()

    def render(self) -> bytes:
        """The text exposition format of every series."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", documentation, ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._model_name)


class _EngineCollector(Collector):
    """Reads the engine's stats when scraped, so that they are never older than the scrape."""

    def __init__(self, client: Engine, model_name: str, compilations: Callable[[], int]) -> None:
        self._client = client
        self._compilations = compilations
        self._labels = {"model_name": model_name}

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats()
        in_use = stats.pages_held + stats.pages_quarantined
        usage = in_use / stats.pages_total if stats.pages_total else 0.0
        yield self._gauge("vllm:num_requests_running", "Requests being computed", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue", stats.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "KV pages in use, 1 is all of them", usage)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens sampled", stats.generation_tokens)
        yield self._counter("vllm:num_preemptions", "Requests put back", stats.preemptions)
        yield self._counter(
            "vllm:prefix_cache_queries", "Tokens looked up when admitted", stats.prefix_queries
        )
        yield self._counter(
            "vllm:prefix_cache_hits", "Of those, tokens found computed", stats.prefix_hits
        )
        pages = GaugeMetricFamily("duetjax_pages", "KV pages by state", labels=["state"])
        pages.add_metric(["free"], stats.pages_free)
        pages.add_metric(["held"], stats.pages_held)
        pages.add_metric(["quarantined"], stats.pages_quarantined)
        pages.add_metric(["cached"], stats.pages_cached)
        yield pages
        decided = CounterMetricFamily(
            "duetjax_decisions", "Launches by what the policy decided", labels=["outcome"]
        )
        for outcome, count in stats.decisions:
            decided.add_metric([outcome], count)
        yield decided
        if stats.predicted_ttft_ms is not None:
            ttft = "Until a short prompt that comes now has its first token, by prediction"
            seconds = stats.predicted_ttft_ms / 1e3
            yield GaugeMetricFamily("duetjax_predicted_ttft_seconds", ttft, seconds)
        if stats.prediction_error is not None:
            error = "Median relative error of predicted launch times, of late"
            yield GaugeMetricFamily("duetjax_prediction_error", error, stats.prediction_error)
            trusted = "1 while predictions are near enough to be planned by"
            yield GaugeMetricFamily(
                "duetjax_predictions_trusted", trusted, float(stats.predictions_trusted)
            )
        if self._client.rung:
            rung = GaugeMetricFamily("duetjax_rung", "How launches run; 1", labels=["rung"])
            rung.add_metric([self._client.rung], 1)
            yield rung
        healthy = "1 while the engine runs and takes requests; 0 before and after"
        yield GaugeMetricFamily("duetjax_engine_healthy", healthy, self._client.is_healthy)
        silence = "What the slowest step in flight, or round of the engine, has taken so far"
        yield GaugeMetricFamily("duetjax_silence_seconds", silence, self._client.silence)
        compiled = "Programs compiled by XLA in this process; constant once it serves"
        yield CounterMetricFamily("duetjax_compilations", compiled, self._compilations())

    def _gauge(self, name: str, documentation: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, documentation: str, value: float) -> Metric:
        family = CounterMetricFamily(name, documentation, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family
