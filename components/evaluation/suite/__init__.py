"""`univigu evaluate`: any model on any clips, texts or prompts, with 95 % intervals and what was left out.

``data`` reads what to evaluate on, ``benchmarks`` the published layouts of VBench, DREAM-1K and VDC; ``captions``,
``likelihood``, ``generation`` and ``joint`` measure one thing each; ``run`` puts them together. A sample that fails
counts as wrong: it scores nothing, and is listed.
"""
