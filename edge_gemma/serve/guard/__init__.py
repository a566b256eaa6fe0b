"""What stands before every route, as configuration: who may come in (tokens.py), how often
(rates.py), with how much (limits.py), and what is written down of it (audit.py, usage.py).
"""

from edge_gemma.serve.guard.door import Guard, is_loopback, too_large
from edge_gemma.serve.guard.limits import Limits
from edge_gemma.serve.guard.tokens import BearerTokens

__all__ = ["BearerTokens", "Guard", "Limits", "is_loopback", "too_large"]
