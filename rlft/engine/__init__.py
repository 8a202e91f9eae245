"""Engines: what samples from the policy. base: the protocol and the accounting's digests. vllm: the engine.
local: transformers, the fallback and the reference in tests. worker: any engine in a process of its own."""
