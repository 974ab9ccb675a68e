"""The arguments of the command line, and its help."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from bandpo import _core
from bandpo.check import suggestion
from bandpo.cli import commands, listing
from bandpo.cli.commands import CHECK_FAILED, PICTURE, SAMPLES, TOGETHER
from bandpo.table import TARGET

_FORMS = {
    "kl@0.05": "a band: divergence and radius",
    "kl@0.01/0.1": "a band: radii below and above a ratio of 1",
    '"u*ln(u)-u+1"@0.01': "a band of any convex f, in quotes of its own",
    "price:kl@0.1": "the region of a price, likewise with two, or of an f in quotes",
    "clip@0.2,0.28": "the interval [0.8, 1.28]; likewise log-clip@0.4, kl3@0.05, dcpo@0.16,0.2",
    "dapo, preset:dapo": "the region of a preset; bandpo presets lists them",
    "a|b, a&b": "either region, both regions",
    "(a).cap(10)": "no ratio above 10",
    "(a).at_least(0.1)": "a minimum width",
    "sides(a,b)": "below 1 the first, above 1 the second",
}
"""Forms of a spec, with their meanings."""

_REGIONS = (
    "A REGION is one of these, in quotes where the shell needs them:",
    _FORMS,
    f"Divergences (numbers are examples): {', '.join(_core.DIVERGENCES)}.",
)
"""Notes for the help of a command that takes regions."""


class _Parser(argparse.ArgumentParser):
    """A parser whose help ends with notes and examples, made for the width of the terminal."""

    notes: Sequence[Mapping[str, str] | str] = ()
    examples: Sequence[str] = ()

    def format_help(self) -> str:
        """Returns the help with the notes and examples at its end."""
        columns = min(listing.width(), 100)
        blocks = [
            listing.wrapped("", note, columns)
            if isinstance(note, str)
            else listing.fields(note, columns)
            for note in self.notes
        ]
        if self.examples:
            blocks.append(["examples:", *(f"  {example}" for example in self.examples)])
        return "\n".join([super().format_help(), *("\n".join([*lines, ""]) for lines in blocks)])


_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments, ``command`` being the function that runs them.

    Ends the program after printing a help or version, and with 2 where they cannot be read.
    """
    given = list(arguments)
    parser, actions = _parser()
    if given[:1] == ["help"]:
        given = [*given[1:3], "--help"]
    _check_commands(parser, actions, given)
    parsed, rest = parser.parse_known_args(list(_unambiguous(given)))
    # argparse ends a list of words at the first option and returns the words behind it as unknown.
    if not hasattr(parsed, "words") or any(text.startswith("-") for text in rest):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        parsed.words = [*parsed.words, *rest]
    return parsed


def _check_commands(
    parser: _Parser, actions: Mapping[str, Sequence[str]], given: Sequence[str]
) -> None:
    """Refuses a command or action that does not exist, with the nearest that does."""
    known: Sequence[str] = tuple(actions)
    for word in given[:2]:
        if word.startswith("-") or not known:
            return
        if word not in known:
            parser.error(f"{word!r} is none of {', '.join(known)}{suggestion(word, known)}")
        known = actions.get(word, ())


def _unambiguous(given: Sequence[str]) -> Iterator[str]:
    """Puts a space before a value with a minus; otherwise argparse takes it for an option."""
    for text in given:
        if text.startswith("--logp="):
            yield "--logp"
            text = text.removeprefix("--logp=")
        yield f" {text}" if _is_negative(text) else text


def _is_negative(text: str) -> bool:
    """True for a negative number and for a formula such as ``-ln(u)``."""
    if not text.startswith("-"):
        return False
    try:
        return not math.isnan(float(text))
    except ValueError:
        return not text.startswith(("--", "-o")) and any(sign in text for sign in "(+*/^")


def _parser() -> tuple[_Parser, dict[str, Sequence[str]]]:
    """The parser, and the commands with their actions."""
    parser = _Parser(
        prog="bandpo",
        description="Probability-aware clip bounds from f-divergence trust regions.",
    )
    version = f"bandpo {_core.__version__}"
    parser.add_argument("-V", "--version", action="version", version=version)
    parser.examples = ("bandpo bounds 0.001 0.5 kl@0.05", "bandpo help bounds")
    added = parser.add_subparsers(required=True, metavar="COMMAND")
    added.add_parser("help", help="print the help of a command")
    _add_bounds(added)
    table_actions = _add_table(added)
    _add_plot(added)
    _add_presets(added)
    _add_demo(added)
    _add_doctor(added)
    _add_conform(added)
    _add_replay(added)
    return parser, {**dict.fromkeys(added.choices, ()), "table": table_actions}


def _add_bounds(to: _Commands) -> None:
    parser = to.add_parser(
        "bounds",
        help="print the exact bounds of a region",
        description="Prints the exact bounds of a region. Those of gspo are for the ratio of a"
        " sequence; bapo's are those it begins with.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="P|REGION",
        help="old probabilities in [0, 1], with --logp their logarithms, - for those on standard "
        "input, and up to one region (kl@0.05)",
    )
    parser.add_argument("--logp", action="store_true", help="read natural logarithms")
    _add_region_options(parser)
    _add_json(parser, commands.bounds)
    parser.notes = (*_REGIONS, 'JSON has no infinity: there it is the text "inf" or "-inf".')
    parser.examples = (
        "bandpo bounds 0.001 0.5 kl@0.05",
        "seq -5 -1 | bandpo bounds --logp - 'kl@0.01|dapo'",
    )


def _add_table(to: _Commands) -> Sequence[str]:
    """Adds the command and returns the names of its actions."""
    parser = to.add_parser("table", help="build, inspect and verify lookup tables")
    parser.examples = ("bandpo table build kl@0.05 -o kl.safetensors", "bandpo help table build")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    build = actions.add_parser("build", help="tabulate a region into a file")
    build.add_argument("region", nargs="?", metavar="REGION", help="region to tabulate (kl@0.05)")
    _add_region_options(build)
    build.add_argument(
        "-o", "--output", type=_path, required=True, help="the .safetensors file to write"
    )
    _add_json(build, commands.table_build)
    build.notes = _REGIONS
    build.examples = (
        "bandpo table build kl@0.05 -o kl.safetensors",
        "bandpo table build '(tv@0.1).cap(10)' -o tv.safetensors --json",
    )

    inspect = actions.add_parser("inspect", help="print the metadata of a table file")
    inspect.add_argument("path", type=_path)
    _add_json(inspect, commands.table_inspect)
    inspect.examples = (
        "bandpo table inspect kl.safetensors",
        "bandpo table inspect kl.safetensors --json",
    )

    verify = actions.add_parser("verify", help="compare a table file with the exact solver")
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
        help="compare every float32 log-prob there is, some minutes; the next run continues an"
        " interrupted one; at the end the errors in the file are replaced",
    )
    _add_json(verify, commands.table_verify)
    verify.notes = (f"The exit code is {CHECK_FAILED} if an error is above {TARGET:g}.",)
    verify.examples = (
        "bandpo table verify kl.safetensors",
        "bandpo table verify kl.safetensors --exhaustive",
    )
    return tuple(actions.choices)


def _add_plot(to: _Commands) -> None:
    parser = to.add_parser(
        "plot",
        help="draw where regions let a token's probability go",
        description="Draws the new probabilities that regions allow against the old one: up to"
        f" {TOGETHER} regions together, on linear and on log axes; more of them, or all presets,"
        " in a small picture each, on axes of the log-odds. The region of gspo is for the ratio of"
        " a sequence; that of bapo is the one it begins with.",
    )
    parser.add_argument("words", nargs="*", metavar="REGION", help="all presets if left out")
    parser.add_argument("-o", "--output", type=_path, help=f"picture ({PICTURE}; with --json none)")
    parser.add_argument(
        "--axes",
        action="append",
        choices=("linear", "log", "logit", "ratio"),
        help="draw all regions together on these axes; ratio has new/old upwards, on log axes; may"
        " be repeated for more panels",
    )
    parser.add_argument("--dark", action="store_true", help="for a dark page")
    parser.add_argument(
        "--p-range",
        nargs=2,
        type=_number,
        metavar=("MIN", "MAX"),
        help="old probabilities to show (0 1 on linear axes, 0.0001 1 on others)",
    )
    _add_json(parser, commands.plot)
    parser.notes = _REGIONS
    parser.examples = (
        "bandpo plot dapo bandpo-kl --dark",
        "bandpo plot 'sides(clip@0.2,kl@0.05)' -o sides.svg",
    )


def _add_presets(to: _Commands) -> None:
    parser = to.add_parser("presets", help="list published rules and their sources")
    _add_json(parser, commands.presets)
    parser.notes = ("JSON has each source in full, with the place of every number.",)
    parser.examples = ("bandpo presets", "bandpo presets --json")


def _add_demo(to: _Commands) -> None:
    parser = to.add_parser(
        "demo",
        help="train a small policy under several clip rules",
        description="Trains a small policy under two KL bands, a fixed clip and no clipping, with"
        " clean and with noisy rewards.",
    )
    parser.add_argument(
        "-o", "--output", type=_path, default="bandpo-demo.png", help="picture (%(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, help="runs for each rule, with clean and with noisy rewards"
    )
    parser.add_argument("--batches", type=int, help="rollout batches a run")
    parser.add_argument("--noise", type=_number, help="share of rewards that are flipped (0.05)")
    _add_json(parser, commands.demo)
    parser.notes = (
        "Tokens of one run are recorded into a folder beside the picture (bandpo-demo-tokens), and"
        " the last line is the command that replays them.",
    )
    parser.examples = ("bandpo demo", "bandpo demo --seeds 1 --noise 0.1 --json")


def _add_doctor(to: _Commands) -> None:
    parser = to.add_parser("doctor", help="print what is installed and which backend would run")
    parser.add_argument(
        "--check", action="store_true", help=f"exit with {CHECK_FAILED} if there is a problem"
    )
    parser.add_argument(
        "--verl",
        action="store_true",
        help="try in a new process whether verl has the loss bandpo, and say why not",
    )
    _add_json(parser, commands.doctor)
    parser.examples = ("bandpo doctor --verl", "bandpo doctor --check --json")


def _add_conform(to: _Commands) -> None:
    parser = to.add_parser(
        "conform",
        help="compare losses with the reference vectors",
        description="Runs the backends that can run here, and the losses of frameworks that are"
        " installed, on vectors of every preset, and prints how far each is, in ulp of float32.",
    )
    parser.add_argument("path", nargs="?", type=_path, metavar="FILE", help="vectors (our own)")
    parser.add_argument(
        "--backend",
        action="append",
        choices=("native", "torch", "cuda"),
        help="compare this backend, and no framework; may be repeated",
    )
    _add_json(parser, commands.conform)
    parser.notes = (f"The exit code is {CHECK_FAILED} if a backend of bandpo does not agree.",)
    parser.examples = ("bandpo conform", "bandpo conform --backend torch --json")


def _add_replay(to: _Commands) -> None:
    parser = to.add_parser(
        "replay",
        help="print what rules would have done to the tokens of a log",
        description="Prints what each rule would have clipped and removed on the tokens of a log:"
        " those of bandpo.record.Recorder, or Parquet, JSON lines, CSV, npz or safetensors with"
        " columns old_log_prob, log_prob and advantages.",
    )
    parser.add_argument("paths", nargs="+", type=_path, metavar="LOG", help="files or folders")
    parser.add_argument(
        "--rule",
        action="append",
        metavar="RULE",
        help="a preset (dapo), a region (kl@0.05) or a surrogate and a region (mask:kl@0.05); may"
        f" be repeated ({', '.join(commands.REPLAYED)})",
    )
    parser.add_argument(
        "--match",
        choices=("clip-fraction", "gradient-removed"),
        help="print the radius at which each divergence acts as strongly as the first rule",
    )
    parser.add_argument(
        "--divergence",
        action="append",
        metavar="NAME",
        help=f"a divergence to match; may be repeated ({', '.join(commands.MATCHED)})",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=OTHER",
        help="name of a column in the files (old_log_prob=old_logprobs); may be repeated",
    )
    parser.add_argument("--html", type=_path, metavar="FILE", help="page to write")
    _add_json(parser, commands.replay)
    parser.notes = (
        "Shares are of the whole run, with intervals of 95 % for another sample of sequences.",
    )
    parser.examples = (
        "bandpo replay run/tokens --rule ppo --rule kl@0.01 --html report.html",
        "bandpo replay tokens.parquet --rule dapo --match clip-fraction",
    )


def _add_region_options(parser: _Parser) -> None:
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


def _add_json(parser: _Parser, command: Callable[[argparse.Namespace], int]) -> None:
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
