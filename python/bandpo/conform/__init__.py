"""Reference vectors of the published rules, and what agrees with them: ``bandpo conform``.

`vectors` reads the file, `compare` runs an implementation on it, `ours` and `frameworks` are the
implementations; docs/conformance.md defines the content of the file. Importing a part but `vectors`
imports torch.
"""
