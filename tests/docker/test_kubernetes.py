"""docker/kubernetes, rendered by kustomize."""

import json
import os
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from service.metrics import Metrics
from service.settings import Settings

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

Document: TypeAlias = dict[str, Any]
OVERLAYS = ("cpu", "cpu-hpa", "gpu", "kserve")
KUBERNETES = ("1.30", "1.37")  # the oldest and newest that the schemas are checked against
CUSTOM = {"ScaledObject", "ServiceMonitor", "InferenceService"}
# Of an InferenceService's predictor, what is KServe's own; the rest is a pod's.
KSERVE_FIELDS = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout", "deploymentStrategy"}
PACKAGES = "@kubernetes-models/keda @kubernetes-models/prometheus-operator"


@pytest.fixture(scope="session")
def render(kustomize: list[str], repository: Path) -> Callable[[str], list[Document]]:
    """The documents of an overlay."""
    rendered: dict[str, list[Document]] = {}

    def documents(overlay: str) -> list[Document]:
        if overlay not in rendered:
            directory = repository / "docker/kubernetes/overlays" / overlay
            result = subprocess.run([*kustomize, str(directory)], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            rendered[overlay] = list(yaml.safe_load_all(result.stdout))
        return deepcopy(rendered[overlay])

    return documents


@pytest.fixture(params=OVERLAYS)
def documents(request: pytest.FixtureRequest, render: Callable[[str], list[Document]]) -> list[Document]:
    return render(request.param)


def of_kind(documents: list[Document], kind: str, name: str = "ig-defense") -> Document:
    (found,) = (d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name)
    return found


def pods(documents: list[Document]) -> dict[str, Document]:
    """The pod specs, by component."""
    found = {}
    for document in documents:
        if document["kind"] in ("Deployment", "StatefulSet"):
            component = document["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
            found[component] = document["spec"]["template"]["spec"]
        elif document["kind"] == "InferenceService":
            predictor = document["spec"]["predictor"]
            found["server"] = {key: value for key, value in predictor.items() if key not in KSERVE_FIELDS}
    return found


def container(pod: Document) -> Document:
    (found,) = pod["containers"]
    return found


def values(pod: Document) -> dict[str, str]:
    """The variables that are given as text."""
    return {variable["name"]: variable["value"] for variable in container(pod)["env"] if "value" in variable}


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_own_schemas_fit(documents: list[Document], version: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "server"}, "spec": pods(documents)["server"]}
    for document in [*(d for d in documents if d["kind"] not in CUSTOM), pod]:
        schemas.validate(document, version, strict=True)


@pytest.fixture(scope="session")
def wrong_custom_resources(find_tool: Callable[..., str], repository: Path) -> Callable[[list[Document]], str]:
    """What the custom resources' own schemas say of documents."""
    node = find_tool("node", "install Node.js")
    installed = Path(os.environ.get("KUBERNETES_MODELS", repository / ".cache/npm"))
    if not (installed / "node_modules/@kubernetes-models").is_dir():
        pytest.skip(f"the schemas are not installed; npm install --prefix .cache/npm {PACKAGES}")
    script = Path(__file__).with_name("custom_resources.mjs").read_text()

    def check(documents: list[Document]) -> str:
        # Given like this, it looks for modules in the working directory.
        command = [node, "--input-type=module", "--eval", script]
        given = json.dumps(documents)
        result = subprocess.run(command, input=given, cwd=installed, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return check


def test_custom_resources_fit_their_schemas(
    documents: list[Document], wrong_custom_resources: Callable[[list[Document]], str]
) -> None:
    assert wrong_custom_resources(documents) == ""


def test_the_schemas_of_custom_resources_find_mistakes(
    render: Callable[[str], list[Document]], wrong_custom_resources: Callable[[list[Document]], str]
) -> None:
    documents = render("cpu")
    of_kind(documents, "ScaledObject")["spec"]["minReplicaCount"] = "two"
    of_kind(documents, "ServiceMonitor")["spec"]["endpoints"][0]["interval"] = "often"
    said = wrong_custom_resources(documents)
    assert "minReplicaCount must be integer" in said
    assert "interval must match pattern" in said


def test_probes_ask_for_paths_that_the_app_has(documents: list[Document], paths_of_the_app: set[str]) -> None:
    server = container(pods(documents)["server"])
    asked = {kind: server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert asked == {"startup": "/health/live", "readiness": "/health/ready", "liveness": "/health/live"}
    assert set(asked.values()) <= paths_of_the_app


def test_ports_agree(documents: list[Document]) -> None:
    server = container(pods(documents)["server"])
    (port,) = server["ports"]
    assert str(port["containerPort"]) == values(pods(documents)["server"])["IGD_PORT"]
    for kind in ("startup", "readiness", "liveness"):
        assert server[f"{kind}Probe"]["httpGet"]["port"] in (port["name"], port["containerPort"])
    (ingress,) = of_kind(documents, "NetworkPolicy")["spec"]["ingress"]
    assert [allowed["port"] for allowed in ingress["ports"]] == [port["containerPort"]]


def test_variables_are_settings(documents: list[Document], setting_names: set[str]) -> None:
    for component in ("server", "worker"):
        assert {variable["name"] for variable in container(pods(documents)[component])["env"]} <= setting_names
    (shared,) = (d for d in documents if d["kind"] == "ConfigMap")
    assert set(shared["data"]) <= setting_names
    Settings(**{name.removeprefix("IGD_").lower(): value for name, value in shared["data"].items()})


def test_settings_are_the_ones_of_the_rendered_config_map(documents: list[Document]) -> None:
    (shared,) = (d for d in documents if d["kind"] == "ConfigMap")
    for component in ("server", "worker"):
        named = container(pods(documents)[component])["envFrom"]
        assert named == [{"configMapRef": {"name": shared["metadata"]["name"]}}], "a change would not roll the pods"


def test_secrets_are_named_and_not_contained(documents: list[Document], repository: Path) -> None:
    assert "Secret" not in {document["kind"] for document in documents}
    variables = [variable for pod in pods(documents).values() for variable in container(pod).get("env", [])]
    named = [v["valueFrom"]["secretKeyRef"] for v in variables if "secretKeyRef" in v.get("valueFrom", {})]
    made = (repository / "docker/igd-make-secrets").read_text()
    assert all(f'"{reference["key"]}"' in made or reference.get("optional") for reference in named)
    assert {variable["name"] for variable in variables if "secretKeyRef" in variable.get("valueFrom", {})} == {
        "IGD_REDIS_URL",
        "IGD_ADMIN_KEY",
        "IGD_API_KEYS",
    }


def test_pods_can_do_little(documents: list[Document]) -> None:
    for name, pod in pods(documents).items():
        context, own = pod["securityContext"], container(pod)["securityContext"]
        assert (context["runAsNonRoot"], context["seccompProfile"]) == (True, {"type": "RuntimeDefault"}), name
        assert (own["readOnlyRootFilesystem"], own["allowPrivilegeEscalation"]) == (True, False), name
        assert own["capabilities"] == {"drop": ["ALL"]}, name
        assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False), name


def test_every_container_says_what_it_needs(documents: list[Document]) -> None:
    for name, pod in pods(documents).items():
        resources = container(pod)["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"]), name
        assert "memory" in resources["limits"], name


def test_a_server_ends_in_order(documents: list[Document]) -> None:
    pod = pods(documents)["server"]
    *command, seconds = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["sleep"]
    assert pod["terminationGracePeriodSeconds"] > float(seconds) + float(values(pod)["IGD_DRAIN_S"])
    # Until it is seen to be not ready, it must go on answering.
    probe = container(pod)["readinessProbe"]
    assert float(seconds) > probe["periodSeconds"] * probe["failureThreshold"]


def test_rolling_out_takes_no_replica_away(documents: list[Document]) -> None:
    if inference := [d for d in documents if d["kind"] == "InferenceService"]:
        strategy = inference[0]["spec"]["predictor"]["deploymentStrategy"]
    else:
        strategy = of_kind(documents, "Deployment")["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_uploads_have_room(documents: list[Document]) -> None:
    (tmp,) = (volume for volume in pods(documents)["server"]["volumes"] if volume["name"] == "tmp")
    assert float(tmp["emptyDir"]["sizeLimit"].removesuffix("Mi")) > Settings().max_total_mb


def test_images_are_pinned_to_the_project_s_version(documents: list[Document], pyproject: dict) -> None:
    images = {name: container(pod)["image"] for name, pod in pods(documents).items()}
    assert images["worker"] == f"ig-defense:{pyproject['version']}"
    assert images["server"] in (images["worker"], f"{images['worker']}-cuda")
    assert images["redis"].startswith("redis:")


def test_everything_that_selects_pods_selects_the_right_ones(documents: list[Document]) -> None:
    labels = {"app.kubernetes.io/name": "ig-defense", "app.kubernetes.io/component": "server"}
    for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert of_kind(documents, kind)["spec"][field]["matchLabels"] == labels
    for document in documents:
        if document["kind"] in ("Deployment", "StatefulSet"):
            given = document["spec"]["template"]["metadata"]["labels"]
            assert document["spec"]["selector"]["matchLabels"].items() <= given.items()
        if document["kind"] == "InferenceService":  # KServe gives its labels to the pods
            assert labels.items() <= document["metadata"]["labels"].items()


def test_the_store_is_reached_by_server_and_worker_only(documents: list[Document]) -> None:
    (rule,) = of_kind(documents, "NetworkPolicy", "ig-defense-redis")["spec"]["ingress"]
    (peer,) = rule["from"]
    (component,) = peer["podSelector"]["matchExpressions"]
    assert component["values"] == ["server", "worker"]


def test_nobody_sets_replicas_against_the_autoscaler(documents: list[Document]) -> None:
    if "InferenceService" not in {document["kind"] for document in documents}:
        assert "replicas" not in of_kind(documents, "Deployment")["spec"]


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_keda_asks_for_a_metric_that_the_service_has(render: Callable[[str], list[Document]], overlay: str) -> None:
    documents = render(overlay)
    scaled = of_kind(documents, "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == of_kind(documents, "Deployment")["metadata"]["name"]
    (trigger,) = scaled["triggers"]
    metrics = {metric.name for metric in Metrics().registry.collect()}
    assert "igd_queue_depth" in metrics
    assert 'igd_queue_depth{job="ig-defense"}' in trigger["metadata"]["query"]
    assert int(trigger["metadata"]["threshold"]) <= Settings().max_batch_size
    monitor = of_kind(documents, "ServiceMonitor")["spec"]
    assert of_kind(documents, "Service")["metadata"]["labels"][monitor["jobLabel"]] == "ig-defense"


@pytest.mark.parametrize("overlay", ["cpu", "cpu-hpa", "gpu"])
def test_the_service_monitor_finds_the_metrics(
    render: Callable[[str], list[Document]], overlay: str, paths_of_the_app: set[str]
) -> None:
    documents = render(overlay)
    service, monitor = of_kind(documents, "Service"), of_kind(documents, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,), (port,) = monitor["endpoints"], service["spec"]["ports"]
    assert endpoint["port"] == port["name"]
    assert endpoint["path"] in paths_of_the_app
    assert port["targetPort"] == container(pods(documents)["server"])["ports"][0]["name"]


def test_there_is_one_autoscaler(documents: list[Document]) -> None:
    kinds = [d["kind"] for d in documents if d["kind"] in ("ScaledObject", "HorizontalPodAutoscaler")]
    made_by_kserve = [d for d in documents if d["kind"] == "InferenceService"]
    assert len(kinds) + len(made_by_kserve) == 1


def test_the_gpu_overlay_asks_for_one(render: Callable[[str], list[Document]]) -> None:
    server = pods(render("gpu"))["server"]
    assert container(server)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert values(server)["IGD_DEVICE"] == "cuda"
    assert container(server)["image"].endswith("-cuda")
