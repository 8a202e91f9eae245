"""Named stretches of time that a profile shows; a few microseconds each where nobody watches."""

from torch.profiler import record_function

PREFIX = "rlft: "


def span(name: str) -> record_function:
    """A block under this name."""
    return record_function(PREFIX + name)
