"""Start a server as the Procfile does, keep its workers on their cores, send it events."""

import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from events import SECRET, signed_requests

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
CLIENTS = [sys.executable, str(BENCH / "clients.py")]
CORES = sorted(os.sched_getaffinity(0))


class Server:
    """A gunicorn with the Procfile's flags, in a process group of its own."""

    def __init__(
        self,
        module: str,
        database: Path,
        workers: int = 1,
        pinned: bool = True,
        preload: Path | None = None,
        token: str = "",
    ):
        self.count, self.pinned = workers, pinned
        self.log = database.with_name("gunicorn.log")
        self.environ = environment(database, workers)
        self.environ |= {"LD_PRELOAD": str(preload)} if preload else {}
        self.environ |= {"KYC_API_TOKEN": token} if token else {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = "127.0.0.1:{1}".format(*probe.getsockname())
        flags = [flag.replace("app:app", f"{module}:app") for flag in procfile_flags()]
        flags += ["--bind", self.address, "--pythonpath", f"{ROOT},{BENCH}"]
        self.command = [sys.executable, "-m", "gunicorn", *flags]

    def __enter__(self):
        """Start; return when all workers run and one has answered."""
        began = time.perf_counter()
        with self.log.open("wb") as log:
            files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            place = {"env": self.environ, "cwd": self.log.parent, "start_new_session": True}
            self.process = subprocess.Popen(self.command, **place, **files)
        try:
            while not self.answers():
                if self.process.poll() is not None or time.perf_counter() > began + 30:
                    fail(f"gunicorn did not start:\n{self.log.read_text()[-2000:]}")
                time.sleep(0.005)
            self.start_seconds = time.perf_counter() - began
            self.workers = self.find_workers()
            self.settle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object):
        """End the processes of this server, gently, then with force."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)

    def answers(self) -> bool:
        """Tell whether the server answers a request."""
        with contextlib.closing(http.client.HTTPConnection(self.address, timeout=5)) as connection:
            try:
                connection.request("GET", "/")
                return connection.getresponse().status in (200, 404)
            except OSError:
                return False

    def find_workers(self) -> list[int]:
        """Return the process IDs of the workers, when all have been started."""
        pid, deadline = self.process.pid, time.monotonic() + 10
        children: list[str] = []
        while len(children) != self.count:
            if time.monotonic() > deadline:
                fail(f"gunicorn has {len(children)} workers, not {self.count}")
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in children]

    def load(
        self, requests: Path, skip: int, connections: int, seconds: int, rate: int = 0
    ) -> dict:
        """Send the requests of a file for some seconds; return what was counted.

        `rate` of them a second by clients.py; for 0 as many as it takes, by wrk.
        """
        self.pin_workers()
        file = [str(requests), str(len(next(signed_requests(1)))), str(skip)]
        options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s"]
        script = ["-s", str(BENCH / "post.lua"), f"http://{self.address}", "--"]
        steady = [*CLIENTS, "send", self.address, *file, str(rate), str(seconds)]
        done = subprocess.run(
            steady if rate else ["wrk", *options, *script, *file],
            capture_output=True,
            text=True,
            timeout=seconds + 60,
            preexec_fn=self.pin_client,
        )
        if done.returncode == 3:
            fail("the server took all events that were prepared: give a larger --supply")
        if done.returncode:
            fail(f"the client failed: {done.stderr.strip()}")
        self.check_pins()
        self.settle()
        return json.loads(done.stdout.splitlines()[-1])

    @contextlib.contextmanager
    def readers(self, seconds: float) -> Iterator[dict]:
        """Read for so long beside the block; at its end yield's dictionary has what was counted."""
        command = [*CLIENTS, "read", self.address, str(seconds)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, preexec_fn=self.pin_client
        ) as process:
            counted: dict = {}
            yield counted
            counted |= json.loads(process.stdout.read())

    def pins(self) -> Iterator[tuple[int, int]]:
        """Yield each thread of the pinned workers, with the core that its worker has."""
        for worker, core in zip(self.workers, itertools.cycle(CORES), strict=False):
            for thread in os.listdir(f"/proc/{worker}/task") if self.pinned else ():
                yield int(thread), core

    def pin_workers(self) -> None:
        """Keep each worker on one core; threads that it starts later inherit that."""
        for thread, core in self.pins():
            with contextlib.suppress(ProcessLookupError):  # the thread has ended
                os.sched_setaffinity(thread, {core})

    def check_pins(self) -> None:
        """End the benchmark if a thread has left the core it was kept on."""
        for thread, core in self.pins():
            with contextlib.suppress(ProcessLookupError):
                if os.sched_getaffinity(thread) != {core}:
                    fail(f"a worker has moved itself away from core {core}")

    def pin_client(self) -> None:
        """Keep a client, from within its process, off the cores of the workers if it can be."""
        if self.pinned:
            os.sched_setaffinity(0, CORES[self.count :] or CORES)

    def settle(self) -> None:
        """Wait until the workers rest, at most 10 seconds."""
        deadline = time.monotonic() + 10
        before, now = -1.0, self.cpu_seconds()
        while now - before > 0.005 and time.monotonic() < deadline:
            time.sleep(0.2)
            before, now = now, self.cpu_seconds()

    def cpu_seconds(self) -> float:
        """Return the CPU time that the workers have used, user and system."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.workers)  # kernel's clock ID

    def memory(self) -> float:
        """Return the resident memory of the larger worker, in MB."""
        status = "".join(Path(f"/proc/{pid}/status").read_text() for pid in self.workers)
        return max(map(int, re.findall(r"VmRSS:\s*(\d+) kB", status))) * 1024 / 1e6


def environment(database: Path, workers: int = 1) -> dict[str, str]:
    """Return the environment of a server."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return kept | {
        "KYC_DATABASE": str(database),
        "PERSONA_WEBHOOK_SECRET": SECRET,
        "PERSONA_SIGNATURE_TOLERANCE": "0",  # the events are signed long before they are sent
        "WEB_CONCURRENCY": str(workers),
    }


def procfile_flags() -> list[str]:
    """Return the arguments that the Procfile gives gunicorn."""
    return re.search(r"^web: gunicorn (.*)", (ROOT / "Procfile").read_text(), re.M)[1].split()


def fail(message: str) -> None:
    """End the benchmark with a message."""
    sys.exit(f"bench: {message}")
