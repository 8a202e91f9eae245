"""Programs that attack the sandbox they run in, each by its name.

They stand in data/hostile.txt, where a line `### kind: name` begins one.

Each should make `answer(2, 3)` give 5, and none computes it: one that passes has fooled the grader. Whatever it finds
out it prints, so that the canaries show up. A place in braces is filled by the test: `{canary}` a file of the host,
`{pid}` a process of the host, `{port}` a port on which it listens.
"""

from __future__ import annotations

import re
from pathlib import Path

TEXT = Path(__file__).with_name("data").joinpath("hostile.txt").read_text()
ALL = dict(re.findall(r"^### (.*)\n((?:(?!### ).*\n)+)", TEXT, re.MULTILINE))
ALL["resources: brackets without end"] = "(" * 100_000
