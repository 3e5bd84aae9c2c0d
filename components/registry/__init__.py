"""The step register-model; promotion, rollback, lineage, and versions of the dataset."""
