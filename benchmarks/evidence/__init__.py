"""The paper's tables in miniature, on models trained here: `python -m benchmarks.evidence`.

`lab` trains, merges with the real commands and scores; `tables` says what is merged;
`page` and `plots` show the figures in docs/evidence.md; `lines` are tasks with answers.
"""
