"""How to get what an extra of pyproject.toml brings, for messages that miss it."""


def install(extra: str) -> str:
    """The commands that install it, for who has a clone and for who has the package."""
    return f"bash launch/install.sh {extra} in a clone, or pip install 'moe_dist[{extra}]'"
