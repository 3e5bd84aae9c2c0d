"""Alerts fire when they should and not before, and nothing asks for a metric that the exporter doesn't have."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from components.orchestration.metrics import EXPORTED

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra/kustomize/monitoring"
MINUTES = 60.0
# The fields that we use, of prometheus-operator 0.86.2, pkg/apis/monitoring/v1/types.go and podmonitor_types.go
POD_MONITOR = {"selector": {"matchLabels"}, "podMetricsEndpoints": {"port", "interval", "scrapeTimeout"}}
RULE = {"alert", "expr", "for", "labels", "annotations"}


@pytest.fixture(scope="module")
def monitoring():
    done = subprocess.run(["kubectl", "kustomize", FOLDER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [*yaml.safe_load_all(done.stdout)]


def of_kind(objects, kind):
    (one,) = [one for one in objects if one["kind"] == kind]
    return one


@pytest.fixture(scope="module")
def rules(monitoring):
    return of_kind(monitoring, "PrometheusRule")["spec"]


def names_in(text):
    return set(re.findall(r"\bunivigu_\w+", text))


def test_each_object_has_only_fields_of_its_kind(monitoring, rules):
    for one in monitoring:
        if one["apiVersion"] != "monitoring.coreos.com/v1":
            kubernetes_validate.validate(one, "1.34", strict=True)
    monitor = of_kind(monitoring, "PodMonitor")["spec"]
    assert monitor.keys() == POD_MONITOR.keys()
    assert monitor["selector"].keys() <= POD_MONITOR["selector"]
    assert all(one.keys() <= POD_MONITOR["podMetricsEndpoints"] for one in monitor["podMetricsEndpoints"])
    for group in rules["groups"]:
        assert group.keys() == {"name", "rules"}
        assert all(rule.keys() <= RULE for rule in group["rules"])


def test_the_monitor_selects_the_exporter_and_its_port_which_prometheus_alone_reaches(monitoring):
    deployment, monitor = of_kind(monitoring, "Deployment"), of_kind(monitoring, "PodMonitor")
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (port,) = container["ports"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == port["name"]
    assert f"--port={port['containerPort']}" in container["args"]
    policy = of_kind(monitoring, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": port["containerPort"]}]
    assert all("namespaceSelector" in peer and "podSelector" in peer for peer in rule["from"])


def test_the_exporter_is_restricted_and_reads_only(monitoring):
    spec = of_kind(monitoring, "Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == "work"]
    assert mount["readOnly"] is True


def test_alerts_and_dashboard_ask_only_for_metrics_that_are_exported(rules):
    board = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    for expression in (*asked, *alerts):
        assert names_in(expression), expression
        assert names_in(expression) <= set(EXPORTED), expression
    page = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
    assert names_in(page) == set(EXPORTED)


def test_the_dashboard_uses_the_labels_that_the_metrics_have_and_its_own_data_source():
    board = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    (variable,) = board["templating"]["list"]
    for panel in board["panels"]:
        assert panel["datasource"]["uid"] == f"${{{variable['name']}}}"
        for target in panel["targets"]:
            known = {label for name in names_in(target["expr"]) for label in EXPORTED[name][1]}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= known, target


def test_the_page_explains_each_alert(rules):
    page = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
    names = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    assert re.findall(r"^\| `(UniViGU\w+)` \|", page, re.M) == names


# --- promtool --------------------------------------------------------------------------------------------------------


@pytest.fixture
def promtool(rules, tmp_path):
    """A function that runs promtool with the rules; returns what it says."""
    if shutil.which("promtool") is None:
        pytest.skip("checking alerts takes Debian's promtool: apt-get install prometheus")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))

    def run(*arguments):
        command = ["promtool", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_promtool_accepts_the_rules(promtool, rules):
    code, said = promtool("check", "rules", "--lint-fatal", "rules.yaml")
    assert code == 0, said
    assert f"{sum(len(group['rules']) for group in rules['groups'])} rules found" in said


STEP = '{step="train-stage-1", instance="a"}'
OTHER = '{instance="a"}'
RUNNING = {f"univigu_training_active{STEP}": "1x200", "univigu_build_info": "1x200"}
OLD = {
    # saved at 0 s, and every 10 minutes from then on
    f"univigu_training_checkpoint_timestamp_seconds{STEP}": "0x200",
    f"univigu_training_checkpoint_interval_seconds{STEP}": "600x200",
}
FILLING = {
    f"univigu_disk_free_bytes{OTHER}": "1000000-5000x120",  # 5000 bytes a minute: full in 200 minutes
    f"univigu_disk_size_bytes{OTHER}": "2000000x120",
}
# What happens -> the series, from one minute to the next, and in which minute which alerts fire
CASES = {
    "a checkpoint in time": (RUNNING | OLD, {20: set(), 24: set()}),
    "an old checkpoint": (RUNNING | OLD, {30: {"UniViGUCheckpointOld"}}),
    "an old checkpoint of a run that was interrupted": (
        RUNNING | OLD | {f"univigu_training_active{STEP}": "0x200"},
        {100: set()},
    ),
    "a loss that is not a number": (
        RUNNING | {f"univigu_training_loss{STEP}": "1 NaN NaN"},
        {0: set(), 1: {"UniViGULossNotFinite"}},
    ),
    "an infinite loss": (
        RUNNING | {f"univigu_training_loss{STEP}": "1 Inf -Inf"},
        {1: {"UniViGULossNotFinite"}, 2: {"UniViGULossNotFinite"}},
    ),
    "a loss": (RUNNING | {f"univigu_training_loss{STEP}": "1 0 1e30"}, {0: set(), 1: set(), 2: set()}),
    "a deferred run past its ceiling": (
        {"univigu_build_info": "1x200", 'univigu_deferred_end_timestamp_seconds{run="r"}': "1800x200"},
        {29: set(), 39: set(), 42: {"UniViGUDeferredRunOverdue"}},
    ),
    "a disk that is full before the end": (
        RUNNING | FILLING | {f"univigu_training_remaining_seconds{STEP}": f"{300 * MINUTES}-60x120"},
        {5: set(), 60: {"UniViGUDiskFullBeforeEnd"}},
    ),
    "a disk that is full after the end": (
        RUNNING | FILLING | {f"univigu_training_remaining_seconds{STEP}": f"{150 * MINUTES}-60x120"},
        {60: set(), 90: set()},
    ),
    "a disk that fills while nothing trains": (
        RUNNING
        | FILLING
        | {f"univigu_training_active{STEP}": "0x200", f"univigu_training_remaining_seconds{STEP}": "1000000x120"},
        {60: set()},
    ),
    "a disk that is nearly full": (
        {
            "univigu_build_info": "1x20",
            f"univigu_disk_free_bytes{OTHER}": "40x20",
            f"univigu_disk_size_bytes{OTHER}": "1000x20",
        },
        {10: {"UniViGUDiskNearlyFull"}},
    ),
    "a step that failed": (
        {"univigu_build_info": "1x5", 'univigu_step_failed{step="a", error="DiskFullError"}': "1x5"},
        {1: {"UniViGUStepFailed"}},
    ),
    "training that waits for data": (
        RUNNING | {f"univigu_training_data_wait_ratio{STEP}": "0.3x60"},
        {20: set(), 40: {"UniViGUWaitingForData"}},
    ),
    "a file that can't be read": (
        {"univigu_build_info": "1x60", "univigu_unreadable_files": "1x60"},
        {20: {"UniViGUExporterBlind"}},
    ),
    "no exporter": ({"up": "0x60"}, {5: set(), 12: {"UniViGUExporterDown"}}),
}


def test_each_alert_fires_when_it_should_and_not_before(promtool, rules, tmp_path):
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    tests = []
    for name, (series, expected) in CASES.items():
        checks = [
            {"expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) > 0', "eval_time": f"{minute}m"}
            | {"exp_samples": [{"labels": "{}", "value": 1}] if alert in firing else []}
            for minute, firing in expected.items()
            for alert in sorted(alerts)
        ]
        inputs = [{"series": one, "values": values} for one, values in series.items()]
        tests.append({"name": name, "interval": "1m", "input_series": inputs, "promql_expr_test": checks})
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(document))
    code, said = promtool("test", "rules", "tests.yaml")
    assert code == 0, said
    assert set().union(*(firing for _, expected in CASES.values() for firing in expected.values())) == alerts


def test_promtool_would_notice_an_alert_that_does_not_fire(promtool, rules, tmp_path):
    check = {"expr": "count(ALERTS)", "eval_time": "1m", "exp_samples": [{"labels": "{}", "value": 7}]}
    tests = [{"interval": "1m", "input_series": [{"series": "up", "values": "1x5"}], "promql_expr_test": [check]}]
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": tests}))
    assert promtool("test", "rules", "tests.yaml")[0] != 0
