"""The steps on Kubeflow Pipelines, as a TrainJob, and from Airflow."""
