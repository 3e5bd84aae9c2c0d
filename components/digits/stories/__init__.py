"""A second, harder world of handwritten digits: two of them in a clip, movements in two phases, and relations.

`scenes` draws and renders them, `writer` words them in many ways, `reader` parses a text back into facts, and `scoring`
compares these with a scene's. A scene is a mapping from the name of a fact to its value, as the attributes of the first
world (`components.digits.world`) are, which has the handwriting, the colours and the grid's places.
"""
