"""docs/grafana/: dashboards and alert rules are those of the table of metrics, and name nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from ci.grafana import ALERTS, CHIPS, FOLDER, RAY_PREFIX, files
from vllm_ray_ascend.observability.metrics import METRICS

pytestmark = pytest.mark.unit

OURS = re.compile(r"\b(?:ray_)?vllm_ray_ascend_\w+")
CHIP = re.compile(r"\bnpu_chip_info_\w+")


def panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in json.loads((FOLDER / name).read_text())["panels"] if panel["type"] != "row"]


def test_the_files_are_those_that_the_table_makes() -> None:
    for name, text in files().items():
        assert (FOLDER / name).read_text() == text, "python -m ci.grafana writes it"


@pytest.mark.parametrize(("name", "prefix"), [("vllm-ray-ascend.json", ""), ("vllm-ray-ascend-ray.json", RAY_PREFIX)])
def test_a_dashboard_shows_every_metric_and_no_other(name: str, prefix: str) -> None:
    queries = [panel["targets"][0]["expr"] for panel in panels(name)]
    assert {found for query in queries for found in OURS.findall(query)} == {prefix + each for each in METRICS}
    assert {found for query in queries for found in CHIP.findall(query)} == {chip.name for chip in CHIPS}
    places = [tuple(panel["gridPos"].values()) for panel in panels(name)]
    assert len(set(places)) == len(places) and all(left + width <= 24 for left, _, width, _ in places)


def test_the_rules_are_yaml_and_name_metrics_of_the_table() -> None:
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    assert [rule["alert"] for rule in group["rules"]] == [alert.name for alert in ALERTS]
    for rule, alert in zip(group["rules"], ALERTS, strict=True):
        assert rule["expr"] == alert.query and rule["annotations"]["description"] == alert.action
        assert set(OURS.findall(rule["expr"])) <= METRICS.keys() and OURS.findall(rule["expr"])
        assert "$model_name" not in rule["expr"]  # a variable of Grafana's


def test_each_rule_is_tested_to_be_silent_on_a_healthy_engine() -> None:
    healthy, trouble = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    assert [each["alertname"] for each in healthy["alert_rule_test"]] == [alert.name for alert in ALERTS]
    assert trouble["promql_expr_test"][0]["exp_samples"][0]["value"] == len(ALERTS)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed")
def test_prometheus_itself_accepts_the_rules_and_their_tests() -> None:
    for arguments in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        subprocess.run(["promtool", *arguments], cwd=FOLDER, check=True, timeout=120)
