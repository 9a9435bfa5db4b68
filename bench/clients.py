"""What wrk cannot do: send events at a steady rate, and read meanwhile.

    python bench/clients.py send ADDRESS FILE SIZE SKIP RATE SECONDS
    python bench/clients.py read ADDRESS SECONDS

Each prints a line of JSON as post.lua does. An event's time counts from the moment at which it is
due, so an answer that comes late is not hidden by those that had to wait for it.
"""

import http.client
import json
import socket
import sys
import threading
import time

SENDERS = 16
TOKEN = "benchmark_token_of_the_readers"
PATHS = (  # one reader for each, which asks again as soon as it has the answer
    "/api/people/{person}",
    "/api/people?limit=100",
    "/api/events?limit=100",
    "/api/events?after={last}&wait=1",
    "/metrics",
    "/people",
)


class Count:
    """What the threads of this process got: milliseconds of each answer, and failures."""

    def __init__(self):
        self.times: list[float] = []
        self.refused = self.broken = 0

    def add(self, began: float, status: int) -> None:
        """Count an answer."""
        self.times.append((time.perf_counter() - began) * 1000)
        self.refused += status != 200

    def report(self, seconds: float) -> str:
        """Return what post.lua prints."""
        times = sorted(self.times) or [0.0]
        content = {"answers": len(self.times), "refused": self.refused, "broken": self.broken}
        content |= {"seconds": seconds, "p50": times[len(times) // 2]}
        return json.dumps({**content, "p99": times[int(len(times) * 0.99)]})


def run(target, arguments: list[tuple], seconds: float) -> None:
    """Run a function in a thread for each of the arguments; print what they counted."""
    count, began = Count(), time.perf_counter()
    end = began + seconds
    threads = [threading.Thread(target=target, args=(count, end, *one)) for one in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(count.report(time.perf_counter() - began))


def send(count: Count, _: float, address: tuple, events: list[bytes], first: float, step: float):
    """Send each event when it is due, over a connection of its own."""
    for number, event in enumerate(events):
        due = first + number * step
        time.sleep(max(0, due - time.perf_counter()))
        try:
            with socket.create_connection(address, timeout=20) as connection:
                connection.sendall(event)
                answer = b"".join(iter(lambda one=connection: one.recv(65536), b""))
            count.add(due, int(answer.split(None, 2)[1]))
        except (OSError, IndexError):
            count.broken += 1


def read(count: Count, end: float, address: tuple, path: str):
    """Ask for a path again and again; 503 says that too many are reading."""
    while (began := time.perf_counter()) < end:
        try:
            count.add(began, ask(address, path)[0])
        except OSError:
            count.broken += 1


def ask(address: tuple, path: str) -> tuple[int, bytes]:
    """Return status and body of an answer."""
    connection = http.client.HTTPConnection(*address, timeout=20)
    connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def main() -> None:
    """Do what the arguments say."""
    what, address, *rest = sys.argv[1:]
    address = (address.partition(":")[0], int(address.partition(":")[2]))
    if what == "read":
        (newest,) = json.loads(ask(address, "/api/people?limit=1")[1])["people"]
        names = {"person": newest["reference_id"], "last": 10**12}
        paths = [path.format(**names) for path in PATHS]
        return run(read, [(address, path) for path in paths], float(rest[0]))
    file, size, skip, rate, seconds = rest[0], *map(int, rest[1:])
    with open(file, "rb") as requests:
        requests.seek(size * skip)
        events = [requests.read(size) for _ in range(rate * seconds)]
    first = time.perf_counter() + 0.05  # when all threads run
    shares = [
        (address, events[n::SENDERS], first + n / rate, SENDERS / rate) for n in range(SENDERS)
    ]
    run(send, shares, seconds)


if __name__ == "__main__":
    main()
