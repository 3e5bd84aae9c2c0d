"""The engine: the table of steps, and what runs them. It knows nothing of what steps do."""
