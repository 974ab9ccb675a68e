"""The command line: bounds, tables, pictures, presets, the demo, and what is installed."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import bandpo
from bandpo import _core, listing
from bandpo.check import check_name, suggestion
from bandpo.curve import curve_of, named_region
from bandpo.error import BandpoError, InputPathError, InvalidValueError
from bandpo.presets import PRESETS, Preset
from bandpo.region import Band, Region
from bandpo.spec import region_from_spec, spec_from_region
from bandpo.surrogate import resolve
from bandpo.table import TARGET

if TYPE_CHECKING:
    from rich.progress import Progress

CHECK_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

SAMPLES = 1_000_000

PICTURE = "bandpo-plot.png"

_REGIONS = {
    "kl@0.05": "a band: divergence and radius",
    "kl@0.01/0.1": "a band: radii below and above a ratio of 1",
    '"u*ln(u)-u+1"@0.01': "a band of any convex f, in quotes of its own",
    "clip@0.2,0.28": "the interval [0.8, 1.28]; likewise log-clip@0.4, kl3@0.05, dcpo@0.16,0.2",
    "dapo, preset:dapo": "the region of a preset; bandpo presets lists them",
    "a|b, a&b": "either region, both regions",
    "(a).cap(10)": "no ratio above 10",
    "(a).at_least(0.1)": "a minimum width",
    "sides(a,b)": "below 1 the first, above 1 the second",
}
"""The forms of a spec, for help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 is success, 1 a failed check (a verified table beyond its target, a problem found by ``doctor
    --check``), 2 bad input, 130 an interruption. Errors and warnings are one line each on standard
    error.
    """
    try:
        parsed = _parse(sys.argv[1:] if arguments is None else arguments)
        command: Callable[[argparse.Namespace], int] = parsed.command
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            code = command(parsed)
        sys.stdout.flush()
        return code
    except BandpoError as error:
        print(f"bandpo: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("bandpo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone, which is no error
        _discard_output()
        return 0
    except OSError as error:
        _discard_output()
        place = error.filename or "standard output"
        print(f"bandpo: error: cannot write {place}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT


def _discard_output() -> None:
    """Sends the rest of the output nowhere; otherwise Python fails once more at its end."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"bandpo: warning: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """A parser whose help ends with notes and examples, made for the width of the terminal."""

    notes: Sequence[Mapping[str, str] | str] = ()
    examples: Sequence[str] = ()

    def format_help(self) -> str:
        """Returns the help with the notes and examples at its end."""
        from textwrap import wrap

        columns = min(listing.width(), 100)
        blocks = [
            wrap(note, columns) if isinstance(note, str) else listing.fields(note, columns)
            for note in self.notes
        ]
        if self.examples:
            blocks.append(["examples:", *(f"  {example}" for example in self.examples)])
        return "\n".join([super().format_help(), *("\n".join([*lines, ""]) for lines in blocks)])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    given = list(arguments)
    parser, commands = _parser()
    if given[:1] == ["help"]:
        given = [*given[1:3], "--help"]
    _check_commands(parser, commands, given)
    parsed, rest = parser.parse_known_args(list(_unambiguous(given)))
    # argparse ends a list of words at the first option, and calls what follows unrecognized.
    if rest and not (hasattr(parsed, "words") and not any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.words = [*parsed.words, *rest]
    return parsed


def _check_commands(
    parser: _Parser, commands: Mapping[str, Sequence[str]], given: Sequence[str]
) -> None:
    """Refuses a command or action that does not exist, with the nearest that does."""
    known: Sequence[str] = tuple(commands)
    for word in given[:2]:
        if word.startswith("-") or not known:
            return
        if word not in known:
            parser.error(f"{word!r} is none of {', '.join(known)}{suggestion(word, known)}")
        known = commands.get(word, ())


def _unambiguous(given: Sequence[str]) -> Iterator[str]:
    """Marks by a space what begins with a minus and is a value; argparse takes it for an option."""
    for text in given:
        if text.startswith("--logp="):
            yield "--logp"
            text = text.removeprefix("--logp=")
        yield f" {text}" if _is_value(text) else text


def _is_value(text: str) -> bool:
    """Whether a text is a negative number, or a formula such as ``-ln(u)``."""
    with suppress(ValueError):
        return text.startswith("-") and not math.isnan(float(text))
    is_option = not text.startswith("-") or text.startswith(("--", "-o"))
    return not is_option and any(sign in text for sign in "(+*/^")


def _parser() -> tuple[_Parser, dict[str, Sequence[str]]]:
    """The parser, and the actions of each command."""
    parser = _Parser(
        prog="bandpo",
        description="Probability-aware clip bounds from f-divergence trust regions.",
    )
    version = f"bandpo {bandpo.__version__}"
    parser.add_argument("-V", "--version", action="version", version=version)
    parser.examples = ("bandpo bounds 0.001 0.5 kl@0.05", "bandpo help bounds")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("help", help="print the help of a command")
    regions = (
        "A REGION is one of these, in quotes where the shell needs them:",
        _REGIONS,
        f"Divergences: {', '.join(_core.DIVERGENCES)}.",
    )

    bounds = commands.add_parser(
        "bounds",
        help="print the exact bounds of a region",
        description="Prints the exact bounds of a region. Those of gspo are for the ratio of a"
        " sequence; bapo's are those it begins with.",
    )
    bounds.add_argument(
        "words",
        nargs="+",
        metavar="P|REGION",
        help="old probabilities in [0, 1], with --logp their logarithms, - for those on standard "
        "input, and up to one region (kl@0.05)",
    )
    bounds.add_argument("--logp", action="store_true", help="read natural logarithms")
    _add_region_options(bounds)
    _add_json(bounds, _bounds)
    bounds.notes = (*regions, 'JSON has no infinity: there it is the text "inf" or "-inf".')
    bounds.examples = (
        "bandpo bounds 0.001 0.5 kl@0.05",
        "seq -5 -1 | bandpo bounds --logp - 'kl@0.01|dapo'",
    )

    table = commands.add_parser("table", help="build, inspect and verify lookup tables")
    table.examples = ("bandpo table build kl@0.05 -o kl.safetensors", "bandpo help table build")
    tables = table.add_subparsers(required=True, metavar="ACTION")
    build = tables.add_parser("build", help="tabulate a region into a file")
    build.add_argument("region", nargs="?", metavar="REGION", help="what to tabulate (kl@0.05)")
    _add_region_options(build)
    build.add_argument(
        "-o", "--output", type=_path, required=True, help="the .safetensors file to write"
    )
    _add_json(build, _table_build)
    build.notes = regions
    build.examples = (
        "bandpo table build kl@0.05 -o kl.safetensors",
        "bandpo table build '(tv@0.1).cap(10)' -o tv.safetensors --json",
    )
    inspect = tables.add_parser("inspect", help="print what a table file says of itself")
    inspect.add_argument("path", type=_path)
    _add_json(inspect, _table_inspect)
    inspect.examples = (
        "bandpo table inspect kl.safetensors",
        "bandpo table inspect kl.safetensors --json",
    )
    verify = tables.add_parser("verify", help="compare a table file with the exact solver")
    verify.add_argument("path", type=_path)
    verify.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        help="float32 log-probs to compare (%(default)s), besides some in every cell",
    )
    verify.add_argument(
        "--exhaustive",
        action="store_true",
        help="compare every float32 log-prob there is, some minutes; an interrupted run is"
        " continued by the next; at the end the file is rewritten and says so",
    )
    _add_json(verify, _table_verify)
    verify.notes = (f"The exit code is {CHECK_FAILED} if an error is above {TARGET:g}.",)
    verify.examples = (
        "bandpo table verify kl.safetensors",
        "bandpo table verify kl.safetensors --exhaustive",
    )

    plot = commands.add_parser(
        "plot",
        help="draw what regions allow, together",
        description="Draws the bounds of regions, and the change of probability that they allow."
        " Those of gspo are for the ratio of a sequence; bapo's are those it begins with.",
    )
    plot.add_argument("words", nargs="*", metavar="REGION", help="all presets if left out")
    plot.add_argument("-o", "--output", type=_path, help=f"picture ({PICTURE}; with --json none)")
    _add_json(plot, _plot)
    plot.notes = regions
    plot.examples = (
        "bandpo plot ppo dapo kl@0.05",
        "bandpo plot 'sides(clip@0.2,kl@0.05)' -o sides.svg",
    )

    presets = commands.add_parser("presets", help="list published rules and their sources")
    _add_json(presets, _presets)
    presets.notes = ("With --json each source is told in full, with the place of every number.",)
    presets.examples = ("bandpo presets", "bandpo presets --json")

    demo = commands.add_parser("demo", help="train a small policy under several clip rules")
    demo.add_argument(
        "-o", "--output", type=_path, default="bandpo-demo.png", help="picture (%(default)s)"
    )
    demo.add_argument("--seeds", type=int, help="runs for each rule")
    demo.add_argument("--batches", type=int, help="rollout batches a run")
    _add_json(demo, _demo)
    demo.examples = ("bandpo demo", "bandpo demo --seeds 1 --batches 20 --json")

    installed = commands.add_parser(
        "doctor", help="print what is installed and which backend would run"
    )
    installed.add_argument(
        "--check", action="store_true", help=f"exit with {CHECK_FAILED} if there is a problem"
    )
    _add_json(installed, _doctor)
    installed.examples = ("bandpo doctor", "bandpo doctor --check --json")
    return parser, {
        name: tuple(tables.choices) if name == "table" else () for name in commands.choices
    }


def _add_region_options(parser: argparse.ArgumentParser) -> None:
    """Adds the older way to name a region."""
    group = parser.add_argument_group("in place of REGION")
    group.add_argument("--divergence", metavar="NAME", help="name of the divergence (kl)")
    group.add_argument(
        "--expression", type=str.strip, metavar="F", help='any convex f, as in "u*ln(u) - u + 1"'
    )
    group.add_argument("--delta", type=_number, metavar="R", help="radius (0.05)")
    group.add_argument(
        "--delta-high", type=_number, metavar="R", help="another radius above a ratio of 1"
    )
    group.add_argument("--preset", metavar="NAME", help="name of a preset")


def _add_json(
    parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]
) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=command)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty")
    return text


def _region(parsed: argparse.Namespace, spec: str | None, read: Callable[[str], Region]) -> Region:
    """The region of a spec, as read by ``read``, or of the options in place of it."""
    names = ("divergence", "expression", "delta", "delta_high", "preset")
    options = {name: value for name in names if (value := getattr(parsed, name)) is not None}
    for one, others in (("expression", ["divergence"]), ("preset", options)):
        for other in others:
            if one in options and other in options and one != other:
                raise InvalidValueError(f"give --{other.replace('_', '-')} or --{one}, not both")
    if spec is not None:
        if options:
            option = next(iter(options)).replace("_", "-")
            raise InvalidValueError(f"give a region or --{option}, not both")
        return read(spec)
    if "preset" in options:
        check_name("preset", parsed.preset, PRESETS)
        return read(f"preset:{parsed.preset}")
    if "expression" in options:
        divergence = bandpo.Divergence.from_expression(parsed.expression)
    else:
        divergence = bandpo.Divergence(options.get("divergence", "kl"))
    low = options.get("delta", 0.05)
    return Band(divergence, (low, options.get("delta_high", low)))


def _print_json(content: object) -> None:
    print(json.dumps(_json_safe(content), indent=2, allow_nan=False))


def _json_safe(content: Any) -> Any:
    """JSON has no infinity and no NaN: they become the strings that float() reads back."""
    if isinstance(content, Mapping):
        return {key: _json_safe(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_json_safe(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content


def _print_fields(values: Mapping[str, object]) -> None:
    texts = {name: str(value) for name, value in values.items()}
    print("\n".join(listing.fields(texts, listing.width())))


def _spec_or_none(region: Region) -> str | None:
    try:
        return spec_from_region(region)
    except InvalidValueError:
        return None


def _bounds(parsed: argparse.Namespace) -> int:
    given, specs = _numbers_and_specs(parsed.words)
    if not given:
        raise InvalidValueError("give at least one probability, as in bandpo bounds 0.5 kl@0.05")
    if len(specs) > 1:
        raise InvalidValueError(f"give one region, got {' and '.join(map(repr, specs))}")
    region = _region(parsed, specs[0] if specs else None, named_region)
    values = np.array(given, dtype=np.float64)
    if parsed.logp:
        logp = values
    else:
        outside = ~((values >= 0.0) & (values <= 1.0))
        if outside.any():
            raise InvalidValueError(f"p must be in [0, 1], got {values[outside][0]}")
        with np.errstate(divide="ignore"):
            logp = np.log(values)
    log_lower, log_upper = region.log_bounds(logp)
    lower, upper = region.bounds(logp)
    names = ("logp" if parsed.logp else "p", "lower", "upper", "log_lower", "log_upper")
    columns = (values, lower, upper, log_lower, log_upper)
    rows = [dict(zip(names, map(float, row), strict=True)) for row in zip(*columns, strict=True)]
    if parsed.json:
        content: dict[str, object] = {"spec": _spec_or_none(region), "region": region.describe()}
        if isinstance(region, Band):
            content["divergence"] = region.divergence.spec
            content["delta_low"], content["delta_high"] = region.delta_low, region.delta_high
        _print_json({**content, "bounds": rows})
        return 0
    texts = [{name: f"{value:.9g}" for name, value in row.items()} for row in rows]
    print("\n".join(listing.table(texts, listing.width())))
    return 0


def _numbers_and_specs(words: Sequence[str]) -> tuple[list[float], list[str]]:
    """The numbers among words, those on standard input in place of ``-``, and the other words."""
    numbers: list[float] = []
    specs: list[str] = []
    for word in words:
        if word == "-":
            numbers += _numbers_on_input()
            continue
        try:
            numbers.append(float(word))
        except ValueError:
            specs.append(word)
    return numbers, specs


def _numbers_on_input() -> list[float]:
    try:
        lines = sys.stdin.read().splitlines()
    except (OSError, ValueError) as error:
        raise InputPathError(f"cannot read standard input: {error}") from None
    numbers = []
    for row, line in enumerate(lines, 1):
        for text in line.replace(",", " ").split():
            try:
                numbers.append(float(text))
            except ValueError:
                raise InvalidValueError(
                    f"standard input must hold numbers, got {text[:60]!r} in line {row}"
                ) from None
    return numbers


def _describe(table: bandpo.BandTable, path: str) -> dict[str, Any]:
    """What a table file says of itself, numbers as numbers."""
    metadata = table.metadata
    return {
        "path": path,
        "format": metadata["format"],
        "format_version": int(metadata["format_version"]),
        "region": table.describe(),
        "grid": metadata["grid"],
        "max_error_log_upper": table.max_error.log_upper,
        "max_error_lower": table.max_error.lower,
        "verification": metadata["verification"],
        "nbytes": table.nbytes,
    }


def _print_table(description: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(description)
    else:
        region = json.dumps(description["region"], sort_keys=True)
        _print_fields({**description, "region": region})


def _table_build(parsed: argparse.Namespace) -> int:
    table = _region(parsed, parsed.region, region_from_spec).table()
    table.save(parsed.output)
    _print_table(_describe(table, parsed.output), parsed.json)
    return 0


def _table_inspect(parsed: argparse.Namespace) -> int:
    table = bandpo.BandTable.load(parsed.path)
    _print_table(_describe(table, parsed.path), parsed.json)
    return 0


def _table_verify(parsed: argparse.Namespace) -> int:
    table = bandpo.BandTable.load(parsed.path)
    if parsed.exhaustive:
        table.save(parsed.path)  # before the minutes that it takes, in case it cannot be written
    with _progress() as progress:
        task = progress.add_task("comparing with the solver")
        verified = table.verify(
            None if parsed.exhaustive else parsed.samples,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            checkpoint=f"{parsed.path}.verify.json" if parsed.exhaustive else None,
        )
    if parsed.exhaustive:
        verified.save(parsed.path)
    passed = max(verified.max_error) <= TARGET
    _print_table(
        {**_describe(verified, parsed.path), "target": TARGET, "passed": passed}, parsed.json
    )
    return 0 if passed else CHECK_FAILED


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    # On standard error, because standard output belongs to the result.
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _plot(parsed: argparse.Namespace) -> int:
    regions = {name: named_region(name) for name in parsed.words or PRESETS}
    output = parsed.output or (None if parsed.json else PICTURE)
    if output is not None:
        from bandpo import plot

        plot.save(plot.comparison_figure(regions), output)
    if parsed.json:
        curves = {name: curve_of(region)._asdict() for name, region in regions.items()}
        _print_json(
            {
                name: {of: values.tolist() for of, values in curve.items()}
                for name, curve in curves.items()
            }
        )
    else:
        print(f"{', '.join(regions)}: {output}")
    return 0


def _presets(parsed: argparse.Namespace) -> int:
    rules = [_rule(each) for each in PRESETS.values()]
    if parsed.json:
        _print_json(rules)
        return 0
    rows = [
        {
            "rule": rule["name"],
            "region": rule["region"] or "changes with the batch",
            "surrogate": _surrogate_text(rule),
            "source": re.split("[;:]", rule["source"])[0],
        }
        for rule in rules
    ]
    print("\n".join(listing.table(rows, min(listing.width(), 120), wrap_last=True)))
    return 0


def _surrogate_text(rule: Mapping[str, Any]) -> str:
    """The surrogate of a rule with its parameters, and the ratio level unless it is the token."""
    name, *parameters = rule["surrogate"].items()
    texts = [name[1]]
    if len(parameters) == 1:
        texts += [f"{key.replace('_', ' ')} {value:g}" for key, value in parameters]
    elif parameters:
        texts[0] += " " + "/".join(f"{value:g}" for _, value in parameters)
    if rule["ratio_level"] != "token":
        texts.append(rule["ratio_level"])
    return ", ".join(texts)


def _rule(preset: Preset) -> dict[str, Any]:
    """A preset as JSON takes it; the spec of its region is None where that changes."""
    surrogate = resolve(preset.surrogate, preset.dual_clip)
    parameters = {
        name: value for name, value in vars(surrogate).items() if value not in (None, False)
    }
    region = preset.region
    return {
        "name": preset.name,
        "region": spec_from_region(region) if isinstance(region, Region) else None,
        "surrogate": {"name": surrogate.name, **parameters},
        "ratio_level": preset.ratio_level,
        "loss_agg_mode": preset.loss_agg_mode,
        "source": preset.source,
    }


def _demo(parsed: argparse.Namespace) -> int:
    from bandpo import demo

    chosen = {name: getattr(parsed, name) for name in ("seeds", "batches")}
    result = demo.run(
        Path(parsed.output),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    if parsed.json:
        _print_json(result.as_dict())
    else:
        demo.print_report(result)
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from bandpo import doctor

    report = doctor.report()
    if parsed.json:
        _print_json(report)
    else:
        _print_fields(doctor.as_text(report))
    return CHECK_FAILED if parsed.check and report["problems"] else 0
