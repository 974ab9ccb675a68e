"""Every backend against the vectors of every preset, and the command that compares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bandpo.cli import main
from bandpo.conform.vectors import ANY, FILE, FORMAT, read_vectors
from bandpo.error import InputPathError, InvalidValueError
from bandpo.presets import PRESETS

MODES = (
    *("token-mean", "token-sum", "seq-mean-token-sum"),
    *("seq-mean-token-mean", "seq-mean-token-sum-norm"),
)
CASES = (
    *("float32", "bfloat16", "padding", "p1", "positive"),
    *("ratio89", "empty-row", "zero-advantages", "split"),
)

EXACT = 1e-6
"""Distance in ulp of float32 of a float64 loss with exact bounds: 7e-14, for the products of some
roundings, which the cancellation of spo multiplies."""

LARGEST_FILE = 1_000_000
LARGEST_IN_WHEEL = 200_000


def test_the_file_has_every_preset_case_and_mode() -> None:
    found = [(vector.preset, vector.case, vector.mode) for vector in read_vectors()]
    assert sorted(found) == sorted((p, c, m) for p in PRESETS for c in CASES for m in MODES)


def test_the_file_is_small_enough_to_be_shipped() -> None:
    import gzip

    content = FILE.read_bytes()
    assert len(content) < LARGEST_FILE
    assert len(gzip.compress(content)) < LARGEST_IN_WHEEL


def test_safetensors_reads_what_our_reader_reads() -> None:
    numpy_of = pytest.importorskip("safetensors.numpy")
    tensors = numpy_of.load_file(FILE)
    for vector in read_vectors():
        name = f"{vector.preset}/{vector.case}"
        np.testing.assert_array_equal(tensors[f"{name}/{vector.mode}/gradient"], vector.gradient)
        np.testing.assert_array_equal(tensors[f"{name}/{ANY}/counts"], vector.counts)
        assert tensors[f"{name}/{vector.mode}/loss"].tolist() == [vector.loss, vector.loss_size]
        for field, array in vector.inputs.items():
            np.testing.assert_array_equal(tensors[f"inputs/{vector.case}/{ANY}/{field}"], array)


def test_cases_hold_what_they_are_named_after() -> None:
    inputs = {vector.case: vector.inputs for vector in read_vectors()}
    valid = {case: given["response_mask"] != 0 for case, given in inputs.items()}
    poisoned = inputs["padding"]["log_prob"][~valid["padding"]]
    assert np.isnan(poisoned).any()
    assert np.isinf(poisoned).any()
    assert (inputs["p1"]["old_log_prob"] == 0).any()
    assert (inputs["positive"]["log_prob"] > 0).any()
    change = inputs["ratio89"]["log_prob"] - inputs["ratio89"]["old_log_prob"]
    assert (np.abs(change) == 89).sum() == 4
    assert (valid["empty-row"].sum(1) == 0).any()
    assert (inputs["zero-advantages"]["advantages"] == 0).all()
    bits = inputs["bfloat16"]["log_prob"].copy().view(np.uint32)
    assert (bits & 0xFFFF == 0).all()
    for field, array in inputs["split"].items():
        np.testing.assert_array_equal(array, inputs["float32"][field])


def test_each_preset_clips_or_drops_a_token_somewhere() -> None:
    acting = {v.preset for v in read_vectors() if v.counts[:2].any() or v.counts[2] < v.counts[3]}
    assert acting == set(PRESETS)


@pytest.mark.filterwarnings("ignore::bandpo.error.MismatchWarning")
def test_float64_losses_with_exact_bounds_are_the_vectors() -> None:
    torch = pytest.importorskip("torch")
    from bandpo.conform.batch import run
    from bandpo.conform.compare import compared
    from bandpo.conform.ours import loss_of

    for vector in read_vectors():
        outcome = run(vector, loss_of(vector, "native", exact=True), dtype=torch.float64)
        verdict = compared(vector, outcome)
        assert max(verdict.loss_ulp, verdict.gradient_ulp) < EXACT, verdict
        assert verdict.counts_agree, verdict


@pytest.mark.filterwarnings("ignore::bandpo.error.MismatchWarning")
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_backends_agree_but_where_a_table_stays_in_the_simplex(backend: str) -> None:
    pytest.importorskip("torch")
    from bandpo.conform.ours import KNOWN
    from bandpo.conform.run import reports

    (found,), others = reports(names=[backend])
    assert others == []
    assert len(found.verdicts) == len(PRESETS) * len(CASES) * len(MODES)
    assert found.agrees
    assert {(v.preset, v.case) for v in found.verdicts if not v.agrees} == set(KNOWN)
    assert all(verdict.finite for verdict in found.verdicts)


def test_masked_tokens_have_no_gradient_whatever_they_hold() -> None:
    for vector in read_vectors():
        masked = vector.inputs["response_mask"] == 0
        assert (vector.gradient[masked] == 0).all()
        assert np.isfinite(vector.gradient).all()


def changed(path: Path, name: str, index: int, by: float) -> Path:
    """The vectors with one number changed."""
    numpy_of = pytest.importorskip("safetensors.numpy")
    tensors = numpy_of.load_file(FILE)
    tensors[name] = tensors[name].copy()
    nonzero = np.flatnonzero(tensors[name])
    tensors[name].flat[nonzero[index]] *= by
    numpy_of.save_file(tensors, path, {"format": FORMAT})
    return path


@pytest.mark.parametrize(
    ("field", "index", "by", "code"),
    [
        ("token-mean/loss", 0, 1 + 2**-12, 1),
        ("token-mean/loss", 0, 1 + 2**-22, 0),
        ("token-sum/gradient", 0, -1.0, 1),
        ("any/counts", 0, 2, 1),
    ],
)
def test_a_wrong_vector_fails(
    field: str,
    index: int,
    by: float,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    path = changed(tmp_path / "wrong.safetensors", f"dapo/float32/{field}", index, by)
    assert main(["conform", "--backend", "native", "--json", str(path)]) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] == (code == 0)
    different = {(row["preset"], row["case"]) for row in printed["differences"]}
    assert (("dapo", "float32") in different) == (code == 1)


def test_the_command_prints_every_backend_and_names_what_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from bandpo.conform import frameworks

    monkeypatch.setattr(frameworks, "find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["conform"]) == 0
    printed = capsys.readouterr().out
    for name in ("bandpo native", "bandpo torch"):
        assert f"{name}  " in printed
    for name in frameworks.ADAPTERS:
        assert f"{name}: not installed" in printed


def test_a_framework_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from bandpo.conform import frameworks

    monkeypatch.setattr(frameworks, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "verl", None)
    found = frameworks.framework_report("verl", [])
    assert found.verdicts == []
    assert found.note.startswith("installed, cannot be imported: ")


def test_files_that_hold_no_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputPathError, match="cannot read"):
        read_vectors(tmp_path / "none")
    other = tmp_path / "other"
    for content in (b"", b"no vectors", FILE.read_bytes()[:1000]):
        other.write_bytes(content)
        with pytest.raises(InvalidValueError, match="holds no vectors"):
            read_vectors(other)


def test_importing_bandpo_reads_no_vectors() -> None:
    code = "import sys, bandpo; print([m for m in sys.modules if m.startswith('bandpo.conform')])"
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert outcome.stdout == "[]\n"


def test_a_distance_counts_ulp_at_the_larger_of_value_and_size() -> None:
    pytest.importorskip("torch")
    from bandpo.conform.compare import distance

    assert distance(1 + 2**-23, 1.0, 0.0) == 1
    assert distance(1 + 2**-23, 1.0, 4.0) == 0.25
    assert distance(1 + 2**-7, 1.0, 0.0, half=True) == 1
    assert distance(float("nan"), 1.0, 0.0) == float("inf")
    assert distance(2.0**-149, 0.0, 0.0) == 1
