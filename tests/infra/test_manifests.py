"""Every object passes all checks that need no cluster: schemas, references, and Pod Security."""

import json
import os
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

import univigu
from components.orchestration import kfp_pipeline, kfp_server, notifications, prerequisites
from components.pipeline.stages import find_stage

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.34"


@pytest.fixture(scope="session")
def pods(objects, pod_templates):
    return pod_templates(objects)


def containers(pod):
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def named(objects, kind):
    return {(one["metadata"].get("namespace"), one["metadata"]["name"]): one for one in objects if one["kind"] == kind}


def test_each_object_fits_the_schema_of_its_kind(objects):
    from kubeflow_trainer_api import models

    for one in objects:
        if one["apiVersion"].startswith("trainer.kubeflow.org/"):
            assert models.TrainerV1alpha1TrainingRuntime.from_dict(one).to_dict() == one
        else:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_the_jobs_of_a_training_runtime_fit_kubernetes_own_schema(objects):
    (runtime,) = [one for one in objects if one["kind"] == "TrainingRuntime"]
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == job["template"]["spec"]["template"]["spec"]["containers"][0]["name"] == "node"
    as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": job["template"]["spec"]}
    kubernetes_validate.validate(as_job, KUBERNETES, strict=True)


def test_a_misspelt_field_would_be_noticed(objects):
    from kubeflow_trainer_api import models

    (runtime,) = [one for one in objects if one["kind"] == "TrainingRuntime"]
    wrong = {**runtime, "spec": {**runtime["spec"], "mlPolicies": {}}}
    assert models.TrainerV1alpha1TrainingRuntime.from_dict(wrong).to_dict() != wrong
    (account, *_) = [one for one in objects if one["kind"] == "ServiceAccount"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**account, "automountToken": False}, KUBERNETES, strict=True)


def test_each_object_is_in_an_existing_namespace(objects):
    namespaces = {name for _, name in named(objects, "Namespace")}
    for one in objects:
        if one["kind"] not in ("Namespace", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"):
            assert one["metadata"]["namespace"] in namespaces, one["metadata"]


# --- pods ------------------------------------------------------------------------------------------------------------


def unrestricted(pod):
    """The violations of Pod Security "restricted" in a pod, and a writable root file system."""
    spec, problems = pod["spec"], []
    around = spec.get("securityContext", {})
    if around.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        problems.append("seccompProfile")
    if not (around.get("runAsNonRoot") is True and around.get("runAsUser", 0) > 0):
        problems.append("runAsNonRoot")
    problems += [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
    for volume in spec.get("volumes", []):
        problems += [f"volume {kind}" for kind in volume.keys() - {"name", "secret"} - allowed]
    for container in containers(pod):
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False:
            problems.append("allowPrivilegeEscalation")
        if own.get("readOnlyRootFilesystem") is not True:
            problems.append("readOnlyRootFilesystem")
        if own.get("capabilities") != {"drop": ["ALL"]}:
            problems.append("capabilities")
        if own.keys() - {"allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"}:
            problems.append("more than is checked")
        problems += [f"hostPort {port['hostPort']}" for port in container.get("ports", []) if "hostPort" in port]
    return problems


def test_namespaces_enforce_and_pods_keep_pod_security_restricted(objects, pods):
    for (_, name), namespace in named(objects, "Namespace").items():
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted", name
    assert {name: unrestricted(pod) for name, pod in pods.items()} == {name: [] for name in pods}


def test_airflows_pods_meet_pod_security_restricted(airflow_values):
    contexts = airflow_values["securityContexts"]
    container = {"name": "any", "securityContext": contexts["containers"]}
    assert unrestricted({"spec": {"securityContext": contexts["pod"], "containers": [container]}}) == []


def test_each_image_has_a_tag_and_the_projects_own_have_its_version(pods, airflow_values):
    images = [container["image"] for pod in pods.values() for container in containers(pod)]
    images.append(f"{airflow_values['defaultAirflowRepository']}:{airflow_values['defaultAirflowTag']}")
    for image in images:
        assert re.fullmatch(r"[a-z0-9./-]+(:v?\d+\.\d+[\w.-]*|@sha256:[0-9a-f]{64})", image), image
        if image.startswith("ghcr.io/uni-vigu/"):
            assert image.endswith(f":{univigu.__version__}"), image


def test_each_container_has_a_memory_request_and_limit(pods):
    for name, pod in pods.items():
        if not name.startswith("TrainingRuntime"):  # a TrainJob says it
            assert all(one["resources"]["limits"]["memory"] for one in containers(pod)), name


# --- rights ----------------------------------------------------------------------------------------------------------


def test_roles_are_of_one_namespace_and_name_what_they_allow(objects):
    kinds = {one["kind"] for one in objects}
    assert not kinds & {"ClusterRole", "ClusterRoleBinding"}
    for role in named(objects, "Role").values():
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]], rule
            assert not {"escalate", "bind", "impersonate"} & {*rule["verbs"]}, rule
            if "secrets" in rule["resources"]:
                assert rule["verbs"] == ["get"], rule
                assert rule["resourceNames"], rule


def test_each_binding_names_an_existing_role_and_existing_accounts(objects):
    accounts, roles = named(objects, "ServiceAccount"), named(objects, "Role")
    for (namespace, _), binding in named(objects, "RoleBinding").items():
        assert binding["roleRef"]["kind"] == "Role"
        assert (namespace, binding["roleRef"]["name"]) in roles
        for subject in binding["subjects"]:
            assert subject["kind"] == "ServiceAccount"
            assert (subject.get("namespace", namespace), subject["name"]) in accounts


def test_each_pod_has_an_account_of_its_own_without_a_token_unless_it_needs_the_api(objects, pods):
    accounts = named(objects, "ServiceAccount")
    used = []
    for name, pod in pods.items():
        account = accounts[pod["metadata"]["namespace"], pod["spec"]["serviceAccountName"]]
        assert account["automountServiceAccountToken"] is False, name
        assert pod["spec"]["automountServiceAccountToken"] is False, name
        used.append((pod["metadata"]["namespace"], pod["spec"]["serviceAccountName"]))
    assert len(used) == len(set(used))
    bound = {subject["name"] for one in named(objects, "RoleBinding").values() for subject in one["subjects"]}
    assert {name for (_, name), one in accounts.items() if one["automountServiceAccountToken"]} == bound


def test_only_the_work_root_needs_a_volume_of_several_nodes():
    def modes(value):
        if isinstance(value, dict):
            name = value.get("metadata", {}).get("name")
            found = value.get("spec", {}).get("accessModes", []) if isinstance(value.get("spec"), dict) else []
            return [(name, mode) for mode in found] + [one for part in value.values() for one in modes(part)]
        return [one for part in value for one in modes(part)] if isinstance(value, list) else []

    files = (ROOT / "infra").rglob("*.yaml")
    claims = [one for file in files for one in modes([*yaml.safe_load_all(file.read_text(encoding="utf-8"))])]
    assert len(claims) >= 5
    assert {name for name, mode in claims if mode != "ReadWriteOnce"} == {"univigu-work"}


@pytest.mark.parametrize("overlay", ["dev", "gke"])
def test_the_pages_patch_for_a_registry_with_a_login_gives_each_account_the_secret(overlay, tmp_path):
    page = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"\n   ```yaml\n(   patches:.*?)   ```", page, re.S)
    base = os.path.relpath(ROOT / "infra/kustomize/overlays" / overlay, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base], **yaml.safe_load(snippet)}))
    done = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    accounts = named([*yaml.safe_load_all(done.stdout)], "ServiceAccount")
    assert len(accounts) >= 5
    for name, account in accounts.items():
        assert account["imagePullSecrets"] == [{"name": "registry"}], name
        kubernetes_validate.validate(account, KUBERNETES, strict=True)


# --- what pods refer to ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def documented_secrets():
    """(namespace, name) -> keys of the Secrets that the commands of docs/operate.md create, run without a cluster."""
    text = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", text, re.S) if "create secret" in block]
    script = 'kubectl() { command kubectl "$@" --dry-run=client --output=yaml; echo "---"; }\n' + "\n".join(blocks)
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = [one for one in yaml.safe_load_all(done.stdout) if one]
    return {(one["metadata"]["namespace"], one["metadata"]["name"]): set(one["data"]) for one in made}


def test_docs_operate_creates_each_secret_that_a_pod_needs(pods, airflow_values, documented_secrets):
    wanted = {}
    for pod in pods.values():
        namespace = pod["metadata"]["namespace"]
        for container in containers(pod):
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    wanted.setdefault((namespace, reference["name"]), set()).add(reference["key"])
            for source in container.get("envFrom", []):
                if reference := source.get("secretRef"):
                    wanted.setdefault((namespace, reference["name"]), set())
        for volume in pod["spec"].get("volumes", []):
            if "secret" in volume:
                wanted.setdefault((namespace, volume["secret"]["secretName"]), set())
    assert ("kubeflow", "univigu-tracking") in wanted
    assert ("mlflow", "mlflow-auth") in wanted
    # the keys that the chart reads, as its values.yaml documents them
    for name, key in (
        (airflow_values["data"]["metadataSecretName"], "connection"),
        (airflow_values["fernetKeySecretName"], "fernet-key"),
        (airflow_values["apiSecretKeySecretName"], "api-secret-key"),
        (airflow_values["jwtSecretName"], "jwt-secret"),
        *((one["secretName"], one["secretKey"]) for one in airflow_values["secret"]),
    ):
        wanted.setdefault(("kubeflow", name), set()).add(key)
    for secret, keys in wanted.items():
        assert keys <= documented_secrets.get(secret, {"<not made>"}), secret


def test_airflow_has_the_address_to_notify_and_the_login_of_mlflow_where_there_are_such(airflow_values):
    variables = yaml.safe_load(airflow_values["extraEnv"])  # the chart puts this text among each container's `env`
    found = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in variables}
    required = {one["envName"] for one in airflow_values["secret"]}
    wanted = {notifications.NOTIFY_URL: kfp_pipeline.NOTIFY_SECRET}
    wanted |= {key: kfp_pipeline.TRACKING_SECRET for key in kfp_pipeline.TRACKING_KEYS if key not in required}
    wanted = {key: {"name": name, "key": key, "optional": True} for key, name in wanted.items()}
    ((secret, _),) = find_stage("register-model").secrets.items()
    for key, variable in prerequisites.REGISTRY_LOGIN.items():  # it promotes, so it has the account that may
        wanted[variable] = {"name": secret, "key": key, "optional": True}
    assert found == wanted
    page = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    assert f"`{kfp_pipeline.NOTIFY_SECRET}` with `{notifications.NOTIFY_URL}`" in page


def test_the_probes_and_the_groomer_of_airflows_pods_need_no_file_of_airflows_own_image(airflow_values):
    # tests/dags runs the probes, and test_images.py the groomer
    for name in ("scheduler", "triggerer", "dagProcessor"):
        assert airflow_values[name]["livenessProbe"]["command"][:3] == ["airflow", "jobs", "check"]
        assert airflow_values[name]["logGroomerSidecar"]["command"] == ["bash", "-c"]
    assert airflow_values["scheduler"]["startupProbe"] == airflow_values["scheduler"]["livenessProbe"]


def test_the_arguments_that_airflow_gives_its_runs_are_the_pipelines_and_so_are_those_of_the_operators_page(
    airflow_values,
):
    settings = {one["name"]: one["value"] for one in airflow_values["env"]}
    page = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    for text in (settings["UNIVIGU_KFP_ARGUMENTS"], *re.findall(r"```json\n(.*?)```", page, re.S)):
        kfp_server.typed_arguments(ROOT / "infra/pipeline.yaml", json.loads(text))


def test_the_account_of_airflows_runs_exists(objects, airflow_values):
    settings = {one["name"]: one["value"] for one in airflow_values["env"]}
    assert ("kubeflow", settings["UNIVIGU_KFP_SERVICE_ACCOUNT"]) in named(objects, "ServiceAccount")


def test_no_secret_is_in_the_manifests(objects, airflow_values):
    assert not named(objects, "Secret")
    for one in (*named(objects, "ConfigMap").values(), airflow_values):
        assert not re.search(r"(?i)password:|secret_key:|://[^/\s]*:[^/\s]*@", yaml.safe_dump(one))


def test_each_config_map_and_claim_of_a_pod_exists(objects, pods, airflow_values):
    maps, claims = named(objects, "ConfigMap"), named(objects, "PersistentVolumeClaim")
    for pod in pods.values():
        namespace = pod["metadata"]["namespace"]
        for container in containers(pod):
            for source in container.get("envFrom", []):
                assert "configMapRef" not in source or (namespace, source["configMapRef"]["name"]) in maps
        for volume in pod["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                assert (namespace, volume["persistentVolumeClaim"]["claimName"]) in claims
    for volume in airflow_values["volumes"]:
        if "persistentVolumeClaim" in volume:
            assert ("kubeflow", volume["persistentVolumeClaim"]["claimName"]) in claims


def test_each_mount_is_of_a_volume_that_the_pod_has(objects, pods):
    for (namespace, name), owner in named(objects, "StatefulSet").items():
        template = pods[f"StatefulSet/{namespace}/{name}"]
        claims = {claim["metadata"]["name"] for claim in owner["spec"]["volumeClaimTemplates"]}
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in containers(template):
            assert {mount["name"] for mount in container["volumeMounts"]} == claims | volumes
    for name, pod in pods.items():
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        for container in containers(pod):
            if not name.startswith("StatefulSet"):
                assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes


def test_each_service_selects_pods_with_the_port_it_leads_to(objects, pods):
    for (namespace, name), service in named(objects, "Service").items():
        selected = [
            pod
            for pod in pods.values()
            if pod["metadata"]["namespace"] == namespace
            and service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
        ]
        assert len(selected) == 1, name
        ports = {
            port[key] for one in containers(selected[0]) for port in one["ports"] for key in ("name", "containerPort")
        }
        assert {port.get("targetPort", port["port"]) for port in service["spec"]["ports"]} <= ports


# --- MLflow ----------------------------------------------------------------------------------------------------------


def test_mlflow_answers_by_the_names_that_the_operators_page_gives_and_by_no_others(objects):
    from mlflow.server.security_utils import is_allowed_host_header

    settings = named(objects, "ConfigMap")["mlflow", "mlflow"]["data"]
    allowed = settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    page = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
    addresses = re.findall(r"MLFLOW_TRACKING_URI=http://([\w.:]+)", page)
    assert set(addresses) == {"mlflow.mlflow:5000", "localhost:5000"}
    assert all(is_allowed_host_header(allowed, address) for address in addresses)
    assert not any(is_allowed_host_header(allowed, host) for host in ("example.com", "mlflow.example.com:5000"))


# --- training --------------------------------------------------------------------------------------------------------


def test_a_training_pod_that_saved_its_state_is_run_again_and_a_bad_input_is_not(objects):
    (runtime,) = [one for one in objects if one["kind"] == "TrainingRuntime"]
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]

    def action(code):
        return next((r["action"] for r in rules if code in r.get("onExitCodes", {}).get("values", [])), "Count")

    from univigu import errors

    assert action(errors.PreemptedError.exit_code) == "Ignore"
    for error in (errors.BadInputError, errors.MissingInputError, errors.ConfigError, errors.GateFailedError):
        assert action(error.exit_code) == "FailJob", error
    assert action(errors.TransientError.exit_code) == "Count"
    assert action(137) == "Count"


def test_only_the_overlay_of_a_cluster_with_gpus_names_its_nodes(render, pod_templates):
    def placement(overlay):
        (pod,) = [p for n, p in pod_templates(render(overlay)).items() if n.startswith("TrainingRuntime")]
        return pod["spec"].get("nodeSelector"), pod["spec"].get("tolerations")

    assert placement("dev") == (None, None)
    selector, tolerations = placement("gke")
    assert "cloud.google.com/gke-accelerator" in selector
    assert tolerations == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
