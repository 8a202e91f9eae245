"""A small world of several apps that an agent acts in by calls, in the spirit of AppWorld (arXiv:2407.18901)."""
