"""All targets by the name that the command line knows."""

from __future__ import annotations

from fuzz import config, records, segments, service

TARGETS = {
    "header": records.TARGET,
    "segment": segments.TARGET,
    "config": config.TARGET,
    "grpc": service.TARGET,
}
