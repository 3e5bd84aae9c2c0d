"""New data: prompts that have come are curated, validated, versioned, and announced once as a dataset.

docs/airflow.md explains it.
"""

import os
from datetime import timedelta

from airflow.sdk import Asset, AssetOrTimeSchedule, CronTriggerTimetable, Metadata, Param, chain, dag, task
from airflow.sdk.exceptions import AirflowSkipException

from components.orchestration.airflow_operator import StepOperator, clear_failures, work_root
from components.pipeline.profiles import profile_names

PROMPTS = Asset("univigu://prompts")  # whoever puts prompts below the work root says so by an event of this asset
DATASET = Asset("univigu://dataset")


@dag(
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
            description="Which parameters and sizes: a file of components/profiles.",
        ),
    },
    default_args={"retries": 3, "retry_delay": timedelta(seconds=30)},
    doc_md=__doc__,
    tags=["uni-vigu"],
)
def new_data():
    @task.sensor(poke_interval=30, timeout=timedelta(days=7).total_seconds(), mode="reschedule")
    def wait_for_retraining(**context):
        """A retraining under way, or about to begin, reads what these steps would replace."""
        return context["ti"].get_dr_count(dag_id="retrain", states=["queued", "running"]) == 0

    profile = "{{ params.profile }}"
    curate, validate = (
        StepOperator(task_id=step, step=step, profile=profile) for step in ("curate-prompts", "validate-prompts")
    )

    @task
    def version_dataset(**context):
        """Put the dataset under DVC, where the work root is a DVC project."""
        from components.orchestration import retraining

        with clear_failures(context):
            print(retraining.version_dataset(work_root(), context["params"]["profile"]))

    @task(inlets=[DATASET], outlets=[DATASET])
    def announce(**context):
        """Emit the dataset with its digest and profile, unless that was done before: then there is nothing new."""
        from components.orchestration import retraining

        with clear_failures(context):
            dataset = retraining.dataset(work_root(), context["params"]["profile"])
        event = {**dataset, "profile": context["params"]["profile"]}
        known = context["inlet_events"][DATASET]
        if len(known) and event.items() <= known[-1].extra.items():
            print(f"nothing new: the dataset {dataset['digest'][:12]} was announced before")
            raise AirflowSkipException
        yield Metadata(DATASET, event)

    chain(wait_for_retraining(), curate, validate, version_dataset(), announce())


new_data()
