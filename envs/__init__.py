"""Worlds to act in: single turn, tools, python, games, adapters to other libraries."""
