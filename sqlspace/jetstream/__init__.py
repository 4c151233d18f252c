"""A `Space` in a NATS server: JetStream, and AsyncJetStream for coroutines.

And an `Endpoint` there for `sqlspace.forward`, and `receive` for the way back.
"""

from .endpoint import Endpoint
from .receiving import receive

__all__ = ["Endpoint", "receive"]
