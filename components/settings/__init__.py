"""The settings of a profile: a pydantic model for each section, how profiles extend others, and what is wrong in one.

`sections` and `training` hold the models, `profile` the whole of them; `layers` reads files and resolves ``extends``;
`faults` says in words what does not fit; `reference` writes the page of all keys and the schema for editors. Steps get
the plain mapping that these models accepted, since its values are what a recipe hashes.
"""
