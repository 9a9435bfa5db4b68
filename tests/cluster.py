"""A PostgreSQL of the tests' own: a cluster in a temporary folder, reached by a Unix socket."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from pathlib import Path

try:
    import psycopg
except ImportError:
    psycopg = None

SETTINGS = "listen_addresses= max_connections=60 autovacuum_naptime=5s"
USER = "postgres"  # Debian's; PostgreSQL refuses to run as root


def find_binaries():
    """Return the folder of the newest PostgreSQL, or None."""
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name)
    )
    found = shutil.which("pg_ctl")
    return folders[-1] if folders else Path(found).parent if found else None


class Cluster:
    """A server, with a schema for each path that a test gives.

    Without fsync it survives kills, but no power cut, and the tests take half the time.
    """

    def __init__(self, fsync="off"):
        self.binaries = find_binaries()
        self.folder = Path(tempfile.mkdtemp(prefix="kyc-postgres-"))
        self.schemas = {}
        if os.geteuid() == 0:
            shutil.chown(self.folder, USER)
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", f"--username={USER}"]
        self.run("initdb", "--pgdata", self.data, *options)
        settings = [*SETTINGS.split(), f"fsync={fsync}", f"unix_socket_directories={self.folder}"]
        with open(self.data / "postgresql.conf", "a") as file:
            file.writelines(
                f"{name} = '{value}'\n"
                for name, value in (setting.split("=") for setting in settings)
            )
        self.start()

    @property
    def data(self):
        return self.folder / "data"

    def run(self, program, *arguments):
        """Run one of PostgreSQL's programs; as the user `postgres` if the tests run as root."""
        command = [self.binaries / program, *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", USER, "--", *command]
        output = subprocess.DEVNULL if program == "pg_ctl" else subprocess.PIPE
        subprocess.run(
            command, check=True, timeout=60, cwd="/", stdout=output, stderr=subprocess.STDOUT
        )

    def start(self):
        self.run("pg_ctl", "-D", self.data, "-w", "-s", "-l", self.folder / "log", "start")

    def stop(self, mode="immediate"):
        self.run("pg_ctl", "-D", self.data, "-w", "-s", "-m", mode, "stop")

    def processes(self):
        """Return the server's processes, the first of them the postmaster."""
        first = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return [first, *map(int, children)]

    @contextlib.contextmanager
    def paused(self):
        """Let the server hang for the block."""
        processes = self.processes()
        try:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):  # autovacuum's workers come and go
                    os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def url(self, schema="public"):
        return f"postgresql://{USER}@/postgres?host={self.folder}&options=-csearch_path%3D{schema}"

    def execute(self, *statements, schema="public"):
        """Run statements; return the rows of the last one."""
        with psycopg.connect(self.url(schema), autocommit=True) as db:
            for statement in statements:
                cursor = db.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def database(self, path):
        """Return the URL of what stands for the file at a path: a schema of its own."""
        if path not in self.schemas:
            self.schemas[path] = f"kyc_{len(self.schemas)}"
            self.execute(f"CREATE SCHEMA {self.schemas[path]}")
        return self.url(self.schemas[path])

    def close(self):
        self.stop()
        shutil.rmtree(self.folder)


class Relay:
    """A TCP port before the server's socket; what passes through can be cut off or held up."""

    def __init__(self, cluster):
        self.path = str(cluster.folder / ".s.PGSQL.5432")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.ends, self.passing = [], threading.Event()
        self.passing.set()
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                client, server = self.listener.accept()[0], socket.socket(socket.AF_UNIX)
                with contextlib.suppress(OSError):  # down for a moment
                    server.connect(self.path)
                self.ends += [client, server]
                for ends in ((client, server), (server, client)):
                    self.threads.append(threading.Thread(target=self.pass_on, args=ends))
                    self.threads[-1].start()

    def pass_on(self, source, target):
        with source, contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.passing.wait()
                target.sendall(data)
        end_connection(target)

    def cut(self):
        """End all connections, whatever is under way."""
        while self.ends:
            end_connection(self.ends.pop())

    @contextlib.contextmanager
    def held_up(self):
        """Let nothing through for the block; what was sent meanwhile arrives afterwards."""
        self.passing.clear()
        try:
            yield
        finally:
            self.passing.set()

    def close(self):
        end_connection(self.listener)
        self.listener.close()
        self.cut()
        for thread in self.threads:
            thread.join()


def end_connection(end):
    """Wake whoever waits for a socket."""
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def why_not():
    """Return why there can be no PostgreSQL here, or None."""
    if psycopg is None:
        return "psycopg is not installed: see postgres/requirements.txt"
    if find_binaries() is None:
        return "PostgreSQL is not installed"
    if os.geteuid() == 0 and subprocess.run(["id", USER], capture_output=True).returncode:
        return f"PostgreSQL does not run as root, and there is no user {USER}"
    return None
