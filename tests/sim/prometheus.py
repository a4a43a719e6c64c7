"""A real Prometheus with the example configuration of deploy/, pointed at processes of a test."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from kvist.engine.local import LocalProcess, free_port

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"
SCRAPE_S = 1
PROMETHEUS = shutil.which("prometheus")
MISSING = "no prometheus here: apt-get install prometheus"

Series = dict[str, Any]


class Prometheus(LocalProcess):
    """Scrapes every second, and evaluates the rules as often.

    Args:
        folder: for its configuration, its data and its log.
        targets: job of deploy/prometheus/prometheus.yml -> host:port.
    """

    def __init__(self, folder: Path, targets: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        config["global"] = dict.fromkeys(config["global"], f"{SCRAPE_S}s")
        config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        port = free_port()
        command = [
            str(PROMETHEUS),
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
        super().__init__(command, f"http://127.0.0.1:{port}", "/-/ready", folder / "log")
        self._client = httpx.Client(base_url=f"{self.url}/api/v1", timeout=10.0)

    def get(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of its HTTP API.

        Raises: AssertionError: it answered with an error, or a warning; the message is its own.
        """
        answer = self._client.get(path, params=parameters).json()
        assert answer["status"] == "success", answer
        assert not answer.get("warnings"), answer
        return answer["data"]

    def stop(self) -> int:
        """See LocalProcess."""
        self._client.close()
        return super().stop()

    def now(self, query: str) -> list[Series]:
        """Series of a query at this moment."""
        found: list[Series] = self.get("query", query=query)["result"]
        return found

    def over(self, query: str, start_s: float, end_s: float) -> list[Series]:
        """Series of a query over a time, a point each second."""
        asked = {"query": query, "start": start_s, "end": end_s, "step": SCRAPE_S}
        found: list[Series] = self.get("query_range", **asked)["result"]
        return found


def values_of(series: Series) -> list[float]:
    """Of an answer's series, at one moment or over a time."""
    pairs = series["values"] if "values" in series else [series["value"]]
    return [float(value) for _, value in pairs]
