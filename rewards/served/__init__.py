"""Rewards that are computed elsewhere.

`remote` asks `rlft serve-reward`, `classifier` a model that vLLM serves; `wire` is how trajectories travel.
"""
