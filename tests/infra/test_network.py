"""NetworkPolicies allow the necessary connections, and no others."""

import pytest

from network_policies import KFP_PODS, Cluster

ANY = 29500  # a port that no rule names


@pytest.fixture(scope="session")
def cluster_of(render, pod_templates, airflow_values):
    return lambda overlay: Cluster(render(overlay), pod_templates(render(overlay)), airflow_values["labels"])


@pytest.fixture(scope="session")
def dev(cluster_of):
    return cluster_of("dev")


@pytest.fixture(scope="session")
def gke(cluster_of):
    return cluster_of("gke")


NEEDED = [
    ("step", "ml-pipeline", 8887),
    ("step", "ml-pipeline", 8888),
    ("step", "metadata-grpc-deployment", 8080),
    ("step", "seaweedfs", 8333),
    ("step", "mlflow", 5000),
    ("step", "captioner", 8000),
    ("training", "training", ANY),
    ("training", "mlflow", 5000),
    ("mlflow", "mlflow-database", 5432),
    ("mlflow", "object-store", 8333),
    ("airflow", "ml-pipeline", 8888),
    ("airflow", "mlflow", 5000),
    ("airflow", "airflow", 8080),
    ("airflow", "airflow-database", 5432),
    ("ml-pipeline", "mysql", 3306),
]


UNLABELLED = ("unlabelled", "unlabelled-in-mlflow")
RESOLVERS = ("dns", "node-dns", "169.254.20.10")


def test_what_is_needed_is_allowed(dev):
    assert [one for one in NEEDED if not dev.reaches(*one)] == []
    for name in RESOLVERS:
        assert [pod for pod in dev.pods if pod not in UNLABELLED and not dev.reaches(pod, name, "dns")] == [], name


def test_nothing_else_is_allowed(dev):
    ports = sorted({port for _, _, port in NEEDED} | {53, 443, 8111, 9333})
    ours = ["step", "training", "seeding", "mlflow", "airflow", "mlflow-database", "airflow-database", "object-store"]
    open_ways = {
        (source, target, port)
        for source in ours
        for target in dev.pods
        for port in ports
        if target not in ("dns", "node-dns") and dev.reaches(source, target, port)
    }
    allowed = {
        *NEEDED,
        *(("training", "training", port) for port in ports),
        *(("airflow", "airflow", p) for p in ports),
    }
    assert open_ways - allowed == set()
    for target in set(dev.pods) - {"dns", "node-dns", "konnectivity", "captioner", "stranger"}:
        assert not any(dev.reaches("stranger", target, port) for port in ports), target
    for source in ours:
        assert not dev.reaches(source, "198.51.100.7", 443), source


@pytest.mark.parametrize("overlay", ["dev", "gke"])
def test_a_pod_without_labels_reaches_nothing_and_is_reached_by_nothing(overlay, cluster_of):
    cluster = cluster_of(overlay)
    ports = sorted({port for _, _, port in NEEDED} | {443, 6443, ANY, "dns"}, key=str)
    addresses = ["8.8.8.8", "172.18.0.2", "10.0.0.2", "169.254.169.254", "169.254.20.10", "10.10.0.5"]
    for pod in UNLABELLED:
        for port in ports:
            assert not [one for one in (*cluster.pods, *addresses) if cluster.reaches(pod, one, port)], (pod, port)
            assert not [one for one in cluster.pods if cluster.reaches(one, pod, port)], (pod, port)


@pytest.mark.parametrize("overlay", ["dev", "gke"])
def test_policies_select_namespaces_by_name_and_nothing_by_the_absence_of_a_label(overlay, render):
    selectors = []

    def walk(value):
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, one in pairs:
            if key == "namespaceSelector":
                assert list(one) == ["matchLabels"]
                assert list(one["matchLabels"]) == ["kubernetes.io/metadata.name"], one
                selectors.append(one)
            elif key == "podSelector":
                operators = {expression["operator"] for expression in one.get("matchExpressions", [])}
                assert operators <= {"In", "Exists"}, one
            walk(one)

    for policy in render(overlay):
        if policy["kind"] == "NetworkPolicy":
            walk(policy["spec"])
            assert policy["spec"]["podSelector"] or policy["metadata"]["name"] == "default-deny"
    assert selectors


def test_the_kubernetes_api_is_reached_by_runs_alone_and_at_the_overlays_address(dev, gke):
    for cluster, address in ((dev, "172.18.0.2"), (gke, "10.0.0.2")):
        assert cluster.reaches("step", address, 6443 if cluster is dev else 443)
        assert cluster.allows("Ingress", "cache-server", address, "TCP", 8443)
        assert not cluster.allows("Ingress", "mysql", address, "TCP", 3306)
        for pod in ("training", "mlflow", "airflow", "seeding"):
            assert not cluster.reaches(pod, address, 443), pod


def test_on_gke_names_are_found_by_cloud_dns_too_and_webhooks_are_called_through_konnectivity(gke):
    ours = [pod for pod in gke.pods if gke.pods[pod][0] in ("kubeflow", "mlflow") and pod not in UNLABELLED]
    assert [pod for pod in ours if not gke.reaches(pod, "169.254.169.254", "dns")] == []
    assert {pod for pod in gke.pods if gke.reaches("konnectivity", pod, 8443) and pod in ours} == {"cache-server"}


def test_on_gke_runs_training_and_airflow_reach_public_addresses_by_https_alone(gke):
    ours = {pod for pod in gke.pods if gke.pods[pod][0] in ("kubeflow", "mlflow")} - set(KFP_PODS)
    assert {pod for pod in ours if gke.reaches(pod, "8.8.8.8", 443)} == {"step", "training", "airflow"}
    private = ["10.10.0.5", "100.64.0.5", "172.16.0.5", "192.168.0.5", "169.254.169.252", "169.254.169.254"]
    for pod in ours:
        assert not any(gke.reaches(pod, "8.8.8.8", port) for port in (22, 80, 8080, 8333)), pod
        assert not any(gke.reaches(pod, address, 443) for address in private), pod


def test_on_gke_mlflow_alone_reaches_the_metadata_server_and_its_database_is_reached_by_airflow_too(gke):
    for pod in ("step", "training", "seeding", "airflow"):
        for address in ("169.254.169.252", "169.254.169.254"):
            assert not any(gke.reaches(pod, address, port) for port in (80, 443, 987, 988)), pod
    assert gke.reaches("mlflow", "169.254.169.254", 80)
    assert {pod for pod in ("step", "training", "mlflow", "airflow") if gke.reaches(pod, "10.10.0.5", 5432)} == {
        *("mlflow", "airflow")
    }


@pytest.mark.parametrize("overlay", ["dev", "gke"])
def test_each_namespace_denies_by_default_and_each_policy_selects_a_pod(overlay, cluster_of):
    cluster = cluster_of(overlay)
    denying = {
        policy["metadata"]["namespace"]
        for policy in cluster.policies
        if policy["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    }
    assert denying == {"kubeflow", "mlflow"}
    for policy in cluster.policies:
        assert any(cluster.selects(policy, pod) for pod in cluster.pods), policy["metadata"]
        assert "192.0.2.0/24" not in str(policy), "an overlay has to say where the Kubernetes API answers"
