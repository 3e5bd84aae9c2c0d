"""The studio: one local web application in which one sees and touches models, runs, data and results.

It is a folder of the command line's room, because it does what the commands do, with the same functions. `server` and
`guard` answer requests, `app` puts the pages together, each `*_page` is one page, and the other modules read the work
root for them without knowing Gradio.
"""
