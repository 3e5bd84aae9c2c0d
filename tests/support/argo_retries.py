"""Argo's rules for retries, as a model: which pods it starts for a task, and when.

Read from Argo Workflows 4.0.5, which Kubeflow Pipelines 2.17.0 installs: workflow/controller/operator.go
(processNodeRetries, mergedTemplateDefaultsInto, inferFailedReason, podReconciliation), workflowpod.go (getDeadline) and
dag.go (executeDAG); and from Kubeflow Pipelines 2.17.0: backend/src/v2/compiler/argocompiler (container.go,
spec_patch.go), backend/src/v2/cmd/launcher-v2/main.go and
manifests/kustomize/third-party/argo/base/workflow-controller-configmap-patch.yaml.
"""

import re
from dataclasses import dataclass

KFP_DEFAULTS = {"limit": "2", "retryPolicy": "OnError"}  # templateDefaults.retryStrategy of KFP's controller
EXPRESSION = re.compile(r"lastRetry\.message != '' && not \(lastRetry\.message matches '(.+)'\)")


@dataclass(frozen=True)
class End:
    """How an attempt ended: the phase and the message that Argo gives it, and how long it took."""

    phase: str  # Succeeded, Failed or Error
    message: str = ""
    pending_s: float = 0.0
    running_s: float = 0.0


def exit_code(code: int, pending_s: float = 0.0, running_s: float = 0.0) -> End:
    """A step that ended with this code: KFP's launcher exits with 1, and the container's message has the code."""
    if code == 0:
        return End("Succeeded", "", pending_s, running_s)
    return End("Failed", f"main: Error (exit code 1): univigu exit code {code}: why", pending_s, running_s)


LOST = {
    "deleted": End("Error", "pod deleted"),
    "evicted": End("Failed", "The node was low on resource: memory."),
    "node shut down": End("Failed", "Pod was terminated in response to imminent node shutdown."),
    "killed": End("Failed", "main: OOMKilled (exit code 137)"),
    "timed out": End("Failed", "Pod was active on the node longer than the specified deadline"),
    "image not found": End("Error", "Pod failed before main container starts due to ErrImagePull: not found"),
}


@dataclass(frozen=True)
class Attempt:
    """A pod: when it was created, and when Argo kills it (None: never), in seconds after the first pod's creation."""

    created: float
    deadline: float | None


def strategy(retry_policy, patch):
    """The retryStrategy of a task's pods, from `retryPolicy` in the compiled pipeline; None: that of a group of tasks.

    patch: the retryStrategy of the server's COMPILED_PIPELINE_SPEC_PATCH. The more specific value wins, field by field.
    """
    own = {}
    if retry_policy is not None:
        backoff = {key: float(retry_policy[f"backoff{key}"].rstrip("s")) for key in ("Duration", "MaxDuration")}
        own = {"limit": str(retry_policy["maxRetryCount"]), "backoff": {**backoff, "Factor": _factor(retry_policy)}}
    return {**KFP_DEFAULTS, **patch, **own}


def _factor(retry_policy):
    factor = retry_policy["backoffFactor"]
    assert factor == int(factor), "Argo parses the factor as an integer"
    return int(factor)


def may_retry(plan, end):
    """Whether the policy and the expression allow another attempt after one that ended like this."""
    allowed = {"Always": ("Failed", "Error"), "OnError": ("Error",), "OnFailure": ("Failed",)}
    if end.phase not in allowed[plan["retryPolicy"]]:
        return False
    if "expression" not in plan:
        return True
    pattern = EXPRESSION.fullmatch(plan["expression"])[1]
    return end.message != "" and re.search(pattern, end.message) is None


def attempts(plan, end, cancelled_after=None):
    """The pods of one task, if each attempt ends like this, and the run is cancelled after so many attempts."""
    backoff, limit, now, made = plan.get("backoff"), int(plan["limit"]), 0.0, []
    while True:
        deadline = None if backoff is None or not made else backoff["MaxDuration"]
        made.append(Attempt(now, deadline))
        now += end.pending_s + end.running_s
        if end.phase == "Succeeded" or cancelled_after == len(made):  # KFP cancels by a deadline of the workflow
            return made
        if backoff is not None:
            now += backoff["Duration"] * backoff["Factor"] ** (len(made) - 1)
            if now > backoff["MaxDuration"]:
                return made
        if not may_retry(plan, end) or len(made) > limit:
            return made


def pods(plan, group, end, depth):
    """How many pods a task starts that always ends like this, `depth` groups deep: failed groups may be retried too."""
    of_task = len(attempts(plan, end))
    around = End(end.phase)  # a group has its task's phase, and no message
    return of_task * len(attempts(group, around)) ** depth
