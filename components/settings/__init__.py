"""The settings of a profile: a pydantic model per section, inheritance between profiles, and validation messages.

`sections` and `training` define the models, and `profile` combines them. `layers` reads files and resolves ``extends``,
`faults` explains validation errors, and `reference` writes the page of all keys and the schema for editors. A recipe
hashes the plain mapping that these models accepted; step functions read the models.
"""
