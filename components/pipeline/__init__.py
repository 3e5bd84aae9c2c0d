"""The engine: the table of steps and the code that runs them. It knows nothing about what the steps do."""
