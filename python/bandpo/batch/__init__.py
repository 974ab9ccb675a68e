"""A batch of tokens: its checks, its sequences, and metrics over it."""
