"""Ranking jobs, for real: servers, workers, the processes these fork, and every way to lose one of them.

Bounds on time are generous, because the machine may be busy; next to them stands what is required.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from defense import NeuronImportance
from defense.resnet import CifarResNet
from importance_store import open_store
from service.jobs import MAX_DEATHS, RankingJobs

ADMIN = {"Authorization": "Bearer sesame"}
PATIENCE_S = 120
LABELS = ("cat", "dog", "fox", "owl")
MODEL_TOML = f"""
name = "slow"
labels = {list(LABELS)}
[architecture]
name = "cifar-resnet"
width = 12
blocks = [1, 1, 1, 1]
[input]
size = [16, 16]
channels = 3
[defense]
layer = "layer4"
top_k = 16
"""
# At layer1, where the tail is not affine, 128 images take 0.1 s on an idle core; at layer4 a hundredth of that.
NUM_IMAGES = {"some": 6000, "many": 14_000}
CHECKPOINT_IMAGES = 20 * 128


def write_model(directory, seed=0):
    directory.mkdir(parents=True)
    (directory / "model.toml").write_text(MODEL_TOML)
    torch.manual_seed(seed)
    network = CifarResNet(width=12, num_classes=4, blocks=(1, 1, 1, 1)).eval()
    save_file(network.state_dict(), directory / "weights.safetensors")
    images = torch.randint(0, 256, (24, 16, 16, 3), dtype=torch.uint8)
    save_file({"images": images, "labels": torch.arange(24) % 4}, directory / "probe.safetensors")
    return directory


def write_folder(directory, damaged):
    """Ten images of each class, the first ones not images at all."""
    for number in range(40):
        file = directory / LABELS[number % 4] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(file)
        if number < damaged:
            file.write_bytes(b"no image")


class Material:
    """A model directory and datasets, not to be changed."""

    def __init__(self, directory):
        self.model, self.datasets = write_model(directory / "slow"), directory / "datasets.toml"
        lines = []
        for name, count in NUM_IMAGES.items():
            pixels = np.random.default_rng(count).integers(0, 256, (count, 16, 16, 3), np.uint8)
            np.savez(directory / f"{name}.npz", images=pixels, labels=np.arange(count) % 4)
            lines.append(f'[datasets.{name}]\nkind = "arrays"\npath = "{name}.npz"')
        np.savez(directory / "black.npz", images=np.zeros((8, 16, 16, 3), np.uint8), labels=np.arange(8) % 4)
        lines.append('[datasets.black]\nkind = "arrays"\npath = "black.npz"')
        for name, damaged in (("scratched", 2), ("ruined", 4)):
            write_folder(directory / name, damaged)
            lines.append(f'[datasets.{name}]\nkind = "image-folder"\npath = "{name}"')
        self.datasets.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.mktemp("material"))


def processes_of(directory):
    """Process ids that write to a log in this directory: ``igd`` processes and all that these started."""
    return [int(process.name) for process in Path("/proc").glob("[0-9]*") if _writes_to(process, directory)]


def _writes_to(process, directory):
    try:
        return any((process / "fd" / fd).readlink().is_relative_to(directory) for fd in "12")
    except OSError:
        return False


class Haste:
    """Takes job processes out of the idle scheduling class, in which a machine busy with other things never runs them.

    They stay at nice 10. Without the right to do so the tests are slow there.
    """

    def __init__(self, directory):
        self._directory, self._ending, self.wanted = directory, threading.Event(), True
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._ending.set()
        self._thread.join()

    def _run(self):
        while not self._ending.wait(0.1):
            for thread, policy in policies(*processes_of(self._directory)).items() if self.wanted else ():
                with suppress(OSError):
                    if policy == os.SCHED_IDLE:
                        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def policies(*pids):
    """Scheduling policy of each thread of these processes."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
            found |= {thread: os.sched_getscheduler(thread) for thread in threads}
    return found


@contextmanager
def nothing_left_running(directory):
    yield
    give_up = time.monotonic() + PATIENCE_S
    while (left := processes_of(directory)) and time.monotonic() < give_up:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes outlived the test"


@pytest.fixture(autouse=True, scope="module")
def haste(tmp_path_factory):
    directory = tmp_path_factory.getbasetemp()
    with nothing_left_running(directory), Haste(directory) as haste:
        yield haste


@pytest.fixture(autouse=True)
def _nothing_left_running(tmp_path):
    with nothing_left_running(tmp_path):
        yield


def read_proc(file):
    """What a file under /proc says; nothing if its process went before it was opened, or while it was read."""
    try:
        return Path(file).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children(pid):
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in read_proc(file).split()]


def exists(pid):
    """Whether a process lives; a zombie does not."""
    state = read_proc(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return bool(state) and state[0] != "Z"


def soon(condition, what):
    """Wait for it; its value, and after how many seconds."""
    began = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() - began < PATIENCE_S, f"{what} did not come true"
        time.sleep(0.02)
    return value, time.monotonic() - began


class Site:
    """A store, embedded or on a Redis, and the processes that use it."""

    def __init__(self, start, material, data_dir, redis_url=None):
        self._start, self.data_dir, self._redis_url = start, data_dir, redis_url
        self.model = material.model
        self._environment = {
            "IGD_ADMIN_KEY": "sesame",
            "IGD_DATASETS": str(material.datasets),
            "IGD_WORKER_THREADS": "1",
            "IGD_DRAIN_S": "2",
        }

    @property
    def _flags(self):
        redis_url = ("--redis-url", self._redis_url) if self._redis_url else ()
        return "--model", self.model, "--data-dir", self.data_dir, *redis_url

    def serve(self, *flags, **environment):
        flags = (*self._flags, "--port", 0, "--threads", 1, *flags)
        return self._start("serve", *flags, **self._environment | environment)

    def start_worker(self):
        return self._start("worker", *self._flags, **self._environment)

    def checkpoint(self, job_id):
        return self.data_dir / "checkpoints" / f"{job_id}.safetensors"

    def store(self):
        return open_store(redis_url=self._redis_url, data_dir=self.data_dir, model="slow")


class Client:
    """What an administrator does with a server's ranking jobs."""

    def __init__(self, server):
        self.http = httpx.Client(base_url=server.url, timeout=30, trust_env=False, headers=ADMIN)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.http.close()

    def submit(self, dataset="some", **request):
        answer = self.http.post("/rank-neurons", json={"dataset": dataset, "activate": False} | request)
        assert answer.status_code == 202, answer.text
        assert answer.headers["location"] == f"/rank-neurons/{answer.json()['id']}"
        return answer.json()["id"]

    def submit_slow(self, dataset="some", **request):
        return self.submit(dataset, layer="layer1", **request)

    def job(self, job_id):
        answer = self.http.get(f"/rank-neurons/{job_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def cancel(self, job_id):
        return self.http.delete(f"/rank-neurons/{job_id}")

    def until(self, job_id, *states):
        return soon(lambda: (job := self.job(job_id))["state"] in states and job, f"{states} of {job_id}")[0]

    def until_ranking(self, job_id):
        """Wait until images are done."""
        return soon(lambda: (job := self.job(job_id))["progress"]["done"] and job, f"progress of {job_id}")[0]

    def ended(self, job_id):
        return self.until(job_id, "succeeded", "failed", "cancelled")

    def succeeded(self, job_id):
        job = self.ended(job_id)
        assert (job["state"], job["error"]) == ("succeeded", None), job
        return job

    def failed(self, job_id):
        job = self.ended(job_id)
        assert job["state"] == "failed" and job["version"] is None, job
        return job

    def scores(self, job):
        answer = self.http.get(f"/importance/{job['version']}", headers={"Accept": "application/octet-stream"})
        return NeuronImportance.from_bytes(answer.content).scores


def pid_of(igd):
    return igd._process.pid


def job_process(worker):
    """Wait for the process that a worker forked for a job."""
    pid = worker if isinstance(worker, int) else pid_of(worker)
    return soon(lambda: children(pid), "a job's process")[0][0]


def assert_same_scores(scores, expected):
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-8)


def assert_is_problem(response, status, *fragments):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    for fragment in fragments:
        assert fragment in response.json()["detail"]


# One server and one worker on an embedded store, for all that needs no violence.


@pytest.fixture(scope="module")
def site(module_igd, material, tmp_path_factory):
    return Site(module_igd, material, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def server(site):
    return site.serve()


@pytest.fixture(scope="module")
def worker(site, server, client):
    return site.start_worker()


@pytest.fixture(scope="module")
def client(server):
    with Client(server) as client:
        yield client


def test_a_job_waits_for_a_worker_and_goes_to_the_first_one_that_starts(client, request):
    job_id = client.submit()
    time.sleep(1)
    assert client.job(job_id)["state"] == "queued" and client.job(job_id)["started_at"] is None

    request.getfixturevalue("worker")
    client.succeeded(job_id)


@pytest.mark.usefixtures("worker")
def test_a_job_that_activates_switches_the_running_server(client):
    job = client.succeeded(client.submit(activate=True))

    assert job["activated"] and job["progress"]["done"] == job["progress"]["total"] == NUM_IMAGES["some"]
    soon(lambda: client.http.get("/model").json()["importance_version"] == job["version"], "the new version")
    assert client.http.get("/health/ready").status_code == 200


@pytest.mark.usefixtures("worker")
def test_a_job_that_does_not_activate_leaves_that_to_the_administrator(client):
    before = client.http.get("/importance").json()["active"]
    job = client.succeeded(client.submit(method="lo-ir-signed"))
    assert job["activated"] is False and client.http.get("/importance").json()["active"] == before

    assert client.http.post(f"/importance/{job['version']}/activate").status_code == 200
    soon(lambda: client.http.get("/model").json()["importance_version"] == job["version"], "the new version")


@pytest.mark.usefixtures("worker")
def test_a_degenerate_ranking_is_activated_only_by_force(client):
    before = client.http.get("/importance").json()["active"]
    job = client.succeeded(client.submit("black", activate=True))
    assert job["version"] and job["activated"] is False
    assert any("not activated, the ranking is degenerate: every score is 0" in note for note in job["notes"])
    assert client.http.get("/importance").json()["active"] == before

    job = client.succeeded(client.submit("black", activate=True, force=True))
    assert job["activated"] and client.http.get("/importance").json()["active"] == job["version"]
    client.http.post(f"/importance/{before}/activate")


@pytest.mark.usefixtures("worker")
def test_a_ranking_of_another_layer_is_served_at_that_layer(client):
    before = client.http.get("/importance").json()["active"]

    job = client.succeeded(client.submit("probe", layer="layer2", activate=True, force=True))

    assert job["activated"]
    soon(lambda: client.http.get("/model").json()["importance_version"] == job["version"], "the new version")
    assert client.http.get("/model").json()["defense"]["layer"] == "network.layer2"
    client.http.post(f"/importance/{before}/activate")


@pytest.mark.usefixtures("worker")
def test_a_ranking_of_a_layer_with_fewer_neurons_than_top_k_is_not_activated(client):
    before = client.http.get("/importance").json()["active"]

    job = client.succeeded(client.submit("probe", layer="layer1", activate=True, force=True))

    assert job["version"] and job["activated"] is False
    assert any("not activated, it cannot be served: expected top_k from 1 to 12" in note for note in job["notes"])
    assert client.http.get("/importance").json()["active"] == before


@pytest.fixture(scope="module")
def told(client, worker):
    """What the events of a job tell that nothing disturbs."""
    with client.http.stream("GET", f"/rank-neurons/{client.submit_slow()}/events") as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        lines = list(events.iter_lines())
    assert set(lines[::3]) == {"event: job"} and set(lines[2::3]) == {""}
    return [json.loads(line.removeprefix("data: ")) for line in lines[1::3]]


@pytest.fixture(scope="module")
def uninterrupted(client, told):
    """Scores of that job."""
    return client.scores(told[-1])


def test_the_events_of_a_job_tell_its_progress_until_it_has_ended(client, told):
    states = [job["state"] for job in told]
    assert sorted(set(states), key=states.index)[-2:] == ["running", "succeeded"]
    assert told[-1] == client.job(told[-1]["id"])
    under_way = [job["progress"] for job in told if job["state"] == "running" and job["progress"]["rate"]]
    done = [progress["done"] for progress in under_way]
    assert len(set(done)) > 3 and done == sorted(done)
    for progress in under_way:
        assert progress["total"] == NUM_IMAGES["some"] and 0 < progress["done"] <= progress["total"]
        left = progress["total"] - progress["done"]
        assert progress["eta_s"] == pytest.approx(left / progress["rate"], rel=0.01, abs=0.01)


def test_a_job_runs_in_a_process_of_the_worker_that_leaves_the_processors_to_the_server(client, server, worker, haste):
    haste.wanted = False
    job_id = client.submit_slow()
    process = job_process(worker)

    # What ranks is in the idle class; what reports and hears of being cancelled is not, or would come too late.
    soon(lambda: policies(process).get(process) == os.SCHED_IDLE, "the ranking's stepping back")
    assert os.SCHED_OTHER in policies(process).values()
    for pid, niceness in ((process, 10), (pid_of(worker), 10), (pid_of(server), 0)):
        assert os.getpriority(os.PRIO_PROCESS, pid) == niceness
    assert os.SCHED_IDLE not in policies(pid_of(worker), pid_of(server)).values()
    assert client.cancel(job_id).json()["state"] == "cancelled"
    haste.wanted = True


def test_a_running_job_is_cancelled_within_a_second(client, worker, site):
    job_id = client.submit_slow()
    soon(site.checkpoint(job_id).exists, "a checkpoint")
    process = job_process(worker)

    began = time.monotonic()
    answer = client.cancel(job_id)
    took_s = time.monotonic() - began

    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    assert took_s < 3  # required: 1
    assert not exists(process)
    soon(lambda: not site.checkpoint(job_id).exists(), "the removal of the checkpoint")
    assert client.job(job_id)["state"] == "cancelled" and client.job(job_id)["ended_at"]
    print(f"\ncancelled a running job in {took_s:.2f} s")


def test_a_job_whose_worker_does_not_hear_is_cancelled_all_the_same(client, worker):
    job_id = client.submit_slow()
    client.until_ranking(job_id)
    process = job_process(worker)
    os.kill(pid_of(worker), signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert client.cancel(job_id).status_code == 200
        client.until(job_id, "cancelled")
        took_s = time.monotonic() - began
        soon(lambda: not exists(process), "the end of the job's process")
    finally:
        os.kill(pid_of(worker), signal.SIGCONT)
    print(f"\ncancelled behind a deaf worker in {took_s:.2f} s")


def test_a_queued_job_is_cancelled_and_never_runs(client, worker):
    running = client.submit_slow()
    client.until_ranking(running)
    queued = client.submit_slow(method="lo-ir-signed")
    assert client.job(queued)["state"] == "queued"

    began = time.monotonic()
    assert client.cancel(queued).json()["state"] == "cancelled"
    assert time.monotonic() - began < 3  # required: 1

    client.cancel(running)
    client.succeeded(client.submit("probe"))  # the queue is empty behind it
    assert client.job(queued)["state"] == "cancelled" and client.job(queued)["started_at"] is None


def test_a_job_that_is_cancelled_while_it_is_forked_stays_cancelled(client, server, worker):
    cancelled = []
    for delay_ms in (0, 2, 5, 10, 20, 40, 80, 160):
        job_id = client.submit_slow()
        time.sleep(delay_ms / 1000)
        assert client.cancel(job_id).json()["state"] == "cancelled", f"after {delay_ms} ms"
        assert client.job(job_id)["state"] == "cancelled", f"after {delay_ms} ms"
        cancelled.append(job_id)

    client.succeeded(client.submit("probe"))  # server and worker have survived it
    assert {client.job(job_id)["state"] for job_id in cancelled} == {"cancelled"}
    assert all(client.job(job_id)["version"] is None for job_id in cancelled)
    soon(lambda: not children(pid_of(worker)), "the end of every job's process, none left as a zombie")


@pytest.mark.usefixtures("worker")
def test_a_job_that_has_ended_cannot_be_cancelled(client):
    job_id = client.submit("probe")
    client.succeeded(job_id)

    assert_is_problem(client.cancel(job_id), 409, f"job {job_id} has ended already (succeeded)")
    assert_is_problem(client.cancel("01NONE"), 404, "no ranking job '01NONE'")
    assert_is_problem(client.http.get("/rank-neurons/01NONE"), 404, "GET /rank-neurons lists them")
    assert_is_problem(client.http.get("/rank-neurons/01NONE/events"), 404)


@pytest.mark.usefixtures("worker")
def test_identical_requests_in_flight_are_one_job(client):
    first, again = client.submit_slow(), client.submit_slow()
    other = client.submit_slow(method="lo-ir-signed")
    assert first == again != other

    client.cancel(other)
    client.cancel(first)
    assert client.submit_slow() != first  # that one is over
    client.cancel(client.submit_slow())


@pytest.mark.usefixtures("worker")
def test_requests_at_the_same_moment_are_one_job(client):
    ids = []
    threads = [threading.Thread(target=lambda: ids.append(client.submit_slow())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(ids) == 8 and len(set(ids)) == 1
    client.cancel(ids[0])


@pytest.mark.usefixtures("worker")
def test_an_idempotency_key_always_gives_the_job_of_its_first_use(client):
    def submit(**request):
        return client.http.post("/rank-neurons", json={"activate": False} | request, headers={"Idempotency-Key": "k1"})

    first = submit().json()["id"]
    client.succeeded(first)

    again = submit()
    assert (again.status_code, again.json()["id"], again.json()["state"]) == (202, first, "succeeded")
    assert client.submit("probe") != first  # without the key it is a new one
    assert_is_problem(submit(method="lo-ir-signed"), 422, "Idempotency-Key 'k1' came with another request")


def test_jobs_are_listed_newest_first(client):
    jobs = client.http.get("/rank-neurons").json()["jobs"]

    created = [job["created_at"] for job in jobs]
    assert len(jobs) > 10 and created == sorted(created, reverse=True)
    assert jobs[-1] == client.job(jobs[-1]["id"])


def test_what_cannot_be_ranked_is_refused_at_once_with_what_can(client):
    known = "expected one of the datasets probe, black, many, ruined, scratched, some"
    assert_is_problem(client.http.post("/rank-neurons", json={"dataset": "none"}), 422, known, "got 'none'")
    answer = client.http.post("/rank-neurons", json={"layer": "layer9"})
    assert_is_problem(answer, 422, "expected one layer named 'layer9', found none", "layer1", "layer4")
    assert_is_problem(client.http.post("/rank-neurons", json={"method": "best"}), 422, "'lo-ir'", "'cd-ir'")
    assert_is_problem(client.http.post("/rank-neurons", json={"datset": "some"}), 422, "datset")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/rank-neurons"),
        ("GET", "/rank-neurons"),
        ("GET", "/rank-neurons/x"),
        ("DELETE", "/rank-neurons/x"),
        ("GET", "/rank-neurons/x/events"),
    ],
)
def test_the_jobs_are_the_administrators_only(client, method, path):
    def ask(**headers):
        with httpx.Client(base_url=client.http.base_url, trust_env=False, timeout=30) as anybody:
            return anybody.request(method, path, headers=headers)

    assert_is_problem(ask(), 401, "IGD_ADMIN_KEY")
    assert_is_problem(ask(Authorization="Bearer wrong"), 401)


@pytest.mark.usefixtures("worker")
def test_unreadable_images_are_skipped_and_counted(client):
    job = client.succeeded(client.submit("scratched"))

    skipped = [note for note in job["notes"] if "skipped image" in note]
    assert len(skipped) == 2 and "cat/00.png cannot be read" in skipped[0]
    assert job["progress"]["done"] == 40
    version = client.http.get(f"/importance/{job['version']}").json()
    assert version["metadata"]["num_images"] == 38


@pytest.mark.usefixtures("worker")
def test_too_many_unreadable_images_are_a_failure(client):
    job = client.failed(client.submit("ruined"))

    assert "expected at most 1% of probe set 'ruined' (40 images) to be unreadable, got 4" in job["error"]
    assert any(line.endswith(f"failed: {job['error']}") for line in job["log"])


# Three workers that were killed, and the jobs they leave. The last test ends that with another worker.


@pytest.fixture(scope="module")
def wreck(module_igd, material, tmp_path_factory):
    return Site(module_igd, material, tmp_path_factory.mktemp("wreck"))


@pytest.fixture(scope="module")
def wreck_client(wreck):
    with Client(wreck.serve()) as client:
        yield client


@pytest.fixture(scope="module")
def interrupted(wreck, wreck_client):
    """Ids of three interrupted jobs; of the first there is a checkpoint."""
    workers = [wreck.start_worker() for _ in range(3)]
    ids = [wreck_client.submit_slow(**job) for job in ({}, {"method": "lo-ir-signed"}, {"dataset": "many"})]
    soon(wreck.checkpoint(ids[0]).exists, "a checkpoint")
    for job_id in ids:
        wreck_client.until_ranking(job_id)
    processes = [job_process(worker) for worker in workers]
    for worker in workers:
        worker.signal(signal.SIGKILL)
    began = time.monotonic()
    soon(lambda: not any(map(exists, processes)), "the end of the orphans")
    orphans_s = time.monotonic() - began
    for job_id in ids:
        wreck_client.until(job_id, "interrupted")
    interrupted_s = time.monotonic() - began
    print(f"\nworkers killed: orphans ended after {orphans_s:.2f} s, jobs interrupted after {interrupted_s:.2f} s")
    assert orphans_s < 10 and interrupted_s < 20  # required: 15
    return ids


def test_a_job_of_a_killed_worker_is_interrupted_until_it_is_cancelled(wreck_client, interrupted):
    assert wreck_client.job(interrupted[1])["state"] == "interrupted"
    assert wreck_client.cancel(interrupted[1]).json()["state"] == "cancelled"


def test_a_job_is_queued_once_by_workers_that_find_it_interrupted_at_the_same_moment(wreck, wreck_client, interrupted):
    with wreck.store() as store:
        finders = [RankingJobs(store.new_client(), "slow") for _ in range(8)]
        threads = [threading.Thread(target=finder.resume, args=(interrupted[2],)) for finder in finders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert finders[0].queue.count == 1 and wreck_client.job(interrupted[2])["state"] == "queued"
    wreck_client.cancel(interrupted[2])


def test_the_next_worker_goes_on_with_an_interrupted_job_from_its_checkpoint(
    wreck, wreck_client, interrupted, uninterrupted
):
    began = time.monotonic()
    wreck.start_worker()
    wreck_client.until(interrupted[0], "running")
    print(f"\nran again {time.monotonic() - began:.2f} s after another worker's start")

    assert_same_scores(wreck_client.scores(wreck_client.succeeded(interrupted[0])), uninterrupted)
    assert [wreck_client.job(job_id)["state"] for job_id in interrupted[1:]] == ["cancelled", "cancelled"]


# From here on every test has processes of its own, to be killed.


@pytest.fixture
def own_site(start_igd, material, tmp_path):
    return Site(start_igd, material, tmp_path / "data")


@pytest.fixture
def redis_site(start_igd, material, tmp_path, redis):
    redis.start()
    return Site(start_igd, material, tmp_path / "data", redis.url)


def test_a_killed_job_process_is_replaced_and_goes_on_from_its_checkpoint(own_site, uninterrupted):
    with Client(own_site.serve()) as client:
        worker, job_id = own_site.start_worker(), client.submit_slow()
        soon(own_site.checkpoint(job_id).exists, "a checkpoint")
        killed = job_process(worker)
        os.kill(killed, signal.SIGKILL)
        done_before = client.job(job_id)["progress"]["done"]

        _, took_s = soon(lambda: set(children(pid_of(worker))) - {killed}, "another process")
        assert took_s < 15
        done = []
        while (job := client.job(job_id))["state"] in ("queued", "running"):
            assert job["ended_at"] is None
            done.append(job["progress"]["done"])
            time.sleep(0.02)

        assert min(set(done) - {0, done_before}) >= CHECKPOINT_IMAGES
        assert job["progress"]["done"] == NUM_IMAGES["some"]
        assert_same_scores(client.scores(client.succeeded(job_id)), uninterrupted)
        assert len(client.http.get("/importance").json()["versions"]) == 1
        soon(lambda: not own_site.checkpoint(job_id).exists(), "the removal of the checkpoint")
        print(f"\na killed job process was replaced after {took_s:.2f} s")


def test_a_job_whose_process_dies_every_time_fails_with_a_sentence_and_its_log(own_site):
    with Client(own_site.serve()) as client:
        worker, job_id = own_site.start_worker(), client.submit_slow()
        killed = None
        for _ in range(MAX_DEATHS):
            soon(lambda: (found := children(pid_of(worker))) and found != [killed], "another process")  # noqa: B023
            client.until_ranking(job_id)
            killed = job_process(worker)
            os.kill(killed, signal.SIGKILL)

        job = client.failed(job_id)
        assert job["error"].startswith(f"the process that ran it died {MAX_DEATHS} times")
        client.succeeded(client.submit("probe"))


def test_a_worker_that_is_stopped_in_order_hands_its_job_on_at_once(redis_site):
    with Client(redis_site.serve()) as client:
        worker, job_id = redis_site.start_worker(), client.submit_slow()
        for _ in range(MAX_DEATHS + 1):  # orderly ends are no deaths
            client.until(job_id, "running")
            began = time.monotonic()
            worker.signal(signal.SIGTERM)
            assert worker.ended() == 0
            took_s = time.monotonic() - began
            assert client.job(job_id)["state"] == "queued"
            worker = redis_site.start_worker()

        client.until(job_id, "running")
        client.cancel(job_id)
        print(f"\na worker with a running job ended {took_s:.2f} s after SIGTERM")


def test_a_killed_server_takes_its_worker_along_and_its_successor_goes_on(own_site, uninterrupted):
    server = own_site.serve(IGD_WORKER="true")
    with Client(server) as client:
        job_id = client.submit_slow()
        soon(own_site.checkpoint(job_id).exists, "a checkpoint")
        (worker,) = filter(is_worker, children(pid_of(server)))  # another child is the embedded store
        process = job_process(worker)
        server.signal(signal.SIGKILL)
    soon(lambda: not exists(worker) and not exists(process), "the end of worker and job process")

    server = own_site.serve(IGD_WORKER="true")
    with Client(server) as client:
        began = time.monotonic()
        assert [job["id"] for job in client.http.get("/rank-neurons").json()["jobs"]] == [job_id]
        job = client.succeeded(job_id)
        assert_same_scores(client.scores(job), uninterrupted)
        print(f"\nafter a restart of the killed server its job ended in {time.monotonic() - began:.2f} s")


def test_a_server_starts_its_killed_worker_again_and_ends_with_it(own_site):
    server = own_site.serve(IGD_WORKER="true")
    with Client(server) as client:
        job_id = client.submit_slow("many")
        client.until_ranking(job_id)
        (killed,) = filter(is_worker, children(pid_of(server)))
        os.kill(killed, signal.SIGKILL)

        def successors():
            return [child for child in children(pid_of(server)) if child != killed and is_worker(child)]

        ((successor,), took_s) = soon(successors, "another worker")
        print(f"\nanother worker was started {took_s:.2f} s after the first was killed")
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
        assert not exists(successor) and not exists(killed)


def is_worker(pid):
    return "igd\0worker\0--parent" in read_proc(f"/proc/{pid}/cmdline")


def test_without_a_worker_of_its_own_the_server_starts_none(own_site):
    server = own_site.serve("--no-worker", IGD_WORKER="true")
    with Client(server) as client:
        job_id = client.submit("probe")
        time.sleep(1)
        assert client.job(job_id)["state"] == "queued"
        assert not any(map(is_worker, children(pid_of(server))))


def freeze(redis):
    redis._process.send_signal(signal.SIGSTOP)
    return lambda: redis._process.send_signal(signal.SIGCONT)


def kill(redis):
    redis.kill()
    return redis.start


@pytest.mark.parametrize("take_away", [freeze, kill])
def test_a_job_goes_on_while_redis_is_away(redis_site, redis, take_away):
    with Client(redis_site.serve()) as client:
        workers, job_id = [redis_site.start_worker() for _ in range(2)], client.submit_slow("many")
        client.until_ranking(job_id)
        (process,) = children(pid_of(workers[0])) + children(pid_of(workers[1]))
        gone_at = time.monotonic()
        bring_back = take_away(redis)
        try:
            assert_is_problem(client.http.get(f"/rank-neurons/{job_id}"), 503, "does not answer")
            time.sleep(gone_at + 10 - time.monotonic())
        finally:
            bring_back()

        soon(lambda: client.http.get("/rank-neurons").status_code == 200, "the store's return")
        while client.job(job_id)["state"] in ("running", "interrupted"):
            # Neither began anew nor was taken up by the other worker, which may find it without a sign of life.
            assert set(children(pid_of(workers[0])) + children(pid_of(workers[1]))) <= {process}
            time.sleep(0.02)
        client.succeeded(job_id)
        soon(lambda: client.http.get("/importance").json()["store_up"], "the server's own return to the store")
        assert len(client.http.get("/importance").json()["versions"]) == 1
        assert [worker.exit_code for worker in workers] == [None, None]

        both = [client.submit_slow("many", method=method) for method in ("lo-ir", "lo-ir-signed")]
        for after in both:
            client.until_ranking(after)
        for after in both:
            began = time.monotonic()
            assert client.cancel(after).json()["state"] == "cancelled"
            assert time.monotonic() - began < 3  # required: 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system that is full")
def test_a_full_disk_costs_a_warning_and_not_the_job(own_site, uninterrupted):
    checkpoints = own_site.data_dir / "checkpoints"
    checkpoints.mkdir(parents=True, mode=0o700)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", checkpoints], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(OSError, match="No space left"), (checkpoints / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        with Client(own_site.serve()) as client:
            own_site.start_worker()
            job = client.succeeded(client.submit_slow())
            assert any("WARNING" in line and "no checkpoint could be written" in line for line in job["log"])
            assert_same_scores(client.scores(job), uninterrupted)
    finally:
        subprocess.run(["umount", "--lazy", checkpoints], check=True)


def test_two_workers_that_publish_at_once_activate_one_version_and_keep_both(redis_site):
    with Client(redis_site.serve()) as client:
        ids = [client.submit(method=method, activate=True) for method in ("lo-ir", "lo-ir-signed")]
        workers = [redis_site.start_worker() for _ in range(2)]
        jobs = [client.succeeded(job_id) for job_id in ids]
        assert all(worker.exit_code is None for worker in workers)

        listed = client.http.get("/importance").json()
        assert {job["version"] for job in jobs} == {version["version"] for version in listed["versions"]}
        assert listed["active"] == next(job["version"] for job in jobs if job["activated"])
        assert [version["active"] for version in listed["versions"]].count(True) == 1
        (other,) = [job for job in jobs if not job["activated"]]
        assert any("another version was activated meanwhile" in note for note in other["notes"])


def test_a_job_for_weights_that_changed_meanwhile_fails_with_a_sentence(own_site, material, tmp_path):
    own_site.model = shutil.copytree(material.model, tmp_path / "slow")
    with Client(own_site.serve()) as client:
        job_id = client.submit()
        other = write_model(tmp_path / "other", seed=1)
        shutil.copy(other / "weights.safetensors", own_site.model)
        own_site.start_worker()

        error = client.failed(job_id)["error"]
        assert f"the weights in {own_site.model} changed since the job was submitted" in error
        assert "submit it again" in error
