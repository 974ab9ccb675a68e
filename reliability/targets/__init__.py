"""Targets of the fuzzer: each takes bytes and makes a case of them."""
