"""Worlds of other libraries, each with the library's own observations, rewards and rules."""
