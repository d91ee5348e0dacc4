"""Evidence on a real language model, SmolLM2-135M-Instruct: `python -m benchmarks.real`.

`text` makes the tasks, `tail` trains and scores the last layers, `lab` keeps the experts and
runs the real commands, `rivals` merges as other papers do, `tables` says what is merged in
which regime, `page` shows the figures in docs/evidence-real.md.
"""
