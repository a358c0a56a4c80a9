"""The Kubernetes manifests say what this release understands, and agree with each other."""

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

# One manifest: what YAML holds.
Manifest: TypeAlias = dict[str, Any]


def _manifests() -> Iterator[Manifest]:
    for path in sorted(FOLDER.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


ALL = list(_manifests())
OURS = ("asyncinfer-serve", "asyncinfer-work")


def one(kind: str, name: str) -> Manifest:
    (found,) = (it for it in ALL if (it["kind"], it["metadata"]["name"]) == (kind, name))
    return found


def pod_of(name: str) -> Manifest:
    spec: Manifest = one("Deployment", name)["spec"]["template"]["spec"]
    return spec


def container_of(name: str) -> Manifest:
    (container,) = pod_of(name)["containers"]
    return dict(container)


def environment_of(name: str) -> dict[str, str]:
    """As the container sees it, secrets in place."""
    secrets = one("Secret", "asyncinfer")["stringData"]
    found = {}
    for variable in container_of(name)["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        found[variable["name"]] = secrets[reference["key"]] if reference else variable["value"]
    return found


def settings_of(name: str) -> Settings:
    return settings.read(environment_of(name), {})


def pods() -> Iterator[tuple[str, Manifest]]:
    for it in ALL:
        if it["kind"] in ("Deployment", "StatefulSet"):
            yield it["metadata"]["name"], it["spec"]["template"]["spec"]


# --- what runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_with_a_value_that_is_allowed(name: str) -> None:
    known = {knob.variable for knob in settings.knobs()}
    assert set(environment_of(name)) <= known
    settings_of(name)


@pytest.mark.parametrize("name", OURS)
def test_the_image_is_this_release_and_runs_a_command_of_ours(name: str) -> None:
    container = container_of(name)
    assert container["image"] == f"asyncinfer:{__version__}"
    assert container["args"] == [name.removeprefix("asyncinfer-")]


def test_the_api_is_reached_from_outside_its_pod_with_keys_only() -> None:
    chosen = settings_of("asyncinfer-serve")
    container = container_of("asyncinfer-serve")
    (mount,) = (it for it in container["volumeMounts"] if it["name"] == "keys")
    assert chosen.host == "0.0.0.0"
    assert str(chosen.api_keys) == f"{mount['mountPath']}/keys"
    assert "--insecure" not in container["args"]


def test_no_secret_is_shipped() -> None:
    for value in one("Secret", "asyncinfer")["stringData"].values():
        assert "REPLACE" in value
        assert not re.search(r"[0-9a-f]{64}|ai_[\w-]{40}", value)


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=lambda it: str(it)[:20])
def test_a_pod_has_no_right_that_it_does_not_need(name: str, pod: Manifest) -> None:
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


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=lambda it: str(it)[:20])
def test_a_service_beside_it_cannot_set_a_variable_of_ours(name: str, pod: Manifest) -> None:
    """A Service called `redis` would, by service links: REDIS_PORT=tcp://10.0.0.1:6379."""
    assert pod["enableServiceLinks"] is False


# --- probes and stops --------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_a_probe_asks_a_page_that_is_there_on_a_port_that_is_open(name: str, probe: str) -> None:
    asked = container_of(name)[probe]["httpGet"]
    (port,) = (it for it in container_of(name)["ports"] if it["name"] == asked["port"])
    chosen = settings_of(name)
    if name == "asyncinfer-work":
        assert port["containerPort"] == chosen.monitor_port
        monitor = Monitor()
        monitor.unready = lambda: None
        assert monitor.answer("GET", asked["path"]).status == 200
    else:
        assert port["containerPort"] == chosen.port
        assert asked["path"] in {route.path for route in ROUTES if route.scope is None}


@pytest.mark.parametrize("name", OURS)
def test_a_redis_that_is_away_restarts_nothing(name: str) -> None:
    container = container_of(name)
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"


def test_a_worker_may_finish_what_it_runs_before_it_is_killed() -> None:
    chosen = settings_of("asyncinfer-work")
    grace_seconds = pod_of("asyncinfer-work")["terminationGracePeriodSeconds"]
    assert grace_seconds >= chosen.drain_timeout + 5
    assert chosen.drain_timeout >= chosen.prediction_timeout


# --- what belongs together ---------------------------------------------------------------------


@pytest.mark.parametrize("it", ALL, ids=lambda it: f"{it['kind']}-{it['metadata']['name']}")
def test_a_manifest_names_no_namespace_and_selects_what_is_there(it: Manifest) -> None:
    assert "namespace" not in it["metadata"]
    spec = it.get("spec", {})
    selector = spec.get("selector")
    if selector is None:
        return
    wanted = selector.get("matchLabels", selector).items()
    labels = [
        other["spec"]["template"]["metadata"]["labels"]
        for other in ALL
        if other["kind"] in ("Deployment", "StatefulSet")
    ]
    assert sum(wanted <= found.items() for found in labels) == 1
    if "template" in spec:
        assert wanted <= spec["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("it", [it for it in ALL if it["kind"] == "Service"], ids=lambda it: "")
def test_a_service_leads_to_a_port_that_its_pods_open(it: Manifest) -> None:
    pod = dict(pods())[it["metadata"]["name"]]
    opened = {port["name"] for one in pod["containers"] for port in one["ports"]}
    assert {port["targetPort"] for port in it["spec"]["ports"]} <= opened


def test_secrets_that_are_asked_for_are_in_the_example() -> None:
    keys = one("Secret", "asyncinfer")["stringData"].keys()
    asked = re.findall(r"name: asyncinfer, key: ([\w-]+)", _text("serve", "work", "valkey", "keda"))
    assert set(asked) | {"keys"} == set(keys)


def _text(*names: str) -> str:
    return "".join((FOLDER / f"{name}.yaml").read_text() for name in names)


# --- the autoscaler ----------------------------------------------------------------------------


def test_the_autoscaler_reads_numbers_that_the_api_gives_where_it_gives_them() -> None:
    scaled = one("ScaledObject", "asyncinfer-work")["spec"]
    assert scaled["scaleTargetRef"] == {"name": "asyncinfer-work"}
    chosen = settings_of("asyncinfer-serve")
    service = one("Service", "asyncinfer-serve")
    for trigger in scaled["triggers"]:
        about = trigger["metadata"]
        url = re.fullmatch(r"http://([\w.-]+):(\d+)(/scale/)\w+", about["url"])
        assert url
        assert url[1].startswith("asyncinfer-serve.")
        assert url[1] in chosen.allowed_hosts
        assert int(url[2]) in [port["port"] for port in service["spec"]["ports"]]
        assert f"{url[3]}{{model}}" in {route.path for route in ROUTES}
        assert about["valueLocation"] in Scale.__struct_fields__
        authentication = one("TriggerAuthentication", trigger["authenticationRef"]["name"])
        assert about["authMode"] == "bearer"
        assert authentication["spec"]["secretTargetRef"][0]["parameter"] == "token"


def test_the_target_is_the_slots_of_a_worker_for_the_wait_that_the_docs_say() -> None:
    backlog = one("ScaledObject", "asyncinfer-work")["spec"]["triggers"][0]["metadata"]
    slots = settings_of("asyncinfer-work").concurrency
    assert float(backlog["targetValue"]) == slots * Cluster().accepted_wait_seconds
    assert slots == Cluster().slots_a_pod


# --- the simulation ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["backlog seconds", "queue length"])
def test_the_simulation_neither_loses_nor_doubles_a_job(name: str) -> None:
    policy, workers = policies(SPIKE, Cluster())[name]
    outcome = Simulation(SPIKE, policy, Cluster(), pods=workers).run()
    assert outcome.submitted > 3000
    assert outcome.finished + outcome.cancelled == outcome.submitted


def test_the_docs_show_what_the_simulation_says() -> None:
    shown = (FOLDER / "README.md").read_text()
    for row in table([SPIKE]):
        assert row in shown


@pytest.mark.soak
def test_the_docs_show_all_that_the_simulation_says() -> None:
    assert "\n".join(table()) in (FOLDER / "README.md").read_text()
