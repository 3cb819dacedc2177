"""A real S3 server of a test's own, without a cluster, and a network in front of it that a test can break."""

import contextlib
import os
import selectors
import socket
import subprocess
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from built import require_program
from testbed.instance import free_ports
from testbed.processes import run
from waiting import PATIENCE_S, until

ACCESS_KEY = "test-access"
SECRET_KEY = "test-secret"


@dataclass(frozen=True)
class Certificate:
    """A certificate of a private authority: no machine trusts it unless told to."""

    file: Path
    key: Path


def certificate(folder: Path, host: str) -> Certificate:
    """A new one for an IP address; it is its own authority."""
    made = Certificate(folder / "ca.crt", folder / "tls.key")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(made.key))
    name = ("-subj", "/CN=private-store", "-addext", f"subjectAltName=IP:{host}", "-days", "30")
    run(["openssl", "req", "-x509", *key, *name, "-out", str(made.file)], timeout_s=PATIENCE_S)
    return made


@contextlib.contextmanager
def versitygw(folder: Path, host: str = "127.0.0.1", tls: Certificate | None = None) -> Generator[str]:
    """Its endpoint; `bucket` exists."""
    program = require_program("versitygw")
    (folder / "data" / "bucket").mkdir(parents=True)
    port = free_ports(host, ["s3"])["s3"]
    command = [program, "--access", ACCESS_KEY, "--secret", SECRET_KEY, "--port", f"{host}:{port}", "--quiet"]
    if tls:
        command += ["--cert", str(tls.file), "--key", str(tls.key)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "posix", str(folder / "data")], stdout=log, stderr=log)
        try:
            until(lambda: _listens(host, port, process), "versitygw listens")
            yield f"{'https' if tls else 'http'}://{host}:{port}"
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(PATIENCE_S)


def environment() -> dict[str, str]:
    """The environment for a process that uses the server."""
    return os.environ | {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


class Network:
    """A TCP proxy in front of an HTTP or HTTPS server. `cut(connection, bytes_answered)` decides when one dies."""

    def __init__(self, endpoint: str, cut: Callable[[int, int], bool]) -> None:
        scheme, _, address = endpoint.partition("://")
        host, _, port = address.partition(":")
        self._target = (host, int(port))
        self._cut = cut
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _address = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._relay, args=(client, self.connections), daemon=True).start()

    def _relay(self, client: socket.socket, number: int) -> None:
        answered = 0
        with (
            client,
            socket.create_connection(self._target, PATIENCE_S) as server,
            selectors.DefaultSelector() as selector,
        ):
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            with contextlib.suppress(ConnectionError):
                while True:
                    for key, _events in selector.select(PATIENCE_S):
                        source, target = key.fileobj, key.data
                        assert isinstance(source, socket.socket)
                        data = source.recv(65536)
                        if not data:
                            return
                        if source is server:
                            answered += len(data)
                            if self._cut(number, answered):
                                self.cuts += 1
                                return
                        target.sendall(data)


def _listens(host: str, port: int, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "versitygw has ended"
    with contextlib.suppress(OSError), socket.create_connection((host, port), PATIENCE_S):
        return True
    return False
