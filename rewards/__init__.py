"""Verdicts on trajectories. A reward judges the trajectories of one task at once: `await reward(group)`.

What lives where: `base` the config every reward shares, and the checks every verdict passes; `match` exact text and
numbers; `math` mathematical equality; `code` programs, which run in `rlft.sandbox`; `shape`, `lengths`, `thinking`,
`layout`, `script` and `parts` how a completion is written; `combine`, `combined`, `conditional` and `balanced` rewards
made of others; `custom` your own function; `outcome` what the environment says; `progress` what blocks of an answer
gain; `judges` language models that are asked; `served` what is judged elsewhere; `catalog` the list of all of
them, which is also what a run's `reward:` block is validated against.
"""
