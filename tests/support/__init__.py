"""Shared by several test files: data, batches, formulas, the emulator of kernels."""
