"""Model kinship (arXiv 2410.12613).

``measures`` computes how similar models are as fine-tunes of one base; ``planner`` decides which
of them to merge next.
"""
