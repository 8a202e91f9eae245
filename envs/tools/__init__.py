"""Tools that the policy may call in its answers, and what runs them.

`base` is what a tool is; `functions` makes them of Python functions and classes, `python` of an interpreter, `search`
of a corpus, `servers` of MCP servers. `formats` reads the calls of an answer, `calling` is the environment, and
`programs` the one that runs the code blocks of an answer. `hints` suggest a tool where none was used.
"""
