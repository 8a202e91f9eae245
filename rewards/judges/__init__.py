"""Language models as judges.

`judge` is the config and the panel; `modes` the four ways to ask, with `briefs` (what they are told), `replies` (what
is read) and `compare` (pairs and rankings); `endpoint` one model behind a server, with `line` (limits, retries, the
key) and `cache` (replies kept on disk).
"""
