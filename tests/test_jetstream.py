"""The space over JetStream, against a real server."""

import itertools

import pytest

from sqlspace.jetstream import AsyncJetStream, JetStream
from sqlspace.space import AsyncSpace, Space
from sqlspace.testing import check_space

# nats-py leaves those of connections that it has given up.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")

names = (f"space{number}" for number in itertools.count())


@pytest.fixture
def stream():
    return next(names)


def test_it_obeys_the_law_of_the_protocol(nats_server):
    check_space(lambda: JetStream(nats_server.url, stream=next(names)))


def test_both_are_spaces(nats_server, stream):
    with JetStream(nats_server.url, stream=stream) as space:
        assert isinstance(space, Space)
    assert isinstance(AsyncJetStream(nats_server.url), AsyncSpace)
