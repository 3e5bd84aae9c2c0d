"""The study: the same training with one thing changed at a time, and what each change does to the scores.

`arms.yaml` declares the arms, `arms` reads it, `run` trains and evaluates them with the pipeline's own steps, `results`
turns the evaluations into figures with intervals (``reports/study.json``), and `page` draws ``reports/study.html``.
"""
