"""The step `register-model`; promotion, rollback, lineage, and dataset versions."""
