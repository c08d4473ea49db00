"""Metrics for Prometheus: requests, errors, queue, batch sizes and latencies."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from serving.limits import Admission

if TYPE_CHECKING:
    from serving.search import ServedIndex

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
SEARCH_BUCKETS = (0.0005, 0.001, 0.0025, *LATENCY_BUCKETS)  # seconds
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # texts

values.ValueClass = values.MutexValue  # no files, even if PROMETHEUS_MULTIPROC_DIR is set for something else
disable_created_metrics()  # no creation time beside each count


class _IndexCollector:
    """The version and size of an index, at the time of the question."""

    def __init__(self, index: "ServedIndex") -> None:
        self._index = index

    def collect(self) -> Iterator[Metric]:
        """For Prometheus' registry."""
        state = self._index.state
        yield InfoMetricFamily("semantic_index_index", "The index in service", {"version": state.version})
        yield GaugeMetricFamily("semantic_index_index_documents", "Documents of the index", state.documents)


class Metrics:
    """Counts what a service does; safe to use from several threads. index: the one that it searches, if any."""

    def __init__(self, admission: Admission, index: "ServedIndex | None" = None) -> None:
        self._registry = CollectorRegistry()
        common = {"namespace": "semantic_index", "registry": self._registry}
        self._requests = Counter("requests", "Answered requests, by protocol", ["protocol"], **common)
        self._errors = Counter("errors", "Answers with an error, by err_no", ["err_no"], **common)
        queue = Gauge("queue_size", "Requests and texts that aren't answered yet", ["unit"], **common)
        queue.labels("requests").set_function(lambda: admission.requests)
        queue.labels("texts").set_function(lambda: admission.texts)
        self._request_duration = Histogram(
            "request_duration_seconds", "Time from a request's arrival to its answer", buckets=LATENCY_BUCKETS, **common
        )
        self._cut_texts = Counter("cut_texts", "Texts with more tokens than max_seq_length, which were cut", **common)
        self._unknown_texts = Counter("unknown_texts", "Texts of which half of the tokens or more are [UNK]", **common)
        self._batch_size = Histogram("batch_size_texts", "Texts encoded together", buckets=BATCH_BUCKETS, **common)
        self._batch_duration = Histogram(
            "batch_duration_seconds", "Time to encode a batch", buckets=LATENCY_BUCKETS, **common
        )
        if index is not None:
            self._registry.register(_IndexCollector(index))
            self._searches = Counter("searches", "Queries that the index was searched for", **common)
            self._candidates = Counter("search_candidates", "Documents that searches found", **common)
            self._search_duration = Histogram(
                "search_duration_seconds", "Time to search for a batch of queries", buckets=SEARCH_BUCKETS, **common
            )

    def answered(self, protocol: str, number: int, seconds: float) -> None:
        """Counts an answered request; protocol: "grpc" or "http"; number: its err_no."""
        self._requests.labels(protocol).inc()
        if number:
            self._errors.labels(number).inc()
        self._request_duration.observe(seconds)

    def unseen(self, cut: int, mostly_unknown: int) -> None:
        """Counts texts that the model doesn't see as a whole: cut ones, and mostly unknown ones."""
        self._cut_texts.inc(cut)
        self._unknown_texts.inc(mostly_unknown)

    def encoded(self, texts: int, seconds: float) -> None:
        """Counts a batch."""
        self._batch_size.observe(texts)
        self._batch_duration.observe(seconds)

    def searched(self, queries: int, candidates: int, seconds: float) -> None:
        """Counts a batch of searches."""
        self._searches.inc(queries)
        self._candidates.inc(candidates)
        self._search_duration.observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
