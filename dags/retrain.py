"""DAG `retrain`: train on a schedule, on a new dataset, or manually; promote after a comparison and an approval.

See docs/airflow.md.
"""

import os
from datetime import timedelta
from pathlib import Path

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import (
    Asset,
    AssetOrTimeSchedule,
    CronTriggerTimetable,
    Param,
    TaskGroup,
    TriggerRule,
    Variable,
    chain,
    dag,
    task,
    teardown,
)
from airflow.sdk.bases.skipmixin import XCOM_SKIPMIXIN_KEY
from airflow.sdk.exceptions import AirflowSkipException

from components.orchestration import approval
from components.orchestration.airflow_operator import (
    FAILURE,
    KFP_ARGUMENTS,
    KfpRunOperator,
    StepOperator,
    report_failures,
    require_known_fields,
    work_root,
)
from components.pipeline.profiles import profile_names
from components.pipeline.stages import STAGES
from components.registry.ledger import PROMOTED, REFUSED

DATASET = Asset("univigu://dataset")
PACKAGE = Path(__file__).resolve().parents[1] / "infra/pipeline.yaml"
BACKENDS = ["local", "kubeflow"]
RUN_HOURS = sum(stage.resources.hours for stage in STAGES)  # time limit of a run on Kubeflow
RETRIES = {"retries": 5, "retry_delay": timedelta(seconds=30), "retry_exponential_backoff": True}
PROFILE = "{{ ti.xcom_pull('begin', key='profile') }}"  # not params.profile: a dataset's event may name another
MANUAL = {"UNIVIGU_PROMOTION": "manual"}  # register-model does not promote: this DAG does, after the approval


@task.branch
def begin(**context):
    """Choose the backend and the profile; end the run if the event's dataset was already used for training."""
    from components.orchestration import retraining

    params, events = context["params"], context["triggering_asset_events"]
    profile = params["profile"]
    with report_failures(context):
        require_known_fields(context)
        approval.may_approve_own()  # a wrong setting ends the run now, and not after the training
        root = work_root()
        retraining.require_registry(root)
        for event in events[DATASET][-1:] if DATASET in events else ():
            profile = retraining.announced_profile(event.extra, profile)
            digest = str(event.extra.get("digest"))
            version = retraining.find_trained(root, profile, digest)
            if version:
                outcome = f"nothing to do: version {version} was trained from the dataset {digest[:12]}"
                context["ti"].xcom_push(key="outcome", value=outcome)
                print(outcome)
                return None
    print(f"training with the profile '{profile}'")
    context["ti"].xcom_push(key="profile", value=profile)
    return "kubeflow" if params["backend"] == "kubeflow" else f"local.{STAGES[0].name}"


def add_local_steps():
    """Add the steps as processes on this machine, each after its inputs; returns them by name."""
    steps = {}
    with TaskGroup("local"):
        for stage in STAGES:
            steps[stage.name] = StepOperator(
                task_id=stage.name,
                step=stage.name,
                profile=PROFILE,
                skip_finished=not stage.external,  # register-model checks the registry itself
                env=MANUAL,
                execution_timeout=timedelta(hours=stage.resources.hours),
            )
            for source in stage.inputs.values():
                steps[source] >> steps[stage.name]
    return steps


def add_kubeflow_run():
    """Add the whole pipeline as one run on Kubeflow Pipelines."""
    return KfpRunOperator(
        task_id="kubeflow",
        package=os.environ.get("UNIVIGU_PIPELINE", str(PACKAGE)),
        run_name="{{ dag.dag_id }}-{{ run_id }}",
        arguments={"profile": PROFILE, "promotion": "manual"},
        extra_arguments=os.environ.get(KFP_ARGUMENTS, ""),
        service_account=os.environ.get("UNIVIGU_KFP_SERVICE_ACCOUNT", ""),
        namespace=os.environ.get("KFP_NAMESPACE", ""),
        limit_s=3600 * float(os.environ.get("UNIVIGU_KFP_HOURS", RUN_HOURS)),
        retries=6,  # about half an hour, because a run that is being cancelled must end before another starts
        poll_s=float(os.environ.get("UNIVIGU_KFP_POLL_S", "15")),
    )


@task.branch(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)
def gate(**context):
    """Compare the candidate with the champion; end the run if it is not better."""
    from components.orchestration import retraining

    profile = context["ti"].xcom_pull(task_ids="begin", key="profile")
    with report_failures(context):
        asked = approval.is_required(Variable.get(approval.VARIABLE, default="required"))
        found = retraining.compare_candidate(work_root(), profile)
    context["ti"].xcom_push(key="asked", value=asked)
    context["ti"].xcom_push(key="comparison", value=found)
    print(f"version {found['version']}: {found['reason']}")
    if not found["better"]:
        return None
    return "approve" if asked else "promote"


def add_approval():
    """Add the approval by one of the named persons; no answer within the time limit counts as a rejection."""
    return ApprovalOperator(
        task_id="approve",
        subject="Make version {{ ti.xcom_pull('gate', key='comparison')['version'] }} champion?",
        body="{{ ti.xcom_pull('gate', key='comparison')['body'] }}\n\n"
        "Approve: version {{ ti.xcom_pull('gate', key='comparison')['version'] }} becomes champion, and the ledger "
        f"records you; unless {approval.OWN} is yes, someone other than the one who started this run has to approve. "
        "Reject, or no answer in time: the champion stays.",
        defaults="Reject",
        assigned_users=approval.approvers(os.environ.get(approval.APPROVERS, "")) or None,
        response_timeout=timedelta(hours=float(os.environ.get("UNIVIGU_APPROVAL_HOURS", "24"))),
    )


@task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)
def promote(**context):
    """Make the compared version champion; the ledger records who approved it."""
    from components.orchestration import retraining

    ti, run = context["ti"], context["dag_run"]
    found = ti.xcom_pull(task_ids="gate", key="comparison")
    answer = ti.xcom_pull(task_ids="approve")
    if ti.xcom_pull(task_ids="gate", key="asked") is not False and (answer or {}).get("chosen_options") != ["Approve"]:
        raise AirflowSkipException("not approved")
    user = (answer or {}).get("responded_by_user") or {}
    who = user.get("name") or user.get("id") or run.triggering_user_name or "airflow"
    why = f"{'approved' if answer else 'not to be asked about'} in Airflow's run {run.run_id}"
    with report_failures(context):
        refused = answer and approval.refusal(who, run.triggering_user_name)
        if refused:
            ti.xcom_push(key="refused", value=refused)
            raise AirflowSkipException(refused)
        return retraining.promote_version(work_root(), found["name"], found["version"], who, why)


@teardown
def notify(**context):
    """Report how the run ended, also after a failure."""
    from components.orchestration import notifications

    ti, run = context["ti"], context["dag_run"]
    report = {"dag": run.dag_id, "run_id": run.run_id, **outcome_of(ti)}
    print(report)
    print(notifications.send(report))


@dag(
    description="Train, compare with the champion on the same held-out items, and promote after an approval.",
    schedule=AssetOrTimeSchedule(
        timetable=CronTriggerTimetable(os.environ.get("UNIVIGU_RETRAIN_CRON", "0 3 * * 1"), timezone="UTC"),
        assets=DATASET,
    ),
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=True,  # whoever installs this decides when training begins
    params={
        "profile": Param(
            os.environ.get("UNIVIGU_PROFILE", "tiny"),
            type="string",
            enum=profile_names(),
            description="The profile: a file in components/profiles. The event of a new dataset overrides it.",
        ),
        "backend": Param(
            os.environ.get("UNIVIGU_BACKEND", "local"),
            type="string",
            enum=BACKENDS,
            description="Where the steps run: as processes on this machine, or on Kubeflow Pipelines.",
        ),
    },
    default_args=RETRIES,
    doc_md=__doc__,
    tags=["uni-vigu"],
)
def retrain():
    begun, steps, kubeflow = begin(), add_local_steps(), add_kubeflow_run()
    gated, approve, promoted = gate(), add_approval(), promote()
    chain(begun, [steps[STAGES[0].name], kubeflow])
    chain([steps[STAGES[-1].name], kubeflow], gated, approve, promoted)
    gated >> promoted
    promoted >> notify()


def outcome_of(ti):
    """How a run ended, from the XComs of its tasks."""
    names = ["begin", *(f"local.{stage.name}" for stage in STAGES), "kubeflow", "gate", "promote"]
    failures = [message for message in ti.xcom_pull(task_ids=names, key=FAILURE) or () if message]
    compared = ti.xcom_pull(task_ids="gate", key="comparison")
    promoted = ti.xcom_pull(task_ids="promote")
    rejected = ti.xcom_pull(task_ids="approve", key=XCOM_SKIPMIXIN_KEY)  # a rejection has no value, it only skips
    versions = {key: compared[key] for key in ("name", "version", "champion")} if compared else {}
    if promoted:
        # refused: the champion changed during the approval; unchanged: an earlier attempt of the task promoted it
        state = "kept champion" if promoted["outcome"] == REFUSED else PROMOTED
        return {"state": state, "message": promoted["reason"], **versions}
    if failures:
        return {"state": "failed", "message": failures[-1], **versions}
    if rejected:
        return {"state": "rejected", "message": f"not approved: {compared['reason']}", **versions}
    if refused := ti.xcom_pull(task_ids="promote", key="refused"):
        return {"state": "rejected", "message": refused, **versions}
    if compared and not compared["better"]:
        state = "kept champion" if compared["champion"] else "not promoted"
        return {"state": state, "message": compared["reason"], **versions}
    nothing = ti.xcom_pull(task_ids="begin", key="outcome")
    if nothing:
        return {"state": "nothing to do", "message": nothing}
    return {"state": "stopped", "message": "the run was stopped before a decision", **versions}


retrain()
