"""A service's metrics, as metrics of Ray that Prometheus reads (docs/serving.md lists them)."""

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0]


class RayMeter:
    """Records the metrics of this replica."""

    def __init__(self) -> None:
        self._seconds = Histogram(
            "visual_memory_stage_seconds",
            "Seconds of a stage: request, embed, search, decide, refresh.",
            boundaries=SECONDS,
            tag_keys=("stage",),
        )
        self._answers = Counter("visual_memory_answers", "Questions answered.", tag_keys=("verb", "partial"))
        self._refusals = Counter("visual_memory_refusals", "Requests refused, by HTTP status.", tag_keys=("status",))
        self._abstentions = Counter("visual_memory_abstentions", "Decisions that abstained.")
        self._confidence = Histogram("visual_memory_confidence", "Confidence of decisions.", boundaries=SHARES)
        self._told: tuple[int, int] | None = None
        self._version = Gauge("visual_memory_version", "The version that is answered by.")
        self._shards = Gauge("visual_memory_shards_answered", "Shards that took part in the last answer.")

    def took(self, stage: str, seconds: float) -> None:
        self._seconds.observe(seconds, {"stage": stage})

    def answered(self, verb: str, version: int, shards: int, *, partial: bool) -> None:
        self._answers.inc(1, {"verb": verb, "partial": str(partial).lower()})
        if (version, shards) != self._told:
            self._told = version, shards
            self._version.set(version)
            self._shards.set(shards)

    def decided(self, confidence: float, *, abstained: bool) -> None:
        self._confidence.observe(max(confidence, 1e-9))  # Ray's histograms refuse 0
        if abstained:
            self._abstentions.inc()

    def refused(self, status: int) -> None:
        self._refusals.inc(1, {"status": str(status)})
