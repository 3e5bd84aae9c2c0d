"""DAG `new_data`: curate, validate and version new prompts, and announce them once as a dataset.

See docs/airflow.md.
"""

import os
from datetime import timedelta

from airflow.sdk import Asset, AssetOrTimeSchedule, CronTriggerTimetable, Metadata, Param, chain, dag, task
from airflow.sdk.exceptions import AirflowSkipException

from components.orchestration.airflow_operator import StepOperator, report_failures, work_root
from components.pipeline.profiles import profile_names

PROMPTS = Asset("univigu://prompts")  # to be updated by the process that adds prompts to the work root
DATASET = Asset("univigu://dataset")


@dag(
    description="Curate and validate new prompts, and announce the dataset, which starts a retraining.",
    schedule=AssetOrTimeSchedule(
        timetable=CronTriggerTimetable(os.environ.get("UNIVIGU_NEW_DATA_CRON", "*/15 * * * *"), timezone="UTC"),
        assets=PROMPTS,
    ),
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=True,
    params={
        "profile": Param(
            os.environ.get("UNIVIGU_PROFILE", "tiny"),
            type="string",
            enum=profile_names(),
            description="The profile: a file in components/profiles.",
        ),
    },
    default_args={"retries": 3, "retry_delay": timedelta(seconds=30)},
    doc_md=__doc__,
    tags=["uni-vigu"],
)
def new_data():
    @task.sensor(poke_interval=30, timeout=timedelta(days=7).total_seconds(), mode="reschedule")
    def wait_for_retraining(**context):
        """Wait for active and queued retrainings, which read the files that these steps replace."""
        return context["ti"].get_dr_count(dag_id="retrain", states=["queued", "running"]) == 0

    profile = "{{ params.profile }}"
    curate, validate = (
        StepOperator(task_id=step, step=step, profile=profile) for step in ("curate-prompts", "validate-prompts")
    )

    @task
    def version_dataset(**context):
        """Add the dataset to DVC, if the work root is a DVC project."""
        from components.orchestration import retraining

        with report_failures(context):
            print(retraining.version_dataset(work_root(), context["params"]["profile"]))

    @task(inlets=[DATASET], outlets=[DATASET])
    def announce(**context):
        """Emit an event with the dataset's digest and profile, unless the last event has the same."""
        from components.orchestration import retraining

        with report_failures(context):
            dataset = retraining.dataset(work_root(), context["params"]["profile"])
        event = {**dataset, "profile": context["params"]["profile"]}
        known = context["inlet_events"][DATASET]
        if len(known) and event.items() <= known[-1].extra.items():
            print(f"nothing new: the dataset {dataset['digest'][:12]} was announced before")
            raise AirflowSkipException
        yield Metadata(DATASET, event)

    chain(wait_for_retraining(), curate, validate, version_dataset(), announce())


new_data()
