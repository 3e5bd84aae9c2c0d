"""The step evaluate-model: samples, scores, and the report page."""
