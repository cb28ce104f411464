"""Rules, alerts and routes, checked by the programs that they are for.

Without promtool and amtool the tests are skipped; `SERENO_REQUIRE_PROMTOOL=1` makes them fail.
"""

from __future__ import annotations

import os
import subprocess

import pytest
import yaml

from .programs import ROOT, find

PROMETHEUS = ROOT / "dashboards/prometheus"
ROUTES = ROOT / "dashboards/alertmanager/alertmanager.yml"
TESTS = sorted(PROMETHEUS.glob("tests/*.yml"))


def run(name: str, *args: str) -> str:
    """What a tool says, when it is content."""
    try:
        tool = find(name)
    except pytest.skip.Exception:
        if os.environ.get("SERENO_REQUIRE_PROMTOOL") == "1":
            pytest.fail(f"there is no {name} here")
        raise
    done = subprocess.run(
        [tool, *args], cwd=PROMETHEUS, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["rules.yml", "alerts.yml"])
def test_the_rules_are_valid(name: str) -> None:
    assert "SUCCESS" in run("promtool", "check", "rules", name)


@pytest.mark.parametrize("name", [path.name for path in TESTS])
def test_alerts_fire_when_they_should_and_only_then(name: str) -> None:
    run("promtool", "test", "rules", f"tests/{name}")


def test_the_routes_are_valid() -> None:
    assert "SUCCESS" in run("amtool", "check-config", str(ROUTES))


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        (("alertname=Watchdog", "severity=none"), "watchdog"),
        (("alertname=RunSuccessBurn", "severity=page"), "page"),
        (("alertname=RunSuccessBurn", "severity=ticket"), "ticket"),
        (("alertname=OfSomebodyElse",), "ticket"),
    ],
)
def test_every_alert_reaches_somebody(labels: tuple[str, ...], receiver: str) -> None:
    said = run("amtool", "config", "routes", "test", f"--config.file={ROUTES}", *labels)

    assert said.strip() == receiver


def test_every_severity_has_a_route() -> None:
    alerts = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    routes = yaml.safe_load(ROUTES.read_text())
    severities = {
        rule["labels"]["severity"] for group in alerts["groups"] for rule in group["rules"]
    }

    assert severities == {"page", "ticket", "none"}
    assert {receiver["name"] for receiver in routes["receivers"]} == {"page", "ticket", "watchdog"}
