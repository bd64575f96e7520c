"""What is counted, on values that one can check on paper; and that docs/metrics.md says so."""

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from math import isnan
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from defense import NeuronImportance
from importance_store import NoActiveImportance, StoreUnavailable
from service import defense_metrics
from service.defense_metrics import DefenseMetrics
from service.errors import BodiesFull, DeadlineExceeded, Draining, NotReady, QueueFull
from service.job_metrics import JobMetrics
from service.metrics import REASONS, Metrics
from service.schemas import JobProgress, JobState, RankingJob, RankRequest
from service.store_metrics import StoreMetrics
from service.store_monitor import StoreMonitor

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
NOW = datetime.now(UTC)


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def defense(registry, thread):
    metrics = DefenseMetrics(registry, thread)
    metrics.name_classes(["cat", "dog", "fox"])
    return metrics


def batch(*images):
    """[B, 3, 3] of (defended, undefended, class weights) each."""
    return np.array(images, np.float32)


CAT, DOG, CLOSE = [0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.32, 0.33, 0.35]


def test_predictions_are_counted_by_defended_class(registry, defense):
    defense.observe(batch([CAT, DOG, DOG], [CAT, CAT, CAT]))
    defense.observe(batch([DOG, DOG, DOG]))
    counts = [registry.get_sample_value("igd_predictions_total", {"class": name}) for name in ("cat", "dog", "fox")]
    assert counts == [2, 1, 0]


def test_what_the_defense_changes_and_where_the_passes_disagree_is_counted(registry, defense):
    defense.observe(batch([CAT, DOG, DOG], [CAT, CAT, DOG], [CAT, DOG, CAT], [DOG, DOG, DOG]))
    assert registry.get_sample_value("igd_defense_changed_total") == 2
    assert registry.get_sample_value("igd_pseudo_label_disagreement_total") == 2


def test_the_margin_is_between_the_two_most_probable_classes(registry, defense):
    defense.observe(batch([CAT, CAT, CAT], [CLOSE, CLOSE, CLOSE]))
    list(registry.collect())
    assert registry.get_sample_value("igd_defended_margin_count") == 2
    assert registry.get_sample_value("igd_defended_margin_sum") == pytest.approx(0.5 + 0.02)
    assert registry.get_sample_value("igd_defended_margin_bucket", {"le": "0.025"}) == 1


def test_one_scrape_shows_margins_and_predictions_of_the_same_images(registry, defense):
    defense.observe(batch([CAT, CAT, CAT]))
    (scrape,) = [{s.name: s.value for metric in registry.collect() for s in metric.samples if not s.labels}]
    assert scrape["igd_defended_margin_count"] == 1


def test_what_is_put_aside_is_counted_before_it_is_much(registry, thread, monkeypatch):
    monkeypatch.setattr(defense_metrics, "FOLD_BYTES", 100)
    metrics = DefenseMetrics(registry, thread)
    metrics.name_classes(["cat", "dog", "fox"])
    for _ in range(10):
        metrics.observe(batch([CAT, DOG, DOG]))
    thread.shutdown()
    assert len(metrics._aside) < 3


def test_classes_of_one_label_share_a_series(registry, thread):
    metrics = DefenseMetrics(registry, thread)
    metrics.name_classes(["crane", "dog", "crane"])
    metrics.observe(batch([CAT, CAT, CAT], [CLOSE, CLOSE, CLOSE]))
    assert registry.get_sample_value("igd_predictions_total", {"class": "crane"}) == 2


def job(name, state, *, progress=None, created=NOW, started=None, ended=None):
    return RankingJob(
        id=name,
        state=state,
        progress=progress or JobProgress(),
        request=RankRequest(),
        created_at=created,
        started_at=started,
        ended_at=ended,
    )


def test_jobs_are_shown_by_state_with_the_progress_of_the_one_that_runs(registry):
    metrics = JobMetrics(registry)
    assert isnan(registry.get_sample_value("igd_job_progress_ratio"))
    running = job("a", JobState.RUNNING, progress=JobProgress(done=25, total=100, rate=5, eta_s=15))
    metrics.show(["a", "b"], [running, job("b", JobState.QUEUED, created=datetime.now(UTC) - timedelta(minutes=5))])

    assert registry.get_sample_value("igd_jobs", {"state": "running"}) == 1
    assert registry.get_sample_value("igd_jobs", {"state": "failed"}) == 0
    assert registry.get_sample_value("igd_job_progress_ratio") == 0.25
    assert registry.get_sample_value("igd_job_eta_seconds") == 15
    assert registry.get_sample_value("igd_job_oldest_queued_seconds") == pytest.approx(300, abs=60)


def test_a_job_s_duration_is_counted_once_and_not_if_it_had_ended_before_the_first_look(registry):
    metrics = JobMetrics(registry)
    times = {"started": NOW - timedelta(seconds=30), "ended": NOW}
    metrics.show(["a", "b"], [job("a", JobState.SUCCEEDED, **times), job("b", JobState.RUNNING)])
    assert metrics.unknown(["c", "b", "a"]) == ["c", "b"]
    metrics.show(["c", "b", "a"], [job("b", JobState.FAILED, **times), job("c", JobState.CANCELLED, ended=NOW)])
    metrics.show(["c", "b", "a"], [])

    counts = {
        state: registry.get_sample_value("igd_job_duration_seconds_count", {"state": state})
        for state in ("succeeded", "failed", "cancelled")
    }
    assert counts == {"succeeded": 0, "failed": 1, "cancelled": 1}
    assert registry.get_sample_value("igd_job_duration_seconds_sum", {"state": "failed"}) == 30
    assert registry.get_sample_value("igd_jobs", {"state": "succeeded"}) == 1


def test_a_job_that_is_gone_from_the_store_is_not_shown(registry):
    metrics = JobMetrics(registry)
    metrics.show(["a"], [job("a", JobState.SUCCEEDED)])
    metrics.show([], [])
    assert registry.get_sample_value("igd_jobs", {"state": "succeeded"}) == 0


def test_failures_of_the_store_are_counted_and_its_answers_are_not(registry):
    metrics = StoreMetrics(registry)
    for error in (StoreUnavailable("away"), NoActiveImportance("none")):
        with pytest.raises(type(error)), metrics.timed("load"):
            raise error
    assert registry.get_sample_value("igd_store_errors_total", {"operation": "load"}) == 1
    assert registry.get_sample_value("igd_store_duration_seconds_count", {"operation": "load"}) == 2


def test_the_monitor_goes_on_while_the_store_is_away(registry, until):
    class Away:
        def ping(self):
            raise StoreUnavailable("away")

    monitor = StoreMonitor(Away(), None, StoreMetrics(registry), JobMetrics(registry), period_s=0.01)
    monitor.start()
    until(lambda: registry.get_sample_value("igd_store_errors_total", {"operation": "ping"}) > 2)
    monitor.stop()


def test_every_rejection_has_a_series():
    reasons = {error.reason for error in (QueueFull, BodiesFull, NotReady, Draining, DeadlineExceeded)}
    assert reasons | {"store"} == set(REASONS)


def test_a_probe_that_is_told_not_ready_is_no_rejection():
    metrics = Metrics()
    metrics.observe_request("health", 503, 0.1, "not_ready")
    metrics.observe_request("classify", 503, 0.1, "not_ready")
    assert metrics.registry.get_sample_value("igd_rejected_total", {"reason": "not_ready"}) == 1


def test_one_version_and_one_model_are_named():
    metrics = Metrics()
    importance = NeuronImportance(
        np_scores(), method="lo-ir", layer="layer4", created_at=datetime.now(UTC) - timedelta(hours=1)
    )
    for version in ("v1", "v2", "v2"):
        metrics.show_importance(version, importance, 4)
        metrics.show_model(
            model="tiny", digest=version, device="cpu", dtype="float32", compiler="none", first_pass="int8"
        )
    samples = {m.name: m.samples for m in metrics.registry.collect()}
    assert [s.labels["version"] for s in samples["igd_importance_info"]] == ["v2"]
    assert [s.labels["digest"] for s in samples["igd_model_info"]] == ["v2"]
    assert samples["igd_model_info"][0].labels["first_pass"] == "int8"
    assert metrics.registry.get_sample_value("igd_importance_age_seconds") == pytest.approx(3600, abs=60)


def np_scores():
    import torch

    return torch.eye(3)


def of_the_registry():
    """Name, type and labels of every metric of ours."""
    metrics = Metrics()
    metrics.defense.name_classes(["cat"])
    metrics.show_importance("v", NeuronImportance(np_scores(), method="lo-ir", layer="layer4"), 4)
    metrics.show_model(model="tiny", digest="d", device="cpu", dtype="float32", compiler="none", first_pass="float32")
    return {
        (
            metric.name + "_total" * (metric.type == "counter"),
            metric.type,
            tuple(sorted({label for sample in metric.samples for label in sample.labels} - {"le"})),
        )
        for metric in metrics.registry.collect()
        if metric.name.startswith("igd_")
    }


def test_the_table_in_the_docs_and_the_registry_agree():
    rows = re.findall(r"^\| `(igd_\w+)` \| (\w+) \| (.*?) \|", DOCS.read_text(), re.MULTILINE)
    documented = {(name, kind, tuple(sorted(re.findall(r"`(\w+)`", labels)))) for name, kind, labels in rows}
    assert documented == of_the_registry()
