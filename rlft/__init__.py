"""rlft: reinforcement and preference fine-tuning of language models that proves its own steps."""

__version__ = "0.1.0"
