"""How the ranks of one run find each other and add up their gradients.

Owns the rendezvous at rank 0, the ring of TCP connections and the all-reduce over it. Leaves the training, and what is
added up, to train.py. Every failure is a PeerError whose text names the rank and the address that it is about.

The rendezvous: rank 0 listens at MASTER_ADDR:MASTER_PORT; every other rank connects, says which port it listens on, and gets
the addresses of all once the last rank is there. Then each rank connects to the next one, which closes the ring.
"""

import errno
import json
import select
import socket
import struct
import sys
import time

RETRY_SECONDS = 0.2  # between two tries to reach a rank that isn't up yet
HELLO_SECONDS = 5.0  # a connection that doesn't say who it is by then is dropped
LARGEST_MESSAGE = 1 << 20  # bytes; anything longer isn't one of our messages
LENGTH = struct.Struct("!I")


class PeerError(Exception):
    """Another rank can't be reached, was lost, or refused this one."""


class Ring:
    """A closed ring of ranks: each sends to the next and receives from the previous one."""

    def __init__(self, rank, addresses, to_next, from_previous, peer_timeout):
        """`addresses`: (host, port) of every rank, by rank. `peer_timeout`: seconds that a neighbour may be silent."""
        self.rank = rank
        self.world_size = len(addresses)
        self.addresses = addresses
        self.to_next = to_next
        self.from_previous = from_previous
        self.peer_timeout = peer_timeout
        self.next = (rank + 1) % self.world_size
        self.previous = (rank - 1) % self.world_size

    def all_reduce(self, values):
        """The element-wise sum of every rank's list of floats (all of one length); bit for bit the same on every rank.

        Reduce-scatter: each chunk travels once around the ring and grows by each rank's share, so that every rank ends
        with one finished chunk. All-gather: the finished chunks travel around once more.
        """
        size = self.world_size
        total = list(values)
        bounds = [len(total) * chunk // size for chunk in range(size + 1)]
        for step in range(size - 1):
            sent, received = (self.rank - step) % size, (self.rank - step - 1) % size
            begin, end = bounds[received], bounds[received + 1]
            share = self._swap(total[bounds[sent] : bounds[sent + 1]], end - begin)
            total[begin:end] = [mine + theirs for mine, theirs in zip(total[begin:end], share)]
        for step in range(size - 1):
            sent, received = (self.rank + 1 - step) % size, (self.rank - step) % size
            begin, end = bounds[received], bounds[received + 1]
            total[begin:end] = self._swap(total[bounds[sent] : bounds[sent + 1]], end - begin)
        return total

    def sleep(self, seconds):
        """Sleep, but wake with a PeerError if the next rank is gone: nothing ever comes back from it but the end."""
        if seconds <= 0:
            return
        if self.world_size == 1:
            time.sleep(seconds)
        elif select.select([self.to_next], [], [], seconds)[0]:
            raise self.lost(self.next, "it closed the connection before the training was over")

    def close(self):
        """Close both connections; the neighbours still receive all that was sent."""
        for connection in (self.to_next, self.from_previous):
            if connection is not None:
                connection.close()

    def _swap(self, floats, expected):
        packed = self._exchange(struct.pack(f"<{len(floats)}d", *floats), 8 * expected)
        return struct.unpack(f"<{expected}d", packed)

    def _exchange(self, outgoing, expected):
        """Send and receive at the same time: were all ranks to send first, full buffers could make them wait for ever."""
        unsent, received = memoryview(outgoing), bytearray()
        while len(unsent) or len(received) < expected:
            readers = [self.from_previous] if len(received) < expected else []
            writers = [self.to_next] if len(unsent) else []
            readable, writable, _ = select.select(readers, writers, [], self.peer_timeout)
            if readable:
                received += self._receive(expected - len(received))
            if writable:
                unsent = unsent[self._send(unsent) :]
            if not readable and not writable:
                silent = self.previous if readers else self.next
                raise self.lost(silent, f"it made no progress for {self.peer_timeout:g} s")
        return received

    def _receive(self, limit):
        try:
            piece = self.from_previous.recv(limit)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise self.lost(self.previous, error) from error
        if not piece:
            raise self.lost(self.previous, "it closed the connection before the training was over")
        return piece

    def _send(self, unsent):
        try:
            return self.to_next.send(unsent)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self.lost(self.next, error) from error

    def lost(self, rank, reason):
        """The error to raise when this rank is gone."""
        return PeerError(f"lost rank {rank} at {_text(self.addresses[rank])}: {reason}")


def join(rank, world_size, master, identity, start_timeout, peer_timeout):
    """Meet the other ranks and close the ring, within `start_timeout` seconds.

    `master`: (host, port) of the rendezvous. `identity`: a dict that must be the same on every rank of the run; a rank of
    another run or attempt, which may still be about, is refused by it.
    """
    if world_size == 1:
        return Ring(0, [master], None, None, peer_timeout)
    deadline = time.monotonic() + start_timeout
    if rank == 0:
        listener, addresses = _serve_rendezvous(world_size, master, identity, deadline)
    else:
        listener, addresses = _visit_rendezvous(rank, master, identity, deadline)
    with listener:
        ring = Ring(rank, addresses, None, None, peer_timeout)
        ring.to_next = _connect(addresses[ring.next], f"rank {ring.next}", deadline)
        try:
            _send_message(ring.to_next, {"rank": rank, "identity": identity})
        except OSError as error:
            raise ring.lost(ring.next, error) from error
        ring.from_previous = _accept_previous(listener, ring, identity, deadline)
    for connection in (ring.to_next, ring.from_previous):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # chunks are small and waited for
        connection.setblocking(False)
    return ring


def _serve_rendezvous(world_size, master, identity, deadline):
    """Rank 0's side: (listener for the ring, everyone's address)."""
    with _listen(*master) as door:
        host = door.getsockname()[0]
        listener = _listen(host, 0)
        addresses = {0: (host, listener.getsockname()[1])}
        guests = {}
        while len(addresses) < world_size:
            guest = _accept(door, deadline)
            if guest is None:
                missing = ", ".join(str(rank) for rank in range(world_size) if rank not in addresses)
                raise PeerError(f"rendezvous at {_text(master)}: still missing when time was up: rank {missing}")
            connection, hello = guest
            refusal = _refusal(hello, identity, world_size, addresses)
            if refusal:
                _turn_away(connection, refusal)
            else:
                addresses[hello["rank"]] = (connection.getpeername()[0], hello["port"])
                guests[hello["rank"]] = connection
        ordered = [addresses[rank] for rank in range(world_size)]
        for guest_rank, connection in guests.items():
            with connection:
                try:
                    _send_message(connection, {"addresses": ordered})
                except OSError as error:
                    raise PeerError(f"lost rank {guest_rank} at {_text(ordered[guest_rank])}: {error}") from error
        return listener, ordered


def _visit_rendezvous(rank, master, identity, deadline):
    """Every other rank's side: (listener for the ring, everyone's address)."""
    where = "rank 0 (rendezvous)"
    with _connect(master, where, deadline) as connection:
        # The address by which this rank reaches rank 0 is the one by which the others reach this rank.
        listener = _listen(connection.getsockname()[0], 0)
        try:
            _send_message(connection, {"rank": rank, "port": listener.getsockname()[1], "identity": identity})
            reply = _receive_message(connection, deadline)
        except (OSError, ValueError) as error:
            raise PeerError(f"{where} at {_text(master)} didn't give the ranks' addresses: {error}") from error
    if "addresses" not in reply:
        raise PeerError(f"{where} at {_text(master)} refused this rank: {reply.get('error')}")
    return listener, [tuple(address) for address in reply["addresses"]]


def _refusal(hello, identity, world_size, taken):
    """Why this guest can't take part; None if it can."""
    theirs = hello.get("identity")
    if theirs != identity:
        return f"it belongs to another run: {json.dumps(theirs)}, this run is {json.dumps(identity)}"
    rank, port = hello.get("rank"), hello.get("port")
    if not isinstance(rank, int) or not 0 < rank < world_size:
        return f"rank {rank!r} isn't between 1 and {world_size - 1}"
    if rank in taken:
        return f"rank {rank} is already here, from {_text(taken[rank])}"
    if not isinstance(port, int) or not 0 < port < 65536:
        return f"port {port!r} isn't between 1 and 65535"
    return None


def _accept_previous(listener, ring, identity, deadline):
    while True:
        guest = _accept(listener, deadline)
        if guest is None:
            where = _text(ring.addresses[ring.previous])
            raise PeerError(f"rank {ring.previous} at {where} didn't connect before time was up")
        connection, hello = guest
        if hello == {"rank": ring.previous, "identity": identity}:
            return connection
        _turn_away(connection, f"only rank {ring.previous} of this run connects here")


def _turn_away(connection, reason):
    with connection:
        print(f"refused a connection: {reason}", file=sys.stderr, flush=True)
        try:
            _send_message(connection, {"error": reason})
        except OSError:
            pass  # it left by itself


def _listen(host, port):
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise PeerError(f"can't listen at {_text((host, port))}: {error}") from error


def _accept(listener, deadline):
    """The next connection that introduces itself, as (connection, its hello); None when time is up."""
    while time.monotonic() < deadline:
        listener.settimeout(_seconds_until(deadline))
        try:
            connection, _ = listener.accept()
        except socket.timeout:
            return None
        try:
            return connection, _receive_message(connection, min(deadline, time.monotonic() + HELLO_SECONDS))
        except (OSError, ValueError):
            connection.close()  # a stranger (a port scan, a browser); ours would have said hello
    return None


def _connect(address, name, deadline):
    """Connect, again and again: the other rank may start later, or be slower."""
    while True:
        try:
            connection = socket.create_connection(address, timeout=_seconds_until(deadline))
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()  # TCP can connect a port to itself while nobody listens on it
            error = OSError(errno.ECONNREFUSED, "nobody listens there")
        except OSError as failure:
            error = failure
        if time.monotonic() + RETRY_SECONDS >= deadline:
            raise PeerError(f"can't reach {name} at {_text(address)}: {error}")
        time.sleep(RETRY_SECONDS)


def _send_message(connection, message):
    body = json.dumps(message).encode()
    connection.sendall(LENGTH.pack(len(body)) + body)


def _receive_message(connection, deadline):
    """One JSON object behind its length, and no byte further; ValueError if it is anything else."""
    (length,) = LENGTH.unpack(_receive_exactly(connection, LENGTH.size, deadline))
    if length > LARGEST_MESSAGE:
        raise ValueError("not a message of a rank")
    message = json.loads(_receive_exactly(connection, length, deadline).decode())
    if not isinstance(message, dict):
        raise ValueError("not a message of a rank")
    return message


def _receive_exactly(connection, length, deadline):
    data = b""
    while len(data) < length:
        connection.settimeout(_seconds_until(deadline))
        piece = connection.recv(length - len(data))
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
        data += piece
    return data


def _seconds_until(deadline):
    return max(0.01, deadline - time.monotonic())  # zero would mean "don't wait", which fails in another way


def _text(address):
    return f"{address[0]}:{address[1]}"
