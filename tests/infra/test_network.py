"""NetworkPolicies allow the necessary connections, and no others."""

import ipaddress

import pytest

ANY = 29500  # a port that no rule names


class Cluster:
    """An overlay's policies and pods, and the pods of Kubeflow Pipelines and Airflow."""

    def __init__(self, objects, made, airflow_labels):
        self.policies = [one for one in objects if one["kind"] == "NetworkPolicy"]
        self.namespaces = {
            one["metadata"]["name"]: {
                **one["metadata"]["labels"],
                "kubernetes.io/metadata.name": one["metadata"]["name"],
            }
            for one in objects
            if one["kind"] == "Namespace"
        }
        self.namespaces["kube-system"] = {"kubernetes.io/metadata.name": "kube-system"}
        self.namespaces["models"] = {"univigu-role": "llm"}
        self.namespaces["strangers"] = {"kubernetes.io/metadata.name": "strangers"}
        self.pods = {
            "training": self.of(made, "TrainingRuntime/node"),
            "mlflow": self.of(made, "Deployment/mlflow/mlflow"),
            "seeding": self.of(made, "Job/kubeflow/univigu-work"),
            "step": ("kubeflow", {"workflows.argoproj.io/workflow": "uni-vigu-x1", "pipeline/runid": "1"}),
            "kfp": ("kubeflow", {"app": "ml-pipeline"}),
            "kfp-mysql": ("kubeflow", {"app": "mysql"}),
            "airflow": ("kubeflow", {"tier": "airflow", **airflow_labels}),
            "dns": ("kube-system", {"k8s-app": "kube-dns"}),
            "node-dns": ("kube-system", {"k8s-app": "node-local-dns"}),
            "konnectivity": ("kube-system", {"k8s-app": "konnectivity-agent"}),
            "captioner": ("models", {"app": "vllm"}),
            "stranger": ("strangers", {}),
        }
        if "StatefulSet/mlflow/postgresql" in made:
            self.pods["mlflow-database"] = self.of(made, "StatefulSet/mlflow/postgresql")
            self.pods["airflow-database"] = self.of(made, "StatefulSet/kubeflow/postgresql")
            self.pods["object-store"] = self.of(made, "StatefulSet/mlflow/object-store")

    @staticmethod
    def of(made, name):
        return made[name]["metadata"]["namespace"], made[name]["metadata"]["labels"]

    def reaches(self, source, target, port):
        """Whether a connection from a pod to another, or to an address, is allowed at both of its ends."""
        protocol, port = ("UDP", 53) if port == "dns" else ("TCP", port)
        out = self.allows("Egress", source, target, protocol, port)
        return out and (target not in self.pods or self.allows("Ingress", target, source, protocol, port))

    def allows(self, direction, pod, peer, protocol, port):
        policies = [p for p in self.policies if direction in p["spec"]["policyTypes"] and self.selects(p, pod)]
        if not policies:
            return True
        side, list_of_peers = ("to", "egress") if direction == "Egress" else ("from", "ingress")
        return any(
            self.fits_port(rule, protocol, port)
            and (side not in rule or any(self.fits_peer(one, p, peer) for one in rule[side]))
            for p in policies
            for rule in p["spec"].get(list_of_peers, [])
        )

    def selects(self, policy, pod):
        namespace, labels = self.pods[pod]
        return namespace == policy["metadata"]["namespace"] and matches(policy["spec"]["podSelector"], labels)

    @staticmethod
    def fits_port(rule, protocol, port):
        return "ports" not in rule or any((o["protocol"], o["port"]) == (protocol, port) for o in rule["ports"])

    def fits_peer(self, rule, policy, peer):
        if "ipBlock" in rule:
            if peer in self.pods:
                return False
            blocks = [ipaddress.ip_network(cidr) for cidr in rule["ipBlock"].get("except", [])]
            address = ipaddress.ip_address(peer)
            return address in ipaddress.ip_network(rule["ipBlock"]["cidr"]) and not any(address in b for b in blocks)
        if peer not in self.pods:
            return False
        namespace, labels = self.pods[peer]
        if "namespaceSelector" in rule:
            if not matches(rule["namespaceSelector"], self.namespaces[namespace]):
                return False
        elif namespace != policy["metadata"]["namespace"]:
            return False
        return matches(rule.get("podSelector", {}), labels)


def matches(selector, labels):
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for one in selector.get("matchExpressions", []):
        held = {
            "Exists": one["key"] in labels,
            "DoesNotExist": one["key"] not in labels,
            "In": labels.get(one["key"]) in one.get("values", []),
            "NotIn": labels.get(one["key"]) not in one.get("values", []),
        }
        if not held[one["operator"]]:
            return False
    return True


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
    *(("step", "kfp", port) for port in (8080, 8333, 8887, 8888)),  # metadata, objects, and the API's two
    ("step", "mlflow", 5000),
    ("step", "captioner", 8000),
    ("training", "training", ANY),
    ("training", "mlflow", 5000),
    ("mlflow", "mlflow-database", 5432),
    ("mlflow", "object-store", 8333),
    ("airflow", "kfp", 8888),
    ("airflow", "mlflow", 5000),
    ("airflow", "airflow", 8080),
    ("airflow", "airflow-database", 5432),
    ("kfp", "kfp-mysql", 3306),
]


def test_what_is_needed_is_allowed(dev):
    assert [one for one in NEEDED if not dev.reaches(*one)] == []
    for name in ("dns", "node-dns", "169.254.20.10"):
        assert [pod for pod in dev.pods if not dev.reaches(pod, name, "dns")] == [], name


def test_nothing_else_is_allowed(dev):
    ports = sorted({port for _, _, port in NEEDED} | {53, 443})
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
    # Pods of a run may use the ports of KFP's services on any of KFP's own pods.
    allowed |= {("step", target, port) for target in ("kfp", "kfp-mysql") for port in (8080, 8333, 8887, 8888)}
    assert open_ways - allowed == set()
    for target in set(dev.pods) - {"dns", "node-dns", "konnectivity", "captioner", "stranger"}:
        assert not any(dev.reaches("stranger", target, port) for port in ports), target
    for source in ours:
        assert not dev.reaches(source, "198.51.100.7", 443), source


def test_the_kubernetes_api_is_reached_by_runs_alone_and_at_the_overlays_address(dev, gke):
    for cluster, address in ((dev, "172.18.0.2"), (gke, "10.0.0.2")):
        assert cluster.reaches("step", address, 6443 if cluster is dev else 443)
        assert cluster.allows("Ingress", "kfp", address, "TCP", 8443)
        for pod in ("training", "mlflow", "airflow", "seeding"):
            assert not cluster.reaches(pod, address, 443), pod


def test_on_gke_names_are_found_by_cloud_dns_too_and_webhooks_are_called_through_konnectivity(gke):
    ours = [pod for pod in gke.pods if gke.pods[pod][0] in ("kubeflow", "mlflow")]
    assert [pod for pod in ours if not gke.reaches(pod, "169.254.169.254", "dns")] == []
    assert {pod for pod in gke.pods if gke.reaches("konnectivity", pod, 8443) and pod in ours} == {"kfp", "kfp-mysql"}


def test_on_gke_runs_training_and_airflow_reach_public_addresses_by_https_alone(gke):
    ours = {pod for pod in gke.pods if gke.pods[pod][0] in ("kubeflow", "mlflow")} - {"kfp", "kfp-mysql"}
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
