"""What moves when somebody attacks."""

from panels import HERE, IMAGES_PER_S, PER_S, Rows, if_nan, panel, quantiles, stat


def defense() -> Rows:
    """Rows of panels."""
    predictions = f"sum(rate(igd_predictions_total{PER_S}))"
    share = {
        name: f"sum(rate(igd_{name}_total{PER_S})) / {predictions}"
        for name in ("defense_changed", "pseudo_label_disagreement")
    }
    margin = f"igd_defended_margin_bucket{{{HERE}}}"
    return [
        (
            "Now",
            [
                stat("Images", IMAGES_PER_S, predictions),
                stat("Changed by the defense", "percentunit", share["defense_changed"]),
                stat("Pseudo-label disagrees", "percentunit", share["pseudo_label_disagreement"]),
                stat("Median margin", "none", quantiles(margin)[0][0], decimals=2),
                stat("Age of the importance", "s", f"max(igd_importance_age_seconds{{{HERE}}})"),
                stat(
                    "Agreement with float32",
                    "percentunit",
                    f"min(igd_precision_agreement{{{HERE}}})",
                    mappings=if_nan("not compared"),
                ),
            ],
        ),
        (
            "Signs of an attack",
            [
                panel(
                    "Predictions changed by the defense",
                    "percentunit",
                    (share["defense_changed"], "share"),
                    ('job:igd_defense_changed:ratio_rate5m{job="ig-defense"}', "share in 5 minutes"),
                ),
                panel(
                    "Noisy first pass against the clean one",
                    "percentunit",
                    (share["pseudo_label_disagreement"], "share"),
                    ('job:igd_pseudo_label_disagreement:ratio_rate5m{job="ig-defense"}', "share in 5 minutes"),
                ),
                panel(
                    "Defended margin (first minus second probability)",
                    "none",
                    *[
                        (f"histogram_quantile({q}, sum by (le) (rate({margin}[$__rate_interval])))", f"p{q * 100:g}")
                        for q in (0.1, 0.25, 0.5)
                    ],
                    max=1,
                ),
                panel(
                    "Margins up to 0.1",
                    "percentunit",
                    (
                        f'sum(rate(igd_defended_margin_bucket{{{HERE},le="0.1"}}[$__rate_interval]))'
                        f" / sum(rate(igd_defended_margin_count{PER_S}))",
                        "share",
                    ),
                    ('job:igd_defended_margin_small:ratio_rate5m{job="ig-defense"}', "share in 5 minutes"),
                ),
            ],
        ),
        (
            "Predictions",
            [
                panel(
                    "By class (20 most frequent)",
                    IMAGES_PER_S,
                    (f"topk(20, sum by (class) (rate(igd_predictions_total{PER_S})))", "{{class}}"),
                ),
                panel(
                    "By class, over the time shown",
                    "none",
                    (
                        f"topk(20, sum by (class) (increase(igd_predictions_total{{{HERE}}}[$__range])))",
                        "{{class}}",
                    ),
                    kind="bargauge",
                    decimals=0,
                ),
            ],
        ),
        (
            "What is served",
            [
                panel(
                    "Replicas by importance version",
                    "none",
                    (f"count by (version, method) (igd_importance_info{{{HERE}}})", "{{method}} {{version}}"),
                ),
                panel(
                    "Agreement with float32",
                    "percentunit",
                    (f"igd_precision_agreement{{{HERE}}}", "{{instance}}"),
                    min=0.9,
                    max=1,
                ),
            ],
        ),
    ]
