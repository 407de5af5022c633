"""Two nodes on this machine: two network namespaces joined by a cable, a veth pair, which a test can cut. As root."""

import os
import shutil
import subprocess
import threading
import time
from contextlib import ExitStack

import pytest
from test_processes import command, losses
from test_torchrun import FAULTY, LOST, ONE_NODE, TORCHRUN, assert_trained_like, own_lines, start, wait_for

from quill.distributed import UNREACHABLE

pytestmark = pytest.mark.slow

OPTIONS = {"dataset": "words", "eval_interval": 5}


class TwoNodes:
    """Two namespaces with the addresses 10.77.0.1 and 10.77.0.2, on a network that nothing else can reach."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self):
        self.names = [f"quill{os.getpid()}-{node}" for node in range(2)]

    def make(self):
        first, second = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
        self.set_cable("up")

    def set_cable(self, state):
        for name in self.names:
            ip("-n", name, "link", "set", "cable", state)

    def remove(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def torchrun(self, stack, *argv):
        """Start torchrun on both nodes, with a process on each; the first node hosts the rendezvous. → two Popen"""
        processes = []
        for node, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=two"]
            # This machine's own name is not on these networks: the addresses must be given.
            options += [f"--rdzv_endpoint={self.addresses[0]}:29400", f"--rdzv_conf=is_host={1 - node}"]
            options += [f"--local_addr={address}"]
            inside = ["ip", "netns", "exec", name, *TORCHRUN, *options]
            processes.append(start(stack, *inside, *argv, GLOO_SOCKET_IFNAME="cable"))
        return processes


def ip(*argv):
    subprocess.run(["ip", *argv], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes():
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2) to make network namespaces with")
    nodes = TwoNodes()
    try:
        nodes.make()
        yield nodes
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces can't be made here: {error.stderr.strip()}")
    finally:
        nodes.remove()


def test_two_nodes_and_a_cut_cable(flags, tmp_path, nodes):
    """Two nodes train as two ranks of one, bit for bit.

    If the cable is cut, both processes end with one line. With the cable back, the run ends as the undisturbed one.
    """
    command(*ONE_NODE[1:], "train.py", *flags(**OPTIONS, out_dir=tmp_path / "one"), check=0)
    with ExitStack() as stack:
        assert_ends(nodes.torchrun(stack, "train.py", *flags(**OPTIONS)), tmp_path)
    argv = [FAULTY, tmp_path, "rest:0:12", *flags(**OPTIONS, init_from="auto", out_dir=tmp_path / "cut")]
    with ExitStack() as stack:
        processes = nodes.torchrun(stack, *argv)
        wait_for(tmp_path / "rest:0:12:0")
        nodes.set_cable("down")
        began = time.monotonic()
        for rank, process in enumerate(processes):
            assert first_own_line(process, 90) == f"faulty_run.py: {LOST.format(rank)}"
        assert UNREACHABLE - 1 < time.monotonic() - began < UNREACHABLE + 15
        # The second torchrun still waits for the rendezvous, until its kernel gives up; the test kills it.
        assert processes[0].wait(timeout=20) == 1
    nodes.set_cable("up")
    with ExitStack() as stack:
        assert_ends(nodes.torchrun(stack, *argv), tmp_path, "cut")


def assert_ends(processes, folder, name="run"):
    """The processes end, and their run is, bit for bit, the one of two ranks of one node."""
    outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert losses(folder / name) == losses(folder / "one")
    assert_trained_like(folder / name, folder / "one")


def first_own_line(process, seconds):
    """Read the output of `process` up to the first line that is quill's. It is killed after `seconds` without one."""
    killer = threading.Timer(seconds, process.kill)
    killer.start()
    found = next((line for line in process.stdout if own_lines(line)), "").rstrip()
    killer.cancel()
    return found
