"""A laboratory's machines without the machines: Linux namespaces with an SSH server each, on a network of their own.

A host has for itself: its network, its processes, its name, /home with an account without privileges, /tmp, /run,
/dev/shm and /srv. It shares with this machine the kernel, the cores, the memory and what is installed. All links lie in
a namespace of the network's own, so this machine's links, routes and addresses are never touched, two laboratories
cannot meet, and addresses that are reserved for documentation reach somebody.

Every process here is killed with the one that started it, and a namespace ends with its first process: nothing outlives
the tests, however they end. Needs root, and a system that lets it make namespaces; `obstacle` says what is missing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ACCOUNT = "equipoise"
UID = 7700
VENV = f"/home/{ACCOUNT}/equipoise/venv"
"""Where the cluster file's setup commands look for an environment, on every host."""
SHARED = "/srv/equipoise"
"""Where every host mounts the one shared folder."""
TOOLS = {"ip": "iproute2", "nsenter": "util-linux", "rsync": "rsync", "setpriv": "util-linux", "ssh": "openssh-client"}
TOOLS |= {"ssh-keygen": "openssh-client", "unshare": "util-linux", "/usr/sbin/sshd": "openssh-server"}
TIED = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child"]
"""Starts a namespace's first process so that it dies with us, even if we are killed."""
OWN = ["--net", "--mount", "--pid", "--mount-proc", "--uts", "--ipc"]
TRY = """
mount -t tmpfs tmpfs /mnt
ip link add br0 type bridge
ip link add left type veth peer name right
hostname left
"""


def obstacle() -> str | None:
    """Why there can be no laboratory on this machine; None where there can."""
    if os.geteuid() != 0:
        return "namespaces with a network of their own take root"
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        return f"not installed: {', '.join(missing)}"
    line = [*TIED, *OWN, "bash", "-euc", TRY]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return f"namespaces are not permitted here: {done.stderr.strip()}" if done.returncode else None


@dataclass
class Host:
    """One machine of the laboratory."""

    name: str
    address: str
    folder: Path
    """What it has for itself, as this machine sees it: `home`, `tmp` and so on."""
    pid: int
    """Of its first process, as this machine counts."""
    switch: int
    """Process that holds the network's links."""
    environment: dict[str, str] = field(default_factory=dict)
    """Added to that of its account's commands."""

    @property
    def home(self) -> Path:
        """The account's home, as this machine sees it."""
        return self.folder / "home" / ACCOUNT

    def line(self, command: str) -> list[str]:
        """What runs a shell command on the host, as its account and in its home."""
        account = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--pdeathsig=KILL", "env", "-i"]
        known = {"HOME": f"/home/{ACCOUNT}", "USER": ACCOUNT, "LANG": "C.UTF-8", "TERM": "dumb", **self.environment}
        words = [f"{key}={value}" for key, value in known.items()]
        return [*_inside(self.pid, "--all"), *account, *words, "bash", "-c", f"cd\n{command}"]

    def run(self, command: str, seconds: float = 240) -> str:
        """Run it and hand back all that it said.

        Raises:
            AssertionError: it failed, with what it said.
        """
        done = subprocess.run(
            self.line(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
        return done.stdout

    def processes(self) -> list[str]:
        """The command lines of all that runs on it."""
        found = []
        for process in self._processes():
            with suppress(OSError):  # it ended while we looked
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        return [line for line in found if line]

    def opened(self) -> list[str]:
        """What its processes hold open, by the host's own paths."""
        found = []
        for process in self._processes():
            with suppress(OSError):
                for file in (process / "fd").iterdir():
                    with suppress(OSError):
                        found.append(os.readlink(file))
        return found

    def _processes(self) -> Iterator[Path]:
        ours = os.readlink(f"/proc/{self.pid}/ns/pid")
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(process / "ns" / "pid") == ours:
                    yield process

    def cut(self) -> None:
        """Pull its cable."""
        self._cable("down")

    def mend(self) -> None:
        """Plug it in again."""
        self._cable("up")

    def _cable(self, state: str) -> None:
        subprocess.run([*_inside(self.switch, "--net"), "ip", "link", "set", self.name, state], check=True)


@contextmanager
def laboratory(folder: Path, addresses: dict[str, str]) -> Iterator[dict[str, Host]]:
    """Hosts by these names at these addresses, all in the last one's /24; the last is its gateway, to nowhere.

    Each has an account `ACCOUNT` that may log in at the others with ~/.ssh/equipoise_cluster, and that can read this
    process's Python.
    """
    key = folder / "key"
    (folder / "shared").mkdir()
    os.chown(folder / "shared", UID, UID)
    for path in (key, folder / "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    with ExitStack() as stack:
        switch = stack.enter_context(_namespace("--net", script="exec sleep infinity"))
        for words in ("link add br0 type bridge", "link set br0 up"):
            _ip(switch, words)
        hosts = {}
        for name, address in addresses.items():
            own = folder / name
            script = _furnish(own, name, folder, key)
            pid = stack.enter_context(
                _namespace(
                    "--net", "--mount", "--pid", "--uts", "--ipc", "--mount-proc", script=script, log=own / "log"
                )
            )
            _ip(switch, f"link add {name} type veth peer name eth0 netns {pid}")
            _ip(switch, f"link set {name} master br0 up")
            gateway = list(addresses.values())[-1]
            for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _ip(pid, words)
            if address != gateway:
                _ip(pid, f"route add default via {gateway}")
            hosts[name] = Host(name, address, own, pid, switch)
        for host in hosts.values():
            wait_until(lambda host=host: _listens(host.pid), 60, f"{host.name} is up")
        yield hosts


def wait_until(there: Callable[[], object], seconds: float, what: str, every: float = 0.2) -> None:
    """Look again and again.

    Raises:
        AssertionError: not there after all those seconds.
    """
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(every)


def furnish_python(host: Host) -> None:
    """Put an environment where the cluster file looks for one, as an earlier `ray up` would have left it.

    It holds none of the packages itself but sees those of this process, so that installing the pinned versions is done
    in seconds and without a network, and what is installed into it comes before what it sees.
    """
    host.run(f"{Path(sys.executable).resolve()} -m venv --without-pip {VENV}")
    venv = host.folder / VENV.lstrip("/")
    (site,) = venv.glob("lib/python*/site-packages")
    ours = Path(sys.prefix, *site.relative_to(venv).parts)
    (site / "seen.pth").write_text(f"{ours}\n")
    for name, module in (("pip", "pip._internal.cli.main"), ("ray", "ray.scripts.scripts")):
        script = venv / "bin" / name
        script.write_text(f"#!{VENV}/bin/python\nfrom {module} import main\nraise SystemExit(main())\n")
        script.chmod(0o755)


def _furnish(own: Path, name: str, folder: Path, key: Path) -> str:
    """Lay out what a host has for itself; the script by which its first process moves in."""
    home = own / "home" / ACCOUNT
    (home / ".ssh").mkdir(parents=True)
    for path in (own / "tmp", own / "srv/equipoise", own / "run/sshd"):
        path.mkdir(parents=True)
    (own / "tmp").chmod(0o1777)
    shutil.copy(key, home / ".ssh/equipoise_cluster")
    shutil.copy(key.with_suffix(".pub"), home / ".ssh/authorized_keys")
    for path in (home, home / ".ssh", *(home / ".ssh").iterdir()):
        os.chown(path, UID, UID)
    shutil.copy(folder / "host_key", own / "run/host_key")
    (own / "run/sshd_config").write_text(
        "HostKey /run/host_key\nPasswordAuthentication no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
    )
    others = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith(f"{ACCOUNT}:")]
    mine = f"{ACCOUNT}:*:{UID}:{UID}::/home/{ACCOUNT}:/bin/bash"
    (own / "passwd").write_text("\n".join([*others, mine, ""]))
    # As Debian has it: whoever looks his own name up is told 127.0.1.1.
    (own / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    hidden = {Path(path) for path in ("/home", "/tmp", "/run", "/srv")}
    needed = [Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
    for path in needed:  # an account without privileges cannot pass, for example, /root
        hidden |= {above for above in path.parents if not above.stat().st_mode & 0o001 and above not in hidden}
    hidden = {path for path in hidden if not hidden & set(path.parents)}
    binds = [(folder / "shared", own / SHARED.lstrip("/"))]
    binds += [(path, own / path.relative_to("/")) for path in needed if hidden & set(path.parents)]
    lines = [f"hostname {name}", f"cd {shlex.quote(str(own))}"]
    for source, target in binds:
        lines += [
            f"mkdir -p {shlex.quote(str(target))}",
            f"mount --bind {shlex.quote(str(source))} {shlex.quote(str(target))}",
        ]
    lines += [f"mount --bind {file} /etc/{file}" for file in ("passwd", "hosts")]
    lines += ["mount -t tmpfs tmpfs /dev/shm"]
    for path in sorted(hidden):  # relative, since one of them may hide where we are
        here = path.relative_to("/")
        (own / here).mkdir(parents=True, exist_ok=True)
        lines += [shlex.join(["mount", "--no-canonicalize", "--rbind", f"./{here}", str(path)])]
    lines += ["until ip link show eth0 up 2>&1 | grep -q UP; do sleep .05; done", "cd /"]
    return "\n".join([*lines, "exec /usr/sbin/sshd -D -e -f /run/sshd_config"])


@contextmanager
def _namespace(*kinds: str, script: str, log: Path | None = None) -> Iterator[int]:
    """Run a script as the first process of new namespaces; its process id."""
    with open(log or os.devnull, "wb") as file:
        outer = subprocess.Popen(
            [*TIED, *kinds, "bash", "-euc", script], stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    try:
        wait_until(lambda: outer.poll() is not None or children.read_text(), 60, "a namespace")
        assert outer.poll() is None, (log or Path(os.devnull)).read_text()
        pid = int(children.read_text().split()[0])
        yield pid
    finally:
        outer.kill()
        outer.wait()


def _listens(pid: int) -> bool:
    """Whether its network has a server at port 22 of every address."""
    table = Path(f"/proc/{pid}/net/tcp").read_text()
    return re.search(r" 0{8}:0016 \S+ 0A ", table) is not None


def _inside(pid: int, *namespaces: str) -> list[str]:
    return ["nsenter", f"--target={pid}", *namespaces, "--"]


def _ip(pid: int, words: str) -> None:
    subprocess.run([*_inside(pid, "--net"), "ip", *words.split()], check=True)
