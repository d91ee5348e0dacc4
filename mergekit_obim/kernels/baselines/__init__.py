"""Other authors' methods, which the paper and the evidence compare with; they need no saliency.

``consensus``  Consensus Task Arithmetic: TALL masks and their agreement (arXiv 2405.07813)
``pcb``        Parameter Competition Balancing (arXiv 2410.02396)
"""
