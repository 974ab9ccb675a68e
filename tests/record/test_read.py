"""Files of tokens: every format and layout, errors, damage, and bounded memory."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bandpo.error import (
    BandpoError,
    InputPathError,
    InvalidTypeError,
    InvalidValueError,
    MissingExtraError,
    TokenFileError,
)
from bandpo.record import LoggedTokens, Recorder, read_tokens, text
from bandpo.record.layout import concatenate
from bandpo.record.tokens import LogMetadata
from support.token_files import (
    TOKENS,
    WIDTH,
    WRITERS,
    log_of_sequences,
    log_of_tokens,
    write_csv,
    write_json_lines,
    write_npz,
    write_parquet,
    write_safetensors,
)

pytest.importorskip("pyarrow")
pytest.importorskip("safetensors")

FORMATS = list(WRITERS)
FEW = {"old_log_prob": np.full(3, -1.0), "log_prob": np.full(3, -2.0), "advantages": np.ones(3)}


def read(path: Path, **options: Any) -> LoggedTokens:
    return concatenate(list(read_tokens(path, **options)))


def assert_same(found: LoggedTokens, expected: dict[str, Any]) -> None:
    for field, array in found._asdict().items():
        if expected.get(field) is None:
            assert array is None, field
        else:
            kind = np.int64 if field in ("step", "sequence", "position") else np.float64
            assert array.dtype == kind, field
            np.testing.assert_array_equal(array, expected[field], err_msg=field)


def written(tmp_path: Path, suffix: str, log: dict[str, Any], name: str = "log") -> Path:
    path = tmp_path / f"{name}.{suffix}"
    WRITERS[suffix](path, log)
    return path


# --- formats and layouts -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_row_a_token_gives_what_was_written_without_masked_tokens(
    suffix: str, tmp_path: Path
) -> None:
    log = log_of_tokens()
    valid = log["response_mask"]
    expected = {name: array[valid] for name, array in log.items()}
    assert_same(read(written(tmp_path, suffix, log)), expected)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_row_a_sequence_gives_its_numbers_to_each_of_its_tokens(
    suffix: str, tmp_path: Path
) -> None:
    log = log_of_sequences()
    valid = log["response_mask"].reshape(-1)
    row = np.repeat(np.arange(TOKENS // WIDTH), WIDTH)
    expected = {
        name: (array.reshape(-1) if array.ndim == 2 else array[row])[valid]
        for name, array in log.items()
    }
    expected["position"] = np.tile(np.arange(WIDTH), TOKENS // WIDTH)[valid]
    assert_same(read(written(tmp_path, suffix, log)), expected)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_log_of_three_columns_has_defaults(suffix: str, tmp_path: Path) -> None:
    found = read(written(tmp_path, suffix, FEW))
    unknown = np.full(3, -1)
    assert_same(
        found,
        FEW | {"step": np.zeros(3), "sequence": unknown, "position": unknown, "weight": np.ones(3)},
    )


@pytest.mark.parametrize("suffix", FORMATS)
def test_sequences_without_numbers_are_counted_over_all_files(suffix: str, tmp_path: Path) -> None:
    log = {name: log_of_sequences()[name] for name in FEW}
    paths = [written(tmp_path, suffix, log, name) for name in ("a", "b")]
    found = concatenate(list(read_tokens(paths)))
    rows = 2 * TOKENS // WIDTH
    np.testing.assert_array_equal(found.sequence, np.repeat(np.arange(rows), WIDTH))
    np.testing.assert_array_equal(found.position, np.tile(np.arange(WIDTH), rows))


def test_ragged_lists_are_read_from_formats_that_have_them(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"old_log_prob": [-1.0, -2.0], "log_prob": [-1.5, -2.5], "advantages": 1.0},
        {"old_log_prob": [], "log_prob": [], "advantages": 2.0},
        {"old_log_prob": [-3.0], "log_prob": [-3.5], "advantages": -1.0},
    ]
    lines = tmp_path / "log.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = tmp_path / "log.csv"
    cells.write_text(
        "old_log_prob,log_prob,advantages\n"
        + "".join(
            f'"{row["old_log_prob"]}","{row["log_prob"]}",{row["advantages"]}\n' for row in rows
        )
    )
    table = tmp_path / "log.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    for path in (lines, cells, table):
        found = read(path)
        assert found.old_log_prob.tolist() == [-1.0, -2.0, -3.0]
        assert found.log_prob.tolist() == [-1.5, -2.5, -3.5]
        assert found.advantages.tolist() == [1.0, 1.0, -1.0]
        assert found.sequence.tolist() == [0, 0, 2]
        assert found.position.tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", ["large_list", "list_"])
@pytest.mark.parametrize("value", ["float16", "float32", "int8"])
def test_lists_of_arrow_of_every_kind_are_read(kind: str, value: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    given = getattr(pyarrow, kind)(getattr(pyarrow, value)())
    numbers = np.arange(-6, 0).astype({"float16": "f2", "float32": "f4", "int8": "i1"}[value])
    fixed = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(numbers), 2)
    rows = fixed.cast(given)
    path = tmp_path / "log.parquet"
    for log_probs in (rows, fixed):
        table = pyarrow.table(
            {"old_log_prob": rows, "log_prob": log_probs, "advantages": pyarrow.array([1, 2, 3])}
        )
        pyarrow.parquet.write_table(table, path)
        found = read(path)
        assert found.log_prob.tolist() == found.old_log_prob.tolist() == [-6, -5, -4, -3, -2, -1]
        assert found.advantages.tolist() == [1, 1, 2, 2, 3, 3]


def test_missing_numbers_are_nan_and_a_missing_list_is_empty(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    cells = tmp_path / "log.csv"
    cells.write_text("old_log_prob,log_prob,advantages\n-1,,1\n-2,nan,\n")
    lines = tmp_path / "log.jsonl"
    lines.write_text(
        '{"old_log_prob": -1, "log_prob": null, "advantages": 1}\n'
        '{"old_log_prob": -2, "log_prob": NaN, "advantages": null}\n'
    )
    table = tmp_path / "log.parquet"
    columns = {"old_log_prob": [-1.0, -2.0], "log_prob": [None, math.nan], "advantages": [1, None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    for path in (cells, lines, table):
        found = read(path)
        np.testing.assert_array_equal(found.log_prob, [math.nan, math.nan])
        np.testing.assert_array_equal(found.advantages, [1, math.nan])
    pyarrow.parquet.write_table(
        pyarrow.table(
            {
                "old_log_prob": [[-1.0], None, [-2.0]],
                "log_prob": [[-1.0], None, [None]],
                "advantages": [1.0, 2.0, 3.0],
            }
        ),
        table,
    )
    found = read(table)
    assert found.sequence.tolist() == [0, 2]
    np.testing.assert_array_equal(found.log_prob, [-1.0, math.nan])


def test_arrays_may_have_one_number_of_the_file_and_columns_of_width_1(tmp_path: Path) -> None:
    log = {
        "old_log_prob": -np.ones((4, 3), np.float16),
        "log_prob": -np.ones((4, 3), np.float32),
        "advantages": np.arange(4.0)[:, None],
        "step": np.int32(7),
        "reward": np.ones(1),
    }
    for write, name in ((write_npz, "log.npz"), (write_safetensors, "log.safetensors")):
        write(tmp_path / name, {field: np.asarray(array) for field, array in log.items()})
        for chunk in (1, 5, 100):
            found = read(tmp_path / name, chunk=chunk)
            assert found.step.tolist() == [7] * 12
            assert found.reward is not None
            assert found.reward.tolist() == [1.0] * 12
            assert found.advantages.tolist() == np.repeat(np.arange(4.0), 3).tolist()


def test_bfloat16_of_safetensors_is_read_exactly(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    numbers = torch.tensor([-1.0, -0.0078125, -3.0e-5, -math.inf, -71.5, math.nan])
    tensors = {name: numbers.bfloat16() for name in FEW}
    save_file(tensors, tmp_path / "log.safetensors")
    found = read(tmp_path / "log.safetensors", chunk=4)
    np.testing.assert_array_equal(found.log_prob, numbers.bfloat16().double().numpy())


def test_a_compressed_npz_file_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "log.npz", **FEW)  # type: ignore[arg-type]
    assert read(tmp_path / "log.npz").log_prob.tolist() == [-2.0] * 3


def test_a_csv_file_may_have_a_byte_order_mark_texts_and_line_ends_in_them(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(
        b"\xef\xbb\xbfold_log_prob,text,log_prob,advantages\r\n"
        b'-1,"two\r\nlines, and ""more""",-2,1\r\n'
        b"-3,\xff\xfe,-4,2\r\n\r\n"
    )
    assert read(path).old_log_prob.tolist() == [-1, -3]


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_columns_have_the_names_that_an_option_gives(suffix: str, tmp_path: Path) -> None:
    log = log_of_tokens()
    names = {"old_log_prob": "actor.old", "response_mask": "mask", "reward": "score"}
    path = written(tmp_path, suffix, {names.get(name, name): log[name] for name in log})
    valid = log["response_mask"]
    assert_same(read(path, columns=names), {name: array[valid] for name, array in log.items()})


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_chunks_have_their_size_and_can_be_read_many_times(
    suffix: str, chunk: int, tmp_path: Path
) -> None:
    paths = [written(tmp_path, suffix, log_of_tokens(seed), str(seed)) for seed in range(3)]
    files = read_tokens(paths, chunk=chunk)
    whole = concatenate(list(read_tokens(paths)))
    for _ in range(2):
        chunks = list(files)
        sizes = [len(part.step) for part in chunks]
        assert set(sizes[:-1]) <= {chunk}
        assert 0 < sizes[-1] <= chunk
        assert_same(concatenate(chunks), whole._asdict())


def test_a_folder_is_read_in_the_order_of_the_names_without_other_files(tmp_path: Path) -> None:
    for name, step in (("b.csv", 1), ("a.npz", 0), ("c.jsonl", 2)):
        WRITERS[name.rpartition(".")[2]](tmp_path / name, FEW | {"step": np.full(3, step)})
    for name in ("README.md", ".hidden.csv", "_SUCCESS"):
        (tmp_path / name).write_text("text")
    files = read_tokens(tmp_path)
    assert [path.name for path in files.paths] == ["a.npz", "b.csv", "c.jsonl"]
    assert next(iter(files)).step.tolist() == [0] * 3 + [1] * 3 + [2] * 3


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_missing_column_is_named_with_the_nearest_one(suffix: str, tmp_path: Path) -> None:
    log = {"old_log_probs": FEW["old_log_prob"], "log_prob": FEW["log_prob"], "adv": np.ones(3)}
    path = written(tmp_path, suffix, log)
    with pytest.raises(TokenFileError) as error:
        read_tokens(path)
    for part in (str(path), "'old_log_prob'", "adv", "mean 'old_log_probs'?", "columns={"):
        assert part in str(error.value)
    with pytest.raises(TokenFileError, match=r"no column 'advantage' for advantages"):
        read_tokens(path, columns={"old_log_prob": "old_log_probs", "advantages": "advantage"})
    names = {"old_log_prob": "old_log_probs", "advantages": "adv"}
    assert len(read(path, columns=names).step) == 3
    with pytest.raises(TokenFileError, match="no column 'rewards' for reward"):
        read_tokens(path, columns=names | {"reward": "rewards"})


def test_arguments_that_are_not_allowed_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="mean 'old_log_prob'"):
        read_tokens(tmp_path, columns={"old_log_probs": "x"})
    with pytest.raises(InvalidValueError, match="chunk must be at least 1, got 0"):
        read_tokens(tmp_path, chunk=0)
    with pytest.raises(InvalidTypeError, match="chunk must be a whole number, got float"):
        read_tokens(tmp_path, chunk=1e6)  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="paths must name a file"):
        read_tokens([])
    with pytest.raises(InvalidTypeError, match="paths must be one or more paths, got 3"):
        read_tokens([3])  # type: ignore[list-item]
    with pytest.raises(InputPathError, match="No such file"):
        read_tokens(tmp_path / "none.parquet")
    with pytest.raises(TokenFileError, match=r"holds no file whose name ends with \.parquet"):
        read_tokens(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\n \n", "must be Parquet"),
        (b"[\n{}]", "JSON lines with an object on each"),
        (b"\x1f\x8b\x08\x00", "must be Parquet"),
        (b"ARROW1\0\0", "must be Parquet"),
        (b"PAR1", "cannot be read as Parquet"),
        (b"PK\x03\x04", "cannot be read as npz"),
        (b"PK\x05\x06" + bytes(18), "only no columns"),
        (b"\x02\0\0\0\0\0\0\0{]", "cannot be read as safetensors"),
        (b"1,2,3\n", "has no column 'old_log_prob' for old_log_prob, only 1, 2, 3"),
        (b"{}\n", "only no columns"),
    ],
)
def test_content_that_is_no_log_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    path.write_bytes(content)
    with pytest.raises(TokenFileError, match=re.escape(message)) as error:
        read_tokens(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("field", "numbers", "message"),
    [
        ("weight", [1.0, 0.0, 1.0], "must be finite and above 0"),
        ("weight", [1.0, math.nan, 1.0], "must be finite and above 0"),
        ("weight", [1.0, math.inf, 1.0], "must be finite and above 0"),
        ("step", [1.0, 1.5, 2.0], "must hold whole numbers"),
        ("sequence", [1.0, 2.0**54, 2.0], "must hold whole numbers"),
        ("response_mask", [1.0, math.nan, 0.0], "must have a whole number for each token"),
        ("response_mask", [1.0, 0.5, 0.0], "must have a whole number for each token"),
    ],
)
def test_numbers_that_are_not_allowed_are_refused(
    suffix: str, field: str, numbers: list[float], message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, suffix, FEW | {field: np.array(numbers)})
    with pytest.raises(TokenFileError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert repr(field) in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            '{"a": [1], "b": [1], "c": 1}\n{"a": 1, "b": [1], "c": 1}\n',
            "'a' has numbers beside lists",
        ),
        ('{"a": [1, 2], "b": [1], "c": 1}\n', "'a' must have lists as long as those of 'b'"),
        ('{"a": 1, "b": [1], "c": 1}\n', "'a' must have a list in each row, as 'b' has"),
        ('{"a": [1], "b": 1, "c": 1}\n', "'a' must have one number in each row, as 'b' has"),
        ('{"a": [[1]], "b": [1], "c": 1}\n', "'a' must hold real numbers"),
        ('{"a": "x", "b": 1, "c": 1}\n', "'a' must hold real numbers"),
        ('{"a": {}, "b": 1, "c": 1}\n', "'a' must hold real numbers"),
        (f'{{"a": 1{"0" * 400}, "b": 1, "c": 1}}\n', "'a' must hold real numbers"),
        ('{"a": 1, "b": 1, "c": 1}\n{"a": 1, "b": 1}\n', "line 2 has no 'c'"),
        ('{"a": 1, "b": 1, "c": 1}\n3\n', "line 2 must be an object"),
        ('{"a": 1, "b": 1, "c": 1}\n{"a": \n{}\n', "line 2 is no JSON"),
        ("[" * 100_000 + "\n", "must be Parquet"),
        ('{"a": ' + "[" * 100_000 + "\n", "is no JSON"),
        ('{"a": 1, "b": 1, "c": 1, "a": 2}\n', "line 1 is no JSON: it has more than one 'a'"),
        ('{"a": {"x": 1, "x": 2}, "b": 1, "c": 1}\n', "it has more than one 'x'"),
        ("a,b,c,b\n1,2,3,4\n", "has more than one column 'b'"),
        ("a,b,c\n1,2\n1,2,3\n", "line 2 has 2 cells in place of 3"),
        ("a,b,c\n1,2,x\n", "'c' must hold real numbers"),
        ("a,b,c\n1,2,[1\n", "has a list that is no JSON"),
    ],
)
def test_lines_that_do_not_fit_are_refused_with_their_place(
    lines: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "log.txt"
    path.write_text(lines)
    with pytest.raises(TokenFileError, match=re.escape(message)) as error:
        read(path, columns={"old_log_prob": "a", "log_prob": "b", "advantages": "c"})
    assert str(path) in str(error.value)


def test_a_line_without_end_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with path.open("wb") as file:
        file.write(b"old_log_prob,log_prob,advantages\n" + 1000 * b"1,2,3\n")
        file.truncate(4 * text.LONGEST_LINE)  # a hole, which takes no space
    with pytest.raises(TokenFileError, match=f"has more than {text.LONGEST_LINE} bytes"):
        read(path)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ({"advantages": np.ones(4)}, r"'advantages' must have shape \(3,\)"),
        ({"log_prob": np.ones((1, 3))}, r"'old_log_prob' must have shape \(1, 3\)"),
        ({"log_prob": np.ones((1, 1, 3))}, r"'log_prob' must have shape \[N\] or \[B, T\]"),
        ({"advantages": np.array(["a"] * 3)}, "must hold bool, int or float, got dtype <U1"),
        ({"advantages": np.ones(3, complex)}, "must hold bool, int or float, got dtype complex128"),
        ({"advantages": np.array([None] * 3)}, "must hold bool, int or float, got dtype object"),
        (
            {name: np.asfortranarray(np.ones((2, 3))) for name in FEW},
            "must be in C order",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    log: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "log.npz"
    write_npz(path, FEW | log)
    with pytest.raises(TokenFileError, match=message):
        read(path)


def test_an_array_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.npz"
    write_npz(path, FEW)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of zipfile, about the name
        archive.writestr("log_prob.npy", archive.read("old_log_prob.npy"))
    with pytest.raises(TokenFileError, match="has more than one column 'log_prob'"):
        read(path)
    header = b'{"log_prob":{},"log_prob":{}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(TokenFileError, match="it has more than one 'log_prob'"):
        read(path)


def test_columns_of_parquet_that_hold_no_numbers_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "log.parquet"
    for column in (["a"] * 3, [[["a"]]] * 3, [{"x": 1}] * 3):
        pyarrow.parquet.write_table(pyarrow.table(FEW | {"advantages": column}), path)
        with pytest.raises(TokenFileError, match="'advantages' must hold bool, int or float"):
            read(path)
    table = pyarrow.table([[1.0]] * 4, names=[*FEW, "log_prob"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(TokenFileError, match="has more than one column 'log_prob'"):
        read(path)


def test_a_column_of_numbers_of_64_bits_without_sign_is_checked(tmp_path: Path) -> None:
    for number, fits in ((2**63 - 1, True), (2**63, False)):
        path = tmp_path / "log.npz"
        write_npz(path, FEW | {"sequence": np.full(3, number, np.uint64)})
        if fits:
            assert read(path).sequence.tolist() == [number] * 3
        else:
            with pytest.raises(TokenFileError, match="'sequence' must hold numbers below 2\\^63"):
                read(path)


def test_files_with_other_optional_columns_are_not_read_together(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", FEW)
    write_csv(tmp_path / "b.csv", FEW | {"reward": np.ones(3)})
    message = r"a\.csv: has no reward, which .*b\.csv has"
    with pytest.raises(TokenFileError, match=message):
        read_tokens(tmp_path)
    with pytest.raises(TokenFileError, match=message):
        read_tokens([tmp_path / "b.csv", tmp_path / "a.csv"])


def test_parquet_without_pyarrow_is_an_error_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "log.parquet", FEW)
    write_npz(tmp_path / "log.npz", FEW)
    monkeypatch.delitem(sys.modules, "bandpo.record.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[record\]'"):
        read_tokens(tmp_path / "log.parquet")
    assert len(read(tmp_path / "log.npz").step) == 3


# --- metadata ------------------------------------------------------------------------------------


def with_metadata(path: Path, metadata: object) -> Path:
    import pyarrow
    import pyarrow.parquet

    content = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    table = pyarrow.table(FEW).replace_schema_metadata({b"bandpo": content})
    pyarrow.parquet.write_table(table, path)
    return path


def test_metadata_of_files_may_differ_in_rank_and_world_size_alone(tmp_path: Path) -> None:
    one: dict[str, Any] = {"format_version": 1, "temperature": 0.7, "dtype": "bfloat16"}
    one |= {"old_policy": "trainer", "rule": {"region": "kl@0.05"}}
    paths = [
        with_metadata(tmp_path / f"{rank}.parquet", one | {"rank": rank, "world_size": 2})
        for rank in range(2)
    ]
    assert read_tokens(paths[1]).metadata == LogMetadata(**one, rank=1, world_size=2)
    assert read_tokens(paths).metadata == LogMetadata(**one, rank=None, world_size=2)
    for name, value in (("temperature", 1.0), ("rule", None), ("dtype", "float32")):
        other = with_metadata(tmp_path / "other.parquet", one | {name: value})
        with pytest.raises(TokenFileError, match=f"of another run than .*: its {name} is"):
            read_tokens([paths[0], other])


@pytest.mark.parametrize("suffix", FORMATS)
def test_files_of_others_have_no_metadata(suffix: str, tmp_path: Path) -> None:
    assert read_tokens(written(tmp_path, suffix, FEW)).metadata == LogMetadata()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": 2}, "has version 2 of the format, above 1"),
        (b"\xff", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        ([1], "cannot be read"),
        ({}, "cannot be read"),
        ({"format_version": 1, "temperature": "hot"}, "has the temperature 'hot'"),
        ({"format_version": 1, "rank": True}, "has the rank True"),
        ({"format_version": 1, "rule": [1]}, "has the rule"),
    ],
)
def test_metadata_that_is_not_allowed_is_refused(
    metadata: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TokenFileError, match=re.escape(message)):
        read_tokens(with_metadata(tmp_path / "log.parquet", metadata))


# --- files that are not whole --------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_csv, write_json_lines])
def test_lines_are_read_up_to_the_last_whole_one(write: Any, tmp_path: Path) -> None:
    log = log_of_tokens()
    path = tmp_path / "log.txt"
    write(path, log)
    content = path.read_bytes()
    whole = read(path)
    valid = np.cumsum(log["response_mask"])
    start = content.index(b"\n") + 1
    for end in (*range(start, len(content), 13), *range(len(content) - 99, len(content))):
        path.write_bytes(content[:end])
        lines = content[:end].count(b"\n") - (write is write_csv)
        if write is write_json_lines and content[end - 1 : end] == b"}":
            lines += 1  # an object that is closed is whole
        tokens = int(valid[lines - 1]) if lines else 0
        found = list(read_tokens(path))
        assert sum(len(part.step) for part in found) == tokens
        if tokens:
            assert_same(
                concatenate(found),
                {
                    name: array[:tokens]
                    for name, array in whole._asdict().items()
                    if array is not None
                },
            )


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet"])
def test_a_binary_file_that_is_cut_is_refused(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path, suffix, log_of_sequences())
    content = path.read_bytes()
    for end in range(1, len(content), 7):
        path.write_bytes(content[:end])
        with pytest.raises(TokenFileError, match=re.escape(str(path))):
            read(path)


def npz_with_header(path: Path, shape: str, dtype: str = "<f8") -> None:
    import zipfile

    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name in FEW:
            archive.writestr(f"{name}.npy", header + bytes(24))


def safetensors_with_header(path: Path, shape: str, dtype: str = "F64") -> None:
    entry = f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,24]}}'
    header = ("{" + ",".join(f'"{name}":{entry}' for name in FEW) + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ("[3]", True),
        ("[1,3]", True),
        ("[1000000000000]", False),
        ("[1099511627776,16777216]", False),
        ("[0,4]", False),
        ("[-3]", False),
        ("[-1,-3]", False),
        ("[3.0]", False),
        ('["3"]', False),
        ("[2]", False),
    ],
)
def test_a_size_that_a_header_claims_is_checked_before_memory_is_taken(
    shape: str, fits: bool, tmp_path: Path
) -> None:
    for make, name in ((npz_with_header, "log.npz"), (safetensors_with_header, "log.safetensors")):
        given = shape
        if make is npz_with_header:
            given = shape.replace("[", "(").replace("]", ",)")
        make(tmp_path / name, given)
        if fits:
            assert read(tmp_path / name).log_prob.tolist() == [0.0] * 3
        else:
            with pytest.raises(TokenFileError, match=name):
                read(tmp_path / name)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.safetensors"
    for size in (2**63, 2**40, 100):
        path.write_bytes(size.to_bytes(8, "little") + b'{"a": 1}')
        with pytest.raises(TokenFileError, match=r"log\.safetensors"):
            read(path)


# --- fuzzing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("originals")
    found = {}
    for suffix in FORMATS:
        for name, log in (("tokens", log_of_tokens()), ("sequences", log_of_sequences())):
            path = folder / f"{name}.{suffix}"
            WRITERS[suffix](path, log)
            found[path.name] = path.read_bytes()
    return found


def read_or_refuse(path: Path) -> None:
    """Reads a file, whose fields fit together then, or raises an error of ours with its path."""
    message, chunks = str(path), []
    try:
        chunks = list(read_tokens(path, chunk=50))
    except BandpoError as error:
        message = str(error)
    assert str(path) in message
    for tokens in chunks:
        assert len({len(field) for field in tokens if field is not None}) == 1


@settings(max_examples=400, deadline=None)
@given(
    start=st.sampled_from([b"", b"PAR1", b"PK\x03\x04", b"\x08\0\0\0\0\0\0\0{", b"{", b"a,b\n"]),
    content=st.binary(max_size=300),
)
def test_any_bytes_are_read_or_refused(
    start: bytes, content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(start + content)
    read_or_refuse(path)


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_a_file_with_flipped_or_missing_bytes_is_read_or_refused(
    data: st.DataObject, originals: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(originals[data.draw(st.sampled_from(sorted(originals)))])
    places = st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(content)), places))
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(content[:end])
    read_or_refuse(path)


# --- memory --------------------------------------------------------------------------------------

MANY = 10_000_000
BYTES_OF_TOKEN = 8 * 7
"""Bytes of a token in memory: the fields of a log of three columns."""

MOST_MEGABYTES = 64
"""Memory for any number of tokens: some chunks of 2^16, which take 4 MB each, and buffers."""

PEAK = """
import resource, sys
from bandpo.record import read_tokens
if sys.argv[1].endswith("parquet"):
    import bandpo.record.parquet
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
tokens = sum(len(part.step) for part in read_tokens(sys.argv[1], chunk=2**16))
print(tokens, peak() - before)
"""


def make_many(path: Path, shape: tuple[int, ...]) -> None:
    import pyarrow
    import pyarrow.parquet

    values = np.random.default_rng(0).random(shape, np.float32)
    log = {"old_log_prob": -values, "log_prob": -values, "advantages": values}
    if path.suffix == ".npz":
        write_npz(path, log)
    elif path.suffix == ".safetensors":
        write_safetensors(path, log)
    else:
        columns = {
            name: pyarrow.array(array)
            if len(shape) == 1
            else pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(array.reshape(-1)), shape[1])
            for name, array in log.items()
        }
        if len(shape) == 2:
            kind = pyarrow.list_(pyarrow.float32())
            columns = {name: array.cast(kind) for name, array in columns.items()}
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=MANY)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet"])
@pytest.mark.parametrize("shape", [(MANY,), (MANY // 1000, 1000)], ids=["tokens", "sequences"])
def test_memory_is_bounded_for_ten_million_tokens(
    suffix: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    pytest.importorskip("resource")
    path = tmp_path / f"log.{suffix}"
    make_many(path, shape)
    outcome = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
    )
    tokens, megabytes = outcome.stdout.split()
    assert int(tokens) == MANY
    assert float(megabytes) < MOST_MEGABYTES < MANY * BYTES_OF_TOKEN / 2**20 / 5


@pytest.mark.parametrize("write", [write_csv, write_json_lines])
def test_memory_is_bounded_for_lines(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tracemalloc

    monkeypatch.setattr(text, "BYTES_OF_BLOCK", 2**14)

    def peak(tokens: int) -> int:
        values = np.linspace(-9, 0, tokens)
        write(tmp_path / "log", dict.fromkeys(FEW, values))
        files = read_tokens(tmp_path / "log", chunk=500)
        tracemalloc.start()
        assert sum(len(part.step) for part in files) == tokens
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    peak(100)  # imports
    assert peak(40_000) < 1.5 * peak(4_000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokens.npz")
    with pytest.raises(InputPathError, match=r"tokens\.npz: it is not a regular file"):
        read_tokens(tmp_path / "tokens.npz")


def test_a_changed_byte_of_a_recorded_number_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    numbers = -np.random.default_rng(0).random((20, 50))
    with Recorder(tmp_path, every=1) as record:
        record(numbers, numbers, np.ones(20), np.ones((20, 50)))
    [path] = tmp_path.glob("*.parquet")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(TokenFileError, match="cannot be read as Parquet"):
        list(read_tokens(path))
