"""The paper in pure tensors: no files, no models, no mergekit.

``scores``       task vectors and saliency            equations 1, 5 and 6
``selection``    the exact top share of a tensor      "the top n_k of the indices"
``exclusive``    iterative, mutually exclusive masks  equation 7, algorithm 1
``merging``      writing the merged tensor            equations 2 and 8
``ties``         TIES' sign election and disjoint mean (the paper's TIES+OBM, section 3.3)
``objective``    equation 6 at the merged weights, for all experts together
``least_error``  exclusive masks that minimise it
``regmean``      the mean that minimises it: RegMean with diagonal Gram matrices
``obm_sign``     the group's later sign election by saliency
``consensus``    Consensus Task Arithmetic (TALL masks), a baseline of the paper's
``pcb``          Parameter Competition Balancing, another
``blocks``       walking over tensors in cache-sized parts
``masked``       what numpy and torch call differently
"""
