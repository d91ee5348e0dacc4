"""The paper in pure tensors: no files, no models, no mergekit.

``scores``       task vectors and saliency            equations 1, 5 and 6
``selection``    the exact top share of a tensor      "the top n_k of the indices"
``iterative``    iterative, mutually exclusive masks  equation 7, algorithm 1
``merging``      writing the merged tensor            equations 2 and 8
``ties``         TIES trimmed by saliency (the paper's TIES+OBM, section 3.3), and the group's later
                 sign election by saliency
``objective``    equation 6 at the merged weights, for all experts together
``least_error``  mutually exclusive masks that minimise it
``regmean``      the mean that minimises it: RegMean with diagonal Gram matrices
``gram``, ``nystrom``, ``regmean_gram``  the same with more of the Gram matrices: sketches, or all
``output_error`` what a layer's output loses, correlated inputs included
``tally``        what an assignment keeps of each expert, counted
``lengths``      how much shorter than task vectors their mean is
``kinship``      how alike task vectors are
``baselines``    other authors' methods
``blocks``       walking over tensors in cache-sized parts
``backend``      what numpy and torch call differently
"""
