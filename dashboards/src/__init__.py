"""Makes the Grafana dashboards from the telemetry contract: `python -m dashboards.src`."""
