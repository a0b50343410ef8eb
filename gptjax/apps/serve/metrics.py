"""What a server counts and times, in the text format of Prometheus."""

from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ModelMeters(NamedTuple):
    """What is counted for each model."""

    prompt_tokens: Any
    reused_tokens: Any
    drawn_tokens: Any
    first: Any
    between: Any


class BatchMeters(NamedTuple):
    """What is counted for each batch, which models with one base share."""

    queue: Any
    slots: Any
    slots_used: Any


class Meters:
    """The counters and clocks of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def make(kind, name: str, about: str, *labels: str, **more):
            return kind(f"gptjax_{name}", about, registry=self._registry, labelnames=labels, **more)

        self.responses = make(Counter, "http_responses", "HTTP responses by status", "code")
        self._batch = BatchMeters(
            make(Gauge, "queue_length", "Texts that wait for a slot", "batch"),
            make(Gauge, "slots", "Texts that can be generated at the same time", "batch"),
            make(Gauge, "slots_used", "Texts that are read or generated now", "batch"),
        )
        timed = {"buckets": SECONDS}
        self._model = ModelMeters(
            make(Counter, "prompt_tokens", "Tokens of prompts, those reused included", "model"),
            make(Counter, "reused_prompt_tokens", "Tokens of prompts that were not read again", "model"),
            make(Counter, "generated_tokens", "Tokens drawn; its rate is the throughput", "model"),
            make(Histogram, "time_to_first_token_seconds", "From arrival to first token", "model", **timed),
            make(Histogram, "time_between_tokens_seconds", "Between tokens of a text", "model", **timed),
        )
        self._known: dict[str, ModelMeters] = {}

    def batch(self, name: str) -> BatchMeters:
        """Return the meters of a batch."""
        return BatchMeters(*(meter.labels(name) for meter in self._batch))

    def model(self, name: str) -> ModelMeters:
        """Return the meters of a model."""
        if name not in self._known:
            self._known[name] = ModelMeters(*(meter.labels(name) for meter in self._model))
        return self._known[name]

    def forget(self, name: str) -> None:
        """Drop what was counted for a model."""
        if self._known.pop(name, None) is not None:
            for meter in self._model:
                meter.remove(name)

    def text(self) -> bytes:
        """Return all values as Prometheus reads them."""
        return generate_latest(self._registry)
