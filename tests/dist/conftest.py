"""Ranks of these tests share few cores: one thread each, also in the processes they start."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
