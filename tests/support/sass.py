"""Machine code of NVIDIA's GPUs, run warp by warp on the CPU, so that instructions are counted.

A program is the text of ``nvdisasm``. A warp is 32 lanes of numpy arrays. Each instruction that it
issues is one step, also if only some lanes take part. The two ways of a branch run one after the
other, until the lanes meet again at the barrier that the compiler set. Results are those of the
arithmetic that the instructions name, so that a wrong reading of one shows in the losses.
Reciprocals, which a GPU approximates, are rounded instead; only divisions use them.

An instruction that is not known ends the run with its text.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bandpo.backends.cuda.raw_module import numpy_scalars

LANES = 32
RZ = 255

PARAMETERS = {80: 0x160, 90: 0x210, 100: 0x380}
"""Where the arguments of a kernel begin in the constant bank, by architecture."""
GRID = {80: 0x0C, 90: 0x0C, 100: 0x370}
"""Where the number of blocks stands."""
SHARED_BYTES = 96 * 1024

Words = Any  # uint32 [32]
Read = Callable[["Warp"], Words]
Step = Callable[["Warp", Any], None]


class Instruction(NamedTuple):
    """A line of a program."""

    text: str
    name: str
    """Opcode without its modifiers."""
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None
    """Predicate, such as ``!P0``."""


class Program(NamedTuple):
    """The instructions of a kernel and the places of its labels."""

    instructions: list[Instruction]
    labels: dict[str, int]
    constants: bytes = b""
    """The compiler's own constants, bank 2."""


_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+|\.text\.\S+|\$?[\w$]+):\s*$")


def parse(text: str, constants: bytes = b"") -> Program:
    """Returns the program in the output of ``nvdisasm`` for a binary with one kernel.

    Args:
        text: The output.
        constants: The section of the compiler's constants.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.match(line):
            instructions.append(_instruction(found[2]))
    return Program(instructions, labels, constants)


def _instruction(text: str) -> Instruction:
    guard = None
    rest = text.replace(".reuse", "")
    if rest.startswith("@"):
        guard, rest = rest[1:].split(None, 1)
    opcode, _, operands = rest.partition(" ")
    name, *modifiers = opcode.split(".")
    parts = re.split(r",\s*(?![^(\[]*[)\]])", operands.strip()) if operands.strip() else []
    return Instruction(text, name, tuple(modifiers), tuple(part.strip() for part in parts), guard)


@dataclass
class Counts:
    """What a run issued.

    Attributes:
        issued: Times that each instruction of the program was issued to a warp.
        shared_wavefronts: Cycles that loads and stores of shared memory take, one for each address
            that two lanes need from the same bank.
    """

    issued: list[int]
    shared_wavefronts: int = 0

    def by_name(self, program: Program) -> Counter[str]:
        """Returns the number of issued instructions of each opcode."""
        found: Counter[str] = Counter()
        for instruction, number in zip(program.instructions, self.issued, strict=True):
            found[instruction.name] += number
        return found


@dataclass
class Group:
    """Lanes of a warp that run together."""

    at: int
    mask: Any


@dataclass
class Warp:
    """The state of a warp."""

    machine: Machine
    first_thread: int
    block: int
    registers: Any = field(default_factory=lambda: np.zeros((256, LANES), np.uint32))
    uniform: Any = field(default_factory=lambda: np.zeros((256, LANES), np.uint32))
    predicates: Any = field(default_factory=lambda: np.zeros((8, LANES), np.bool_))
    uniform_predicates: Any = field(default_factory=lambda: np.zeros((8, LANES), np.bool_))
    barriers: dict[str, Any] = field(default_factory=dict)
    waiting: dict[str, Any] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    exited: Any = field(default_factory=lambda: np.zeros(LANES, np.bool_))

    def __post_init__(self) -> None:
        self.predicates[7] = self.uniform_predicates[7] = True
        self.groups = [Group(0, np.ones(LANES, np.bool_))]


class UnknownInstructionError(Exception):
    """An instruction that the machine cannot run."""


class Machine:
    """Runs launches of one kernel.

    Attributes:
        counts: What all launches so far issued.
        grid: Max blocks of a launch.
    """

    def __init__(self, program: Program, architecture: int, grid: int = 1) -> None:
        self.program = program
        self.architecture = architecture
        self.grid = grid
        self.counts = Counts([0] * len(program.instructions))
        self.constants = np.zeros(0x1000, np.uint8)
        self.known = np.zeros(0x1000, np.bool_)
        self.shared = np.zeros(SHARED_BYTES, np.uint8)
        self._steps = [_step(instruction, self) for instruction in program.instructions]
        self._guards = [
            None if one.guard is None else _predicate(one.guard) for one in program.instructions
        ]

    def launch(
        self,
        kernel: str,
        device: object,
        blocks: int,
        types: str,
        arguments: tuple[float, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Takes the place of `bandpo.backends.cuda.launch.launch`, with pointers of the host."""
        at = PARAMETERS[self.architecture]
        for scalar in numpy_scalars(types, arguments):
            at = -(-at // scalar.itemsize) * scalar.itemsize
            self._set(at, scalar)
            at += scalar.itemsize
        grid = max(1, min(blocks, self.grid))
        base = GRID[self.architecture] - 0x0C
        for place, number in ((0x00, 256), (0x04, 1), (0x08, 1), (0x0C, grid), (0x10, 1)):
            self._set(base + place, np.uint32(number))
        for place in (0x28, 0x118, 0x208, 0x358, 0x37C):  # stack and memory descriptors
            self.known[place : place + 8] = True
        with np.errstate(all="ignore"):
            for block in range(grid):
                self._run_block(block)

    def _set(self, at: int, value: Any) -> None:
        raw = np.frombuffer(np.asarray(value).tobytes(), np.uint8)
        self.constants[at : at + raw.size] = raw
        self.known[at : at + raw.size] = True

    def constant(self, at: int, words: int = 1, bank: int = 0) -> list[int]:
        """Returns words of a constant bank."""
        if bank == 2:
            return list(np.frombuffer(self.program.constants, np.uint32, words, at))
        if not self.known[at : at + 4 * words].all():
            raise UnknownInstructionError(f"c[0x0][{at:#x}] is not set")
        return [int(word) for word in self.constants[at : at + 4 * words].view(np.uint32)]

    def _run_block(self, block: int) -> None:
        self.shared[:] = 0
        warps = [Warp(self, first, block) for first in range(0, 256, LANES)]
        while any(warp.groups for warp in warps):
            for warp in warps:
                self._run_to_barrier(warp)
            # All lanes of all warps wait, or have ended.
            for warp in warps:
                waiting = warp.waiting.pop("BAR", None)
                if waiting is not None:
                    warp.groups.append(waiting)
                elif not warp.exited.all():
                    raise UnknownInstructionError("a barrier that not all lanes reach")

    def _run_to_barrier(self, warp: Warp) -> None:
        issued, steps, guards = self.counts.issued, self._steps, self._guards
        while warp.groups:
            group = warp.groups[-1]
            at = group.at
            issued[at] += 1
            guard = guards[at]
            mask = group.mask if guard is None else group.mask & guard(warp)
            group.at = at + 1
            steps[at](warp, mask)

    # Lanes that part and meet.

    def jump(self, warp: Warp, mask: Any, target: int) -> None:
        """Moves some lanes of the running group to another place."""
        group = warp.groups[-1]
        if not mask.any():
            return
        rest = group.mask & ~mask
        if not rest.any():
            group.at = target
            return
        group.mask = rest
        warp.groups.append(Group(target, mask.copy()))

    def scatter(self, warp: Warp, values: Any, mask: Any) -> None:
        """Moves lanes of the running group to places given in bytes."""
        group = warp.groups.pop()
        rest = group.mask & ~mask
        if rest.any():
            warp.groups.append(Group(group.at, rest))
        for value in np.unique(values[mask]):
            warp.groups.append(Group(int(value) // 16, mask & (values == value)))

    def wait(self, warp: Warp, barrier: str, mask: Any) -> None:
        """Lets the lanes of the running group wait until all that the barrier names are there."""
        group = warp.groups.pop()
        if not mask.any():
            warp.groups.append(group)
            return
        if not (mask == group.mask).all():
            raise UnknownInstructionError("a guarded barrier of some lanes")
        held = warp.waiting.get(barrier)
        if held is not None:
            group = Group(group.at, held.mask | group.mask)
        warp.waiting[barrier] = group
        self._release(warp, barrier)

    def _release(self, warp: Warp, barrier: str) -> None:
        held = warp.waiting.get(barrier)
        if held is None:
            return
        missing = warp.barriers[barrier] & ~warp.exited & ~held.mask
        if not missing.any():
            del warp.waiting[barrier]
            warp.groups.append(held)

    def leave(self, warp: Warp, mask: Any) -> None:
        """Ends lanes of the running group."""
        group = warp.groups[-1]
        warp.exited |= mask
        group.mask = group.mask & ~mask
        if not group.mask.any():
            warp.groups.remove(group)
        for barrier in list(warp.waiting):
            if barrier != "BAR":
                self._release(warp, barrier)

    def forget(self, warp: Warp, mask: Any, barrier: str) -> None:
        """Takes lanes out of a barrier, so that the others do not wait for them."""
        if mask.any() and barrier in warp.barriers:
            warp.barriers[barrier] = warp.barriers[barrier] & ~mask
            running = warp.groups.pop()
            self._release(warp, barrier)
            warp.groups.append(running)

    # Memory.

    def wavefronts(self, addresses: Any, size: int, mask: Any) -> None:
        """Counts the cycles of an access to shared memory."""
        lanes_at_a_time = {16: 8, 8: 16}.get(size, 32)
        for first in range(0, LANES, lanes_at_a_time):
            part = slice(first, first + lanes_at_a_time)
            words = addresses[part][mask[part]].astype(np.int64) // 4
            if words.size == 0:
                continue
            every = np.unique((words[:, None] + np.arange(max(1, size // 4))).ravel())
            self.counts.shared_wavefronts += int(np.bincount(every % 32).max())


# Operands.


def _predicate(text: str) -> Callable[[Warp], Any]:
    negated = text.startswith("!")
    name = text.lstrip("!")
    uniform = name.startswith("U")
    digits = name.lstrip("UP")
    index = 7 if digits == "T" else int(digits)

    def read(warp: Warp) -> Any:
        file = warp.uniform_predicates if uniform else warp.predicates
        return ~file[index] if negated else file[index]

    return read


def _is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P[T\d]", text) is not None


def _is_register(text: str) -> bool:
    return re.fullmatch(r"(R|UR)(Z|\d+)", text) is not None


def _register(text: str) -> tuple[bool, int]:
    """Whether it is uniform, and its number."""
    uniform = text.startswith("UR")
    digits = text[2:] if uniform else text[1:]
    return uniform, RZ if digits == "Z" else int(digits)


_FLOATS = {"+INF": math.inf, "-INF": -math.inf, "INF": math.inf}


def _constant_word(text: str) -> int | None:
    """The bits of an immediate number."""
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return int(text, 16) & 0xFFFFFFFF
    if "QNAN" in text:
        return 0xFFC00000 if text.startswith("-") else 0x7FC00000
    if text in _FLOATS:
        return int(np.float32(_FLOATS[text]).view(np.uint32))
    if re.fullmatch(r"-?\d+(\.\d*)?(e[+-]?\d+)?", text):
        return int(np.float32(float(text)).view(np.uint32))
    return None


def _raw(text: str, machine: Machine, offset: int = 0) -> Read:
    """The 32 bits of an operand without sign; word `offset` of a wide one."""
    text = text.removesuffix(".64").removesuffix(".U32").removesuffix(".64H")
    if _is_register(text):
        uniform, number = _register(text)
        if number != RZ:
            number += offset
        if uniform:
            return lambda warp: warp.uniform[number]
        return lambda warp: warp.registers[number]
    if found := re.fullmatch(r"c\[(0x[02])\]\[(0x[0-9a-f]+)\]", text):
        at, bank = int(found[2], 16) + 4 * offset, int(found[1], 16)
        return lambda warp: np.full(LANES, machine.constant(at, bank=bank)[0], np.uint32)
    if (found := re.search(r"\((\.L_x_\d+)", text)) and "@" in text:
        place = machine.program.labels[found[1]] if "32@lo" in text else 0
        return lambda warp: np.full(LANES, place, np.uint32)
    word = _constant_word(text)
    if word is None:
        raise UnknownInstructionError(f"operand {text}")
    constant = np.full(LANES, word, np.uint32)
    return lambda warp: constant


def _word(text: str, machine: Machine) -> Read:
    """An integer operand, with its sign."""
    if text.startswith("-") and not text.startswith("-0x") and not re.match(r"-\d", text):
        inner = _word(text[1:], machine)
        return lambda warp: np.uint32(0) - inner(warp)
    if text.startswith("~"):
        inverted = _raw(text[1:], machine)
        return lambda warp: ~inverted(warp)
    if text.startswith("|"):
        size = _raw(text.strip("|"), machine)
        return lambda warp: np.abs(size(warp).view(np.int32)).view(np.uint32)
    return _raw(text, machine)


def _wide_addend(text: str, machine: Machine) -> Callable[[Warp], Any]:
    """An integer operand of a sum as int64, of which a carry is seen."""
    if text.startswith("-") and not text.startswith("-0x"):
        inner = _raw(text[1:], machine)
        return lambda warp: (1 << 32) - inner(warp).astype(np.int64)
    word = _word(text, machine)
    return lambda warp: word(warp).astype(np.int64)


def _float(text: str, machine: Machine, ftz: bool) -> Callable[[Warp], Any]:
    negative = text.startswith("-") and _constant_word(text) is None
    inner = text[1:] if negative else text
    absolute = inner.startswith("|")
    raw = _raw(inner.strip("|"), machine)

    def read(warp: Warp) -> Any:
        value = raw(warp).view(np.float32)
        if absolute:
            value = np.abs(value)
        if negative:
            value = -value
        return _flushed(value) if ftz else value

    return read


_MIN_NORMAL = np.float32(2.0**-126)


def _flushed(value: Any) -> Any:
    small = np.abs(value) < _MIN_NORMAL
    if small.any():
        return np.where(small, np.copysign(np.float32(0), value), value)
    return value


def _double(text: str, machine: Machine) -> Callable[[Warp], Any]:
    negative = text.startswith("-") and not re.match(r"-\d", text)
    inner = text[1:] if negative else text
    absolute = inner.startswith("|")
    inner = inner.strip("|")
    word = None if _is_register(inner) or inner.startswith("c[") else inner
    if word is not None:
        number = np.full(LANES, _FLOATS.get(word) or float(word), np.float64)
        return lambda warp: number
    low, high = _raw(inner, machine), _raw(inner, machine, 1)

    def read(warp: Warp) -> Any:
        value = _joined(low(warp), high(warp)).view(np.float64)
        if absolute:
            value = np.abs(value)
        return -value if negative else value

    return read


def _joined(low: Any, high: Any) -> Any:
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def _pair(text: str, machine: Machine) -> Callable[[Warp], Any]:
    """64 bits of an integer operand."""
    if text.startswith("-"):
        inner = _pair(text[1:], machine)
        return lambda warp: np.uint64(0) - inner(warp)
    if (word := _constant_word(text)) is not None:
        signed = int(text, 16) if "0x" in text else word
        number = np.full(LANES, signed & (1 << 64) - 1, np.uint64)
        return lambda warp: number
    low, high = _raw(text, machine), _raw(text, machine, 1)
    return lambda warp: _joined(low(warp), high(warp))


def _write(text: str, offset: int = 0) -> Callable[[Warp, Any, Any], None]:
    """Writes uint32 values of the lanes of a mask."""
    uniform, number = _register(text.removesuffix(".64"))
    if number == RZ:
        return lambda warp, mask, value: None
    number += offset
    if uniform:

        def write_uniform(warp: Warp, mask: Any, value: Any) -> None:
            if mask.any():
                warp.uniform[number] = np.broadcast_to(value, LANES)[int(np.argmax(mask))]

        return write_uniform

    def write(warp: Warp, mask: Any, value: Any) -> None:
        np.copyto(warp.registers[number], value, where=mask, casting="unsafe")

    return write


def _write_float(text: str, ftz: bool) -> Callable[[Warp, Any, Any], None]:
    write = _write(text)

    def write_float(warp: Warp, mask: Any, value: Any) -> None:
        value = np.asarray(value, np.float32)
        write(warp, mask, (_flushed(value) if ftz else value).view(np.uint32))

    return write_float


def _write_pair(text: str) -> Callable[[Warp, Any, Any], None]:
    low, high = _write(text), _write(text, 1)

    def write(warp: Warp, mask: Any, value: Any) -> None:
        bits = np.ascontiguousarray(value).view(np.uint64)
        low(warp, mask, (bits & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        high(warp, mask, (bits >> np.uint64(32)).astype(np.uint32))

    return write


def _write_predicate(text: str) -> Callable[[Warp, Any, Any], None]:
    name = text
    uniform = name.startswith("U")
    digits = name.lstrip("UP")
    if digits == "T":
        return lambda warp, mask, value: None
    index = int(digits)
    if uniform:

        def write_uniform(warp: Warp, mask: Any, value: Any) -> None:
            if mask.any():
                warp.uniform_predicates[index] = value[int(np.argmax(mask))]

        return write_uniform

    def write(warp: Warp, mask: Any, value: Any) -> None:
        np.copyto(warp.predicates[index], value, where=mask)

    return write


def _term(text: str, machine: Machine) -> Callable[[Warp], Any]:
    """A term of an address, as int64."""
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        number = int(text, 16)
        return lambda warp: number
    scaled = re.search(r"\.X(\d+)$", text)
    scale = int(scaled[1]) if scaled else 1
    name = text.split(".")[0]
    low, high = _raw(name, machine), _raw(name, machine, 1)
    if ".64" in text and name not in ("RZ", "URZ"):
        return lambda warp: _joined(low(warp), high(warp)).view(np.int64)
    return lambda warp: low(warp).view(np.int32).astype(np.int64) * scale


def _address(text: str, machine: Machine) -> Callable[[Warp], Any]:
    """The sum of the terms of an address, as int64."""
    inside = text[text.rindex("[") + 1 : -1]
    terms = [_term(term.lstrip("+"), machine) for term in re.findall(r"[+-]?[^+-]+", inside)]
    return lambda warp: sum((term(warp) for term in terms), np.zeros(LANES, np.int64))


# Instructions.

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
    "EQ": np.equal, "NE": lambda a, b: (a < b) | (a > b),
}  # fmt: skip


def _float_compare(name: str) -> Callable[[Any, Any], Any]:
    if name == "NAN":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "NUM":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name.endswith("U") and name != "U":
        ordered = _COMPARE[name[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    return _COMPARE[name]


_COMBINE = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


def _step(instruction: Instruction, machine: Machine) -> Step:
    """Returns what an instruction does; an unknown one fails when it is reached."""
    name = instruction.name
    makers = _MAKERS
    maker = makers.get(name) or (makers.get(name[1:]) if name.startswith("U") else None)
    try:
        if maker is None:
            raise UnknownInstructionError(f"opcode {name}")
        return maker(instruction, machine)
    except (UnknownInstructionError, ValueError, IndexError, KeyError) as problem:
        reason = f"{instruction.text}: {problem!r}"

        def fail(warp: Warp, mask: Any) -> None:
            raise UnknownInstructionError(reason)

        return fail


_MAKERS: dict[str, Callable[[Instruction, Machine], Step]] = {}


def _op(*names: str) -> Callable[[Any], Any]:
    def register(maker: Any) -> Any:
        for name in names:
            _MAKERS[name] = maker
        return maker

    return register


@_op("NOP", "YIELD", "DEPBAR", "MEMBAR", "ERRBAR", "CCTL", "ACQBULK", "PREEXIT")
def _nothing(one: Instruction, machine: Machine) -> Step:
    return lambda warp, mask: None


@_op("MOV", "R2UR", "IMOV")
def _mov(one: Instruction, machine: Machine) -> Step:
    operands = [text for text in one.operands if not _is_predicate(text)]
    if "64" in one.modifiers:
        write_pair, pair = _write_pair(operands[0]), _pair(operands[1], machine)
        return lambda warp, mask: write_pair(warp, mask, pair(warp))
    write, read = _write(operands[0]), _word(operands[1], machine)
    return lambda warp, mask: write(warp, mask, read(warp))


def _truth(table: int, a: Any, b: Any, c: Any) -> Any:
    result = np.zeros_like(a)
    for bit in range(8):
        if table >> bit & 1:
            result |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
    return result


@_op("LOP3")
def _lop3(one: Instruction, machine: Machine) -> Step:
    operands = list(one.operands)
    set_predicate = _write_predicate(operands.pop(0)) if _is_predicate(operands[0]) else None
    write = _write(operands[0])
    a, b, c = (_word(text, machine) for text in operands[1:4])
    table = int(operands[4], 16)
    either = _predicate(operands[5]) if len(operands) > 5 else (lambda warp: np.False_)

    def step(warp: Warp, mask: Any) -> None:
        result = _truth(table, a(warp), b(warp), c(warp))
        if set_predicate is not None:
            set_predicate(warp, mask, (result != 0) | either(warp))
        write(warp, mask, result)

    return step


@_op("PLOP3")
def _plop3(one: Instruction, machine: Machine) -> Step:
    first, second = _write_predicate(one.operands[0]), _write_predicate(one.operands[1])
    a, b, c = (_predicate(text) for text in one.operands[2:5])
    tables = [int(text, 16) for text in one.operands[5:7]]

    def step(warp: Warp, mask: Any) -> None:
        values = [np.broadcast_to(read(warp), LANES) for read in (a, b, c)]
        results = [_truth(table, *values) for table in tables]
        first(warp, mask, results[0])
        second(warp, mask, results[1])

    return step


@_op("IADD3", "IADD", "VIADD")
def _iadd3(one: Instruction, machine: Machine) -> Step:
    operands = list(one.operands)
    extended = "X" in one.modifiers
    if "64" in one.modifiers:
        write_pair = _write_pair(operands.pop(0))
        carries = []
        while _is_predicate(operands[0]):
            carries.append(operands.pop(0))
        if extended or any(carry.lstrip("U") != "PT" for carry in carries):
            raise UnknownInstructionError("wide carry")
        pairs = [_pair(text, machine) for text in operands if not _is_predicate(text)]
        return lambda warp, mask: write_pair(
            warp, mask, sum((pair(warp) for pair in pairs), np.zeros(LANES, np.uint64))
        )
    write = _write(operands.pop(0))
    carry_out = []
    while _is_predicate(operands[0]):
        carry_out.append(_write_predicate(operands.pop(0)))
    carry_in = []
    while operands and _is_predicate(operands[-1]):
        carry_in.append(_predicate(operands.pop()))
    addends = [_wide_addend(text, machine) for text in operands]
    if carry_in and not extended:
        raise UnknownInstructionError("carry without .X")

    def step(warp: Warp, mask: Any) -> None:
        total = sum((addend(warp) for addend in addends), np.zeros(LANES, np.int64))
        for carry in carry_in:
            total = total + np.broadcast_to(carry(warp), LANES).astype(np.int64)
        for number, output in enumerate(carry_out):
            output(warp, mask, total >> 32 > number)
        write(warp, mask, total.astype(np.uint32))

    return step


@_op("IMAD")
def _imad(one: Instruction, machine: Machine) -> Step:
    modifiers, operands = one.modifiers, list(one.operands)
    unsigned = "U32" in modifiers
    carry_in = None
    if _is_predicate(operands[-1]):
        carry_in = _predicate(operands.pop())
    if "MOV" in modifiers:
        write, moved = _write(operands[0]), _word(operands[-1], machine)
        return lambda warp, mask: write(warp, mask, moved(warp))
    target = operands.pop(0)
    carry_out = _write_predicate(operands.pop(0)) if _is_predicate(operands[0]) else None
    a, b = (_word(text, machine) for text in operands[:2])

    def product(warp: Warp) -> Any:
        if unsigned:
            return a(warp).astype(np.uint64) * b(warp).astype(np.uint64)
        wide = a(warp).view(np.int32).astype(np.int64) * b(warp).view(np.int32).astype(np.int64)
        return wide.view(np.uint64)

    if "WIDE" in modifiers:
        write_pair, addend = _write_pair(target), _pair(operands[2], machine)

        def wide(warp: Warp, mask: Any) -> None:
            factor, more = product(warp), addend(warp)
            total = factor + more
            if carry_out is not None:
                carry_out(warp, mask, total < factor)
            write_pair(warp, mask, total)

        return wide
    write, added = _write(target), _word(operands[2], machine)
    if carry_out is not None:
        raise UnknownInstructionError("carry of a narrow IMAD")

    def narrow(warp: Warp, mask: Any) -> None:
        result = product(warp)
        if "HI" in modifiers:
            result = result >> np.uint64(32)
        result = result + added(warp).astype(np.uint64)
        if carry_in is not None:
            result = result + np.broadcast_to(carry_in(warp), LANES).astype(np.uint64)
        write(warp, mask, (result & np.uint64(0xFFFFFFFF)).astype(np.uint32))

    return narrow


@_op("LEA")
def _lea(one: Instruction, machine: Machine) -> Step:
    modifiers, operands = one.modifiers, list(one.operands)
    write = _write(operands.pop(0))
    carry_out = []
    while _is_predicate(operands[0]):
        carry_out.append(_write_predicate(operands.pop(0)))
    carry_in = []
    while _is_predicate(operands[-1]):
        carry_in.append(_predicate(operands.pop()))
    shift = int(operands.pop(), 16)
    low = _word(operands[0], machine)
    base = _wide_addend(operands[1], machine)
    high = _word(operands[2], machine) if len(operands) > 2 else None
    signed = "SX32" in modifiers

    def step(warp: Warp, mask: Any) -> None:
        if signed:
            whole = low(warp).view(np.int32).astype(np.int64).view(np.uint64)
        else:
            whole = low(warp).astype(np.uint64)
            if high is not None:
                whole = _joined(low(warp), high(warp))
        part = whole << np.uint64(shift)
        part = part >> np.uint64(32) if "HI" in modifiers else part & np.uint64(0xFFFFFFFF)
        total = part.astype(np.int64) + base(warp)
        for carry in carry_in:
            total = total + np.broadcast_to(carry(warp), LANES).astype(np.int64)
        for number, output in enumerate(carry_out):
            output(warp, mask, total >> 32 > number)
        write(warp, mask, (total & 0xFFFFFFFF).astype(np.uint32))

    return step


@_op("SHF")
def _shf(one: Instruction, machine: Machine) -> Step:
    modifiers = one.modifiers
    write = _write(one.operands[0])
    low, amount, high = (_word(text, machine) for text in one.operands[1:4])
    wraps, left, wide = "W" in modifiers, "L" in modifiers, "U64" in modifiers or "S64" in modifiers
    signed = "S32" in modifiers or "S64" in modifiers
    takes_high = "HI" in modifiers
    limit = 63 if wide else 31

    def step(warp: Warp, mask: Any) -> None:
        by = amount(warp).astype(np.uint64)
        by = by & np.uint64(limit) if wraps else np.minimum(by, np.uint64(limit + 1))
        over = by > limit
        by = np.minimum(by, np.uint64(limit))
        whole = _joined(low(warp), high(warp))
        if left:
            if not wide and not takes_high:
                shifted = (whole & np.uint64(0xFFFFFFFF)) << by
            else:
                shifted = whole << by
        elif signed:
            shifted = (whole.view(np.int64) >> by.astype(np.int64)).view(np.uint64)
        else:
            shifted = whole >> by
        result = shifted >> np.uint64(32) if takes_high else shifted
        result = (result & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        if over.any():
            if signed and not left:
                sign = (high(warp).view(np.int32) >> 31).view(np.uint32)
                result = np.where(over, sign, result)
            elif not wide:
                result = np.where(over, np.uint32(0), result)
        write(warp, mask, result)

    return step


@_op("SEL", "FSEL")
def _sel(one: Instruction, machine: Machine) -> Step:
    write = _write(one.operands[0])
    if one.name == "FSEL":
        ftz = "FTZ" in one.modifiers
        first, second = (_float(text, machine, ftz) for text in one.operands[1:3])
        a: Read = lambda warp: first(warp).view(np.uint32)  # noqa: E731
        b: Read = lambda warp: second(warp).view(np.uint32)  # noqa: E731
    else:
        a, b = (_word(text, machine) for text in one.operands[1:3])
    which = _predicate(one.operands[3])
    return lambda warp, mask: write(warp, mask, np.where(which(warp), a(warp), b(warp)))


@_op("ISETP")
def _isetp(one: Instruction, machine: Machine) -> Step:
    compare, *rest = one.modifiers
    extended, unsigned = "EX" in rest, "U32" in rest or "U64" in rest
    wide = "64" in rest or "U64" in rest or "S64" in rest
    combine = next(_COMBINE[name] for name in rest if name in _COMBINE)
    yes, no = _write_predicate(one.operands[0]), _write_predicate(one.operands[1])
    other = _predicate(one.operands[4])
    low = _predicate(one.operands[5]) if extended else None
    if wide:
        pairs = [_pair(text, machine) for text in one.operands[2:4]]
    else:
        pairs = [_word(text, machine) for text in one.operands[2:4]]
    dtype = {(False, True): np.uint32, (False, False): np.int32,
             (True, True): np.uint64, (True, False): np.int64}[wide, unsigned]  # fmt: skip

    def step(warp: Warp, mask: Any) -> None:
        a, b = (np.ascontiguousarray(pair(warp)).view(dtype) for pair in pairs)
        result = a != b if compare == "NE" else _COMPARE[compare](a, b)
        if low is not None:
            strict = {"GE": a > b, "LE": a < b, "EQ": np.zeros(LANES, bool)}.get(compare, result)
            result = strict | ((a == b) & low(warp))
        yes(warp, mask, combine(result, other(warp)))
        no(warp, mask, combine(~result, other(warp)))

    return step


@_op("FSETP", "DSETP")
def _fsetp(one: Instruction, machine: Machine) -> Step:
    compare = _float_compare(one.modifiers[0])
    combine = next(_COMBINE[name] for name in one.modifiers[1:] if name in _COMBINE)
    yes, no = _write_predicate(one.operands[0]), _write_predicate(one.operands[1])
    if one.name == "DSETP":
        a, b = (_double(text, machine) for text in one.operands[2:4])
    else:
        a, b = (_float(text, machine, "FTZ" in one.modifiers) for text in one.operands[2:4])
    other = _predicate(one.operands[4])

    def step(warp: Warp, mask: Any) -> None:
        result = compare(a(warp), b(warp))
        yes(warp, mask, combine(result, other(warp)))
        no(warp, mask, combine(~result, other(warp)))

    return step


def _arithmetic(operation: Callable[..., Any]) -> Callable[[Instruction, Machine], Step]:
    def make(one: Instruction, machine: Machine) -> Step:
        known = {"FTZ", "RN"}
        if not set(one.modifiers) <= known:
            raise UnknownInstructionError("rounding")
        ftz = "FTZ" in one.modifiers
        write = _write_float(one.operands[0], ftz)
        reads = [_float(text, machine, ftz) for text in one.operands[1:]]
        return lambda warp, mask: write(warp, mask, operation(*(read(warp) for read in reads)))

    return make


def _fused(a: Any, b: Any, c: Any) -> Any:
    wide = np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(np.float32)


_MAKERS["FADD"] = _arithmetic(lambda a, b: a + b)
_MAKERS["FMUL"] = _arithmetic(lambda a, b: a * b)
_MAKERS["FFMA"] = _arithmetic(_fused)


def _double_arithmetic(operation: Callable[..., Any]) -> Callable[[Instruction, Machine], Step]:
    def make(one: Instruction, machine: Machine) -> Step:
        write = _write_pair(one.operands[0])
        reads = [_double(text, machine) for text in one.operands[1:]]
        return lambda warp, mask: write(warp, mask, operation(*(read(warp) for read in reads)))

    return make


def _fused_double(a: Any, b: Any, c: Any) -> Any:
    return np.array([
        float(_exact(x) * _exact(y) + _exact(z)) if all(map(math.isfinite, (x, y, z)))
        else x * y + z for x, y, z in zip(a, b, c, strict=True)
    ])  # fmt: skip


def _exact(value: float) -> Any:
    from fractions import Fraction

    return Fraction(float(value))


_MAKERS["DADD"] = _double_arithmetic(lambda a, b: a + b)
_MAKERS["DMUL"] = _double_arithmetic(lambda a, b: a * b)
_MAKERS["DFMA"] = _double_arithmetic(_fused_double)


@_op("FMNMX", "FMNMX3")
def _fmnmx(one: Instruction, machine: Machine) -> Step:
    ftz, keeps_nan = "FTZ" in one.modifiers, "NAN" in one.modifiers
    write = _write_float(one.operands[0], ftz)
    reads = [_float(text, machine, ftz) for text in one.operands[1:-1]]
    is_min = _predicate(one.operands[-1])

    def step(warp: Warp, mask: Any) -> None:
        values = [read(warp) for read in reads]
        low, high = (np.minimum, np.maximum) if keeps_nan else (np.fmin, np.fmax)
        smaller, larger = values[0], values[0]
        for value in values[1:]:
            smaller, larger = low(smaller, value), high(larger, value)
        write(warp, mask, np.where(is_min(warp), smaller, larger))

    return step


@_op("IMNMX", "VIMNMX", "VIMNMX3")
def _imnmx(one: Instruction, machine: Machine) -> Step:
    dtype = np.uint32 if "U32" in one.modifiers else np.int32
    operands = [text for text in one.operands[1:-1] if not _is_predicate(text)]
    write = _write(one.operands[0])
    reads = [_word(text, machine) for text in operands]
    is_min = _predicate(one.operands[-1])

    def step(warp: Warp, mask: Any) -> None:
        values = [np.ascontiguousarray(read(warp)).view(dtype) for read in reads]
        smaller, larger = values[0], values[0]
        for value in values[1:]:
            smaller, larger = np.minimum(smaller, value), np.maximum(larger, value)
        write(warp, mask, np.where(is_min(warp), smaller, larger).view(np.uint32))

    return step


@_op("VIADDMNMX")
def _viaddmnmx(one: Instruction, machine: Machine) -> Step:
    dtype = np.uint32 if "U32" in one.modifiers else np.int32
    write = _write(one.operands[0])
    operands = [text for text in one.operands[1:-1] if not _is_predicate(text)]
    a, b, c = (_word(text, machine) for text in operands)
    is_min = _predicate(one.operands[-1])

    def step(warp: Warp, mask: Any) -> None:
        total = (a(warp) + b(warp)).view(dtype)
        limit = np.ascontiguousarray(c(warp)).view(dtype)
        result = np.where(is_min(warp), np.minimum(total, limit), np.maximum(total, limit))
        write(warp, mask, result.view(np.uint32))

    return step


@_op("FCHK")
def _fchk(one: Instruction, machine: Machine) -> Step:
    """Sets a predicate where a division needs the way that serves every number."""
    output = _write_predicate(one.operands[0])
    reads = [_float(text, machine, False) for text in one.operands[1:]]

    def step(warp: Warp, mask: Any) -> None:
        sizes = [np.abs(read(warp)) for read in reads]
        plain = [(size > 2.0**-100) & (size < 2.0**100) for size in sizes]
        output(warp, mask, ~(plain[0] & plain[1]))

    return step


@_op("IABS")
def _iabs(one: Instruction, machine: Machine) -> Step:
    write, read = _write(one.operands[0]), _word(one.operands[1], machine)
    return lambda warp, mask: write(warp, mask, np.abs(read(warp).view(np.int32)).view(np.uint32))


@_op("POPC")
def _popc(one: Instruction, machine: Machine) -> Step:
    write, read = _write(one.operands[0]), _word(one.operands[1], machine)
    return lambda warp, mask: write(warp, mask, np.bitwise_count(read(warp)).astype(np.uint32))


@_op("MUFU")
def _mufu(one: Instruction, machine: Machine) -> Step:
    functions: dict[str, Callable[[Any], Any]] = {
        "RCP": lambda x: np.float32(1) / x,
        "RSQ": lambda x: np.float32(1) / np.sqrt(x),
        "SQRT": np.sqrt,
        "EX2": np.exp2,
        "LG2": np.log2,
    }
    function = functions[one.modifiers[0]]
    write, read = _write_float(one.operands[0], True), _float(one.operands[1], machine, True)
    return lambda warp, mask: write(warp, mask, function(read(warp)))


@_op("PRMT")
def _prmt(one: Instruction, machine: Machine) -> Step:
    write = _write(one.operands[0])
    low, selector, high = (_word(text, machine) for text in one.operands[1:4])

    def step(warp: Warp, mask: Any) -> None:
        pool, select = _joined(low(warp), high(warp)), selector(warp)
        result = np.zeros(LANES, np.uint64)
        for byte in range(4):
            nibble = (select >> np.uint32(4 * byte)) & np.uint32(15)
            picked = pool >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)
            picked = picked & np.uint64(255)
            sign = np.where(picked >> np.uint64(7) & np.uint64(1), np.uint64(255), np.uint64(0))
            picked = np.where(nibble & np.uint32(8), sign, picked)
            result |= picked << np.uint64(8 * byte)
        write(warp, mask, result.astype(np.uint32))

    return step


@_op("P2R")
def _p2r(one: Instruction, machine: Machine) -> Step:
    write, base = _write(one.operands[0]), _word(one.operands[2], machine)
    kept = np.uint32(int(one.operands[3], 16))
    bits = (np.uint32(1) << np.arange(7, dtype=np.uint32))[:, None]

    def step(warp: Warp, mask: Any) -> None:
        word = (warp.predicates[:7] * bits).sum(0, dtype=np.uint32)
        write(warp, mask, base(warp) & ~kept | word & kept)

    return step


@_op("R2P")
def _r2p(one: Instruction, machine: Machine) -> Step:
    read, changed = _word(one.operands[1], machine), int(one.operands[2], 16)

    def step(warp: Warp, mask: Any) -> None:
        word = read(warp)
        for index in range(7):
            if changed >> index & 1:
                bit = (word >> np.uint32(index) & np.uint32(1)).astype(np.bool_)
                np.copyto(warp.predicates[index], bit, where=mask)

    return step


@_op("SHFL")
def _shfl(one: Instruction, machine: Machine) -> Step:
    inside, write = _write_predicate(one.operands[0]), _write(one.operands[1])
    value, by, limits = (_word(text, machine) for text in one.operands[2:5])
    kind = one.modifiers[0]

    def step(warp: Warp, mask: Any) -> None:
        lane = np.arange(LANES)
        distance = by(warp).astype(np.int64)
        if int(limits(warp)[0]) not in ((0x1F, 0) if kind != "UP" else (0,)):
            raise UnknownInstructionError("a shuffle of a part of a warp")
        source = {"DOWN": lane + distance, "BFLY": lane ^ distance,
                  "IDX": distance % LANES, "UP": lane - distance}[kind]  # fmt: skip
        within = (source >= 0) & (source < LANES)
        source = np.where(within, source, lane)
        if not mask[source[mask]].all():
            raise UnknownInstructionError("a shuffle from a lane that does not take part")
        write(warp, mask, value(warp)[source])
        inside(warp, mask, within)

    return step


@_op("VOTE", "VOTEU")
def _vote(one: Instruction, machine: Machine) -> Step:
    kind = one.modifiers[0]
    operands = list(one.operands)
    write = _write(operands.pop(0)) if _is_register(operands[0]) else None
    output = _write_predicate(operands.pop(0)) if len(operands) > 1 else None
    read = _predicate(operands[0])
    bits = np.uint32(1) << np.arange(LANES, dtype=np.uint32)

    def step(warp: Warp, mask: Any) -> None:
        votes = np.broadcast_to(read(warp), LANES) & mask
        if write is not None:
            number = int(bits[votes].sum(dtype=np.uint64))
            write(warp, mask, np.full(LANES, number, np.uint32))
        if output is not None:
            answer = votes.any() if kind == "ANY" else bool((votes == mask).all())
            output(warp, mask, np.full(LANES, answer))

    return step


@_op("REDUX", "CREDUX")
def _redux(one: Instruction, machine: Machine) -> Step:
    write, read = _write(one.operands[0]), _word(one.operands[1], machine)
    signed = "S32" in one.modifiers
    kind = one.modifiers[0] if one.modifiers else "AND"

    def step(warp: Warp, mask: Any) -> None:
        values = read(warp)[mask]
        if values.size == 0:
            return
        ordered = values.view(np.int32) if signed else values
        results: dict[str, Callable[[], Any]] = {
            "SUM": lambda: values.sum(dtype=np.uint32),
            "MIN": ordered.min, "MAX": ordered.max,
            "AND": lambda: np.bitwise_and.reduce(values),
            "OR": lambda: np.bitwise_or.reduce(values),
        }  # fmt: skip
        word = np.asarray(results[kind]()).astype(np.int64) & 0xFFFFFFFF
        write(warp, mask, np.full(LANES, word, np.uint32))

    return step


@_op("S2R", "S2UR", "CS2R")
def _special(one: Instruction, machine: Machine) -> Step:
    what = one.operands[1]
    if what == "SRZ":
        both = [_write(one.operands[0])]
        if "32" not in one.modifiers:
            both.append(_write(one.operands[0], 1))

        def clear(warp: Warp, mask: Any) -> None:
            for write in both:
                write(warp, mask, np.zeros(LANES, np.uint32))

        return clear
    write = _write(one.operands[0])
    lanes = np.arange(LANES, dtype=np.uint32)
    values: dict[str, Read] = {
        "SR_TID.X": lambda warp: lanes + np.uint32(warp.first_thread),
        "SR_CTAID.X": lambda warp: np.full(LANES, warp.block, np.uint32),
        "SR_LANEID": lambda warp: lanes,
        "SR_CgaCtaId": lambda warp: np.zeros(LANES, np.uint32),
        "SR_SWINHI": lambda warp: np.zeros(LANES, np.uint32),
    }
    read = values[what]
    return lambda warp, mask: write(warp, mask, read(warp))


_SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def _size(modifiers: Sequence[str]) -> int:
    return next((_SIZES[name] for name in modifiers if name in _SIZES), 4)


@_op("LDC", "ULDC", "LDCU")
def _ldc(one: Instruction, machine: Machine) -> Step:
    words = max(1, _size(one.modifiers) // 4)
    if _size(one.modifiers) < 4:
        raise UnknownInstructionError("a narrow constant")
    found = re.fullmatch(r"c\[(0x[02])\]\[(?:(U?R\w+)\+?)?(-?0x[0-9a-f]+)?\]", one.operands[1])
    if found is None:
        raise UnknownInstructionError("bank")
    bank = int(found[1], 16)
    register = _raw(found[2], machine) if found[2] else None
    offset = int(found[3] or "0", 16)
    writes = [_write(one.operands[0], k) for k in range(words)]

    def step(warp: Warp, mask: Any) -> None:
        if not mask.any():
            return
        at = np.full(LANES, offset, np.int64)
        if register is not None:
            at = at + register(warp).view(np.int32)
        places = {int(place) for place in at[mask]}
        table = {place: machine.constant(place, words, bank) for place in places}
        for k, write in enumerate(writes):
            values = np.array([table[int(p)][k] if int(p) in table else 0 for p in at], np.uint32)
            write(warp, mask, values)

    return step


def _memory(address: int, size: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


@_op("LDG", "LD")
def _ldg(one: Instruction, machine: Machine) -> Step:
    size = _size(one.modifiers)
    target = next(text for text in one.operands if _is_register(text))
    where = _address(next(text for text in one.operands if "[" in text), machine)
    writes = [_write(target, k) for k in range(max(1, size // 4))]
    if "S8" in one.modifiers or "S16" in one.modifiers:
        raise UnknownInstructionError("a signed load")

    def step(warp: Warp, mask: Any) -> None:
        if not mask.any():
            return
        data = np.zeros((LANES, max(4, size)), np.uint8)
        for lane, address in enumerate(where(warp)):
            if mask[lane]:
                if address % size:
                    raise UnknownInstructionError("a load that is not aligned")
                data[lane, :size] = _memory(int(address), size)
        words = data.view(np.uint32)
        for k, write in enumerate(writes):
            write(warp, mask, words[:, k])

    return step


@_op("STG", "ST")
def _stg(one: Instruction, machine: Machine) -> Step:
    size = _size(one.modifiers)
    where = _address(next(text for text in one.operands if "[" in text), machine)
    source = one.operands[-1]
    reads = [_raw(source, machine, k) for k in range(max(1, size // 4))]

    def step(warp: Warp, mask: Any) -> None:
        if not mask.any():
            return
        words = np.stack([np.asarray(read(warp)) for read in reads], 1)
        data = np.ascontiguousarray(words).view(np.uint8)
        for lane, address in enumerate(where(warp)):
            if mask[lane]:
                if address % size:
                    raise UnknownInstructionError("a store that is not aligned")
                _memory(int(address), size)[:] = data[lane, :size]

    return step


@_op("LDS")
def _lds(one: Instruction, machine: Machine) -> Step:
    size = _size(one.modifiers)
    where = _address(one.operands[1], machine)
    writes = [_write(one.operands[0], k) for k in range(max(1, size // 4))]

    def step(warp: Warp, mask: Any) -> None:
        if not mask.any():
            return
        addresses = where(warp)
        machine.wavefronts(addresses, size, mask)
        places = np.where(mask, addresses, 0)
        if size < 4:
            value = machine.shared[places].astype(np.uint32)
            writes[0](warp, mask, value)
            return
        if (places % size).any():
            raise UnknownInstructionError("a load that is not aligned")
        words = machine.shared.view(np.uint32)
        for k, write in enumerate(writes):
            write(warp, mask, words[places // 4 + k])

    return step


@_op("STS")
def _sts(one: Instruction, machine: Machine) -> Step:
    size = _size(one.modifiers)
    where = _address(one.operands[0], machine)
    reads = [_raw(one.operands[1], machine, k) for k in range(max(1, size // 4))]

    def step(warp: Warp, mask: Any) -> None:
        if not mask.any():
            return
        addresses = where(warp)
        machine.wavefronts(addresses, size, mask)
        if (addresses[mask] % size).any():
            raise UnknownInstructionError("a store that is not aligned")
        if size < 4:
            machine.shared[addresses[mask]] = reads[0](warp)[mask].astype(np.uint8)
            return
        words = machine.shared.view(np.uint32)
        for k, read in enumerate(reads):
            words[addresses[mask] // 4 + k] = np.broadcast_to(read(warp), LANES)[mask]

    return step


@_op("ATOMS")
def _atoms(one: Instruction, machine: Machine) -> Step:
    if one.modifiers != ("POPC", "INC", "32") or one.operands[0] != "RZ":
        raise UnknownInstructionError("an operation on shared memory")
    where = _address(one.operands[1], machine)

    def step(warp: Warp, mask: Any) -> None:
        np.add.at(machine.shared.view(np.uint32), where(warp)[mask] // 4, np.uint32(1))

    return step


@_op("F2F")
def _f2f(one: Instruction, machine: Machine) -> Step:
    if one.modifiers[:2] == ("F64", "F32"):
        wide, read = _write_pair(one.operands[0]), _float(one.operands[1], machine, False)
        return lambda warp, mask: wide(warp, mask, read(warp).astype(np.float64))
    if one.modifiers[:2] == ("F32", "F64"):
        narrow, wide_read = _write_float(one.operands[0], False), _double(one.operands[1], machine)
        return lambda warp, mask: narrow(warp, mask, wide_read(warp).astype(np.float32))
    raise UnknownInstructionError("conversion")


def _bfloat16(value: Any) -> Any:
    bits = np.ascontiguousarray(value).view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), np.uint64(0x7FFF), rounded).astype(np.uint32)


@_op("F2FP")
def _f2fp(one: Instruction, machine: Machine) -> Step:
    write = _write(one.operands[0])
    high, low = (_float(text, machine, False) for text in one.operands[1:3])
    is_brain = "BF16" in one.modifiers

    def half(value: Any) -> Any:
        if is_brain:
            return _bfloat16(value)
        return value.astype(np.float16).view(np.uint16).astype(np.uint32)

    return lambda warp, mask: write(warp, mask, half(high(warp)) << np.uint32(16) | half(low(warp)))


@_op("HADD2", "HFMA2", "HMUL2")
def _half(one: Instruction, machine: Machine) -> Step:
    write = _write(one.operands[0])
    if one.name == "HFMA2":
        if [text.lstrip("-") for text in one.operands[1:3]] != ["RZ", "RZ"]:
            raise UnknownInstructionError("half arithmetic")
        high, low = (int(np.float16(float(text)).view(np.uint16)) for text in one.operands[3:5])
        return lambda warp, mask: write(warp, mask, np.full(LANES, high << 16 | low, np.uint32))
    if one.name != "HADD2" or "F32" not in one.modifiers or one.operands[1].lstrip("-") != "RZ":
        raise UnknownInstructionError("half arithmetic")
    source, _, part = one.operands[2].partition(".")
    read, shift = _raw(source, machine), np.uint32(16 if part == "H1_H1" else 0)

    def step(warp: Warp, mask: Any) -> None:
        halves = (read(warp) >> shift & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16)
        write(warp, mask, halves.astype(np.float32).view(np.uint32))

    return step


@_op("I2F", "I2FP")
def _i2f(one: Instruction, machine: Machine) -> Step:
    if "F64" in one.modifiers or "64" in "".join(one.modifiers):
        raise UnknownInstructionError("conversion")
    dtype = np.uint32 if "U32" in one.modifiers else np.int32
    read = _word(one.operands[1], machine)
    write = _write_float(one.operands[0], False)
    return lambda warp, mask: write(
        warp, mask, np.ascontiguousarray(read(warp)).view(dtype).astype(np.float32)
    )


@_op("F2I")
def _f2i(one: Instruction, machine: Machine) -> Step:
    if "TRUNC" not in one.modifiers or "F64" in one.modifiers:
        raise UnknownInstructionError("conversion")
    read, write = _float(one.operands[1], machine, True), _write(one.operands[0])
    top = float(2**32 - 1) if "U32" in one.modifiers else float(2**31 - 1)
    bottom = 0.0 if "U32" in one.modifiers else -float(2**31)
    return lambda warp, mask: write(
        warp, mask,
        np.clip(np.trunc(read(warp).astype(np.float64)), bottom, top).astype(np.int64),
    )  # fmt: skip


@_op("BRA")
def _bra(one: Instruction, machine: Machine) -> Step:
    *conditions, label = one.operands
    target = machine.program.labels[label.strip("`()")]
    if "DIV" in one.modifiers or "CONV" in one.modifiers:
        # Taken by a warp that is not whole, or by one that is.
        whole = "CONV" in one.modifiers

        def by_whole(warp: Warp, mask: Any) -> None:
            if (mask | warp.exited).all() == whole:
                machine.jump(warp, mask, target)

        return by_whole
    reads = [_predicate(text) for text in conditions]
    uniform = "U" in one.modifiers

    def step(warp: Warp, mask: Any) -> None:
        for read in reads:
            mask = mask & read(warp)
        # A uniform branch is taken if all lanes take it.
        if uniform and not (mask == warp.groups[-1].mask).all():
            return
        machine.jump(warp, mask, target)

    return step


@_op("BRX")
def _brx(one: Instruction, machine: Machine) -> Step:
    found = re.match(r"(R\d+) (-?0x[0-9a-f]+)", one.operands[0])
    if found is None:
        raise UnknownInstructionError("table of places")
    read, offset = _raw(found[1], machine), int(found[2], 16) + 16

    def step(warp: Warp, mask: Any) -> None:
        here = 16 * (warp.groups[-1].at - 1)
        values = read(warp).view(np.int32).astype(np.int64) + here + offset
        machine.scatter(warp, values, mask)

    return step


@_op("CALL")
def _call(one: Instruction, machine: Machine) -> Step:
    target = machine.program.labels[one.operands[0].strip("`()")]
    return lambda warp, mask: machine.jump(warp, mask, target)


@_op("RET")
def _ret(one: Instruction, machine: Machine) -> Step:
    read = _raw(one.operands[0].split()[0], machine)
    return lambda warp, mask: machine.scatter(warp, read(warp), mask)


@_op("BSSY")
def _bssy(one: Instruction, machine: Machine) -> Step:
    barrier = one.operands[0]

    def step(warp: Warp, mask: Any) -> None:
        warp.barriers[barrier] = mask.copy()

    return step


@_op("BSYNC")
def _bsync(one: Instruction, machine: Machine) -> Step:
    return lambda warp, mask: machine.wait(warp, one.operands[0], mask)


@_op("WARPSYNC")
def _warpsync(one: Instruction, machine: Machine) -> Step:
    if "ALL" not in one.modifiers and one.operands != ("0xffffffff",):
        raise UnknownInstructionError("a barrier of a part of a warp")

    def step(warp: Warp, mask: Any) -> None:
        # Where it stands tells one from another.
        name = f"W{warp.groups[-1].at}"
        warp.barriers[name] = np.ones(LANES, np.bool_)
        machine.wait(warp, name, mask)

    return step


@_op("BREAK")
def _break(one: Instruction, machine: Machine) -> Step:
    *conditions, barrier = one.operands
    reads = [_predicate(text) for text in conditions]

    def step(warp: Warp, mask: Any) -> None:
        for read in reads:
            mask = mask & read(warp)
        machine.forget(warp, mask, barrier)

    return step


@_op("BAR")
def _bar(one: Instruction, machine: Machine) -> Step:
    def step(warp: Warp, mask: Any) -> None:
        group = warp.groups.pop()
        if len(warp.groups) or not (group.mask | warp.exited).all():
            raise UnknownInstructionError("a block's barrier that not all lanes reach")
        warp.waiting["BAR"] = group

    return step


@_op("EXIT")
def _exit(one: Instruction, machine: Machine) -> Step:
    return lambda warp, mask: machine.leave(warp, mask) if mask.any() else None
