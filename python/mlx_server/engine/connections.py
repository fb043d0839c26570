"""Which API processes are connected: ZeroMQ's monitor tells at once when one is gone, whatever there is to send."""

import zmq
from zmq.utils.monitor import recv_monitor_message


class Connections:
    """Of a ROUTER socket. The monitor knows connections by their file descriptors, which the system uses again;
    messages tell whose they are.

    A connection is accepted before it sends anything. So after some messages are received, `ended` has all that came
    before them, and who sent one over a descriptor that is closed by then is gone.
    """

    def __init__(self, router: zmq.Socket[bytes]) -> None:
        """To be made before the socket is bound."""
        self.monitor = router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._by_fd: dict[int, bytes] = {}  # identities; empty before the first message

    def ended(self) -> list[bytes]:
        """Identities of connections that have ended since the last call."""
        ended: list[bytes] = []
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._by_fd[event["value"]] = b""
            elif identity := self._by_fd.pop(event["value"], b""):
                ended.append(identity)
        return ended

    def is_open(self, identity: bytes, fd: int) -> bool:
        """Whether the sender of a message that was received before the last `ended` was connected then."""
        if fd not in self._by_fd:
            return False
        self._by_fd[fd] = identity
        return True
