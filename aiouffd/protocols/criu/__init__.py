"""CRIU: checkpoints of processes, and what lazily restores them."""
