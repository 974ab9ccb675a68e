"""Random and damaged input of the Python entries: each gives its result or an error of bandpo.

A target takes bytes and makes a case of them. Seeded random bytes drive it here and in tests/trust;
`--guided` hands it to Atheris, which steers the bytes by the coverage that they reach. The parsers
and the reader of tables in Rust have targets of their own in rust/tests/fuzz.rs.

    python -m reliability.fuzz --cases 100000
    python -m reliability.fuzz --guided token_files --cases 100000
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bandpo import Band, BandTable, Clip, Divergence, PriceBand, Region
from bandpo._core import BandTable as CoreTable
from bandpo.cli import main as command_line
from bandpo.error import BandpoError
from bandpo.record import read_tokens
from bandpo.region import Dcpo
from bandpo.spec import region_or_source_from_spec, schedule_from_spec
from bandpo.table.verification import Checkpoint
from reliability.choices import Choices
from reliability.result import Row, write

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "data" / "corpus"
SEED = 20260304

Array = NDArray[Any]


@cache
def corpus(name: str) -> tuple[str, ...]:
    """Lines of a file of the corpus."""
    return tuple((CORPUS / f"{name}.txt").read_text(encoding="utf-8").splitlines())


@cache
def folder() -> Path:
    """The folder of the files of all cases, which is removed at the end of the process."""
    made = tempfile.mkdtemp(prefix="bandpo-fuzz-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


# --- texts -------------------------------------------------------------------------------------

_PIECES = ("0", "-1", "1e-320", "1e308", "1e999", "nan", "inf", "9" * 400, ".05", "\udce9", "\0")


def text_of(choices: Choices, lines: tuple[str, ...]) -> str:
    """A line with some changes."""
    text = choices.of(lines)
    for _ in range(choices.below(4)):
        place = choices.below(len(text) + 1)
        kind = choices.below(4)
        if kind == 0:
            text = text[:place] + text[place + 1 + choices.below(6) :]
        elif kind == 1:
            text = text[:place] + choices.of(lines) + text[place:]
        elif kind == 2:
            text = text[:place] + chr(choices.below(0x2FF)) + text[place:]
        else:
            text = text[:place] + choices.of(_PIECES) + text[place:]
    return text


def specs(data: bytes) -> None:
    """Specs of regions."""
    region = region_or_source_from_spec(text_of(Choices(data), corpus("specs")))
    if isinstance(region, Region):
        lower, upper = region.log_bounds([-0.5])
        assert lower[0] <= 0.0 <= upper[0]


def schedules(data: bytes) -> None:
    """Specs of schedules."""
    schedule_from_spec(text_of(Choices(data), corpus("schedules")))


def commands(data: bytes) -> None:
    """Arguments of the command line, whose files are damaged tables."""
    choices = Choices(data)
    line = text_of(choices, corpus("commands"))
    path = folder() / "table.safetensors"
    path.write_bytes(_damaged(choices, _TABLE))
    line = line.replace("FILE", str(path)).replace("FOLDER", str(folder()))
    try:
        words = shlex.split(line)
    except ValueError:
        words = line.split()
    if {"demo", "conform", "doctor"} & set(words[:1]):  # seconds each
        words.append("--unknown")
    if len(words) > 1 and words[0] == "plot" and "--json" not in words:
        words.append("--json")
    if "--exhaustive" in words or any(len(word) > 300 for word in words):
        return
    silent = io.StringIO("0.5 0.25\n")
    out, sys.stdin = io.StringIO(), silent
    before = os.getcwd()
    os.chdir(folder())  # where a picture without a path would go
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = command_line(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 2
    finally:
        sys.stdin = sys.__stdin__
        os.chdir(before)
    assert code in (0, 1, 2), code
    assert "Traceback" not in out.getvalue()


# --- files -------------------------------------------------------------------------------------

_TABLE = Band("kl", 0.05).table()._core.to_bytes()


def _damaged(choices: Choices, whole: bytes) -> bytes:
    """The bytes with some changes."""
    file = bytearray(whole)
    for _ in range(choices.below(4)):
        place = choices.below(len(file) + 1)
        kind = choices.below(6)
        if kind == 0:
            del file[place:]
        elif kind == 1:
            del file[place : place + choices.below(16)]
        elif kind == 2:
            file[place:place] = whole[place : place + choices.below(300)]
        elif kind == 3:
            file[place : place + 8] = (2 ** choices.below(64)).to_bytes(8, "little")
        elif kind == 4 and place < len(file):
            file[place] ^= 1 << choices.below(8)
        else:
            file[place : place + 1] = choices.of(_BYTES)
    return bytes(file)


_BYTES = (
    *(b"", b"{", b"[", b'"', b"-", b"9" * 30, b"1e999", b"NaN", b"null"),
    *(b"\xff\xfe", b"\0", b"\n", b","),
)


def _forged(region: str) -> bytes:
    """A table file of any description, with its checksum."""
    (size,) = struct.unpack_from("<Q", _TABLE)
    header = json.loads(_TABLE[8 : 8 + size])
    metadata, image = header["__metadata__"], _TABLE[8 + size :]
    metadata["region"] = region
    digest = hashlib.sha256()
    order = ("format", "format_version", "region", "grid", "max_error_log_upper")
    for key in (*order, "max_error_lower", "verification"):
        for part in (key.encode(), metadata[key].encode("utf-8", "replace")):
            digest.update(struct.pack("<Q", len(part)) + part)
    digest.update(image)
    metadata["checksum"] = digest.hexdigest()
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    raw = text.encode("utf-8", "replace")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + image


def descriptions(data: bytes) -> None:
    """Table files of any description, under a right checksum."""
    table = BandTable(CoreTable.from_bytes(_forged(text_of(Choices(data), corpus("descriptions")))))
    table.region.log_bounds([-0.5])


def checkpoints(data: bytes) -> None:
    """Checkpoints of a verification."""
    path = folder() / "checkpoint.json"
    state = Checkpoint(None, _TABLE, 100)
    whole = json.dumps({**state.key, "done": 3, "max_error": [1e-9, 0.0]}).encode()
    path.write_bytes(_damaged(Choices(data), whole))
    found = Checkpoint(path, _TABLE, 100)
    assert 0 <= found.done <= 100
    assert min(found.max_error) >= 0.0


def _token_rows(sequences: bool) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shape = (4, 3) if sequences else (12,)
    log: dict[str, Array] = {
        name: -rng.exponential(2.0, shape) for name in ("old_log_prob", "log_prob")
    }
    log["advantages"] = rng.normal(size=shape[:1])
    log["response_mask"] = rng.random(shape) < 0.7
    log["step"] = np.arange(shape[0])
    return log


@cache
def token_corpus() -> tuple[bytes, ...]:
    """Small whole files of every format, with a row a token and with a row a sequence."""
    from bandpo.record import Recorder

    files = []
    for log in map(_token_rows, (False, True)):
        names = list(log)
        rows = list(zip(*(array.tolist() for array in log.values()), strict=True))
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        files.append("\n".join(lines).encode() + b"\n")
        cells = [",".join(f'"{str(cell).lower()}"' for cell in row) for row in rows]
        files.append("\n".join([",".join(names), *cells]).encode() + b"\n")
        arrays = io.BytesIO()
        np.savez(arrays, **log)  # type: ignore[arg-type]
        files.append(arrays.getvalue())
        files.append(_safetensors(log))
        with contextlib.suppress(ImportError):
            import pyarrow
            import pyarrow.parquet

            parquet = io.BytesIO()
            table = pyarrow.table({name: array.tolist() for name, array in log.items()})
            pyarrow.parquet.write_table(table, parquet)
            files.append(parquet.getvalue())
    with contextlib.suppress(BandpoError), tempfile.TemporaryDirectory() as place:
        numbers = -np.ones((2, 3))
        with Recorder(place) as record:
            record(numbers, numbers, numbers, np.ones((2, 3)), step=1)
        files += [path.read_bytes() for path in Path(place).rglob("*.parquet")]
    return tuple(files)


def _safetensors(log: dict[str, Array]) -> bytes:
    header, body = {}, b""
    kinds = {"f8": "F64", "i8": "I64", "b1": "BOOL"}
    for name, array in log.items():
        place = len(body)
        body += array.tobytes()
        kind = kinds[array.dtype.str[1:]]
        offsets = [place, len(body)]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def token_files(data: bytes) -> None:
    """Files of logged tokens in every format."""
    choices = Choices(data)
    path = folder() / "tokens"
    kind = choices.below(8)
    path.write_bytes(choices.rest() if kind == 0 else _damaged(choices, choices.of(token_corpus())))
    for tokens in read_tokens(path, chunk=choices.of((1, 5, 2**20))):
        assert len(tokens.log_prob) == len(tokens.step)


# --- numbers and arrays --------------------------------------------------------------------------

_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 0.05, 1e-320, 1e308, float("nan"), float("inf"), -0.0, 10**400, -(10**400), True),
    *(None, "0.1", b"1", [], [0.1], (0.1, 0.2), (0.1, None), {}, object(), 1j, Fraction(1, 20)),
    *(Fraction(10**400), Decimal("0.1"), Decimal("1e999"), np.float16(0.1), np.float32(0.1)),
    *(np.longdouble("1e4000"), np.array(0.1), np.array([0.1]), np.array([]), np.array("x"), 2**63),
    *(np.array(None), np.timedelta64(1, "s"), np.bool_(True), range(2), lambda u: u),
)

_MAKERS: tuple[Callable[..., Any], ...] = (
    lambda a, b: Band("kl", a),
    lambda a, b: Band("kl", (a, b)),
    lambda a, b: Band(a, 0.1),
    lambda a, b: Clip(a, b),
    lambda a, b: Clip.between(a, b),
    lambda a, b: Clip.from_log_ratio(a, b),
    lambda a, b: Clip.kl3(a),
    lambda a, b: Dcpo(a, b),
    lambda a, b: PriceBand("tv", (a, b)),
    lambda a, b: Clip(0.2).cap(a),
    lambda a, b: Band("kl", 0.1).at_least(a, b),
    lambda a, b: Band("kl", 0.1).calibrated("tv", p=a),
    lambda a, b: Divergence.from_expression("u*ln(u)-u+1", at_zero=a, slope_at_infinity=b),
    lambda a, b: Divergence(a),
    lambda a, b: BandTable.load(a),
    lambda a, b: region_or_source_from_spec(a),
    lambda a, b: schedule_from_spec(a),
)


def numbers(data: bytes) -> None:
    """Arguments of every type for constructors of regions and readers."""
    choices = Choices(data)
    choices.of(_MAKERS)(choices.of(_NUMBERS), choices.of(_NUMBERS))


_DTYPES = (
    *("f2", "f4", "f8", "g", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16"),
    *("O", "S3", "U3", "M8[s]", "m8[s]", "V4"),
)

_READERS: tuple[Callable[[Array], Any], ...] = (
    Band("kl", 0.05).log_bounds,
    Band("kl", 0.05).bounds,
    Band("jensen-shannon", (0.05, 0.1)).diagnose,
    Band("tv", 0.05).table().log_bounds,
    Band("renyi:2", 0.05).cap(10).log_bounds,
    PriceBand("kl", 0.1).log_bounds,
    Clip(0.2).log_bounds,
    Dcpo().log_bounds,
    lambda logp: Band("kl", 0.05).contains(logp, logp),
    lambda logp: PriceBand("kl", 0.05).contains(logp, -0.1),
    lambda logp: Band("kl", 0.05).table().contains(-0.3, logp),
    lambda logp: Divergence("kl").between(logp, logp),
    lambda logp: Band("kl", logp).log_bounds(-1.0),
    lambda logp: Band("tv", 0.1).log_bounds(logp.tolist()),
)


def array_of(choices: Choices) -> Array:
    """An array of any dtype, byte order, layout and shape."""
    shape = choices.of(((), (0,), (1,), (5,), (2, 3), (0, 4), (1, 1, 3), (3, 0, 2), (40,)))
    bits = np.frombuffer((choices.rest() * 9 + bytes(320))[: 8 * 40], np.uint8)
    dtype = np.dtype(choices.of(_DTYPES))
    count = max(1, int(np.prod(shape)))
    if choices.below(2) or dtype.kind not in "fiu":
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array = -(bits[:count].astype("f8") / 16.0)
            array = array.astype(dtype) if dtype.kind != "V" else np.zeros(count, dtype)
    else:
        raw = np.resize(bits, count * dtype.itemsize)
        if dtype.char == "g":  # not every pattern of its bits is a number
            raw = np.zeros_like(raw)
        array = np.frombuffer(raw.tobytes(), dtype).copy()
    if array.dtype.kind == "f":  # numpy warns about a signalling NaN
        array[np.isnan(array)] = np.nan
    array = np.resize(array, shape).reshape(shape) if shape else array[:1].reshape(())
    kind = choices.below(7)
    if kind == 0 and array.dtype.itemsize > 1:
        array = array.astype(array.dtype.newbyteorder())
    elif kind == 1 and array.ndim:
        array = array[::-1]
    elif kind == 2 and array.ndim:
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif kind == 3:
        array = array.T
    elif kind == 4:
        array.flags.writeable = False
    elif kind == 5 and array.ndim:
        array = np.broadcast_to(array[:1], array.shape)
    elif kind == 6 and array.dtype.itemsize > 1:  # not aligned
        room = np.zeros(array.nbytes + 1, np.uint8)
        moved = room[1:].view(array.dtype) if array.dtype.kind != "O" else array.reshape(-1)
        moved = moved[: array.size].reshape(array.shape)
        moved[...] = array
        array = moved
    return np.asarray(array)


def arrays(data: bytes) -> None:
    """Arrays of every dtype and layout, against the same numbers in order."""
    choices = Choices(data)
    reader = choices.of(_READERS)
    array = array_of(choices)
    before = array.tobytes() if array.dtype.kind != "O" else b""
    try:
        found = reader(array)
    finally:
        assert array.dtype.kind == "O" or array.tobytes() == before, "the argument was changed"
    plain = np.array(array, array.dtype.newbyteorder("="), order="C")
    wanted = reader(plain)
    assert _bits(found) == _bits(wanted), "the layout changed the result"


def _bits(result: Any) -> bytes:
    parts = result if isinstance(result, tuple) else (result,)
    return b"".join(
        _bits(part) if isinstance(part, tuple) else np.asarray(part).tobytes() for part in parts
    )


@cache
def _losses() -> tuple[dict[str, Any], ...]:
    table = Band("kl", 0.05).table()
    return (
        {"region": Band("kl", 0.05).cap(10)},
        {"region": Clip(0.2, 0.28), "surrogate": "weight"},
        {"region": table, "ratio_level": "sequence"},
        {"region": Band("tv", 0.1), "surrogate": "mask", "loss_agg_mode": "seq-mean-token-mean"},
    )


def tensors(data: bytes) -> None:
    """Tensors of every dtype and layout in a loss, against the same numbers in order."""
    import torch

    from bandpo.loss import policy_loss

    choices = Choices(data)
    options = choices.of(_losses())
    backend: Any = choices.of(("native", "torch"))
    shape = choices.of(((2, 3), (1, 1), (0, 3), (3, 0), (4, 7), (5,), (), (2, 2, 2)))
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
    generator = torch.Generator().manual_seed(choices.below(2**16))
    given = []
    for place in range(4):
        dtype = choices.of(dtypes[:2] if choices.below(4) else dtypes)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = -values.abs() if place < 2 else values
        if choices.below(8) == 0 and values.numel():
            special = (float("nan"), float("inf"), -float("inf"), 0.0, 5.0, -3e38, 1e-320)
            values.view(-1)[choices.below(values.numel())] = choices.of(special)
        values = (values > 0.0) if place == 3 else values
        values = values.to(dtype) if place < 3 or choices.below(2) else values
        kind = choices.below(4)
        if kind == 1 and values.dim() == 2:
            values = values.t().contiguous().t()
        elif kind == 2 and values.dim():
            values = torch.stack([values, values], -1)[..., 0]
        elif kind == 3 and values.dim() == 2 and values.shape[1]:
            values = values[:, :1].expand(shape)
        given.append(values)
    results = []
    for batch in (given, [tensor.clone(memory_format=torch.contiguous_format) for tensor in given]):
        new = batch[1].detach()
        if new.is_floating_point():
            new = new.requires_grad_()
        result = policy_loss(batch[0], new, *batch[2:], backend=backend, **options)
        gradient = torch.autograd.grad(result.loss, new, allow_unused=True)[0]
        results.append((result.loss.detach(), gradient))
    for found, wanted in zip(*results, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:  # sums of torch depend on the layout in their last bits
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0, equal_nan=True)


TARGETS: dict[str, tuple[Callable[[bytes], None], float]] = {
    "specs": (specs, 1.0),
    "schedules": (schedules, 1.0),
    "descriptions": (descriptions, 1.0),
    "checkpoints": (checkpoints, 0.2),
    "numbers": (numbers, 4.0),
    "arrays": (arrays, 2.0),
    "token_files": (token_files, 0.3),
    "commands": (commands, 0.05),
    "tensors": (tensors, 0.2),
}
"""Targets, and their share of the cases, by what one takes."""


def one(target: Callable[[bytes], None], data: bytes) -> bool:
    """Runs a case; True if it was accepted. Any error but those of bandpo goes through."""
    try:
        target(data)
    except BandpoError:
        return False
    return True


def run(name: str, cases: int, seed: int = SEED) -> int:
    """Runs cases of a target and returns how many were accepted.

    Raises:
        AssertionError: If a case fails, with its bytes.
    """
    rng = np.random.default_rng(seed)
    accepted = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # What a case is warned about on purpose; others of numpy or Python are findings.
        for expected in ("log_prob", "advantages", "old_log_prob", "Clip", "the table of", "far"):
            warnings.filterwarnings("ignore", rf"(?s).*{expected}")
        for number in range(cases):
            data = rng.bytes(int(rng.integers(4, 120)))
            try:
                accepted += one(TARGETS[name][0], data)
            except Exception as error:
                raise AssertionError(f"{name}, case {number}, {data!r}: {error!r}") from error
    return accepted


def run_rust(cases: int, seed: int) -> list[Row]:
    """The targets of rust/tests/fuzz.rs."""
    environment = {"BANDPO_FUZZ_CASES": str(cases), "BANDPO_FUZZ_SEED": str(seed)}
    done = subprocess.run(
        ["cargo", "test", "--locked", "--lib", "fuzz", "--", "--nocapture", "--test-threads=1"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    lines = re.findall(r"fuzzed ([\w ]+): (\d+) cases, (\d+) accepted", done.stdout)
    return [
        Row(f"{what} (Rust)", int(count), f"{accepted} accepted, no panic")
        for what, count, accepted in sorted(lines)
    ]


def guided(name: str, cases: int, seed: int) -> None:
    """Runs a target under Atheris, which ends the process."""
    import atheris

    atheris.instrument_all()
    target = TARGETS[name][0]
    atheris.Setup([sys.argv[0], f"-runs={cases}", f"-seed={seed}", "-max_len=512"],
                  lambda data: one(target, data) and None)  # fmt: skip
    atheris.Fuzz()


def main() -> None:
    """Runs all targets and writes their counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of a target of share 1")
    parser.add_argument("--rust-cases", type=int, default=6_000_000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--guided", choices=list(TARGETS))
    parsed = parser.parse_args()
    if parsed.guided:
        guided(parsed.guided, parsed.cases, parsed.seed)
    rows = run_rust(parsed.rust_cases, parsed.seed)
    for name, (target, share) in TARGETS.items():
        cases = int(parsed.cases * share)
        accepted = run(name, cases, parsed.seed)
        what = (target.__doc__ or name).rstrip(".").split(",")[0]
        rows.append(Row(what, cases, f"{accepted} accepted, other errors: none"))
    command = f"python -m reliability.fuzz --cases {parsed.cases} --rust-cases {parsed.rust_cases}"
    write("fuzzing", command, rows)


if __name__ == "__main__":
    main()
