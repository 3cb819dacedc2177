"""An HTTP server on loopback whose answers are written byte by byte by a test, however wrong they are."""

import contextlib
import socket
import threading
from collections.abc import Callable, Generator

# Gets the connection and the request's head; the connection is closed when it returns.
Answer = Callable[[socket.socket, str], None]


@contextlib.contextmanager
def serving(answer: Answer) -> Generator[str]:
    """Serve each connection in a thread of its own, one request on each; yields the endpoint."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    open_sockets: list[socket.socket] = [listener]

    def talk(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:  # the other side may give up at any time
            answer(connection, _request(connection))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _address = listener.accept()
                open_sockets.append(connection)
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for each in open_sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def _request(connection: socket.socket) -> str:
    """Read a request's head, and as much of its body as comes with it."""
    head = b""
    while b"\r\n\r\n" not in head and (part := connection.recv(65536)):
        head += part
    return head.partition(b"\r\n\r\n")[0].decode()
