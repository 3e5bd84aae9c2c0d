"""What a compromised step can't reach: rights, secrets and passwords, beside Kubeflow Pipelines as it is installed."""

import copy
import os
import re
import subprocess
from pathlib import Path

import cel
import pytest
import yaml

from components.orchestration import kfp_pipeline
from network_policies import KFP, Cluster

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra/kustomize/kubeflow-pipelines"


# --- applying manifests one after the other ---------------------------------------------------------------------------


class Server:
    """The objects of a cluster, as `kubectl apply` merges manifests into them.

    A field that the manifest last applied had, and the new one has not, is removed, whoever applied them
    (kubernetes.io/last-applied-configuration).
    """

    def __init__(self):
        self.live, self.last = {}, {}

    def apply(self, objects):
        for one in objects:
            key = (one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"])
            self.live[key] = merged(self.live.get(key, {}), self.last.get(key, {}), one)
            self.last[key] = one

    def objects(self, kind):
        return [one for (found, *_), one in self.live.items() if found == kind]


def merged(live, last, new):
    if not isinstance(new, dict) or not isinstance(live, dict):
        return copy.deepcopy(new)
    kept = {key: value for key, value in live.items() if key in new or key not in (last or {})}
    return kept | {key: merged(kept.get(key), (last or {}).get(key), value) for key, value in new.items()}


@pytest.mark.parametrize("overlay", ["dev", "gke"])
def test_applying_kubeflow_pipelines_again_changes_nothing(overlay, kubeflow_pipelines, render):
    server = Server()
    server.apply(kubeflow_pipelines)
    server.apply(render(overlay))
    before = copy.deepcopy(server.live)
    server.apply(kubeflow_pipelines)
    assert server.live == before
    server.apply(render(overlay))
    assert server.live == before


def test_kubeflow_pipelines_own_manifests_take_no_connection_away(render, pod_templates, airflow_values):
    """As after an upgrade with KFP's own commands: its namespace's labels replace ours."""
    server = Server()
    server.apply(KFP)
    server.apply(render("dev"))
    server.apply(KFP)
    (namespace,) = [one for one in server.objects("Namespace") if one["metadata"]["name"] == "kubeflow"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "baseline"  # why we correct it
    objects = server.objects("Namespace") + server.objects("NetworkPolicy")
    cluster = Cluster(objects, pod_templates(render("dev")), airflow_values["labels"])
    for pod in ("step", "training", "airflow"):
        assert cluster.reaches(pod, "mlflow", 5000), pod
    assert cluster.reaches("step", "seaweedfs", 8333)
    assert not [one for one in cluster.pods if cluster.reaches("unlabelled", one, 8333)]
    assert not cluster.reaches("step", "seaweedfs", 8888)  # the filer, which asks for no password


def test_both_folders_are_of_the_version_whose_manifests_were_read(kubeflow_pipelines):
    versions = {
        resource.rpartition("?ref=")[2]
        for name in ("cluster-scoped", ".")
        for resource in yaml.safe_load((FOLDER / name / "kustomization.yaml").read_text())["resources"]
    }
    (api,) = [one for one in KFP if one["kind"] == "Deployment" and one["metadata"]["name"] == "ml-pipeline"]
    (container,) = api["spec"]["template"]["spec"]["containers"]
    assert versions == {container["image"].rpartition(":")[2]}


# --- rights and passwords ---------------------------------------------------------------------------------------------


def of_kind(objects, kind):
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}


def test_the_account_that_runs_have_by_default_at_kubeflow_pipelines_has_no_rights(kubeflow_pipelines, render):
    def bound(objects):
        bindings = of_kind(objects, "RoleBinding").values()
        return {subject["name"] for one in bindings for subject in one["subjects"]}

    assert "pipeline-runner" in bound(KFP)
    assert "pipeline-runner" not in bound(kubeflow_pipelines) | bound(render("dev"))


def test_no_password_of_kubeflow_pipelines_own_manifest_is_installed(kubeflow_pipelines):
    assert set(of_kind(KFP, "Secret")) == {"mysql-secret", "mlpipeline-minio-artifact"}
    assert not of_kind(kubeflow_pipelines, "Secret")
    (mysql,) = of_kind(kubeflow_pipelines, "Deployment")["mysql"]["spec"]["template"]["spec"]["containers"]
    assert mysql["env"] == [
        {"name": "MYSQL_ROOT_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "mysql-secret", "key": "password"}}}
    ]


def test_the_operators_page_makes_each_key_that_kubeflow_pipelines_reads(kubeflow_pipelines):
    page = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    (block,) = [one for one in re.findall(r"```bash\n(.*?)```", page, re.S) if "generic mysql-secret" in one]
    made = {
        name: set(re.findall(r"^(\w+)=", keys, re.M))
        for name, keys in re.findall(r"generic ([\w-]+) .*?<<EOF\n(.*?)EOF", block, re.S)
    }
    assert {name: keys for name, keys in secrets_read(kubeflow_pipelines).items() if keys - made[name]} == {}


def secrets_read(objects):
    """The keys that deployments read of each secret; all keys of KFP's own manifest if they read the whole secret."""
    found = {}
    for deployment in of_kind(objects, "Deployment").values():
        for container in deployment["spec"]["template"]["spec"]["containers"]:
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    found.setdefault(reference["name"], set()).add(reference["key"])
            for source in container.get("envFrom", []):
                name = source["secretRef"]["name"]
                found.setdefault(name, set()).update(of_kind(KFP, "Secret")[name]["stringData"])
    return found


RECORDER = """#!/usr/bin/env python3
import base64, os, pathlib, sys
arguments = sys.argv[3:]  # after --namespace NAME
log = pathlib.Path(os.environ["LOG"])
text = "" if arguments[:2] == ["get", "secret"] or "rollout" in arguments else sys.stdin.read()
with log.open("a") as stream:
    stream.write(f"{' '.join(arguments)}\\n" + "".join(f"  {line}\\n" for line in text.splitlines()))
if arguments[:2] == ["get", "secret"]:
    known = {"password": "", "accesskey": "minio"}
    sys.stdout.write(base64.b64encode(known[arguments[-1].split(".")[-1].rstrip("}")].encode()).decode())
if arguments[0] == "create":
    sys.stdout.write(text)
"""


@pytest.fixture
def rotated(tmp_path):
    """What the command for new passwords did: (arguments, standard input) of each call of kubectl, in order."""
    (tmp_path / "kubectl").write_text(RECORDER)
    (tmp_path / "kubectl").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    done = subprocess.run([FOLDER / "rotate-passwords"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = re.findall(r"^(\S.*)\n((?:  .*\n)*)", (tmp_path / "log").read_text(), re.M)
    return [(arguments, [line.strip() for line in lines.splitlines()]) for arguments, lines in calls]


def test_new_passwords_reach_the_services_first_and_then_everything_that_reads_them(rotated, kubeflow_pipelines):
    said = [" ".join([arguments, *lines]) for arguments, lines in rotated]
    order = [
        next(number for number, one in enumerate(said) if re.search(pattern, one))
        for pattern in (
            r"exec .*deployment/mysql .*ALTER USER 'root'@'localhost' .*'root'@'%'",
            r"replace .*username=root password=\w{48}",
            r"exec .*deployment/seaweedfs .*-secret_key \w{48} -actions Admin -apply",
            r"replace .*accesskey=\w{20} secretkey=\w{48}",
            r"rollout restart",
            r"rollout status",
            r"exec .*deployment/seaweedfs .*-access_key minio -delete -apply",
        )
    ]
    assert order == sorted(order)
    (restarted,) = [arguments for arguments, _ in rotated if arguments.startswith("rollout restart")]
    readers = {
        name
        for name, one in of_kind(kubeflow_pipelines, "Deployment").items()
        if re.search("secretKeyRef|secretRef", yaml.safe_dump(one["spec"]))
    }
    assert {one.removeprefix("deployment/") for one in restarted.split()[2:]} == readers


def test_new_passwords_are_on_no_command_line(rotated):
    given = {word for _, lines in rotated for line in lines for word in re.findall(r"\b[0-9a-f]{20,48}\b", line)}
    assert len(given) == 3
    assert not [arguments for arguments, _ in rotated if any(one in arguments for one in given)]


# --- what the pods of jobs may be -------------------------------------------------------------------------------------


def admitted(policy, pod, user="system:serviceaccount:kubeflow:argo"):
    """The messages of the rules of a policy that a pod breaks, by evaluating them; None if it isn't matched."""
    spec, names = policy["spec"], {"object": pod, "request": {"userInfo": {"username": user}}}
    if not all(cel.evaluate(one["expression"], names) for one in spec["matchConditions"]):
        return None
    names["variables"] = {}
    for one in spec["variables"]:
        names["variables"][one["name"]] = cel.evaluate(one["expression"], names)
    return [one["message"] for one in spec["validations"] if not cel.evaluate(one["expression"], names)]


@pytest.fixture(scope="session")
def policies(render):
    return of_kind(render("dev"), "ValidatingAdmissionPolicy")


@pytest.fixture(scope="session")
def runs(policies):
    return policies["univigu-pods-of-runs"]


def make_pod(labels=None, account="univigu-launcher", **spec):
    """A pod of a run as Argo makes it, with changes."""
    labels = {"workflows.argoproj.io/workflow": "uni-vigu-x1"} if labels is None else labels
    containers = spec.pop("containers", [{"name": "main"}, {"name": "wait"}])
    return {
        "metadata": {"name": "x", "labels": labels},
        "spec": {"serviceAccountName": account, "containers": containers, **spec},
    }


def step_pods():
    """The pods of all compiled tasks: containers with their secrets, and Argo's secret of the object store."""
    _, platform = yaml.safe_load_all((ROOT / kfp_pipeline.PACKAGE).read_text(encoding="utf-8"))
    for name, settings in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].items():
        variables = [
            {
                "name": pair["envVar"],
                "valueFrom": {"secretKeyRef": {"name": one["secretName"], "key": pair["secretKey"]}},
            }
            for one in settings.get("secretAsEnv", [])
            for pair in one["keyToEnv"]
        ]
        volumes = [
            {"name": "work", "persistentVolumeClaim": {"claimName": "univigu-work"}},
            {"name": "mlpipeline-minio-artifact", "secret": {"secretName": "mlpipeline-minio-artifact"}},
            {"name": "kube-api-access", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ]
        main = {"name": "main", "env": [{"name": "A", "value": "1"}, *variables]}
        yield name, make_pod(containers=[main, {"name": "wait"}], initContainers=[{"name": "init"}], volumes=volumes)


def test_the_pods_of_our_pipeline_are_admitted(runs):
    pods = dict(step_pods())
    assert len(pods) > 10
    assert any("CAPTION_API_KEY" in str(pod) for pod in pods.values())
    assert {name: admitted(runs, pod) for name, pod in pods.items()} == {name: [] for name in pods}
    assert admitted(runs, make_pod(account="univigu-steps")) == []


def variable(secret):
    return [{"name": "main", "env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": secret, "key": "x"}}}]}]


CLAIM = {"name": "v", "persistentVolumeClaim": {"claimName": "mysql-pv-claim"}}
ATTACKS = {
    "another account": make_pod(account="pipeline-runner"),
    "the default account": {**make_pod(), "spec": {"containers": [{"name": "main"}]}},
    "a secret as a variable": make_pod(containers=variable("airflow-keys")),
    "a secret in an init container": make_pod(initContainers=variable("mysql-secret")),
    "all of a secret": make_pod(containers=[{"name": "m", "envFrom": [{"secretRef": {"name": "airflow-metadata"}}]}]),
    "a secret as a volume": make_pod(volumes=[{"name": "v", "secret": {"secretName": "postgresql"}}]),
    "a projected secret": make_pod(volumes=[{"name": "v", "projected": {"sources": [{"secret": {"name": "x"}}]}}]),
    "the database's volume": make_pod(volumes=[CLAIM]),
    "another kind of volume": make_pod(volumes=[{"name": "v", "csi": {"driver": "secrets-store.csi.k8s.io"}}]),
    "KFP's network": make_pod({"workflows.argoproj.io/workflow": "x", "application-crd-id": "kubeflow-pipelines"}),
    "Airflow's network": make_pod({"workflows.argoproj.io/workflow": "x", "univigu-job": "airflow"}),
    "the database's clients": make_pod({"workflows.argoproj.io/workflow": "x", "univigu-database": "client"}),
    "a debug container": make_pod(ephemeralContainers=[{"name": "debugger"}]),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_pod_of_a_run_that_takes_more_is_refused(attack, runs):
    (message,) = admitted(runs, ATTACKS[attack])
    assert message.startswith("A pod of a run ")


def test_a_pod_that_argo_makes_without_the_label_is_checked_and_other_pods_are_not(runs):
    assert admitted(runs, make_pod(labels={}, account="ml-pipeline")) != []
    assert (
        admitted(runs, make_pod(labels={}, account="ml-pipeline"), user="system:serviceaccount:kube-system:x") is None
    )


def test_a_trainjob_gets_no_other_account_and_no_other_secret_by_patching_its_pods(policies, render, pod_templates):
    policy = policies["univigu-pods-of-trainjobs"]
    from kubeflow_trainer_api import models

    template = copy.deepcopy(pod_templates(render("dev"))["TrainingRuntime/node"])
    template["metadata"]["labels"]["jobset.sigs.k8s.io/jobset-name"] = "train-stage-1-0123456789"
    assert admitted(policy, template, user="system:serviceaccount:kube-system:job-controller") == []
    patches = {
        "serviceAccountName": "univigu-launcher",
        "volumes": [{"name": "v", "secret": {"secretName": "airflow-keys"}}],
        "initContainers": variable("mysql-secret"),
    }
    for key, value in patches.items():
        patched = {**template, "spec": {**template["spec"], key: value}}
        assert models.TrainerV1alpha1PodSpecPatch.from_dict({key: value}).to_dict() == {key: value}  # Trainer allows it
        assert len(admitted(policy, patched)) == 1, key
    assert admitted(policy, make_pod()) is None


@pytest.mark.parametrize("overlay", ["dev", "gke", "multi-user"])
def test_the_policies_deny_in_the_namespace_of_jobs(overlay, render):
    objects = render(overlay)
    (work,) = [
        one for one in objects if one["kind"] == "PersistentVolumeClaim" and one["metadata"]["name"] == "univigu-work"
    ]
    bindings = of_kind(objects, "ValidatingAdmissionPolicyBinding")
    assert {one["spec"]["policyName"] for one in bindings.values()} == set(
        of_kind(objects, "ValidatingAdmissionPolicy")
    )
    for one in bindings.values():
        assert one["spec"]["validationActions"] == ["Deny"]
        selector = one["spec"]["matchResources"]["namespaceSelector"]["matchLabels"]
        assert selector == {"kubernetes.io/metadata.name": work["metadata"]["namespace"]}


# --- multi-user Kubeflow Pipelines ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def multi_user(render, pod_templates, airflow_values):
    objects = render("multi-user")
    return Cluster(objects, pod_templates(objects), airflow_values["labels"], jobs="univigu")


def test_jobs_have_a_namespace_of_their_own_apart_from_kubeflow_pipelines(render, multi_user):
    ours = {one["metadata"].get("namespace") for one in render("multi-user")} - {None}
    assert ours == {"univigu", "mlflow"}
    (namespace,) = [o for o in render("multi-user") if o["metadata"]["name"] == "univigu" and o["kind"] == "Namespace"]
    assert "app.kubernetes.io/part-of" not in namespace["metadata"]["labels"]  # the profile's, see the overlay
    for target, port in (("ml-pipeline", 8888), ("metadata-grpc-deployment", 8080), ("seaweedfs", 8333)):
        assert multi_user.allows("Egress", "step", target, "TCP", port)
    for target, port in (("mysql", 3306), ("workflow-controller", 9090), ("seaweedfs", 8888), ("ml-pipeline-ui", 3000)):
        assert not multi_user.allows("Egress", "step", target, "TCP", port), target
    for pod in ("step", "training", "airflow"):
        assert multi_user.reaches(pod, "mlflow", 5000)
    assert not [one for one in multi_user.pods if multi_user.reaches("unlabelled", one, 5000)]
