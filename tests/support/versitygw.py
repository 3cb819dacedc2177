"""A real S3 server of a test's own, without a cluster, and a network in front of it that a test can break."""

import contextlib
import os
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from built import require_program
from testbed.processes import run

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
    run(["openssl", "req", "-x509", *key, *name, "-out", str(made.file)], timeout_s=120)
    return made


@contextlib.contextmanager
def versitygw(folder: Path, host: str = "127.0.0.1", tls: Certificate | None = None) -> Generator[str]:
    """Its endpoint; `bucket` exists."""
    program = require_program("versitygw")
    (folder / "data" / "bucket").mkdir(parents=True)
    port = _free_port(host)
    command = [program, "--access", ACCESS_KEY, "--secret", SECRET_KEY, "--port", f"{host}:{port}", "--quiet"]
    if tls:
        command += ["--cert", str(tls.file), "--key", str(tls.key)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "posix", str(folder / "data")], stdout=log, stderr=log)
        try:
            _wait_for(host, port, process, time.monotonic() + 120)
            yield f"{'https' if tls else 'http'}://{host}:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(60)


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
        with client, socket.create_connection(self._target, 10) as server, selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            with contextlib.suppress(ConnectionError):
                while True:
                    for key, _events in selector.select(30):
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


def _wait_for(host: str, port: int, process: subprocess.Popen[bytes], deadline_s: float) -> None:
    while time.monotonic() < deadline_s:
        assert process.poll() is None, "versitygw has ended"
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
            return
        time.sleep(0.05)
    raise TimeoutError("versitygw does not listen")


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
