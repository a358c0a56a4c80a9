"""The alert rules, the board and the scrape settings, against metrics of a real service."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.docs.markdown import page
from tests.faults.harness import eventually_sync
from tests.metrics import Scrape, promtool, scrape
from tests.ports import free_port
from tests.process import REPOSITORY
from tests.serving import running_serve

FOLDER: Final = REPOSITORY / "asyncinfer" / "docs" / "monitoring"
RULES: Final = FOLDER / "alerts.yaml"
RULE_TESTS: Final = Path(__file__).with_name("alerts_test.yaml")
ALERTS: Final[list[dict[str, Any]]] = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
BOARD: Final[dict[str, Any]] = json.loads((FOLDER / "board.json").read_text())
NAME: Final = re.compile(r"\b(?:asyncinfer|process)_[a-z_]+\b")


@pytest.fixture(scope="module")
def scrapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scrape, Scrape]]:
    """The metrics of an API and of its worker, which has a file that it refuses."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "iris").symlink_to(REPOSITORY / "model" / "iris")
    (folder / "broken" / "1").mkdir(parents=True)
    (folder / "broken" / "1" / "model.onnx").write_bytes(b"no model")
    api_port, worker_port = free_port(), free_port()
    with running_serve(
        DATA_DIR=str(tmp_path_factory.mktemp("data")),
        MODEL_DIR=str(folder),
        METRICS_PORT=str(api_port),
        MONITOR_PORT=str(worker_port),
    ) as serve:
        eventually_sync(lambda: bool(serve.get("/models")["models"]), "iris is served")
        request = urllib.request.Request(
            serve.banner["URL"] + "/predict",
            b'{"data": [[5.1, 3.5, 1.4, 0.2]]}',
            {"content-type": "application/json", "prefer": "wait=20"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["status"] == "completed"
        eventually_sync(
            lambda: scrape(worker_port)("asyncinfer_slots_busy") == 0, "the job is counted"
        )
        yield scrape(api_port), scrape(worker_port)


def expressions() -> Iterator[tuple[str, str]]:
    """Each alert or panel with one of its expressions."""
    for alert in ALERTS:
        yield alert["alert"], alert["expr"]
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in BOARD["templating"]["list"]:
        yield variable["name"], variable["query"]


def test_every_series_of_rules_and_board_is_in_a_real_scrape(
    scrapes: tuple[Scrape, Scrape],
) -> None:
    known = scrapes[0].names | scrapes[1].names
    absent = {
        (where, name)
        for where, expression in expressions()
        for name in NAME.findall(expression)
        if name not in known
    }
    assert absent == set()


def test_every_series_is_in_the_table_of_operations(scrapes: tuple[Scrape, Scrape]) -> None:
    text = page("operations.md").text
    metrics = scrapes[0].types.keys() | scrapes[1].types.keys()
    ours = sorted(name for name in metrics if name.startswith("asyncinfer_"))
    assert [name for name in ours if f"`{name}" not in text] == []


def test_labels_of_rules_and_board_are_those_of_the_series(scrapes: tuple[Scrape, Scrape]) -> None:
    known: dict[str, set[str]] = {}
    for found in scrapes:
        for name, labels in found.values:
            known.setdefault(name, {"instance", "job"}).update(dict(labels))
    selectors = re.compile(r"(asyncinfer_[a-z_]+)\{([^}]*)\}")
    wrong = [
        (where, name, label)
        for where, expression in expressions()
        for name, matchers in selectors.findall(expression)
        for label in re.findall(r"(\w+)(?:=~|!~|!=|=)", matchers)
        if label not in known[name]
    ]
    assert wrong == []


def test_series_of_queues_are_said_to_be_equal_on_every_replica_and_taken_by_max(
    scrapes: tuple[Scrape, Scrape],
) -> None:
    shared = [name for name in scrapes[0].types if re.match(r"asyncinfer_(queue|workers)", name)]
    assert len(shared) > 8
    for name in shared:
        assert f"# HELP {name} " in scrapes[0].text
        (help_text,) = re.findall(rf"^# HELP {name} (.*)$", scrapes[0].text, re.MULTILINE)
        assert help_text.endswith("Equal on every replica: use max, not sum.")
    summed = re.compile(r"\bsum(?: by \([^)]*\))? ?\((?:rate\()?asyncinfer_(queue|workers)")
    assert [where for where, expression in expressions() if summed.search(expression)] == []


@pytest.mark.system("promtool")
def test_promtool_accepts_the_metrics_of_an_api_and_of_a_worker(
    scrapes: tuple[Scrape, Scrape],
) -> None:
    for found in scrapes:
        promtool("check", "metrics", text=found.text)


@pytest.mark.system("promtool")
def test_promtool_accepts_rules_and_configuration() -> None:
    promtool("check", "rules", str(RULES))
    promtool("check", "config", str(FOLDER / "prometheus.yaml"))


@pytest.mark.soak
@pytest.mark.system("promtool")
def test_each_alert_fires_once_with_two_replicas_and_is_silent_when_nothing_is_wrong() -> None:
    promtool("test", "rules", str(RULE_TESTS))


def test_each_alert_has_a_silent_and_a_firing_case_of_two_replicas() -> None:
    cases = {case["name"]: case for case in yaml.safe_load(RULE_TESTS.read_text())["tests"]}
    assert cases.keys() == {
        f"{alert['alert']} {case}" for alert in ALERTS for case in ("is silent", "fires once")
    }
    for name, case in cases.items():
        instances = {
            instance
            for series in case["input_series"]
            for instance in re.findall(r'instance="([^"]+)"', series["series"])
        }
        assert len(instances) == 2, name
        (checked,) = case["alert_rule_test"]
        assert checked["alertname"] == name.split()[0]
        assert len(checked["exp_alerts"]) == name.endswith("fires once")


def test_each_alert_has_a_section_of_operations_that_says_what_to_do() -> None:
    headings = re.findall(r"^### (Asyncinfer\w+)$", page("operations.md").text, re.MULTILINE)
    assert headings == [alert["alert"] for alert in ALERTS]
    for alert in ALERTS:
        anchor = alert["alert"].lower()
        assert alert["annotations"]["runbook"] == f"asyncinfer/docs/operations.md#{anchor}"


def test_panels_of_the_board_do_not_overlap_and_have_a_unit() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        assert panel["fieldConfig"]["defaults"]["unit"]
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_prometheus_scrapes_the_ports_that_compose_opens() -> None:
    services = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    scraped = {
        discovery["names"][0]: discovery["port"]
        for job in config["scrape_configs"]
        for discovery in job["dns_sd_configs"]
    }
    opened = {
        name: int(environ.get("METRICS_PORT") or environ["MONITOR_PORT"])
        for name in ("serve", "work")
        for environ in [services[name]["environment"]]
    }
    assert scraped == opened
    assert services["serve"]["environment"]["METRICS_HOST"] == "0.0.0.0"
    assert services["work"]["environment"]["MONITOR_HOST"] == "0.0.0.0"


def test_the_alerts_about_processes_match_the_jobs_of_the_configuration() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (pattern,) = set(re.findall(r'job=~"([^"]+)"', RULES.read_text()))
    assert all(re.fullmatch(pattern, job["job_name"]) for job in config["scrape_configs"])
