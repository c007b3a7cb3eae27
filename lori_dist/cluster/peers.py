"""Notices between the ranks that a launcher has started: each learns when another one ends before its time.

Every rank holds a connection to rank 0, which closes with its process, however that ends. Collectives notice as well,
but only the next one, which may be many minutes away while a model is loaded, and those of NCCL only after a timeout.
What a rank does when it learns of an end is in failures.py.
"""

import ipaddress
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from lori_dist.training.world import World

CONNECT_S = 10.0
"""Seconds to wait for a machine that does not answer."""
LOST_S = 20
"""Seconds after which a silent machine, such as one without power, is given up."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A rank that ended before its time."""

    rank: int
    notice: str | None
    """The notice that it gave to `Peers.notify`; None if it ended without one."""


def watch(world: World, ended: Callable[[Ended], None]) -> "Peers | None":
    """Begins to watch the other ranks. Every rank calls this.

    ended: called in a thread, once, with the first rank that ends. Returns None if rank 0 and this one cannot be
    connected; then only collectives fail when another rank has ended.
    """
    peers = Peers(world.rank, ended)
    try:
        connected = _connect(peers, world)
    except OSError as error:
        log.error(
            "rank %d cannot be notified when other ranks end, as it has no connection to rank 0: %s", world.rank, error
        )
        connected = False
    dist.broadcast_object_list([None], device=world.device)  # which rank 0 begins when all are there
    return peers if connected else None


def _connect(peers: "Peers", world: World) -> bool:
    names: list[Any] = [None] * world.size
    dist.all_gather_object(names, socket.gethostname())
    host = "127.0.0.1" if len(set(names)) == 1 else os.environ["MASTER_ADDR"]
    offer: list[Any] = [None]
    try:
        if world.rank == 0:
            offer[0] = peers.listen(host)
    finally:
        dist.broadcast_object_list(offer, device=world.device)
    if world.rank == 0:
        peers.await_connections(world.size - 1)
    elif offer[0] is not None:
        peers.connect(host, *offer[0])
    return offer[0] is not None


class Peers:
    """The connections between ranks: rank 0 has one to each other rank and passes notices on."""

    def __init__(self, rank: int, ended: Callable[[Ended], None]) -> None:
        self.rank = rank
        self.first: Ended | None = None
        """The first rank that ended, which may be this one."""
        self._ended = ended
        self._lock = threading.Condition()
        self._connections: dict[int, socket.socket] = {}

    def notify(self, notice: str) -> None:
        """Notifies the others that this rank ends now. notice: a word without spaces, such as its message's digest."""
        self._learn(Ended(rank=self.rank, notice=notice))

    def close(self) -> None:
        """Notifies the others that this rank is done. It ignores from now on how others end."""
        with self._lock:
            self.first = self.first or Ended(rank=self.rank, notice=None)
        self._send("done")

    def listen(self, host: str) -> tuple[str, int, str]:
        """Returns the address, if it matters, the port and the password with which the others connect.

        host: this machine, as the others call it; a loopback address only if all are on it.
        """
        own, family = _own_address(host)
        if own != host and ipaddress.ip_address(own).is_loopback:
            own = ""  # any: machines may have such an address for their own name, which others know by another one
        listener = socket.create_server((own, 0), family=family, backlog=1024)
        password = secrets.token_hex(16)
        _start(self._accept, listener, password)
        return own, listener.getsockname()[1], password

    def connect(self, host: str, own: str, port: int, password: str) -> None:
        """Connects to rank 0. own: the address that rank 0 has found for itself."""
        connection = socket.create_connection((own or host, port), timeout=CONNECT_S)
        connection.sendall(f"{password} {self.rank}\n".encode())
        self._add(0, connection)
        _start(self._follow, 0, connection.makefile("r"))

    def await_connections(self, num_ranks: int) -> None:
        """Waits until so many ranks are connected, at most CONNECT_S seconds."""
        with self._lock:
            self._lock.wait_for(lambda: len(self._connections) == num_ranks, timeout=CONNECT_S)

    def _accept(self, listener: socket.socket, password: str) -> None:
        while True:
            connection, _ = listener.accept()
            _start(self._enter, connection, password)

    def _enter(self, connection: socket.socket, password: str) -> None:
        connection.settimeout(CONNECT_S)
        stream = connection.makefile("r")
        try:
            given, _, rank = stream.readline(100).partition(" ")
        except (OSError, ValueError):
            given = ""
        if secrets.compare_digest(given.encode(), password.encode()):
            self._add(int(rank), connection)
            self._follow(int(rank), stream)
        else:  # whoever it was, it was none of us
            stream.close()
            connection.close()

    def _add(self, rank: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        _keep_alive(connection)
        with self._lock:
            self._connections[rank] = connection
            self._lock.notify_all()

    def _follow(self, rank: int, stream: Iterable[str]) -> None:
        """Reads `ended RANK NOTICE` or `done`. The end of the connection means that the rank has ended."""
        try:
            for line in stream:
                word, *rest = line.split()
                if word == "done":
                    return
                self._learn(Ended(rank=int(rest[0]), notice=rest[1] if len(rest) > 1 else None))
        except OSError:
            pass
        self._learn(Ended(rank=rank, notice=None))

    def _learn(self, ended: Ended) -> None:
        with self._lock:
            if self.first is not None:  # what ends after it ends because of it
                return
            self.first = ended
        if self.rank == 0 or ended.rank == self.rank:
            self._send(f"ended {ended.rank} {ended.notice or ''}")
        if ended.rank != self.rank:
            self._ended(ended)

    def _send(self, line: str) -> None:
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            try:
                connection.sendall(f"{line}\n".encode())
            except OSError:  # it has ended as well
                continue


def _own_address(host: str) -> tuple[str, socket.AddressFamily]:
    """The address of this machine that is visible to machines which look up `host`."""
    places = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    for number, (family, kind, _, _, place) in enumerate(places):
        with socket.socket(family, kind) as probe:
            try:
                probe.connect(place)  # sends nothing, but chooses the address
            except OSError:
                if number == len(places) - 1:
                    raise
                continue
            return probe.getsockname()[0], family
    raise AssertionError("a name has an address, or cannot be resolved")


def _start(function: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()


def _keep_alive(connection: socket.socket) -> None:
    """Makes the loss of a machine noticeable although nothing is sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST_S // 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST_S // 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
