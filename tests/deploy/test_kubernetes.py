"""The Kubernetes manifests: their settings are valid for this release, and they fit together."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml

from asyncinfer import __version__, settings
from asyncinfer.api.routes import ROUTES
from asyncinfer.schemas.responses import Scale
from asyncinfer.settings import Settings
from asyncinfer.worker.monitor import Monitor
from tests.benchmarks.autoscaling import SPIKE, Cluster, Simulation, policies, table

FOLDER = Path(__file__).parents[2] / "asyncinfer" / "docs" / "kubernetes"

Manifest: TypeAlias = dict[str, Any]


def _manifests() -> Iterator[Manifest]:
    for path in sorted(FOLDER.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


MANIFESTS = list(_manifests())
OURS = ("asyncinfer-serve", "asyncinfer-work")


def manifest_of(kind: str, name: str) -> Manifest:
    (found,) = (
        manifest
        for manifest in MANIFESTS
        if (manifest["kind"], manifest["metadata"]["name"]) == (kind, name)
    )
    return found


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def pod_of(name: str) -> Manifest:
    spec: Manifest = manifest_of("Deployment", name)["spec"]["template"]["spec"]
    return spec


def container_of(name: str) -> Manifest:
    (container,) = pod_of(name)["containers"]
    return dict(container)


def environment_of(name: str) -> dict[str, str]:
    """The container's environment, with the values of its secrets."""
    secrets = manifest_of("Secret", "asyncinfer")["stringData"]
    environment = {}
    for variable in container_of(name)["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        environment[variable["name"]] = (
            secrets[reference["key"]] if reference else variable["value"]
        )
    return environment


def settings_of(name: str) -> Settings:
    return settings.read(environment_of(name), {})


def pods() -> Iterator[tuple[str, Manifest]]:
    """The name and the pod specification of each workload."""
    for manifest in MANIFESTS:
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]


# --- pods ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_with_an_allowed_value(name: str) -> None:
    known = {knob.variable for knob in settings.knobs()}
    assert set(environment_of(name)) <= known
    settings_of(name)


@pytest.mark.parametrize("name", OURS)
def test_each_container_runs_its_command_with_the_image_of_this_release(name: str) -> None:
    container = container_of(name)
    assert container["image"] == f"asyncinfer:{__version__}"
    assert container["args"] == [name.removeprefix("asyncinfer-")]


def test_the_api_is_reached_from_outside_its_pod_with_keys_only() -> None:
    read = settings_of("asyncinfer-serve")
    container = container_of("asyncinfer-serve")
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "keys")
    assert read.host == "0.0.0.0"
    assert str(read.api_keys) == f"{mount['mountPath']}/keys"
    assert "--insecure" not in container["args"]


def test_no_secret_is_shipped() -> None:
    for value in manifest_of("Secret", "asyncinfer")["stringData"].values():
        assert "REPLACE" in value
        assert not re.search(r"[0-9a-f]{64}|ai_[\w-]{40}", value)


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=lambda value: str(value)[:20])
def test_a_pod_has_no_unneeded_rights(name: str, pod: Manifest) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


def test_a_kubernetes_service_cannot_set_a_variable_of_a_pod() -> None:
    """By service links a Service called `redis` would set REDIS_PORT=tcp://10.0.0.1:6379."""
    assert [name for name, pod in pods() if pod["enableServiceLinks"] is not False] == []


# --- probes and stops --------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_a_probe_requests_an_existing_route_on_an_open_port(name: str, probe: str) -> None:
    http_get = container_of(name)[probe]["httpGet"]
    (port,) = (port for port in container_of(name)["ports"] if port["name"] == http_get["port"])
    read = settings_of(name)
    if name == "asyncinfer-work":
        assert port["containerPort"] == read.monitor_port
        assert http_get["path"] in Monitor().pages
    else:
        assert port["containerPort"] == read.port
        assert http_get["path"] in {route.path for route in ROUTES if route.scope is None}


@pytest.mark.parametrize("name", OURS)
def test_no_pod_is_restarted_while_redis_is_unreachable(name: str) -> None:
    container = container_of(name)
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"


def test_a_worker_has_time_to_finish_its_runs_before_it_is_killed() -> None:
    read = settings_of("asyncinfer-work")
    grace_seconds = pod_of("asyncinfer-work")["terminationGracePeriodSeconds"]
    assert grace_seconds >= read.drain_timeout + 5
    assert read.drain_timeout >= read.prediction_timeout


# --- references between manifests --------------------------------------------------------------


def test_no_manifest_names_a_namespace() -> None:
    assert [
        name_of(manifest) for manifest in MANIFESTS if "namespace" in manifest["metadata"]
    ] == []


def test_each_selector_matches_one_workload() -> None:
    labels = [
        other["spec"]["template"]["metadata"]["labels"]
        for other in MANIFESTS
        if other["kind"] in ("Deployment", "StatefulSet")
    ]
    offenders = {}
    for manifest in MANIFESTS:
        spec = manifest.get("spec", {})
        if "selector" not in spec:
            continue
        selected = spec["selector"].get("matchLabels", spec["selector"]).items()
        matches = [pod_labels for pod_labels in labels if selected <= pod_labels.items()]
        own = spec.get("template", {}).get("metadata", {}).get("labels")
        if len(matches) != 1 or own not in (None, *matches):
            offenders[name_of(manifest)] = matches
    assert offenders == {}


def test_a_service_targets_a_port_that_its_pods_open() -> None:
    offenders = {}
    for service in (manifest for manifest in MANIFESTS if manifest["kind"] == "Service"):
        containers = dict(pods())[service["metadata"]["name"]]["containers"]
        open_ports = {port["name"] for container in containers for port in container["ports"]}
        closed = {port["targetPort"] for port in service["spec"]["ports"]} - open_ports
        if closed:
            offenders[name_of(service)] = closed
    assert offenders == {}


def test_each_pod_is_scraped_on_its_port_for_metrics() -> None:
    scraped = {
        monitor["metadata"]["name"]: endpoint["port"]
        for monitor in MANIFESTS
        if monitor["kind"] == "PodMonitor"
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
    }
    opened = {
        name: {port["containerPort"]: port["name"] for port in container_of(name)["ports"]}
        for name in OURS
    }
    serve, work = map(settings_of, OURS)
    assert (serve.metrics_host, work.monitor_host) == ("0.0.0.0", "0.0.0.0")
    assert scraped == {
        "asyncinfer-serve": opened["asyncinfer-serve"][serve.metrics_port or 0],
        "asyncinfer-work": opened["asyncinfer-work"][work.monitor_port or 0],
    }


def test_the_example_secret_has_every_key_that_is_referenced() -> None:
    keys = manifest_of("Secret", "asyncinfer")["stringData"].keys()
    referenced = re.findall(
        r"name: asyncinfer, key: ([\w-]+)", _text("serve", "work", "valkey", "keda")
    )
    assert set(referenced) | {"keys"} == set(keys)


def _text(*names: str) -> str:
    return "".join((FOLDER / f"{name}.yaml").read_text() for name in names)


# --- the autoscaler ----------------------------------------------------------------------------


def test_the_autoscaler_reads_fields_of_the_apis_scale_route() -> None:
    scaled = manifest_of("ScaledObject", "asyncinfer-work")["spec"]
    assert scaled["scaleTargetRef"] == {"name": "asyncinfer-work"}
    read = settings_of("asyncinfer-serve")
    service = manifest_of("Service", "asyncinfer-serve")
    for trigger in scaled["triggers"]:
        metadata = trigger["metadata"]
        url = re.fullmatch(r"http://([\w.-]+):(\d+)(/scale/)\w+", metadata["url"])
        assert url
        assert url[1].startswith("asyncinfer-serve.")
        assert url[1] in read.allowed_hosts
        assert int(url[2]) in [port["port"] for port in service["spec"]["ports"]]
        assert f"{url[3]}{{model}}" in {route.path for route in ROUTES}
        assert metadata["valueLocation"] in Scale.__struct_fields__
        authentication = manifest_of("TriggerAuthentication", trigger["authenticationRef"]["name"])
        assert metadata["authMode"] == "bearer"
        assert authentication["spec"]["secretTargetRef"][0]["parameter"] == "token"


def test_the_target_is_the_slots_of_a_worker_times_the_documented_wait() -> None:
    backlog = manifest_of("ScaledObject", "asyncinfer-work")["spec"]["triggers"][0]["metadata"]
    slots = settings_of("asyncinfer-work").concurrency
    assert float(backlog["targetValue"]) == slots * Cluster().accepted_wait_seconds
    assert slots == Cluster().slots_per_pod


# --- the simulation ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["backlog seconds", "queue length"])
def test_the_simulation_ends_each_job_once(name: str) -> None:
    policy, workers = policies(SPIKE, Cluster())[name]
    outcome = Simulation(SPIKE, policy, Cluster(), pods=workers).run()
    assert outcome.submitted > 3000
    assert outcome.finished + outcome.cancelled == outcome.submitted


def test_the_documents_show_the_result_of_the_simulation() -> None:
    page = (FOLDER / "README.md").read_text()
    for row in table([SPIKE]):
        assert row in page


@pytest.mark.soak
def test_the_documents_show_all_results_of_the_simulation() -> None:
    assert "\n".join(table()) in (FOLDER / "README.md").read_text()
