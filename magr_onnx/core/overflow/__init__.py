"""Accumulators: how wide they must be, which machines have which, and proofs that they do not overflow."""
