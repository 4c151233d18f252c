"""A `Space` in a NATS server: JetStream for threads, AsyncJetStream for coroutines.

>>> from sqlspace.jetstream import JetStream
>>> with JetStream("nats://127.0.0.1:4222", stream="work") as space:  # doctest: +SKIP
...     space.out("mail", "hello")
...     space.in_("mail")
'hello'

And an `Endpoint` there for `sqlspace.forward`, and `receive` for the way back.
"""

from .asynchronous import AsyncJetStream
from .endpoint import Endpoint
from .receiving import receive
from .threads import JetStream

__all__ = ["AsyncJetStream", "Endpoint", "JetStream", "receive"]
