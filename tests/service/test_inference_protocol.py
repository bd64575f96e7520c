"""/v2: NVIDIA's own client classifies batches; what does not fit gets the protocol's kind of error."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from defense import load_classifier
from defense.model_config import InputConfig
from service.errors import TooLarge, Unprocessable
from service.inference_protocol import read_request, read_tensor

CONFIG = InputConfig(size=(4, 6), channels=3)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
IMAGES = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), np.uint8)
OUTPUTS = ("logits", "probabilities", "undefended_logits")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def softmax(logits):
    return torch.tensor(logits).softmax(1).numpy()


@pytest.fixture(scope="module")
def server(module_igd, tiny_model):
    # Fewer images a batch than a request has: they travel in several.
    return module_igd.serve(tiny_model, "--dtype", "float32", "--max-batch-size", 8, "--max-images", 30)


@pytest.fixture(scope="module")
def http(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def triton(server):
    module = pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")
    with module.InferenceServerClient(server.url.removeprefix("http://"), network_timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def expected(tiny_model):
    """Undefended logits of the images, from the network alone."""
    with torch.no_grad():
        return load_classifier(tiny_model)(torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255).numpy()


def input_of(images, datatype="UINT8", binary=True):
    from tritonclient.http import InferInput

    tensor = InferInput("images", list(images.shape), datatype)
    return [tensor.set_data_from_numpy(images, binary_data=binary)]


@pytest.mark.parametrize("binary_output", [False, True])
@pytest.mark.parametrize("binary_input", [False, True])
def test_a_stock_client_classifies_a_batch(triton, expected, binary_input, binary_output):
    from tritonclient.http import InferRequestedOutput

    wanted = [InferRequestedOutput(name, binary_data=binary_output) for name in OUTPUTS]

    result = triton.infer("tiny", input_of(IMAGES, binary=binary_input), outputs=wanted, request_id="mine")

    answer = result.get_response()
    assert (answer["id"], answer["model_name"]) == ("mine", "tiny")
    assert [output["name"] for output in answer["outputs"]] == list(OUTPUTS)
    logits, probabilities, undefended = (result.as_numpy(name) for name in OUTPUTS)
    assert logits.dtype == np.float32 and logits.shape == probabilities.shape == (20, 4)
    np.testing.assert_allclose(undefended, expected, atol=1e-4)
    np.testing.assert_allclose(probabilities, softmax(logits), atol=1e-6)
    assert not np.allclose(logits, undefended)  # or there would be no defense


def test_a_stock_client_sends_image_files(triton, expected):
    files = np.array([png(image) for image in IMAGES], dtype=object)

    result = triton.infer("tiny", input_of(files, "BYTES"))

    np.testing.assert_allclose(result.as_numpy("undefended_logits"), expected, atol=1e-4)


def test_outputs_are_those_asked_for_in_that_order(triton):
    from tritonclient.http import InferRequestedOutput

    wanted = [InferRequestedOutput("undefended_logits", binary_data=False), InferRequestedOutput("logits")]
    result = triton.infer("tiny", input_of(IMAGES), outputs=wanted)

    outputs = result.get_response()["outputs"]
    assert [output["name"] for output in outputs] == ["undefended_logits", "logits"]
    assert ["data" in output for output in outputs] == [True, False]
    assert result.as_numpy("logits").shape == (20, 4)
    assert "id" not in result.get_response()


def test_a_stock_client_reads_what_is_served(triton, http):
    version = http.get("/model").json()["importance_version"]

    assert triton.is_server_live() and triton.is_server_ready()
    assert triton.is_model_ready("tiny") and triton.is_model_ready("tiny", version)
    assert "binary_tensor_data" in triton.get_server_metadata()["extensions"]
    described = triton.get_model_metadata("tiny", version)
    assert (described["name"], described["versions"]) == ("tiny", [version])
    assert described["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 8, 8, 3]}]
    assert described["outputs"] == [{"name": name, "datatype": "FP32", "shape": [-1, 4]} for name in OUTPUTS]
    result = triton.infer("tiny", input_of(IMAGES), model_version=version)
    assert result.get_response()["model_version"] == version


def test_a_stock_client_is_told_what_is_wrong(triton):
    from tritonclient.utils import InferenceServerException

    for model, version, images, status, fragment in [
        ("other", "", IMAGES, "404", "the model 'tiny'"),
        ("tiny", "01", IMAGES, "404", "version '01' is not being served"),
        ("tiny", "", IMAGES[:, :7], "422", "shape [n, 8, 8, 3]"),
        ("tiny", "", np.repeat(IMAGES, 2, axis=0), "413", "at most 30 images"),
    ]:
        with pytest.raises(InferenceServerException) as refused:
            triton.infer(model, input_of(images), model_version=version)
        assert refused.value.status() == status and fragment in refused.value.message()
    assert not triton.is_model_ready("other") and not triton.is_model_ready("tiny", "01")


def test_curl_with_json_alone_does(http, expected):
    images = {"name": "images", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(png(IMAGES[0])).decode()]}
    answer = http.post("/v2/models/tiny/infer", json={"inputs": [images], "outputs": [{"name": "undefended_logits"}]})

    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    (output,) = answer.json()["outputs"]
    assert output["datatype"] == "FP32" and output["shape"] == [1, 4]
    np.testing.assert_allclose(output["data"], expected[0], atol=1e-4)


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "fragment"),
    [
        ("GET", "/v2/models/other", b"", 404, "the model 'tiny'"),
        ("GET", "/v2/nothing", b"", 404, "nothing is at /v2/nothing"),
        ("GET", "/v2/models/tiny/infer", b"", 405, "use POST"),
        ("POST", "/v2/models/tiny/infer", b"{", 422, "expected JSON"),
        ("POST", "/v2/models/tiny/infer", b"x" * 40_000_000, 413, "IGD_MAX_BODY_MB"),
    ],
)
def test_errors_are_the_protocol_s(http, method, path, content, status, fragment):
    answer = http.request(method, path, content=content)

    assert answer.status_code == status and answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"} and fragment in answer.json()["error"]
    assert answer.headers["x-request-id"]


def test_a_damaged_image_and_a_compressed_body_are_refused(http):
    tensor = {"name": "images", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(b"no image").decode()]}
    answer = http.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
    assert answer.status_code == 400 and "expected an image file" in answer.json()["error"]

    answer = http.post("/v2/models/tiny/infer", content=b"{}", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415 and "not compressed" in answer.json()["error"]


def test_keys_and_metrics_are_those_of_classify(module_igd, tiny_model):
    server = module_igd.serve(tiny_model, IGD_API_KEYS="alpha")
    tensor = {"name": "images", "datatype": "UINT8", "shape": [20, 8, 8, 3], "data": IMAGES.tolist()}
    with server.client() as http:
        refused = http.post("/v2/models/tiny/infer", json={"inputs": [tensor]})
        assert refused.status_code == 401 and "IGD_API_KEYS" in refused.json()["error"]
        key = {"Authorization": "Bearer alpha"}
        assert http.post("/v2/models/tiny/infer", json={"inputs": [tensor]}, headers=key).status_code == 200
        assert http.get("/v2/health/ready").status_code == 200
        metrics = http.get("/metrics").text
    assert 'igd_requests_total{endpoint="infer",outcome="ok"} 1.0' in metrics
    assert 'igd_requests_total{endpoint="infer",outcome="client_error"} 1.0' in metrics
    assert 'igd_requests_total{endpoint="health",outcome="ok"} 1.0' in metrics
    assert "igd_batch_size_sum 20.0" in metrics


def body_of(data=None, binary=None, shape=(5, 4, 6, 3), datatype="UINT8", name="images", **members):
    """A request's body, and the length of its JSON."""
    tensor = {"name": name, "datatype": datatype, "shape": list(shape)}
    tensor |= {"parameters": {"binary_data_size": len(binary)}} if binary is not None else {}
    tensor |= {"data": data} if data is not None else {}
    text = json.dumps({"inputs": [tensor]} | members).encode()
    return text + (binary or b""), str(len(text))


def read(body, length=None, max_images=10):
    request, binary = read_request(body, length)
    return read_tensor(request.inputs[0], binary, CONFIG, max_images=max_images)


def lengths_and(*files):
    return b"".join(len(file).to_bytes(4, "little") + file for file in files)


def test_pixels_are_read_from_all_forms():
    for body in (body_of(PIXELS.tolist()), body_of(PIXELS.ravel().tolist()), body_of(binary=PIXELS.tobytes())):
        assert np.array_equal(read(*body), PIXELS)


def test_files_are_read_from_both_forms():
    files = [b"one", b"", b"three"]
    assert read(*body_of(binary=lengths_and(*files), shape=[3], datatype="BYTES")) == files
    assert read(*body_of([base64.b64encode(f).decode() for f in files], shape=[3], datatype="BYTES")) == files


RAGGED = [*PIXELS[:4].tolist(), PIXELS[4, :3].tolist()]


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        (body_of(PIXELS.tolist(), name="image"), "expected the input 'images'"),
        (body_of(PIXELS.tolist(), datatype="FP32"), "UINT8 [n, 4, 6, 3] or BYTES [n]"),
        (body_of(PIXELS.tolist(), shape=[5, 6, 4, 3]), "nested like its shape"),
        (body_of(PIXELS.ravel().tolist(), shape=[5, 6, 4, 3]), "shape [n, 4, 6, 3]"),
        (body_of(PIXELS.ravel().tolist()[:-1]), "expected 360 bytes of pixels"),
        (body_of(RAGGED), "nested like its shape"),
        (body_of((PIXELS.ravel() / 255).tolist()), "whole numbers from 0 to 255"),
        (body_of([256] * 360), "whole numbers from 0 to 255"),
        (body_of(["7"] * 360), "whole numbers from 0 to 255"),
        (body_of([None] * 360), "whole numbers from 0 to 255"),
        (body_of(10**12), "it is not a list"),
        (body_of("x" * 360), "it is not a list"),
        (body_of({"a": 1}), "it is not a list"),
        (body_of(shape=[0, 4, 6, 3], data=[]), "got [0, 4, 6, 3]"),
        (body_of(), "either 'data' or a binary_data_size"),
        (body_of(PIXELS.tolist(), binary=b"x"), "either 'data' or a binary_data_size"),
        (body_of(binary=PIXELS.tobytes()[:-1]), "expected 360 bytes of pixels"),
        (body_of(shape=[-1, 4, 6, 3], data=[]), "inputs.0.shape.0"),
        (body_of(shape=["5", 4, 6, 3], data=[]), "inputs.0.shape.0"),
        (body_of(["AAAA"], shape=[2], datatype="BYTES"), "a list of 2 strings"),
        (body_of(["A"], shape=[1], datatype="BYTES"), "in base64"),
        (body_of([1], shape=[1], datatype="BYTES"), "a list of 1 strings"),
        (body_of(["AAAA"], shape=[1, 1], datatype="BYTES"), "expected shape [n]"),
        (body_of(binary=lengths_and(b"one"), shape=[2], datatype="BYTES"), "expected 2 image files"),
        (body_of(binary=lengths_and(b"one") + b"\xff\xff\xff\xff", shape=[2], datatype="BYTES"), "image files"),
        (body_of(binary=lengths_and(b"one") + b"x", shape=[1], datatype="BYTES"), "got 8 bytes"),
        (body_of(PIXELS.tolist(), outputs=[{"name": "labels"}]), "outputs.0.name"),
        (body_of(PIXELS.tolist(), outputs=[{"name": "logits"}] * 2), "each output once"),
        (
            body_of(PIXELS.tolist(), outputs=[{"name": "logits", "parameters": {"classification": 3}}]),
            "classification extension is not offered",
        ),
        (body_of(PIXELS.tolist(), inputs=[]), "inputs"),
        ((b"[]", None), "body"),
        ((b"{}", "3"), "at most 2"),
        ((b"{}", "-1"), "number of bytes of JSON"),
        ((b"{}", "9" * 5000), "number of bytes of JSON"),
        ((b'{"inputs"', None), "expected JSON"),
        ((b"[" * 100_000, None), "expected JSON"),
        ((b"\xff\xfe", None), "expected JSON"),
    ],
)
def test_what_is_not_of_the_protocol_is_refused_with_a_sentence(body, fragment):
    with pytest.raises(Unprocessable) as refused:
        read(*body)
    assert fragment in refused.value.detail and len(refused.value.detail) < 500


def test_too_many_images_are_refused_before_they_are_looked_at():
    for body in (body_of(PIXELS.tolist()), body_of(binary=bytes(10_000_000), shape=[2_500_000], datatype="BYTES")):
        with pytest.raises(TooLarge):
            read(*body, max_images=4)
