"""Which connections NetworkPolicies allow: a model of their rules, and the pods of a cluster."""

import ipaddress
from pathlib import Path

import yaml

KFP = [*yaml.safe_load_all(Path(__file__).with_name("kubeflow_pipelines.yaml").read_text(encoding="utf-8"))]
KFP_PODS = {  # namespace and labels of Kubeflow Pipelines' own pods, by the name of their deployment
    one["metadata"]["name"]: (one["metadata"]["namespace"], one["spec"]["template"]["metadata"]["labels"])
    for one in KFP
    if one["kind"] == "Deployment"
}


class Cluster:
    """An overlay's policies and pods, and the pods of Kubeflow Pipelines, of a run and of Airflow.

    objects: the overlay's, and those that are applied beside it. made: the overlay's pod templates by name. jobs: the
    namespace of jobs.
    """

    def __init__(self, objects, made, airflow_labels, jobs="kubeflow"):
        self.policies = [one for one in objects if one["kind"] == "NetworkPolicy"]
        self.namespaces = {
            one["metadata"]["name"]: {
                **one["metadata"].get("labels", {}),
                "kubernetes.io/metadata.name": one["metadata"]["name"],
            }
            for one in objects
            if one["kind"] == "Namespace"
        }
        for name in ("kube-system", "captioner", "strangers", "kubeflow"):
            self.namespaces.setdefault(name, {"kubernetes.io/metadata.name": name})
        self.pods = {
            "training": self.of(made, "TrainingRuntime/node"),
            "mlflow": self.of(made, "Deployment/mlflow/mlflow"),
            "seeding": self.of(made, f"Job/{jobs}/univigu-work"),
            "step": (jobs, {"workflows.argoproj.io/workflow": "uni-vigu-x1", "pipeline/runid": "1"}),
            "airflow": (jobs, {"tier": "airflow", **airflow_labels}),
            "unlabelled": (jobs, {}),
            "unlabelled-in-mlflow": ("mlflow", {}),
            "dns": ("kube-system", {"k8s-app": "kube-dns"}),
            "node-dns": ("kube-system", {"k8s-app": "node-local-dns"}),
            "konnectivity": ("kube-system", {"k8s-app": "konnectivity-agent"}),
            "captioner": ("captioner", {"app": "vllm"}),
            "stranger": ("strangers", {"univigu-job": "airflow", "application-crd-id": "kubeflow-pipelines"}),
            **KFP_PODS,
        }
        if "StatefulSet/mlflow/postgresql" in made:
            self.pods["mlflow-database"] = self.of(made, "StatefulSet/mlflow/postgresql")
            self.pods["airflow-database"] = self.of(made, f"StatefulSet/{jobs}/postgresql")
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
        if "ports" not in rule:
            return True
        return any((one.get("protocol", "TCP"), one["port"]) == (protocol, port) for one in rule["ports"])

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
