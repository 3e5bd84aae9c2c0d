"""The step curate-prompts: sources, filters, and the search for duplicates."""
