"""Worlds of our own: small, made of a seed, without any library."""
