"""Prometheus metrics: those of the HTTP front, and whatever numbers the engine reports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ygglight.serving.backend import Backend

# Seconds. Finer than Prometheus' defaults where a token lies: 5 ms to 1 s.
_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class EngineCollector(Collector):
    """Reads ``backend.metrics()`` whenever it is scraped.

    Args:
        backend: The engine.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def describe(self) -> list[Metric]:
        """Nothing: names are known at the scrape only, and the engine need not be asked at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """One family a number; a name that ends in ``_total`` is a counter."""
        for name, value in self._backend.metrics().items():
            full = "ygglight_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            help_text = name.replace("_", " ")
            if full.endswith("_total"):
                yield CounterMetricFamily(full, help_text, value=float(value))
            else:
                yield GaugeMetricFamily(full, help_text, value=float(value))


class Metrics:
    """The metrics of one application, in a registry of its own: a process may serve more than once.

    Args:
        backend: The engine.
    """

    def __init__(self, backend: Backend) -> None:
        self._registry = registry = CollectorRegistry()
        self.responses = Counter(
            "ygglight_http_requests", "answers to requests for text", ["endpoint", "code"], registry=registry
        )
        self.in_flight = Gauge("ygglight_http_requests_in_flight", "requests under way", registry=registry)
        self.cancelled = Counter(
            "ygglight_http_requests_cancelled", "requests whose client left early", registry=registry
        )
        self.prompt_tokens = Counter(
            "ygglight_prompt_tokens", "tokens of accepted prompts", ["model"], registry=registry
        )
        self.answer_tokens = Counter("ygglight_answer_tokens", "tokens answered", ["model"], registry=registry)
        self.first_token = Histogram(
            "ygglight_time_to_first_token_seconds", "from the request to its first token", ["model"],
            buckets=_REQUEST_BUCKETS, registry=registry,
        )  # fmt: skip
        self.per_token = Histogram(
            "ygglight_time_per_output_token_seconds", "mean time per token of an answer after the first", ["model"],
            buckets=_TOKEN_BUCKETS, registry=registry,
        )  # fmt: skip
        registry.register(EngineCollector(backend))

    def observe(
        self, model: str, arrival: float, first: Sequence[float | None], last: Sequence[float], tokens: Sequence[int]
    ) -> None:
        """Takes in the choices of one request, finished or not.

        Args:
            model: Name that was asked for. arrival: when it came, in seconds. first, last: when the first and the
                latest token of each choice came. tokens: how many.
        """
        self.answer_tokens.labels(model).inc(sum(tokens))
        for start, end, count in zip(first, last, tokens, strict=True):
            if start is not None:
                self.first_token.labels(model).observe(start - arrival)
                if count > 1:
                    self.per_token.labels(model).observe((end - start) / (count - 1))

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
