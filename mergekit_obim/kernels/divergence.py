"""How far one model's next-token distribution is from another's, of which the likeliest are kept.

A distribution over a vocabulary of V tokens takes V numbers per position. Of a teacher only its k
likeliest tokens are kept, and the rest as one. KL(p ‖ q) over that partition is a lower bound of
the KL divergence over the vocabulary (the log-sum inequality: Cover and Thomas, Elements of
Information Theory, theorem 2.7.1), and is equal to it where k is V, or where both models share out
the rest in the same proportions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopTokens:
    """The likeliest k tokens of a teacher at n positions.

    Attributes:
        ids: Their ids, int32 [n, k], the likeliest first.
        logs: The logarithms of their probabilities, float32 or float64 [n, k].
        rest: The logarithm of the probability of all other tokens, [n]; −inf if k is all.
    """

    ids: Tensor
    logs: Tensor
    rest: Tensor

    def to(self, device: torch.device | str) -> TopTokens:
        """Return the same on another device."""
        return TopTokens(*(one.to(device) for one in (self.ids, self.logs, self.rest)))


def top_tokens(logits: Tensor, k: int) -> TopTokens:
    """Return what is kept of a teacher's distributions.

    Args:
        logits: [n, V], of any floating-point dtype.
        k: How many tokens to keep; all, where V is smaller.
    """
    logs = _log_probabilities(logits)
    kept = logs.topk(min(k, logs.shape[-1]))
    return TopTokens(kept.indices.int(), kept.values, _rest(logs, kept.indices))


def divergence(teacher: TopTokens, logits: Tensor) -> Tensor:
    """Return KL(teacher ‖ student) over the partition {the teacher's top k, the rest}, in nats.

    Args:
        teacher: The teacher's distributions at n positions.
        logits: The student's at the same positions, [n, V], on the same device.

    Returns:
        [n], of the dtype of the teacher's; inf where the student excludes what the teacher does
        not, and NaN where its logits are not finite numbers.
    """
    logs = _log_probabilities(logits).to(teacher.logs.dtype)
    ids = teacher.ids.long()
    own = torch.cat((logs.gather(-1, ids), _rest(logs, ids).unsqueeze(-1)), -1)
    theirs = torch.cat((teacher.logs, teacher.rest.unsqueeze(-1)), -1)
    probabilities = theirs.exp()
    # A token that the teacher excludes adds nothing: 0 · log 0 is 0.
    terms = torch.where(probabilities > 0, probabilities * (theirs - own), 0.0)
    return terms.sum(-1)


def _log_probabilities(logits: Tensor) -> Tensor:
    # In bfloat16, log-probabilities of likely tokens would be off by several percent.
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.log_softmax(-1, dtype=kind)


def _rest(logs: Tensor, ids: Tensor) -> Tensor:
    # Summed up by itself: 1 minus the others' sum would be rounding alone where they have it all.
    return logs.scatter(-1, ids, float("-inf")).logsumexp(-1)
