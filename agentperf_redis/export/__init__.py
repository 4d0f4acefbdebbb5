"""Export to other tools: Prometheus, OpenTelemetry, Grafana, CSV. Each module needs the packages of its extra."""
