"""What a server counts and times, in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Meters:
    """The counters and clocks of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def make(kind, name: str, about: str, **more):
            return kind(f"gptjax_{name}", about, registry=self._registry, **more)

        self.responses = make(Counter, "http_responses", "HTTP responses by status", labelnames=("code",))
        self.queue = make(Gauge, "queue_length", "Texts that wait for a slot")
        self.slots = make(Gauge, "slots", "Texts that can be generated at the same time")
        self.slots_used = make(Gauge, "slots_used", "Texts that are read or generated now")
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of prompts, those reused included")
        self.reused_tokens = make(Counter, "reused_prompt_tokens", "Tokens of prompts that were not read again")
        self.drawn_tokens = make(Counter, "generated_tokens", "Tokens drawn; its rate is the throughput")
        self.first = make(Histogram, "time_to_first_token_seconds", "From arrival to first token", buckets=SECONDS)
        self.between = make(Histogram, "time_between_tokens_seconds", "Between tokens of a text", buckets=SECONDS)

    def text(self) -> bytes:
        """Return all values as Prometheus reads them."""
        return generate_latest(self._registry)
