"""The command line: bounds, tables, pictures, the demo, and what is installed."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import bandpo
from bandpo import doctor
from bandpo.curve import curve_of, named_region
from bandpo.error import BandpoError, InvalidValueError
from bandpo.presets import PRESETS
from bandpo.table import TARGET

if TYPE_CHECKING:
    from rich.progress import Progress

CHECK_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

SAMPLES = 1_000_000

PICTURE = "bandpo-plot.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 is success, 1 a verified table beyond its target, 2 bad input, 130 an interruption. Errors and
    warnings are one line each on standard error.
    """
    given = sys.argv[1:] if arguments is None else arguments
    # argparse takes -1e-5 and -inf for options, but nothing that has a space in it.
    parsed = _parser().parse_args([f" {text}" if _is_negative(text) else text for text in given])
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            return command(parsed)
    except BandpoError as error:
        print(f"bandpo: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("bandpo: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, and Python would complain about it once more
        return 0
    except OSError as error:
        print(f"bandpo: error: {error}", file=sys.stderr)
        return BAD_INPUT


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"bandpo: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bandpo",
        description="Probability-aware clip bounds from f-divergence trust regions.",
    )
    parser.add_argument("--version", action="version", version=f"bandpo {bandpo.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    bounds = commands.add_parser("bounds", help="print the exact bounds of a band")
    bounds.add_argument(
        "p",
        nargs="+",
        type=_number,
        help="old probabilities in [0, 1]; with --logp their logarithms",
    )
    _add_band(bounds)
    bounds.add_argument("--logp", action="store_true", help="read natural logarithms")
    _add_json(bounds)
    bounds.set_defaults(command=_bounds)

    table = commands.add_parser("table", help="build, inspect and verify lookup tables")
    tables = table.add_subparsers(required=True, metavar="ACTION")
    build = tables.add_parser("build", help="tabulate a band into a file")
    _add_band(build)
    build.add_argument("-o", "--output", required=True, help="the .safetensors file to write")
    _add_json(build)
    build.set_defaults(command=_table_build)
    inspect = tables.add_parser("inspect", help="print what a table file says of itself")
    inspect.add_argument("path")
    _add_json(inspect)
    inspect.set_defaults(command=_table_inspect)
    verify = tables.add_parser("verify", help="compare a table file with the exact solver")
    verify.add_argument("path")
    verify.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        help="float32 log-probs to look at (%(default)s), besides some in every cell",
    )
    verify.add_argument(
        "--exhaustive",
        action="store_true",
        help="look at every float32 log-prob there is, some minutes; interrupted, it goes on the"
        " next time; at the end the file is rewritten and says so",
    )
    _add_json(verify)
    verify.set_defaults(command=_table_verify)

    plot = commands.add_parser(
        "plot",
        help="draw what methods and bands allow, together",
        description="Draws the bounds of methods and bands, and the change of probability that they"
        " allow. Those of gspo are for the ratio of a sequence; bapo's are those it begins with.",
    )
    plot.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="presets, such as ppo, or bands, such as kl@0.05; all presets if left out",
    )
    plot.add_argument("-o", "--output", help=f"picture ({PICTURE}; with --json none)")
    _add_json(plot)
    plot.set_defaults(command=_plot)

    demo = commands.add_parser("demo", help="train a small policy under several clip rules")
    demo.add_argument("-o", "--output", default="bandpo-demo.png", help="picture (%(default)s)")
    demo.add_argument("--seeds", type=int, help="runs for each rule")
    demo.add_argument("--batches", type=int, help="rollout batches a run")
    _add_json(demo)
    demo.set_defaults(command=_demo)

    installed = commands.add_parser("doctor", help="what is installed and which backend would run")
    _add_json(installed)
    installed.set_defaults(command=_doctor)
    return parser


def _add_band(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--divergence", help="name of the divergence (kl)")
    parser.add_argument("--expression", help='any convex f instead, such as "u*ln(u) - u + 1"')
    parser.add_argument("--delta", type=_number, default=0.05, help="radius (%(default)s)")
    parser.add_argument("--delta-high", type=_number, help="another radius above a ratio of 1")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _is_negative(text: str) -> bool:
    try:
        return text.startswith("-") and math.copysign(1.0, float(text)) < 0.0
    except ValueError:
        return False


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _band(parsed: argparse.Namespace) -> bandpo.Band:
    high = parsed.delta if parsed.delta_high is None else parsed.delta_high
    if parsed.expression is None:
        divergence = bandpo.Divergence(parsed.divergence or "kl")
    elif parsed.divergence is None:
        divergence = bandpo.Divergence.from_expression(parsed.expression)
    else:
        raise InvalidValueError("give --divergence or --expression, not both")
    return bandpo.Band(divergence, (parsed.delta, high))


def _print_json(content: object) -> None:
    print(json.dumps(_json_safe(content), indent=2, allow_nan=False))


def _json_safe(content: Any) -> Any:
    """JSON has no infinity and no NaN: they become the strings that float() reads back."""
    if isinstance(content, dict):
        return {key: _json_safe(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_json_safe(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content


def _bounds(parsed: argparse.Namespace) -> int:
    band = _band(parsed)
    given = np.array(parsed.p, dtype=np.float64)
    if parsed.logp:
        logp = given
    else:
        outside = ~((given >= 0.0) & (given <= 1.0))
        if outside.any():
            raise InvalidValueError(f"p must be in [0, 1], got {given[outside][0]}")
        with np.errstate(divide="ignore"):
            logp = np.log(given)
    log_lower, log_upper = band.log_bounds(logp)
    lower, upper = band.bounds(logp)
    rows = [
        {
            "logp" if parsed.logp else "p": float(given[i]),
            "lower": float(lower[i]),
            "upper": float(upper[i]),
            "log_lower": float(log_lower[i]),
            "log_upper": float(log_upper[i]),
        }
        for i in range(len(given))
    ]
    if parsed.json:
        _print_json(
            {
                "divergence": band.divergence.spec,
                "delta_low": band.delta_low,
                "delta_high": band.delta_high,
                "bounds": rows,
            }
        )
        return 0
    print(" ".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print(" ".join(f"{value:>14.9g}" for value in row.values()))
    return 0


def _describe(table: bandpo.BandTable) -> dict[str, Any]:
    return {**table.metadata, "nbytes": table.nbytes}


def _print_table(table: bandpo.BandTable, as_json: bool) -> None:
    description = _describe(table)
    if as_json:
        _print_json(description)
        return
    for name, value in description.items():
        print(f"{name:22} {value}")


def _table_build(parsed: argparse.Namespace) -> int:
    table = _band(parsed).table()
    table.save(parsed.output)
    _print_table(table, parsed.json)
    return 0


def _table_inspect(parsed: argparse.Namespace) -> int:
    _print_table(bandpo.BandTable.load(parsed.path), parsed.json)
    return 0


def _table_verify(parsed: argparse.Namespace) -> int:
    table = bandpo.BandTable.load(parsed.path)
    if parsed.exhaustive:
        table.save(parsed.path)  # rather now than after minutes, if it cannot be written
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
    if parsed.json:
        _print_json({**_describe(verified), "target": TARGET, "passed": passed})
    else:
        _print_table(verified, as_json=False)
        print(f"{'target':22} {TARGET}")
        print("passed" if passed else "failed: the error is above the target")
    return 0 if passed else CHECK_FAILED


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    # On standard error: standard output belongs to the result.
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _plot(parsed: argparse.Namespace) -> int:
    regions = {name: named_region(name) for name in parsed.names or PRESETS}
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
    found = doctor.report()
    if parsed.json:
        _print_json(found)
    else:
        for name, value in found.items():
            print(f"{name:22} {'not installed' if value is None else value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
