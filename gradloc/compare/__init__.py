"""Comparisons: a grid of method × localisation × learning rate × seed, every run recorded.

`config` says what is compared, `grid` which runs that makes, `schedule` works through them, and
`results` keeps what came out. What a run does is in `run_cell`; `gradloc.report` reads results.
Nothing is imported here.
"""
