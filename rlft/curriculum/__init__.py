"""Which tasks a step plays: not in turn, but by what the results so far say that the policy can learn from.

A curriculum sees the tasks that it chose and how their groups came out. What it keeps of that is plain numbers, which
stand in the source's state: a resumed run draws the tasks that an uninterrupted one would have drawn.
"""
