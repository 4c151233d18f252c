"""A look into a stream from outside, for tests that aren't coroutines."""

import json

from sqlspace.jetstream import Endpoint
from sqlspace.jetstream.endpoint import Loop
from sqlspace.jetstream.link import Link, RefusedError


class Stream:
    """A stream as another client sees it.

    Args:
        url: Of the server.
        name: Of the stream.
        config: What its configuration has, if the test makes it; else it is made by others.
    """

    def __init__(self, url, name, **config):
        endpoint = Endpoint(url, stream=name)
        self.subjects = endpoint.subjects
        self._loop = Loop()
        self._link = Link(url, 20.0, {})
        self._run(self._link.open())
        if config:
            self._run(self._link.ensure_stream({**endpoint.settings.streams[0], **config}))

    def _run(self, coroutine):
        return self._loop.submit(coroutine).result(60)

    def messages(self, key):
        """All of a key, in the order of the stream."""
        return self._run(self._messages(self.subjects.entry(key)))

    async def _messages(self, subject):
        found, seq = [], 0
        while message := await self._link.next_message(
            self.subjects.entries, subject, seq, direct=True, doing="look"
        ):
            found.append(message)
            seq = message.seq + 1
        return found

    def payloads(self, key):
        return [message.payload for message in self.messages(key)]

    def positions(self):
        return self._run(self._messages(self.subjects.all_positions))

    def take(self, key):
        """Take all messages of a key, as consumers do; what comes meanwhile stays."""
        messages = self.messages(key)
        if messages:
            request = {"filter": self.subjects.entry(key), "seq": messages[-1].seq + 1}
            self._run(
                self._link.api(
                    f"STREAM.PURGE.{self.subjects.entries}", request, "take", writes=True
                )
            )
        return messages

    def publish(self, key, payload, **options):
        return self._run(self._link.publish(self.subjects.entry(key), payload, **options))

    def forgets(self, key, message_id):
        """Whether the server takes a message with this id for a new one; it is not kept then."""
        before = self.count()
        seq = self.publish(key, b"", message_id=message_id)
        if self.count() == before:
            return False
        self._run(self._link.delete(self.subjects.entries, seq, doing="undo"))
        return True

    def count(self):
        return self.info()["state"]["messages"]

    def info(self):
        request = self._link.api(f"STREAM.INFO.{self.subjects.entries}", None, "look", writes=False)
        return self._run(request)

    def exists(self):
        try:
            return bool(self.info())
        except RefusedError:
            return False

    def update(self, **config):
        return json.dumps(
            self._run(
                self._link.api(
                    f"STREAM.UPDATE.{self.subjects.entries}",
                    {**self.info()["config"], **config},
                    "update",
                    writes=True,
                )
            )
        )

    def delete(self):
        self._run(
            self._link.api(f"STREAM.DELETE.{self.subjects.entries}", None, "end", writes=True)
        )

    def close(self):
        self._run(self._link.close(0))
        self._loop.close()
