"""Long checks that try to break bandpo, one line of docs/reliability.md a file.

A file has functions with a number of cases, of which tests/trust runs few, and a command line that
runs many and writes their counts to `results`. `make reliability` runs all of them.
"""
