"""The ranking jobs; every replica shows all of them, hence the maxima."""

from panels import HERE, LOG_SCALE, Rows, if_nan, panel, quantiles, stat


def jobs() -> Rows:
    """Rows of panels."""
    every = f"max by (state) (igd_jobs{{{HERE}}})"
    return [
        (
            "Now",
            [
                stat("Running", "none", f'max(igd_jobs{{{HERE},state="running"}})'),
                stat("Queued", "none", f'max(igd_jobs{{{HERE},state="queued"}})'),
                stat("Interrupted", "none", f'max(igd_jobs{{{HERE},state="interrupted"}})'),
                stat("Failed (kept)", "none", f'max(igd_jobs{{{HERE},state="failed"}})'),
                stat(
                    "Progress",
                    "percentunit",
                    f"max(igd_job_progress_ratio{{{HERE}}})",
                    mappings=if_nan("none runs"),
                ),
                stat("Time left", "s", f"max(igd_job_eta_seconds{{{HERE}}})", mappings=if_nan("unknown")),
            ],
        ),
        (
            "Jobs",
            [
                panel("Jobs by state", "none", (every, "{{state}}")),
                panel(
                    "Progress of the running job",
                    "percentunit",
                    (f"max(igd_job_progress_ratio{{{HERE}}})", "done"),
                    max=1,
                ),
                panel("Time left", "s", (f"max(igd_job_eta_seconds{{{HERE}}})", "time left")),
                panel("Longest wait for a worker", "s", (f"max(igd_job_oldest_queued_seconds{{{HERE}}})", "waiting")),
                panel(
                    "Ended in the last hour",
                    "none",
                    (
                        f"max by (state) (increase(igd_job_duration_seconds_count{{{HERE}}}[1h]))",
                        "{{state}}",
                    ),
                ),
                panel(
                    "Mean duration of those ended in the last hour",
                    "s",
                    (
                        f"max by (state) (increase(igd_job_duration_seconds_sum{{{HERE}}}[1h])"
                        f" / increase(igd_job_duration_seconds_count{{{HERE}}}[1h]))",
                        "{{state}}",
                    ),
                ),
            ],
        ),
        (
            "What came of them",
            [
                panel("Age of the importance served", "s", (f"igd_importance_age_seconds{{{HERE}}}", "{{instance}}")),
                panel(
                    "/classify p99 meanwhile",
                    "s",
                    quantiles(f'igd_request_duration_seconds_bucket{{{HERE},endpoint="classify"}}')[2],
                    custom=LOG_SCALE,
                ),
            ],
        ),
    ]
