"""A `Space` in a NATS server: JetStream for threads, AsyncJetStream for coroutines.

>>> from sqlspace.jetstream import JetStream
>>> with JetStream("nats://127.0.0.1:4222", stream="work") as space:  # doctest: +SKIP
...     space.out("mail", "hello")
...     space.in_("mail")
'hello'
"""

from .asynchronous import AsyncJetStream
from .threads import JetStream

__all__ = ["AsyncJetStream", "JetStream"]
