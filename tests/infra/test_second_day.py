"""Backups, restores, the migration and the limits fit the namespaces they run in, and what they refer to is there."""

import os
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from components.orchestration.train_job import Settings, build
from components.pipeline.stages import STAGES, find_stage
from network_policies import Cluster

ROOT = Path(__file__).parents[2]
KUSTOMIZE = ROOT / "infra/kustomize"
FOLDERS = ["backup", "backup/restore-mlflow", "backup/restore-airflow", "migrate", "limits", "accounts"]


def built(folder):
    done = subprocess.run(["kubectl", "kustomize", KUSTOMIZE / folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [*yaml.safe_load_all(done.stdout)]


@pytest.fixture(scope="module")
def second_day():
    """The objects of each folder."""
    return {folder: built(folder) for folder in FOLDERS}


def of_store(render):
    """The stateful set of the object store."""
    found = [one for one in render("dev") if one["kind"] == "StatefulSet"]
    return next(one for one in found if one["metadata"]["name"] == "object-store")


def pods_of(objects):
    """(namespace, pod template) of each object that makes pods, without those of TrainJobs."""
    for one in objects:
        if one["kind"] == "TrainingRuntime":
            continue
        spec = one.get("spec", {})
        spec = spec["jobTemplate"]["spec"] if one["kind"] == "CronJob" else spec
        if "template" in spec:
            yield one["metadata"]["namespace"], spec["template"]


@pytest.fixture(scope="module")
def pods(second_day):
    return [pod for objects in second_day.values() for pod in pods_of(objects)]


def containers(pod):
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def test_each_object_fits_the_schema_of_its_kind(second_day):
    for objects in second_day.values():
        for one in objects:
            kubernetes_validate.validate(one, "1.34", strict=True)


def test_their_pods_meet_pod_security_restricted_and_have_no_token(pods):
    assert len(pods) == 6
    for _, pod in pods:
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, container["name"]
            assert container["resources"]["limits"]["memory"], container["name"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= {one["name"] for one in spec["volumes"]}


def test_what_their_pods_refer_to_is_in_their_namespace(second_day, render, pods):
    there = {
        (one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"])
        for one in [*render("dev"), *second_day["backup"], *second_day["migrate"], *second_day["accounts"]]
    }
    page = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    secrets = set(re.findall(r"kubectl -n (\w+) create secret generic ([\w-]+)", page))
    for namespace, pod in pods:
        assert ("ServiceAccount", namespace, pod["spec"]["serviceAccountName"]) in there
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", namespace, volume["configMap"]["name"]) in there
            if "secret" in volume:
                assert (namespace, volume["secret"]["secretName"]) in secrets
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", namespace, volume["persistentVolumeClaim"]["claimName"]) in there
        for container in containers(pod):
            sources = [one.get("valueFrom", {}) for one in container.get("env", [])]
            sources += container.get("envFrom", [])
            for source in sources:
                if name := (source.get("secretKeyRef") or source.get("secretRef") or {}).get("name"):
                    assert (namespace, name) in secrets
                if name := source.get("configMapKeyRef", {}).get("name"):
                    assert ("ConfigMap", namespace, name) in there


def test_a_backup_dumps_the_database_before_it_copies_artifacts_and_a_restore_verifies_first(second_day):
    order = {
        folder: [[one["name"] for one in containers(pod)] for _, pod in pods_of(second_day[folder])]
        for folder in FOLDERS[:3]
    }
    assert order == {
        "backup": [["connection", "dump", "finish"]] * 2,
        "backup/restore-mlflow": [["connection", "verify", "artifacts", "database"]],
        "backup/restore-airflow": [["connection", "verify", "database"]],
    }


def test_the_tools_of_postgresql_have_the_version_of_the_server(second_day, render):
    """pg_dump refuses a newer server, and pg_restore a dump of a newer pg_dump."""

    def images(objects):
        found = (one["image"] for _, pod in pods_of(objects) for one in containers(pod))
        return {image for image in found if "postgres" in image}

    assert images(render("dev")) == images([one for objects in second_day.values() for one in objects])


def test_the_ways_to_the_stores_are_open_to_backups_and_migrations(second_day, render, pods):
    for _, pod in pods:
        labels = pod["metadata"]["labels"]
        assert labels.get("univigu-database") == "client" or labels["univigu-job"] == "accounts"
    policies = {one["metadata"]["name"]: one["spec"] for one in second_day["backup"] if one["kind"] == "NetworkPolicy"}
    (store,) = [
        one for one in render("dev") if one["metadata"]["name"] == "object-store" and one["kind"] == "StatefulSet"
    ]
    label = {"app.kubernetes.io/name": store["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"]}
    port = [
        {"protocol": "TCP", "port": store["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]}
    ]
    backup = {"matchLabels": {"univigu-job": "backup"}}
    assert policies["object-store-from-backup"]["podSelector"] == {"matchLabels": label}
    assert policies["object-store-from-backup"]["ingress"] == [{"from": [{"podSelector": backup}], "ports": port}]
    assert policies["backup-to-object-store"]["podSelector"] == backup
    assert policies["backup-to-object-store"]["egress"] == [
        {"to": [{"podSelector": {"matchLabels": label}}], "ports": port}
    ]


def test_the_job_of_mlflows_accounts_reaches_mlflow_and_nothing_else(second_day, render, pod_templates, airflow_values):
    objects = [*render("dev"), *second_day["accounts"]]
    cluster = Cluster(objects, pod_templates(render("dev")), airflow_values["labels"])
    (pod,) = pods_of(second_day["accounts"])
    cluster.pods["accounts"] = (pod[0], pod[1]["metadata"]["labels"])
    assert cluster.reaches("accounts", "dns", "dns")
    reached = {
        (one, port)
        for one in cluster.pods
        for port in (443, 5000, 5432, 8080, 8333)
        if cluster.reaches("accounts", one, port)
    }
    assert reached == {("mlflow", 5000)}


# --- limits ----------------------------------------------------------------------------------------------------------


def number(quantity):
    text = str(quantity)
    for unit, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("Ti", 2**40)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)


def claims(objects, namespace):
    """The storage that each claim of a namespace requests, those of stateful sets included."""
    found = []
    for one in objects:
        if one["metadata"].get("namespace") == namespace:
            made = (
                [one] if one["kind"] == "PersistentVolumeClaim" else one.get("spec", {}).get("volumeClaimTemplates", [])
            )
            found += [number(claim["spec"]["resources"]["requests"]["storage"]) for claim in made]
    return found


@pytest.mark.parametrize("overlay", ["dev", "gke"])
def test_the_quotas_have_room_for_all_claims_and_for_a_trainjob_beside_a_step_with_a_gpu(second_day, render, overlay):
    objects = [*render(overlay), *second_day["backup"]]
    for quota in [one for one in second_day["limits"] if one["kind"] == "ResourceQuota"]:
        hard, namespace = quota["spec"]["hard"], quota["metadata"]["namespace"]
        sizes = claims(objects, namespace)
        assert len(sizes) <= int(hard["persistentvolumeclaims"])
        assert sum(sizes) <= number(hard["requests.storage"])
        (limits,) = [
            one["spec"]["limits"]
            for one in second_day["limits"]
            if (one["kind"], one["metadata"]["namespace"]) == ("LimitRange", namespace)
        ]
        (largest,) = [one["max"]["storage"] for one in limits if one["type"] == "PersistentVolumeClaim"]
        assert max(sizes) <= number(largest)
        if namespace == "kubeflow":
            job = build(find_stage("train-stage-2"), "0" * 64, "wan-1.3b", Path("/work"), Settings(nodes=2))
            asked = 2 * int(job["spec"]["trainer"]["resourcesPerNode"]["requests"]["nvidia.com/gpu"])
            one_step = max(stage.resources.gpus for stage in STAGES if stage.resources.pool == "gpu")
            assert asked + one_step <= int(hard["requests.nvidia.com/gpu"])


def test_each_budget_selects_pods_of_one_store_or_one_kind_of_job(second_day, render, pods):
    templates = [
        (one["metadata"]["namespace"], one["spec"]["template"], one)
        for one in render("dev")
        if one["kind"] == "StatefulSet"
    ]
    jobs = [(namespace, pod, None) for namespace, pod in pods]
    for budget in [one for one in second_day["limits"] if one["kind"] == "PodDisruptionBudget"]:
        wanted, namespace = budget["spec"]["selector"]["matchLabels"], budget["metadata"]["namespace"]
        selected = [
            owner
            for where, pod, owner in templates + jobs
            if where == namespace and wanted.items() <= pod["metadata"]["labels"].items()
        ]
        assert len(selected) == 1, budget["metadata"]
        # a Job has no scale from which a share could be computed
        assert ("maxUnavailable" in budget["spec"]) == (selected[0] is not None)


# --- the object store ------------------------------------------------------------------------------------------------

WEED = """#!/bin/sh
# Ends with 0, whether or not it did what it was asked, as the real one does; works from the third call on.
echo . >> {state}/calls
working=$([ $(wc -l < {state}/calls) -ge {works_from} ] && echo yes || true)
while read -r command rest; do
    case "$command $rest" in
    "s3.bucket.create -name mlflow") [ -z "$working" ] || echo mlflow > {state}/buckets ;;
    "s3.bucket.list ") [ -z "$working" ] || cat {state}/buckets ;;
    "s3.configure ") [ -z "$working" ] || cat {state}/identities ;;
    "s3.configure "*) echo "$rest"; [ -z "$working" ] || echo "$rest" > {state}/identities ;;
    esac
done
"""


@pytest.mark.parametrize(("works_from", "code"), [(1, 0), (4, 0), (10000, 1)])
def test_the_object_store_is_set_up_once_the_filer_answers_and_says_when_it_never_does(
    render, tmp_path, works_from, code
):
    (store,) = [
        one for one in render("dev") if one["metadata"]["name"] == "object-store" and one["kind"] == "StatefulSet"
    ]
    (container,) = store["spec"]["template"]["spec"]["containers"]
    programs = {
        "weed": WEED.format(state=tmp_path, works_from=works_from),
        "wget": "#!/bin/sh\n",
        "sleep": "#!/bin/sh\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    keys = {"AWS_ACCESS_KEY_ID": "the-key", "AWS_SECRET_ACCESS_KEY": "the-secret"}
    environment = {**os.environ, **keys, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = container["lifecycle"]["postStart"]["exec"]["command"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "the-secret" not in done.stdout + done.stderr
    if code:
        assert "object-store: this failed 60 times: create" in done.stderr
    else:
        assert "-user mlflow -actions Admin -access_key the-key" in (tmp_path / "identities").read_text()
