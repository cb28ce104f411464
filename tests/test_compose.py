"""The files of the stack agree with each other, with the contract, and with common rules."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.settings import Settings
from telemetry import contract
from telemetry.http import UNSEEN

ROOT = Path(__file__).parent.parent
COMPOSE, SMOKE = ROOT / "compose.yml", ROOT / "compose.smoke.yml"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COLLECTOR = ROOT / "otel-collector.yaml"
LAYERS = (ROOT / "otel-collector.sampling.yaml", ROOT / "smoke" / "otel-collector.smoke.yaml")
PROMETHEUS = ROOT / "dashboards" / "prometheus" / "prometheus.yml"

ENV = dict(
    line.split("=", 1)
    for line in (ROOT / ".env").read_text().splitlines()
    if line and not line.startswith("#")
)
#: Of the image and the builds, and not of the server.
NOT_SETTINGS = {"SERENO_TAG", "SERENO_COMMIT"}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def services(*files: Path) -> list[Any]:
    return [
        pytest.param(service, id=f"{file.name}-{name}")
        for file in files
        for name, service in load(file)["services"].items()
    ]


def collector(*layers: Path) -> Any:
    """The configuration as the collector merges it: maps are joined, all else is replaced."""

    def merge(below: Any, above: Any) -> Any:
        if not (isinstance(below, dict) and isinstance(above, dict)):
            return above
        return {key: merge(below.get(key), value) for key, value in above.items()} | {
            key: value for key, value in below.items() if key not in above
        }

    merged: Any = {}
    for layer in (COLLECTOR, *layers):
        merged = merge(merged, load(layer))
    return merged


def defaults(config: Any) -> dict[str, str]:
    """`${env:NAME:-default}` of a configuration."""
    return dict(re.findall(r"\$\{env:(\w+):-([^}]*)\}", str(config)))


@pytest.mark.parametrize("service", services(COMPOSE, SMOKE))
def test_every_container_is_hardened_and_bounded(service: Any) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges=true"]
    assert service["pids_limit"]
    assert service["mem_limit"]
    assert not service.get("privileged")


@pytest.mark.parametrize("file", [COMPOSE, SMOKE], ids=lambda file: file.name)
def test_only_the_one_that_gives_volumes_away_is_root_and_it_sees_no_network(file: Path) -> None:
    roots = {
        name: service
        for name, service in load(file)["services"].items()
        if service.get("cap_add") or service.get("user", "").startswith("0")
    }

    assert set(roots) == ({"owner"} if file == COMPOSE else set())
    for service in roots.values():
        assert service["cap_add"] == ["CHOWN"]
        assert service["network_mode"] == "none"


@pytest.mark.parametrize("service", services(COMPOSE))
def test_ports_are_published_on_loopback_only_and_the_admin_listener_never(service: Any) -> None:
    for port in service.get("ports", ()):
        host, _, inside = port.split(":")
        assert host == "127.0.0.1"
        assert inside != "9009"


def test_the_smoke_test_publishes_nothing_and_keeps_nothing() -> None:
    smoke = load(SMOKE)

    assert not any(service.get("ports") for service in smoke["services"].values())
    assert {volume["driver_opts"]["type"] for volume in smoke["volumes"].values()} == {"tmpfs"}


@pytest.mark.parametrize("service", services(COMPOSE, SMOKE))
def test_images_are_named_in_one_place_and_a_registry_can_be_forbidden(service: Any) -> None:
    if not service["image"].startswith("sereno:"):
        name = re.fullmatch(r"\$\{(\w+):\?is in \.env\}", service["image"])
        assert name
        assert name[1] in ENV
        assert service["pull_policy"] == "${PULL_POLICY:-missing}"


def test_every_pinned_image_is_used_and_has_an_exact_tag() -> None:
    used = set(re.findall(r"\$\{(\w+_IMAGE):", COMPOSE.read_text()))

    assert used == ENV.keys()
    for image in ENV.values():
        assert re.fullmatch(r"(\w+/)?[\w-]+:v?\d+\.\d+(\.\d+)?(-slim)?", image)
    assert f"ARG PYTHON_IMAGE={ENV['PYTHON_IMAGE']}\n" in DOCKERFILE


@pytest.mark.parametrize("service", services(COMPOSE, SMOKE))
def test_every_file_that_is_mounted_exists(service: Any) -> None:
    for volume in service.get("volumes", ()):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert volume.endswith(":ro")


@pytest.mark.parametrize("file", [COMPOSE, SMOKE], ids=lambda file: file.name)
def test_nobody_waits_for_the_health_of_one_that_cannot_tell_it(file: Path) -> None:
    all_of = load(file)["services"]
    for service in all_of.values():
        for name, condition in service.get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                assert name == "runtime" or all_of[name]["healthcheck"]["test"]
    assert "healthcheck" not in all_of["otel-collector"]


def test_the_environment_of_runtimes_is_made_of_settings() -> None:
    known = {f"SERENO_{name.upper()}" for name in Settings.model_fields} | NOT_SETTINGS
    texts = (COMPOSE.read_text(), SMOKE.read_text(), DOCKERFILE)
    named = {name for text in texts for name in re.findall(r"\bSERENO_[A-Z_]+\b", text)}

    assert named - known == set()


def test_a_stop_leaves_time_to_drain() -> None:
    grace = load(COMPOSE)["services"]["runtime"]["stop_grace_period"]

    assert int(grace.removesuffix("s")) > Settings.model_fields["drain_s"].default


def test_the_image_needs_no_registry_but_for_its_base() -> None:
    assert "syntax=" not in DOCKERFILE
    assert "@sha256" not in DOCKERFILE
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)
    assert set(bases) == {"${PYTHON_IMAGE}"}


def test_the_image_runs_as_nobody_in_particular_and_says_how_it_is() -> None:
    last = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).rpartition("FROM ")[2]

    assert "\nUSER 10001:10001\n" in last
    assert re.search(r'HEALTHCHECK .*\\\n +CMD \["python", ', last)
    assert "SERENO_INSECURE=" not in last, "whoever publishes the port has to say so"


def test_the_build_gets_what_it_copies_and_nothing_else() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M)
        for source in line.split()[:-1]
    }

    assert let_in == copied
    assert all((ROOT / name).exists() for name in copied)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    packed = wheel["targets"]["wheel"]
    wanted = {*packed["packages"], *packed.get("force-include", ())}
    assert {name.partition("/")[0] for name in wanted} <= copied


def test_the_collector_knows_the_attributes_by_their_names() -> None:
    named = set(re.findall(r"\bsereno\.[a-z_.]+\b", str(collector(*LAYERS))))

    assert named == {"sereno.graph.name", "sereno.node.path", "sereno.attempt.number"}
    assert named <= {attribute.name for attribute in contract.ATTRIBUTES}


@pytest.mark.parametrize("layer", [None, *LAYERS], ids=lambda layer: layer and layer.name)
def test_the_pipelines_use_what_is_configured(layer: Path | None) -> None:
    config = collector(*([layer] if layer else []))
    parts = {
        "receivers": {*config["receivers"], *config["connectors"]},
        "processors": set(config["processors"]),
        "exporters": {*config["exporters"], *config["connectors"]},
    }

    for pipeline in config["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            assert set(names) <= parts[kind]
    assert set(config["service"]["extensions"]) == set(config["extensions"])


def test_secrets_are_masked_wherever_spans_and_records_leave() -> None:
    for layers in ((), *((layer,) for layer in LAYERS)):
        pipelines = collector(*layers)["service"]["pipelines"]
        assert "redaction" in pipelines["traces"]["processors"]
        assert "transform/status" in pipelines["traces"]["processors"]
        assert "redaction" in pipelines["logs"]["processors"]


def test_the_filter_of_probes_knows_all_of_them() -> None:
    (condition,) = collector()["processors"]["filter/probes"]["trace_conditions"]
    pattern = re.search(r'IsMatch\(span\.attributes\["url\.path"\], "(.+)"\)', condition)

    assert pattern
    assert all(re.search(pattern[1], path) for path in UNSEEN)
    assert not re.search(pattern[1], "/v1/runs")


def test_senders_and_receivers_meet() -> None:
    stack = load(COMPOSE)["services"]
    ports = defaults(collector())
    jaeger = defaults(load(ROOT / "dashboards" / "jaeger" / "jaeger.yaml"))
    loki = (ROOT / "dashboards" / "loki" / "loki.yaml").read_text()

    otlp = ports["OTELCOL_HTTP_ENDPOINT"].rpartition(":")[2]
    endpoint = stack["runtime"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
    assert endpoint == f"http://otel-collector:{otlp}"
    assert ports["TRACES_ENDPOINT"] == f"jaeger:{jaeger['JAEGER_OTLP_ENDPOINT'].rpartition(':')[2]}"
    assert ports["LOGS_ENDPOINT"] == "http://loki:3100/otlp"
    assert "${LOKI_PORT:-3100}" in loki


def test_prometheus_scrapes_the_admin_listener_and_both_faces_of_the_collector() -> None:
    ports = defaults(collector())
    jobs = {
        job["job_name"]: (job["static_configs"][0]["targets"], job.get("honor_labels", False))
        for job in load(PROMETHEUS)["scrape_configs"]
    }

    admin = Settings.model_fields["admin_port"].default
    made = ports["OTELCOL_PROMETHEUS_ENDPOINT"].rpartition(":")[2]
    assert jobs == {
        "sereno": ([f"runtime:{admin}"], False),
        "otel-collector": ([f"otel-collector:{ports['OTELCOL_SELF_PORT']}"], False),
        "span-metrics": ([f"otel-collector:{made}"], True),
    }


def test_the_smoke_test_scrapes_the_same_jobs() -> None:
    smoke = load(ROOT / "smoke" / "prometheus.yml")

    assert smoke["scrape_configs"] == load(PROMETHEUS)["scrape_configs"]


def test_prometheus_keeps_exemplars_and_more_than_the_month_of_objectives() -> None:
    command = load(COMPOSE)["services"]["prometheus"]["command"]

    assert "--enable-feature=exemplar-storage" in command
    assert "--storage.tsdb.retention.time=35d" in command


def test_rule_files_are_beside_the_configuration_that_names_them() -> None:
    for name in load(PROMETHEUS)["rule_files"]:
        assert (PROMETHEUS.parent / name).exists()


def test_grafana_finds_its_dashboards_and_keeps_its_data_sources() -> None:
    grafana = load(COMPOSE)["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    provisioning = ROOT / "dashboards" / "provisioning" / "dashboards"
    (provider,) = [
        provider for file in provisioning.glob("*.y*ml") for provider in load(file)["providers"]
    ]

    assert provider["options"]["path"] == mounts["./dashboards/grafana"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent.as_posix() == mounts["./dashboards/grafana"]
    assert (ROOT / "dashboards" / "grafana" / home.name).exists()
    assert grafana["environment"]["GF_PLUGINS_PREINSTALL_DISABLED"] == "true"


def test_the_smoke_test_serves_what_the_image_serves() -> None:
    command = json.loads(re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.M)[-1])
    smoke = yaml.safe_load(SMOKE.read_text())["services"]["runtime"]["command"]

    assert smoke == command
