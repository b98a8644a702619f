"""The hosts that the cluster's test runs on: each by itself, unseen from here, gone with whoever made them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hosts import SHARED, UID, laboratory, obstacle, wait_until

pytestmark = pytest.mark.cluster
ADDRESSES = {"one": "192.0.2.1", "two": "192.0.2.2"}
TELL = "from hosts import obstacle; print(obstacle())"
OWNER = """
import sys
from pathlib import Path
from hosts import laboratory
with laboratory(Path(sys.argv[1]), {"one": "192.0.2.1"}) as hosts:
    print(hosts["one"].pid, hosts["one"].switch, flush=True)
    sys.stdin.read()
"""


def python(script: str, *words: str) -> list[str]:
    """What runs a script that may import `hosts`."""
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{script}", *words]


@pytest.fixture
def permitted() -> None:
    if why := obstacle():
        pytest.skip(why)


@pytest.mark.usefixtures("permitted")
def test_hosts_reach_each_other_by_ssh_and_share_one_folder_until_a_cable_is_pulled(tmp_path: Path) -> None:
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    with laboratory(tmp_path, ADDRESSES) as hosts:
        options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o ConnectTimeout=2 -i ~/.ssh/equipoise_cluster"
        ssh = f"ssh {options} {ADDRESSES['two']}"
        said = hosts["one"].run(f"{ssh} 'echo I am $(id -u) on $(hostname); touch ~/mine /tmp/mine {SHARED}/ours'")
        assert f"I am {UID} on two" in said
        seen = hosts["one"].run(f"ls ~ /tmp; ls {SHARED}").split()  # in /tmp this very checkout, should it lie there
        assert "mine" not in seen
        assert seen[-1] == "ours"
        hosts["two"].cut()
        assert "cut off" in hosts["one"].run(f"{ssh} true || echo cut off")
        hosts["two"].mend()
        hosts["one"].run(f"{ssh} true")
        assert subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout == links


@pytest.mark.usefixtures("permitted")
def test_hosts_are_gone_when_their_owner_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(python(OWNER, str(tmp_path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        processes = owner.stdout.readline().split()
        assert len(processes) == 2
        owner.kill()
    wait_until(lambda: not any(Path("/proc", process).exists() for process in processes), 60, "all have ended")


def test_who_may_not_make_namespaces_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if obstacle() is not None:
        pytest.skip("needs the right itself, to do without it")
    without = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *python(TELL)]
    assert "not permitted" in subprocess.run(without, capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr("os.geteuid", lambda: UID)
    assert "root" in (obstacle() or "")
