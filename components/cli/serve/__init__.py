"""`univigu serve`: the model behind OpenAI's formats, videos under ``/v1/videos``, captions as chat completions.

It is a folder of the command line's room, because it does what `univigu generate` and `univigu caption` do. A request
passes through these modules: `guard` refuses strangers and large bodies, `app` routes it, `chat` and `videos` read it,
`line` holds it until the `worker` runs it with others of its kind, and `jobs` keeps videos on the disk. `models` has
the model in use, and looks for a new champion.
"""
