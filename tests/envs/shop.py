"""An MCP server for the tests. SHOP_PORT: it speaks HTTP there, else on its standard input and output."""

from __future__ import annotations

import os
import sys
import time

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("shop", log_level="CRITICAL")
stock = {"apple": int(os.environ.get("SHOP_APPLES", "3"))}


@server.tool()
def buy(thing: str, count: int = 1) -> str:
    """Buy some of a thing."""
    if thing not in stock:
        raise ToolError(f"there is no {thing}")
    stock[thing] -= count
    return f"{stock[thing]} left"


@server.tool()
def wait(seconds: float) -> str:
    """Wait."""
    time.sleep(seconds)
    return "done"


@server.tool()
def number() -> int:
    """The number of the server's process."""
    return os.getpid()


@server.tool()
def burn() -> str:
    """Burn the shop down."""
    print("something on standard error", file=sys.stderr)
    os._exit(3)


if __name__ == "__main__":
    if port := os.environ.get("SHOP_PORT"):
        server.run("streamable-http", port=int(port))
    else:
        server.run()
