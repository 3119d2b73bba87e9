"""How to spend N requests. Samplers never know the price; see ``ttc.policies`` for what to buy."""

from ttc.samplers.aggregate import best, confidences, leader, tally
from ttc.samplers.parallel import Parallel

__all__ = ["Parallel", "best", "confidences", "leader", "tally"]
