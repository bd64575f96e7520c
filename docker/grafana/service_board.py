"""What operators look at first."""

from panels import HERE, IMAGES_PER_S, LOG_SCALE, PER_S, Json, Rows, panel, quantiles, stat


def service() -> Rows:
    """Rows of panels."""
    classify = f'igd_request_duration_seconds_bucket{{{HERE},endpoint="classify"}}'
    store = f"igd_store_duration_seconds_bucket{PER_S}"
    stage = f"igd_stage_duration_seconds_bucket{PER_S}"
    return [
        (
            "Now",
            [
                stat("Replicas up", "none", 'sum(up{job="ig-defense"})'),
                stat("Requests", "reqps", f"sum(rate(igd_requests_total{PER_S}))"),
                stat("Images", IMAGES_PER_S, f"sum(rate(igd_predictions_total{PER_S}))"),
                stat("Store", "none", f"min(igd_store_up{{{HERE}}})", mappings=up_or_down()),
                stat("Model", "none", f"igd_model_info{{{HERE}}}", "{{model}}, {{dtype}}, {{compiler}}", text=True),
                stat("Importance", "none", f"igd_importance_info{{{HERE}}}", "{{method}} {{version}}", text=True),
            ],
        ),
        (
            "Traffic and outcomes",
            [
                panel(
                    "Requests by endpoint",
                    "reqps",
                    (f"sum by (endpoint) (rate(igd_requests_total{PER_S}))", "{{endpoint}}"),
                ),
                panel(
                    "/classify by outcome",
                    "reqps",
                    (
                        f'sum by (outcome) (rate(igd_requests_total{{{HERE},endpoint="classify"}}[$__rate_interval]))',
                        "{{outcome}}",
                    ),
                ),
                panel(
                    "Rejected by reason", "reqps", (f"sum by (reason) (rate(igd_rejected_total{PER_S}))", "{{reason}}")
                ),
                panel("/classify, seconds", "s", *quantiles(classify), custom=LOG_SCALE),
            ],
        ),
        (
            "Stages",
            [
                panel(
                    "p95 by stage",
                    "s",
                    (f"histogram_quantile(0.95, sum by (le, stage) (rate({stage})))", "{{stage}}"),
                    custom=LOG_SCALE,
                ),
                panel(
                    "Mean by stage",
                    "s",
                    (
                        f"sum by (stage) (rate(igd_stage_duration_seconds_sum{PER_S}))"
                        f" / sum by (stage) (rate(igd_stage_duration_seconds_count{PER_S}))",
                        "{{stage}}",
                    ),
                    custom=LOG_SCALE,
                ),
            ],
        ),
        (
            "Queue and batches",
            [
                panel(
                    "Images waiting and in flight",
                    "none",
                    (f"sum by (instance) (igd_queue_depth{{{HERE}}})", "{{instance}} waiting"),
                    (f"sum by (instance) (igd_in_flight{{{HERE}}})", "{{instance}} in flight"),
                ),
                panel(
                    "Images in a batch",
                    "none",
                    (f"sum(rate(igd_batch_size_sum{PER_S})) / sum(rate(igd_batch_size_count{PER_S}))", "mean"),
                    *quantiles(f"igd_batch_size_bucket{{{HERE}}}")[1:2],
                ),
                panel("Batches", "ops", (f"sum by (instance) (rate(igd_batch_size_count{PER_S}))", "{{instance}}")),
                panel(
                    "Seconds since the last batch",
                    "s",
                    (f"time() - (igd_last_batch_timestamp_seconds{{{HERE}}} > 0)", "{{instance}}"),
                ),
            ],
        ),
        (
            "Store",
            [
                panel(
                    "Store, p95 by operation",
                    "s",
                    (
                        f"histogram_quantile(0.95, sum by (le, operation) (rate({store})))",
                        "{{operation}}",
                    ),
                    custom=LOG_SCALE,
                ),
                panel(
                    "Store errors",
                    "ops",
                    (f"sum by (operation) (rate(igd_store_errors_total{PER_S}))", "{{operation}}"),
                ),
            ],
        ),
        (
            "Process",
            [
                panel("CPU", "percentunit", (f"rate(process_cpu_seconds_total{PER_S})", "{{instance}}"), width=8),
                panel(
                    "Memory",
                    "bytes",
                    (f"process_resident_memory_bytes{{{HERE}}}", "{{instance}}"),
                    (f"igd_gpu_memory_bytes{{{HERE}}}", "{{instance}} GPU, {{kind}}"),
                    width=8,
                ),
                panel("Open files", "none", (f"process_open_fds{{{HERE}}}", "{{instance}}"), width=8),
            ],
        ),
    ]


def up_or_down() -> list[Json]:
    """Words for 1 and 0."""
    options = {"0": {"text": "down", "color": "red", "index": 0}, "1": {"text": "up", "color": "green", "index": 1}}
    return [{"type": "value", "options": options}]
