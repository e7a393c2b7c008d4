"""Network interfaces and which of them gloo and NCCL take, Slurm, and variables of the environment.

    gloo    GLOO_SOCKET_IFNAME, else the interface whose address the host's name has, else the loopback
    nccl    NCCL_SOCKET_IFNAME, else the first ib*, else the first that is neither docker* nor lo

Runs on one machine use the loopback, whatever is here.
"""

import os
import re
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from moe_dist.doctor.findings import Findings, NoAnswer, said_by, within

_SHOWN = re.compile(
    r"(NCCL|GLOO|OMP|MKL|KMP|CUDA|NVIDIA|TORCH|TORCHELASTIC|PYTORCH|TRITON|SLURM|MOE_DIST|DS|HF|WANDB|UCX|FI)_.*"
    r"|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|LD_PRELOAD|LD_LIBRARY_PATH|PYTHONPATH"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|JWT|COOKIE", re.IGNORECASE)
_LOGIN_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]*@")
_LONGEST = 160
_SECONDS = 5.0
_SIOCGIFADDR = 0x8915  # of ioctl: the IPv4 address of an interface


def look_at_network(found: Findings, environ: Mapping[str, str] = os.environ) -> None:
    addresses = {name: address_of_interface(name) for _, name in socket.if_nameindex()}
    facts = {name: _about(name, address) for name, address in addresses.items()}
    try:
        host = within(_SECONDS, lambda: socket.gethostbyname(socket.gethostname()))
    except (NoAnswer, OSError):
        host = None
    facts["gloo between machines"] = gloo_interface(addresses, host, environ)
    facts["nccl between machines"] = nccl_interface([name for name, address in addresses.items() if address], environ)
    found.facts["network"] = facts
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wrong = unknown_interfaces(environ.get(variable, ""), list(addresses))
        if wrong:
            found.broken.append(
                f"{variable}={environ[variable]}: there is no interface {wrong[0]} here; it has "
                f"{', '.join(addresses)}: unset it, or name one of these"
            )


def address_of_interface(name: str) -> str | None:
    """IPv4, or None where it has none."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, suppress(OSError):
        told = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(told[20:24])
    return None


def gloo_interface(addresses: Mapping[str, str | None], host: str | None, environ: Mapping[str, str]) -> str:
    """host: the address that the host's name has."""
    if environ.get("GLOO_SOCKET_IFNAME"):
        return f"{environ['GLOO_SOCKET_IFNAME']}, by GLOO_SOCKET_IFNAME"
    own = next((name for name, address in addresses.items() if address == host and host is not None), None)
    if own is not None and not (host or "").startswith("127."):
        return f"{own}, whose address the host's name has"
    better = next((name for name, address in addresses.items() if address and not address.startswith("127.")), None)
    advice = f": export GLOO_SOCKET_IFNAME={better} to reach others" if better else ""
    return f"the loopback, as the host's name leads to {'it' if host else 'nothing'}{advice}"


def nccl_interface(names: list[str], environ: Mapping[str, str]) -> str:
    """names: of interfaces that have an address."""
    if environ.get("NCCL_SOCKET_IFNAME"):
        return f"{environ['NCCL_SOCKET_IFNAME']}, by NCCL_SOCKET_IFNAME"
    ranked = sorted(
        names, key=lambda name: (name.startswith("lo"), name.startswith("docker"), not name.startswith("ib"))
    )
    return ranked[0] if ranked else "none"


def unknown_interfaces(value: str, names: list[str]) -> list[str]:
    """Of a list such as eth0,ib0 or =eth0, where a name also stands for those that open with it; ^eth0 excludes, and
    asks for none."""
    if not value or value.startswith("^"):
        return []
    exact, wanted = value.startswith("="), value.lstrip("=").split(",")
    return [each for each in wanted if not any(name == each or (not exact and name.startswith(each)) for name in names)]


def _about(name: str, address: str | None) -> str:
    public = address is not None and ip_address(address).is_global
    words = ["a public address" if public else address or "no IPv4 address"]
    for file, unit in (("operstate", ""), ("speed", " Mb/s")):
        with suppress(OSError, ValueError):
            told = Path("/sys/class/net", name, file).read_text(encoding="ascii").strip()
            if told not in ("", "unknown", "-1"):
                words.append(told + unit)
    return ", ".join(words)


def look_at_slurm(found: Findings, environ: Mapping[str, str] = os.environ) -> None:
    version = said_by(["sbatch", "--version"], _SECONDS)
    facts = {"version": version or "absent"}
    if "SLURM_JOB_ID" in environ:
        nodes, step = environ.get("SLURM_JOB_NUM_NODES", "?"), environ.get("SLURM_STEP_ID")
        facts["this is in"] = f"job {environ['SLURM_JOB_ID']} of {nodes} nodes" + (f", step {step}" if step else "")
    elif version:
        facts["this is in"] = "no job"
    found.facts["slurm"] = facts


def look_at_environment(found: Findings, environ: Mapping[str, str] = os.environ) -> None:
    found.facts["environment"] = {
        name: masked(name, environ[name]) for name in sorted(environ) if _SHOWN.fullmatch(name)
    }


def masked(name: str, value: str) -> str:
    """A value fit to be published: none of what may be a secret, nobody's login in an address, not too long."""
    if _SECRET.search(name) and value:
        return "(masked)"
    text = _LOGIN_IN_ADDRESS.sub("(masked)@", " ".join(value.split()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
