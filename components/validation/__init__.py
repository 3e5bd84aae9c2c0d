"""The steps validate-prompts, validate-clips and validate-pairs: Great Expectations as a gate."""
