"""The whole service over HTTP: a real server in a process of its own, polite clients and hostile ones."""

import base64
import io
import re
import socket

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from defense import NeuronImportance
from importance_store import open_store
from service.schemas import ClassifyResponse, ImportanceListResponse, ImportanceResponse, ModelResponse

ADMIN = {"Authorization": "Bearer open sesame"}
MAX_BODY = 300_000
MAX_IMAGES = 20
LABELS = ["cat", "dog", "fox", "owl"]


def png(seed=0, size=(8, 8)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def flat(width, height):
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def base64_of(*files):
    return {"images": [base64.b64encode(file).decode() for file in files]}


def form_of(*files):
    return [("images", (f"{i}.png", file, "image/png")) for i, file in enumerate(files)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def server(module_igd, tiny_model, data_dir):
    """Small limits, so that small bodies exceed them."""
    limits = ("--max-body-mb", MAX_BODY / 1e6, "--max-images", MAX_IMAGES, "--max-pixels", 100_000)
    return module_igd.serve(tiny_model, *limits, "--data-dir", data_dir, IGD_ADMIN_KEY="open sesame")


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def guarded(module_igd, tiny_model):
    """A server with keys for /classify and without an admin key; it gives a request no time."""
    server = module_igd.serve(tiny_model, "--deadline-s", "1e-6", IGD_API_KEYS="alpha, beta")
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def store(server, data_dir):
    """The server's embedded store, from this process."""
    assert server.url
    with open_store(redis_url=None, data_dir=data_dir, model="tiny") as store:
        yield store


def assert_is_problem(response, status, *fragments):
    """It is an RFC 9457 problem with a sentence in it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status and problem["type"] == "about:blank" and problem["title"]
    assert problem["request_id"] == response.headers["x-request-id"]
    assert len(problem["detail"]) > 20 and "Traceback" not in problem["detail"]
    for fragment in fragments:
        assert fragment in problem["detail"]


def samples(client):
    """/metrics as {series: value}."""
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (li.rsplit(" ", 1) for li in lines if not li.startswith("#"))}


def test_the_three_forms_of_a_request_get_the_same_answer(client):
    image = png()
    answers = [
        client.post("/classify", content=image, headers={"Content-Type": "image/png"}),
        client.post("/classify", files=form_of(image)),
        client.post("/classify", json=base64_of(image)),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert ClassifyResponse.model_validate(answer.json()).model_dump() == answer.json()
        assert answer.json() | {"predictions": []} == answers[0].json() | {"predictions": []}
        (prediction,) = answer.json()["predictions"]
        assert prediction["undefended"] == answers[0].json()["predictions"][0]["undefended"]


def test_an_answer_is_what_the_design_says(client, tiny_model):
    sample = (tiny_model / "samples" / "cat.png").read_bytes()
    body = client.post("/classify?top=4", content=sample, headers={"Content-Type": "image/png"}).json()
    assert set(body) == {"model", "importance_version", "predictions"} and body["model"] == "tiny"
    (prediction,) = body["predictions"]
    single = {"label", "class_id", "probability"}
    assert set(prediction) == single | {"top", "undefended", "pseudo_label", "changed"}
    for entry in (prediction, prediction["undefended"], prediction["pseudo_label"], *prediction["top"]):
        assert single <= set(entry) and LABELS[entry["class_id"]] == entry["label"]
    assert sum(entry["probability"] for entry in prediction["top"]) == pytest.approx(1, abs=1e-4)
    assert prediction["changed"] == (prediction["label"] != prediction["undefended"]["label"])


def test_many_images_are_answered_in_the_order_they_were_sent(client):
    images = [png(seed) for seed in range(MAX_IMAGES)]
    alone = [
        client.post("/classify", content=image, headers={"Content-Type": "image/png"}).json()["predictions"][0]
        for image in images
    ]
    expected = [prediction["undefended"]["probability"] for prediction in alone]
    assert len(set(expected)) > MAX_IMAGES // 2  # otherwise their order could not be told
    for body in ({"files": form_of(*images)}, {"json": base64_of(*images)}):
        predictions = client.post("/classify", **body).json()["predictions"]
        found = [prediction["undefended"]["probability"] for prediction in predictions]
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("top", "entries"), [(None, 4), (1, 1), (2, 2), (4, 4), (1000, 4)])
def test_top_says_how_many_classes_are_listed(client, top, entries):
    parameters = {} if top is None else {"top": top}
    answer = client.post("/classify", content=png(), params=parameters, headers={"Content-Type": "image/png"})
    (prediction,) = answer.json()["predictions"]
    probabilities = [entry["probability"] for entry in prediction["top"]]
    assert len(probabilities) == entries and probabilities == sorted(probabilities, reverse=True)
    assert prediction["top"][0]["label"] == prediction["label"]


@pytest.mark.parametrize("top", ["0", "-1", "1001", "many", "", "\0", "9" * 5000])
def test_a_senseless_top_is_refused(client, top):
    answer = client.post("/classify", content=png(), params={"top": top}, headers={"Content-Type": "image/png"})
    assert_is_problem(answer, 422, "query.top")


@pytest.mark.parametrize("media_type", ["image/jpeg", "IMAGE/PNG", "image/png; charset=binary", "image/x-whatever"])
def test_what_the_image_is_decides_not_what_it_is_called(client, media_type):
    assert client.post("/classify", content=png(), headers={"Content-Type": media_type}).status_code == 200


IMAGE = {"Content-Type": "image/png"}
PROBLEMS = {
    "not an image": (400, "POST", "/classify", {"content": b"GIF? no", "headers": IMAGE}, "expected an image file"),
    "an empty body": (400, "POST", "/classify", {"headers": IMAGE}, "got 0 other bytes"),
    "a damaged image": (400, "POST", "/classify", {"content": png()[:-40], "headers": IMAGE}, "damaged"),
    "one bad image of many": (400, "POST", "/classify", {"files": form_of(png(), b"no")}, "expected an image file"),
    "no admin key": (401, "POST", "/importance/1/activate", {}, "IGD_ADMIN_KEY"),
    "a wrong admin key": (401, "POST", "/importance/1/activate", {"headers": {"Authorization": "Bearer x"}}, "wrong"),
    "another scheme": (401, "POST", "/importance/1/activate", {"headers": {"Authorization": "Basic eDp5"}}, "Bearer"),
    "nothing there": (404, "GET", "/predict", {}, "nothing is at /predict; see /docs"),
    "no such version": (404, "GET", "/importance/01J0", {}, "no version '01J0' of model 'tiny'; expected one of"),
    "no such version to activate": (404, "POST", "/importance/01J0/activate", {"headers": ADMIN}, "no version '01J0'"),
    "a wrong method": (405, "GET", "/classify", {}, "use POST"),
    "another wrong method": (405, "DELETE", "/model", {}, "use GET"),
    "too many bytes": (413, "POST", "/classify", {"content": bytes(MAX_BODY + 1), "headers": IMAGE}, "IGD_MAX_BODY_MB"),
    "too many pixels": (413, "POST", "/classify", {"content": flat(400, 300), "headers": IMAGE}, "400 x 300"),
    "too many files": (413, "POST", "/classify", {"files": form_of(*[b"x"] * (MAX_IMAGES + 1))}, "at most 20 images"),
    "many too many files": (413, "POST", "/classify", {"files": form_of(*[b"x"] * 1000)}, "at most 20 images"),
    "many too many in JSON": (413, "POST", "/classify", {"json": {"images": [""] * 50_000}}, "at most 20 images"),
    "too many in JSON": (413, "POST", "/classify", {"json": {"images": [""] * 21}}, "at most 20 images"),
    "a form of another kind": (415, "POST", "/classify", {"data": {"images": "x"}}, "x-www-form-urlencoded"),
    "text": (415, "POST", "/classify", {"content": b"hi", "headers": {"Content-Type": "text/plain"}}, "--data-binary"),
    "no content type": (415, "POST", "/classify", {"content": b"hi"}, "got 'none'"),
    "JSON of another form": (422, "POST", "/classify", {"json": {"image": "x"}}, "images: Field required"),
    "no image in JSON": (422, "POST", "/classify", {"json": {"images": []}}, "images: List should have at least 1"),
    "a URL": (422, "POST", "/classify", {"json": {"images": ["http://127.0.0.1/cat.png"]}}, "plain base64"),
    "a data URL": (422, "POST", "/classify", {"json": {"images": ["data:image/png;base64,AAAA"]}}, "no data: prefix"),
    "a field of another name": (422, "POST", "/classify", {"files": {"file": png()}}, "got the fields ['file']"),
    "senseless top_k": (422, "GET", "/importance/1?top_k=0", {}, "query.top_k"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_explained(client, name):
    status, method, path, options, fragment = PROBLEMS[name]
    response = client.request(method, path, **options)
    assert_is_problem(response, status, fragment)
    assert status != 401 or response.headers["www-authenticate"] == "Bearer"
    assert status != 405 or response.headers["allow"] in response.json()["detail"]


def test_an_animation_is_refused(client):
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    response = client.post("/classify", content=file.getvalue(), headers={"Content-Type": "image/gif"})
    assert_is_problem(response, 422, "still image")


@pytest.mark.parametrize("given", ["abc-123", "01J:a/b+c=d@e._", "x" * 128])
def test_a_request_keeps_the_id_it_came_with(client, given):
    for path in ("/model", "/nowhere"):
        assert client.get(path, headers={"X-Request-ID": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "a\tb", "<script>", 'a"b', "ä".encode()])
def test_a_request_without_a_sound_id_gets_one(client, given):
    headers = {} if given is None else {"X-Request-ID": given}
    ids = {client.get("/model", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2 and all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer gamma"}])
def test_classify_asks_for_one_of_the_keys(guarded, header):
    response = guarded.post("/classify", content=png(), headers=IMAGE | header)
    assert_is_problem(response, 401, "one of IGD_API_KEYS")


@pytest.mark.parametrize("key", ["Bearer alpha", "bearer beta", "Bearer  alpha"])
def test_each_key_opens_classify(guarded, key):
    response = guarded.post("/classify", content=png(), headers=IMAGE | {"Authorization": key})
    assert_is_problem(response, 504, "no answer within 1e-06 s", "IGD_DEADLINE_S")  # in, and then out of time


@pytest.mark.parametrize("key", ["Bearer alpha", "Bearer"])
def test_without_an_admin_key_the_admin_endpoints_are_off(guarded, key):
    response = guarded.post("/importance/1/activate", headers={"Authorization": key})
    assert_is_problem(response, 403, "IGD_ADMIN_KEY is not set")


def test_what_is_no_secret_needs_no_key(guarded):
    for path in ("/model", "/importance", "/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json"):
        assert guarded.get(path).status_code == 200, path


def test_model_says_what_is_served(client):
    model = ModelResponse.model_validate(client.get("/model").json())
    assert (model.name, model.classes, model.num_neurons) == ("tiny", LABELS, 16)
    assert (model.input.height, model.input.width, model.input.channels) == (8, 8, 3)
    assert (model.defense.top_k, model.defense.sigma, model.importance_method) == (4, 0.001, "lo-ir")
    prediction = client.post("/classify", content=png(), headers=IMAGE).json()
    assert prediction["importance_version"] == model.importance_version


def test_importance_lists_the_versions(client, tiny_model):
    listed = ImportanceListResponse.model_validate(client.get("/importance").json())
    assert listed.store_up and listed.problem is None and listed.serving == listed.active
    shipped = NeuronImportance.from_bytes((tiny_model / "importance.safetensors").read_bytes())
    found = next(version for version in listed.versions if version.version == listed.active)
    assert found.active and found.created_at == shipped.created_at and found.num_images == 24


def test_a_version_is_a_dictionary_of_the_best_neurons_of_each_class(client, tiny_model):
    version = client.get("/model").json()["importance_version"]
    shown = ImportanceResponse.model_validate(client.get(f"/importance/{version}").json())
    scores = NeuronImportance.from_bytes((tiny_model / "importance.safetensors").read_bytes()).scores
    assert shown.active and list(shown.classes) == LABELS and shown.metadata["method"] == "lo-ir"
    for row, entries in zip(scores, shown.classes.values(), strict=True):
        assert [entry.score for entry in entries] == pytest.approx(row.sort(descending=True).values[:4].tolist())
        assert [float(row[entry.neuron]) for entry in entries] == pytest.approx([entry.score for entry in entries])
    everything = client.get(f"/importance/{version}", params={"top_k": 1000}).json()
    assert {len(entries) for entries in everything["classes"].values()} == {16}


def test_a_version_is_also_there_as_the_bytes_that_were_published(client, tiny_model):
    version = client.get("/model").json()["importance_version"]
    response = client.get(f"/importance/{version}", headers={"Accept": "application/octet-stream"})
    assert response.headers["content-type"] == "application/octet-stream"
    assert f'filename="{version}.safetensors"' in response.headers["content-disposition"]
    shipped = NeuronImportance.from_bytes((tiny_model / "importance.safetensors").read_bytes())
    assert torch.equal(NeuronImportance.from_bytes(response.content).scores, shipped.scores)


def test_activating_serves_a_version_and_rolls_back(client, store, until):
    before = client.get("/model").json()["importance_version"]
    after = store.publish(store.load().importance, activate=False)
    for version in (after, before):
        activated = client.post(f"/importance/{version}/activate", headers=ADMIN)
        assert activated.status_code == 200 and activated.json()["active"], activated.text
        until(lambda v=version: client.get("/model").json()["importance_version"] == v, "the activation")


def test_an_importance_of_other_weights_is_not_activated(client, store):
    scores = store.load().importance.scores
    foreign = NeuronImportance(scores, method="lo-ir", layer="network.layer4", model_digest="sha256:other")
    version = store.publish(foreign, activate=False)
    response = client.post(f"/importance/{version}/activate", headers=ADMIN)
    assert_is_problem(response, 409, version, "made for weights sha256:other", "igd rank")
    assert store.active_version() != version


def test_an_importance_of_another_shape_is_shown_but_not_activated(client, store):
    digest = store.load().importance.model_digest
    foreign = NeuronImportance(torch.rand(7, 5), method="mine", layer="conv1", model_digest=digest)
    version = store.publish(foreign, activate=False)
    assert_is_problem(client.post(f"/importance/{version}/activate", headers=ADMIN), 422, version)
    shown = client.get(f"/importance/{version}")
    assert shown.status_code == 200 and len(shown.json()["classes"]) == 7


def test_metrics_count_what_was_asked(client):
    before = samples(client)
    client.post("/classify", files=form_of(png(), png()))
    client.post("/classify", content=b"no", headers=IMAGE)
    client.get("/wherever")
    after = samples(client)

    def moved(name):
        return after[name] - before[name]

    assert moved('igd_requests_total{endpoint="classify",outcome="ok"}') == 1
    assert moved('igd_requests_total{endpoint="classify",outcome="client_error"}') == 1
    assert moved('igd_requests_total{endpoint="other",outcome="client_error"}') == 1
    assert moved('igd_request_duration_seconds_count{endpoint="classify"}') == 2
    assert moved('igd_request_duration_seconds_sum{endpoint="classify"}') > 0
    assert moved("igd_batch_size_sum") == 2 and 1 <= moved("igd_batch_size_count") <= 2
    assert after["igd_queue_depth"] == after["igd_in_flight"] == 0
    assert after["igd_store_up"] == 1


def test_metrics_name_the_version_served_and_no_other(client):
    served = [name for name in samples(client) if name.startswith("igd_importance_info")]
    version = client.get("/model").json()["importance_version"]
    assert len(served) == 1 and f'version="{version}"' in served[0] and 'method="lo-ir"' in served[0]


def test_every_outcome_has_a_series_from_the_start(guarded):
    names = samples(guarded)
    for outcome in ("ok", "client_error", "rejected", "error"):
        assert f'igd_requests_total{{endpoint="classify",outcome="{outcome}"}}' in names


def test_a_stranger_cannot_make_series(client):
    before = len(samples(client))
    for i in range(20):
        client.get(f"/made-up-{i}")
    assert len(samples(client)) == before


def test_the_docs_load_nothing_from_elsewhere(client):
    page = client.get("/docs")
    assert page.status_code == 200
    links = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", page.text)
    assert links and all(link.startswith("/") for link in links), links
    assert all(client.get(link).status_code == 200 for link in links)


def test_the_example_in_the_openapi_document_works(client):
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/classify"]["post"]
    example = operation["requestBody"]["content"]["application/json"]["example"]
    assert client.post("/classify", json=example).status_code == 200
    assert {"400", "401", "413", "415", "422", "429", "503", "504"} <= set(operation["responses"])


def multipart(body, content_type="multipart/form-data; boundary=x"):
    return {"content": body, "headers": {"Content-Type": content_type}}


def part(name=b'name="images"; filename="a.png"', content=b"", boundary=b"x"):
    disposition = b"Content-Disposition: form-data; " + name
    return b"--" + boundary + b"\r\n" + disposition + b"\r\n\r\n" + content + b"\r\n--" + boundary + b"--\r\n"


def json_body(body):
    return {"content": body, "headers": {"Content-Type": "application/json"}}


HOSTILE = {
    "multipart without a boundary": multipart(part(), "multipart/form-data"),
    "multipart with an empty boundary": multipart(part(), "multipart/form-data; boundary="),
    "multipart with another boundary": multipart(part(boundary=b"y")),
    "multipart with an endless boundary": multipart(part(), "multipart/form-data; boundary=" + "x" * 5000),
    "multipart that ends in the middle": multipart(part(content=png())[:-30]),
    "multipart without a name": multipart(part(b'filename="a.png"')),
    "multipart without a disposition": multipart(b"--x\r\n\r\nimage\r\n--x--\r\n"),
    "multipart of nothing": multipart(b""),
    "multipart of its end only": multipart(b"--x--\r\n"),
    "multipart with text as image": multipart(part(b'name="images"', png())),
    "multipart with a path as file name": multipart(part(b'name="images"; filename="../../etc/passwd"')),
    "multipart with bytes as names": multipart(part(b'name="\xff\xfe\0"; filename="\xff"')),
    "multipart in an unknown charset": multipart(part(), "multipart/form-data; boundary=x; charset=klingon"),
    "multipart in an undefined charset": multipart(part(), "multipart/form-data; boundary=x; charset=undefined"),
    "multipart in a charset that is none": multipart(part(), "multipart/form-data; boundary=x; charset=zlib"),
    "multipart in idna": multipart(part(b'name="\xff"; filename="a"'), "multipart/form-data; boundary=x; charset=idna"),
    "multipart with half a surrogate": multipart(
        part(b'name="+2AA-"; filename="+2AA-"'), "multipart/form-data; boundary=x; charset=utf-7"
    ),
    "multipart with many fields": {"files": [(f"field{i}", (None, "x")) for i in range(1500)]},
    "multipart with a header of 100 kB": multipart(b"--x\r\nX-Long: " + b"y" * 100_000 + b"\r\n\r\n\r\n--x--\r\n"),
    "multipart with 10,000 headers": multipart(b"--x\r\n" + b"A: b\r\n" * 10_000 + b"\r\n\r\n--x--\r\n"),
    "JSON that is none": json_body(b"images"),
    "JSON of nothing": json_body(b""),
    "JSON that ends in the middle": json_body(b'{"images": ["'),
    "deep JSON": json_body(b"[" * 100_000),
    "deep JSON in its place": json_body(b'{"images": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "deep JSON objects": json_body(b'{"a":' * 40_000 + b"1" + b"}" * 40_000),
    "JSON numbers": json_body(b'{"images": [1, 1e999, -0, 123456789012345678901234567890]}'),
    "a JSON number of 100,000 digits": json_body(b'{"images": ' + b"9" * 100_000 + b"}"),
    "JSON constants": json_body(b'{"images": [null, true, NaN, Infinity]}'),
    "JSON with half a surrogate": json_body(rb'{"images": ["\ud800"]}'),
    "JSON with NUL": json_body(rb'{"images": ["\u0000"]}'),
    "JSON with a NUL byte": json_body(b'{"images": ["\0"]}'),
    "JSON in UTF-16": json_body('{"images": ["AAAA"]}'.encode("utf-16")),
    "JSON in Latin-1": json_body(b'{"images": ["\xe4"]}'),
    "base64 without its end": json_body(b'{"images": ["AAA"]}'),
    "base64 of another alphabet": json_body(b'{"images": ["-_-_"]}'),
    "base64 with white space": json_body(b'{"images": ["AA AA"]}'),
    "an empty base64": json_body(b'{"images": [""]}'),
    "base64 of letters from elsewhere": json_body('{"images": ["äöüß"]}'.encode()),
    "NUL bytes": {"content": bytes(1000), "headers": IMAGE},
    "an image said to be compressed": {"content": b"\x1f\x8b" * 100, "headers": IMAGE | {"Content-Encoding": "gzip"}},
    "a content type of bytes": {"content": b"x", "headers": {"Content-Type": b"\xff\xfe"}},
    "a content type of 50 kB": {"content": b"x", "headers": {"Content-Type": "image/" + "x" * 50_000}},
}
PATHS = [
    "/importance/%00",
    "/importance/%ff%fe",
    "/importance/" + "x" * 20_000,
    "/importance/..%2f..%2fetc%2fpasswd",
    "/importance/%7B%7D%0d%0aX-Injected:%201",
    "/importance/*",
    "/importance/1?top_k=" + "9" * 5000,
    "/%00",
    "//etc/passwd",
    "/static-offline-docs/../../etc/passwd",
    "/static-offline-docs/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
]


def talk(server, *pieces, close=False):
    """Send bytes as they are; all that comes back until the server closes."""
    url = httpx.URL(server.url)
    received = b""
    with socket.create_connection((url.host, url.port), timeout=20) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough; its answer is there to be read
        if close:
            return b""
        try:
            while data := connection.recv(65_536):
                received += data
        except (TimeoutError, ConnectionResetError):
            pass
    return received


def head(*headers, request="POST /classify"):
    return "\r\n".join([f"{request} HTTP/1.1", "Host: x", "Content-Type: image/png", *headers, "", ""]).encode()


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


def with_body(*headers):
    """A request for a classification with all that it needs."""
    return head(f"Content-Length: {len(png())}", CLOSE, *headers) + png()


CLOSE = "Connection: close"
# what is sent, statuses that may come back (none: the connection is just closed)
RAW = {
    "a length that is no number": ([head("Content-Length: many")], {400}),
    "a negative length": ([head("Content-Length: -1")], {400}),
    "a length of 5,000 digits": ([head("Content-Length: " + "9" * 5000)], {400, 413}),
    "a length over the limit": ([head("Content-Length: 99999999999")], {413}),
    "a length shorter than the body": ([head("Content-Length: 2", CLOSE), b"xx GET / nonsense"], {400}),
    "two lengths": ([head("Content-Length: 2", "Content-Length: 3"), b"xxx"], {400}),
    "a length and chunks": ([head("Content-Length: 2", "Transfer-Encoding: chunked", CLOSE), b"0\r\n\r\n"], {400}),
    "a chunk that is none": ([head("Transfer-Encoding: chunked"), b"zz\r\n"], {400}),
    "a body without a length": ([head(CLOSE), b"xxxxx"], {400}),
    "an unknown transfer encoding": ([head("Transfer-Encoding: gzip", CLOSE), b"xxxxx"], {400, 501}),
    "no HTTP": ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)], {400}),
    "HTTP/3": ([b"GET / HTTP/3.0\r\n\r\n"], {400, 505}),
    "a header without a colon": ([b"GET /model HTTP/1.1\r\nHost x\r\n\r\n"], {400}),
    "a NUL in a header": ([head("X-A: a\0b", CLOSE)], {400}),
    "a length of 5,000 zeros": ([head("Content-Length: " + "0" * 5000 + str(len(png())), CLOSE), png()], {413}),
    "a header of 1 MB": ([with_body("X-Long: " + "x" * 1_000_000)], {431}),
    "a header that never ends": ([head()[:-2], b"X-Long: ", *[b"x" * 10_000] * 1000], {431}),
    "a path of 100 kB": ([head(request="POST /" + "x" * 100_000)], {431}),
    "20,000 headers": ([with_body(*["X-A: b"] * 20_000)], {431}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_gets_a_4xx(client, name):
    response = client.post("/classify", **HOSTILE[name])
    assert 400 <= response.status_code < 500, response.text
    assert_is_problem(response, response.status_code)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
def test_a_hostile_path_gets_a_4xx(client, path):
    response = client.get(httpx.URL(client.base_url, raw_path=path.encode()))
    assert_is_problem(response, response.status_code)
    assert response.status_code in (404, 422) and "x-injected" not in response.headers


@pytest.mark.parametrize("name", RAW)
def test_hostile_http_gets_a_4xx(server, client, name):
    sent, statuses = RAW[name]
    received = talk(server, *sent)
    assert received and int(received.split()[1]) in statuses, received[:300]
    assert client.get("/health/live").status_code == 200


def test_a_chunked_body_is_cut_off_at_the_limit(server):
    endless = [chunk(bytes(100_000))] * 200
    received = talk(server, head("Transfer-Encoding: chunked"), *endless)
    assert int(received.split()[1]) == 413 and b"IGD_MAX_BODY_MB" in received


def test_a_chunked_body_within_the_limit_is_read(server):
    image = png()
    pieces = [chunk(image[:10]), chunk(image[10:]), b"0\r\n\r\n"]
    received = talk(server, head("Transfer-Encoding: chunked", CLOSE), *pieces)
    assert int(received.split()[1]) == 200


def test_who_asks_first_learns_that_the_body_is_too_large(server):
    received = talk(server, head("Content-Length: 99999999", "Expect: 100-continue"))
    assert b"413" in received.splitlines()[0] and b"100 Continue" not in received


def test_a_client_that_leaves_is_not_an_error_of_the_server(server, client, until):
    def left():
        return samples(client)['igd_requests_total{endpoint="classify",outcome="client_error"}']

    before, errors = left(), samples(client)['igd_requests_total{endpoint="classify",outcome="error"}']
    talk(server, head("Content-Length: 1000"), b"only this", close=True)
    until(lambda: left() == before + 1, "the count of the client that left")
    assert samples(client)['igd_requests_total{endpoint="classify",outcome="error"}'] == errors


def test_an_image_that_pillow_has_doubts_about_leaves_no_trace_in_the_log(server, client):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0" + bytes(20))
    assert client.post("/classify", content=file.getvalue(), headers=IMAGE).status_code == 200
    assert "Warning" not in server.output


def test_none_of_all_this_was_a_bug(server, client):
    assert "Traceback" not in server.output and "failed" not in server.output
    counts = samples(client)
    errors = [name for name in counts if 'outcome="error"' in name and counts[name]]
    assert not errors
    assert counts["igd_queue_depth"] == counts["igd_in_flight"] == 0
