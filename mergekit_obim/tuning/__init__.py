"""Choosing how to merge by what the experts themselves say: ``obim-tune`` and ``obim-eval``.

``held_back``   the rows that are set aside for each expert, and who their teacher is
``scoring``     teachers' distributions, kept once; how far a model is from them
``candidates``  the settings that are tried, and the recipe that each one makes
``merged``      a candidate's weights in a loaded model, without a checkpoint on disk
``search``      which candidate is tried next; the trials that a killed run goes on from
``evaluation``  merged models that are on disk: loss, divergence, recovery
``benchmarks``  the tasks of lm-evaluation-harness
``card``        results in a model card's metadata
"""
