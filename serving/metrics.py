"""Counts of requests, errors, batch sizes and latencies, for Prometheus."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)

from serving.limits import Admission

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # texts

values.ValueClass = values.MutexValue  # no files, where PROMETHEUS_MULTIPROC_DIR is set for something else
disable_created_metrics()  # else there is a time beside each count


class Metrics:
    """What a service has done since it started; safe to use from several threads."""

    def __init__(self, admission: Admission) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("requests", "Requests that were answered, by way in", ["way"], registry=registry)
        self._errors = Counter("errors", "Answers that were errors, by err_no", ["err_no"], registry=registry)
        waiting = Gauge("waiting", "Requests and texts that aren't answered yet", ["of"], registry=registry)
        waiting.labels("requests").set_function(lambda: admission.requests)
        waiting.labels("texts").set_function(lambda: admission.texts)
        self._request_seconds = Histogram(
            "request_seconds", "From a request's arrival to its answer", buckets=LATENCY_BUCKETS, registry=registry
        )
        self._batch_texts = Histogram(
            "batch_texts", "Texts that were encoded together", buckets=BATCH_BUCKETS, registry=registry
        )
        self._batch_seconds = Histogram(
            "batch_seconds", "What encoding them took", buckets=LATENCY_BUCKETS, registry=registry
        )

    def answered(self, way: str, number: int, seconds: float) -> None:
        """A request was answered; way: "rpc" or "http"; number: its err_no."""
        self._requests.labels(way).inc()
        if number:
            self._errors.labels(number).inc()
        self._request_seconds.observe(seconds)

    def encoded(self, texts: int, seconds: float) -> None:
        """Texts were encoded together."""
        self._batch_texts.observe(texts)
        self._batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """Everything, with what is being worked on right now."""
        return generate_latest(self._registry)
