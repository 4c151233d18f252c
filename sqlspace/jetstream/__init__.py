"""A `Space` in a NATS server: JetStream, and AsyncJetStream for coroutines."""
