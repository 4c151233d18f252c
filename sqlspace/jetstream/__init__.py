"""A `Space` in a NATS server: JetStream, and AsyncJetStream for coroutines.

And an `Endpoint` there for `sqlspace.forward`.
"""

from .endpoint import Endpoint

__all__ = ["Endpoint"]
