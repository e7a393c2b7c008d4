"""What processes of this machine listen on, as the kernel tells it."""

import ipaddress
import os
import re
from pathlib import Path

LISTENING = "0A"


def descendants(root: int) -> set[int]:
    """The process and all below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, new = set(), [root]
    while new:
        found.add(new[0])
        new += children.get(new.pop(0), [])
    return found


def listeners(pids: set[int]) -> set[str]:
    """The addresses on which these processes listen for TCP: `127.0.0.1`, `::`, ..."""
    open_at = _listening_sockets()
    found = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                socket = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
            except OSError:
                continue
            if socket and socket[1] in open_at:
                found.add(open_at[socket[1]])
    return found


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _listening_sockets() -> dict[str, str]:
    """{inode: address}."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                raw = bytes.fromhex(fields[1].split(":")[0])
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))  # each in the machine's order
                found[fields[9]] = str(ipaddress.ip_address(words))
    return found
