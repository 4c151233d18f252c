"""The spaces for coroutines: the same verbs, awaited; bounded by `asyncio.timeout`.

>>> import asyncio, sqlspace.aio, tempfile
>>> async def main(path):
...     async with sqlspace.aio.open(path) as store:
...         await store.push("mail", b"hello")
...         async with asyncio.timeout(5):
...             return await store.pull("mail")
>>> with tempfile.TemporaryDirectory() as folder:
...     asyncio.run(main(f"{folder}/queue.db"))
b'hello'

The event loop never waits for the disk or a lock, and what many coroutines do shares commits. A
verb that was cancelled did nothing: an entry was returned, or it is in the space. Any number of
loops, in any threads, may use one of these at once.
"""

from .delivery import Delivery
from .durable import DurableSpace
from .local import Local
from .store import Store, open

__all__ = ["Delivery", "DurableSpace", "Local", "Store", "open"]
