"""What Rust's compiler does not check is counted, and has a reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "rust").is_dir(), reason="needs a checkout, not an installed wheel"
)

from list_unsafe import panics, unsafe  # noqa: E402

UNSAFE = {
    "loss/apply.rs": 6,
    "loss/bounds.rs": 5,
    "loss/collect.rs": 6,
    "loss/columns.rs": 4,
    "simd/avx2.rs": 19,
    "simd/avx512.rs": 18,
    "simd/lanes.rs": 2,
    "simd/lookup.rs": 1,
    "simd/mod.rs": 1,
    "simd/portable.rs": 4,
    "threads.rs": 4,
}

INDICES = {
    # Places of characters that the text itself has.
    "divergence/expression/grammar.rs": 4,
    "spec.rs": 5,
    # The header's length is that of a file that safetensors has read.
    "table/file.rs": 7,
}
"""Files that read what a user gives, with their indices. rust/tests/fuzz.rs tries to break each."""


def test_every_unsafe_is_counted_and_has_a_reason() -> None:
    found = unsafe()
    assert dict(Counter(each.file for each in found)) == UNSAFE
    for each in found:
        # A function of a trait has the condition of its trait.
        of_trait = each.code.startswith("unsafe fn") and "pub" not in each.code
        assert each.reason or of_trait, each


def test_nothing_but_four_invariants_panics_on_purpose() -> None:
    found = {
        (file, kind): count
        for file, counts in panics().items()
        for kind, count in counts.items()
        if kind != "index"
    }
    assert found == {
        ("band/mod.rs", "panic"): 1,  # of the compiler
        ("image.rs", "expect"): 1,  # an image was checked when it was made
        ("simd/mod.rs", "panic"): 1,  # the import of the package has refused it
        ("threads.rs", "expect"): 1,  # a part of a batch that panicked before
    }


@pytest.mark.parametrize("file", INDICES)
def test_indices_into_input_are_counted(file: str) -> None:
    assert panics()[file].get("index", 0) == INDICES[file]
