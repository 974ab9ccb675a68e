"""A study of clip rules on small verifiable tasks; README.md has its questions and protocol."""
