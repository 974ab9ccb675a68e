"""The commands: each prints its result and returns the exit code."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from bandpo.check import check_name
from bandpo.cli import listing
from bandpo.curve import curve_of, drawn_presets, named_region
from bandpo.divergence import Divergence
from bandpo.error import InputPathError, InvalidValueError, MismatchWarning, MissingExtraError
from bandpo.presets import PRESETS, Preset
from bandpo.region import Band, BySign, PrefixBudget, Region, from_description
from bandpo.spec import region_from_spec, spec_from_region
from bandpo.surrogate import resolve
from bandpo.table import TARGET, BandTable

if TYPE_CHECKING:
    from rich.progress import Progress

    from bandpo.record import LoggedTokens

CHECK_FAILED = 1
"""Exit code of a check that failed."""

SAMPLES = 1_000_000
"""Log-probs that ``table verify`` compares by default."""

PICTURE = "bandpo-plot.png"
"""The picture that ``plot`` writes by default."""

REPLAYED = ("ppo", "dapo", "kl@0.01", "kl@0.05", "dppo-tv")
"""Rules that ``replay`` compares by default."""

MATCHED = ("kl", "reverse-kl", "tv", "hellinger", "pearson-chi2", "jensen-shannon")
"""Divergences that ``replay --match`` calibrates by default."""

TOGETHER = 3
"""Regions that are drawn over each other unless axes are named; more are hard to tell apart."""


def bounds(parsed: argparse.Namespace) -> int:
    """Prints the bounds of a region for each probability."""
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
        description = region.describe()
        content: dict[str, object] = {"spec": _spec_or_none(description), "region": description}
        if isinstance(region, Band):
            content["divergence"] = region.divergence.spec
            content["delta_low"], content["delta_high"] = region.delta_low, region.delta_high
        _print_json({**content, "bounds": rows})
        return 0
    texts = [{name: f"{value:.9g}" for name, value in row.items()} for row in rows]
    print("\n".join(listing.table(texts, listing.width())))
    return 0


def table_build(parsed: argparse.Namespace) -> int:
    """Writes the table of a region."""
    table = _region(parsed, parsed.region, region_from_spec).table()
    table.save(parsed.output)
    _print_table(_describe(table, parsed.output), parsed.json)
    return 0


def table_inspect(parsed: argparse.Namespace) -> int:
    """Prints the metadata of a table file."""
    table = BandTable.load(parsed.path)
    _print_table(_describe(table, parsed.path), parsed.json)
    return 0


def table_verify(parsed: argparse.Namespace) -> int:
    """Compares a table file with the solver; the code is `CHECK_FAILED` above the target."""
    table = BandTable.load(parsed.path)
    if parsed.exhaustive:
        table.save(parsed.path)  # before the minutes that it takes, in case it cannot be written
    with _progress() as progress:
        task = progress.add_task("verifying")
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


def plot(parsed: argparse.Namespace) -> int:
    """Draws regions, or prints the curves as JSON."""
    regions = {name: named_region(name) for name in parsed.words or drawn_presets()}
    probability_range = None if parsed.p_range is None else tuple(parsed.p_range)
    output = parsed.output or (None if parsed.json else PICTURE)
    if output is not None:
        from bandpo.plot import comparison_figure, save, update_figure

        named = {name.removeprefix("preset:"): region for name, region in regions.items()}
        page = {"dark": parsed.dark, "probability_range": probability_range}
        if parsed.axes is None and len(named) > TOGETHER:
            figure = comparison_figure(named, **page)
        else:
            figure = update_figure(named, views=parsed.axes or ("linear", "log"), **page)
        save(figure, output)
    if parsed.json:
        _print_json(
            {
                name: {
                    of: values.tolist()
                    for of, values in curve_of(region, probability_range)._asdict().items()
                }
                for name, region in regions.items()
            }
        )
    else:
        print(f"{', '.join(regions)}: {output}")
    return 0


def presets(parsed: argparse.Namespace) -> int:
    """Prints the published rules."""
    rules = [_rule(each) for each in PRESETS.values()]
    if parsed.json:
        _print_json(rules)
        return 0
    rows = [
        {
            "rule": rule["name"],
            "region": rule["region"] or _without_spec(PRESETS[rule["name"]]),
            "surrogate": _surrogate_text(rule),
            "source": re.split("[;:]", rule["source"])[0],
        }
        for rule in rules
    ]
    print("\n".join(listing.table(rows, min(listing.width(), 120), wrap_last=True)))
    return 0


def demo(parsed: argparse.Namespace) -> int:
    """Runs the demo."""
    from bandpo.demo import print_report, run

    chosen = {name: getattr(parsed, name) for name in ("seeds", "batches", "noise")}
    picture = Path(parsed.output)
    result = run(
        picture,
        tokens=picture.with_name(f"{picture.stem}-tokens"),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    if parsed.json:
        _print_json(result.as_dict())
    else:
        print_report(result)
    return 0


def doctor(parsed: argparse.Namespace) -> int:
    """Prints what is installed; the code may be `CHECK_FAILED` with ``--check``."""
    from bandpo.doctor import as_text, report

    found = report(verl=parsed.verl)
    if parsed.json:
        _print_json(found)
    else:
        _print_fields(as_text(found))
    return CHECK_FAILED if parsed.check and found["problems"] else 0


def conform(parsed: argparse.Namespace) -> int:
    """Compares implementations with the vectors; `CHECK_FAILED` if a backend of ours disagrees."""
    if find_spec("torch") is None:
        raise MissingExtraError("torch", "torch")
    from bandpo.conform.compare import MAX_ULP
    from bandpo.conform.run import differences, reports, summary
    from bandpo.conform.vectors import FILE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MismatchWarning)  # the vectors mean to be far apart
        ours, others = reports(parsed.path or FILE, parsed.backend or ())
    found = [*ours, *others]
    passed = all(each.agrees for each in ours)
    rows = [summary(each) for each in found]
    different = [row for each in found for row in differences(each)]
    if parsed.json:
        content = {"max_ulp": MAX_ULP, "passed": passed, "summary": rows, "differences": different}
        _print_json(content)
        return 0 if passed else CHECK_FAILED
    texts = [_texts_of(row) for row in rows if not row["note"]]
    lines = [listing.table(texts, listing.width())]
    if different:
        lines.append(listing.table(list(map(_texts_of, different)), listing.width()))
    lines.append([f"{row['implementation']}: {row['note']}" for row in rows if row["note"]])
    print("\n\n".join("\n".join(block) for block in lines if block))
    return 0 if passed else CHECK_FAILED


def replay(parsed: argparse.Namespace) -> int:
    """Prints what rules would have done to the tokens of a log."""
    if find_spec("torch") is None:
        raise MissingExtraError("torch", "torch")
    from bandpo.record import read_tokens
    from bandpo.replay import compare, match, rows_of
    from bandpo.replay.cloud import Cloud
    from bandpo.replay.complaints import Facts
    from bandpo.replay.table import texts_of

    if parsed.divergence and not parsed.match:
        raise InvalidValueError("--divergence is for --match, which is left out")
    if parsed.html:
        from bandpo.plot import check_output
        from bandpo.replay.report import SUFFIXES, report, save

        check_output(parsed.html, SUFFIXES)  # before the minutes that a long log takes

    logged = read_tokens(parsed.paths, columns=dict(map(_column, parsed.column)))
    # A loss computes in float32 where the log-probs of the run have fewer digits.
    dtype = "float64" if logged.metadata.dtype == "float64" else "float32"
    rules = parsed.rule or list(REPLAYED)
    matched, page = None, None
    facts, cloud = Facts(), Cloud()
    with _progress() as progress:

        def watched(stage: str) -> Iterator[LoggedTokens]:
            task = progress.add_task(stage, total=None)
            for part in logged:
                yield part
                progress.advance(task, len(part.step))

        def seen_once() -> Iterator[LoggedTokens]:
            """The log for a comparison; what else needs each token gets it in the same pass."""
            for part in watched("comparing"):
                facts.add(part)
                if parsed.html:
                    cloud.add(part)
                yield part

        found = compare(seen_once(), rules, dtype=dtype)
        complaints = facts.complaints()
        if parsed.match:
            divergences, by = parsed.divergence or MATCHED, parsed.match
            strength, matches = match(
                watched("matching"), rules[0], divergences, by=by, dtype=dtype
            )
            matched = (by, rules[0], strength, matches)
        if parsed.html:
            title = ", ".join(Path(path).name for path in parsed.paths)
            page = report(found, complaints, cloud, title=title, matches=matched)
    if page is not None:
        save(page, parsed.html)
    rows = rows_of(found)
    if parsed.json:
        content: dict[str, Any] = {
            "tokens": found.sampled,
            "left_out": found.unknown,
            "complaints": {each.name: each.text for each in complaints},
            "rules": rows,
        }
        if matched is not None:
            content["match"] = {
                "by": parsed.match,
                "rule": rules[0],
                "strength": matched[2],
                "radii": {each.divergence: each.delta for each in matched[3]},
            }
        _print_json({**content, "html": parsed.html})
        return 0
    for each in complaints:
        print("\n".join(listing.wrapped("! ", each.text, listing.width())))
    print("\n".join(listing.table([texts_of(row) for row in rows], listing.width())))
    if matched is not None:
        texts = [{"divergence": each.divergence, "region": each.spec} for each in matched[3]]
        print(f"\nas strong as {rules[0]} ({parsed.match} {matched[2]:.4%}):")
        print("\n".join(listing.table(texts, listing.width())))
    if parsed.html:
        print(f"\nwrote {parsed.html}")
    return 0


def _column(text: str) -> tuple[str, str]:
    name, separator, other = text.partition("=")
    if not (name and separator and other):
        raise InvalidValueError(
            f"--column must be NAME=OTHER, as in old_log_prob=old_logprobs, got {text!r}"
        )
    return name, other


def _texts_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The cells of a row; a number of ulp has three digits."""
    return {
        name: f"{value:.3g}" if isinstance(value, float) else str(value)
        for name, value in row.items()
        if name != "note"
    }


def _region(parsed: argparse.Namespace, spec: str | None, read: Callable[[str], Region]) -> Region:
    """The region of a spec, as ``read`` makes it, or of the options in place of one."""
    names = ("divergence", "expression", "delta", "delta_high", "preset")
    options = {name: value for name in names if (value := getattr(parsed, name)) is not None}

    def refuse(one: str, other: str) -> NoReturn:
        raise InvalidValueError(f"give {one} or --{other.replace('_', '-')}, not both")

    for other in options:
        if spec is not None:
            refuse("a region", other)
        if "preset" in options and other != "preset":
            refuse("--preset", other)
        if "expression" in options and other == "divergence":
            refuse("--expression", other)
    if spec is not None:
        return read(spec)
    if "preset" in options:
        check_name("preset", options["preset"], PRESETS)
        return read(f"preset:{options['preset']}")
    if "expression" in options:
        divergence = Divergence.from_expression(options["expression"])
    else:
        divergence = Divergence(options.get("divergence", "kl"))
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
    words = {True: "yes", False: "no"}
    texts = {
        name: words[value] if isinstance(value, bool) else str(value)
        for name, value in values.items()
    }
    print("\n".join(listing.fields(texts, listing.width())))


def _spec_or_none(description: dict[str, Any]) -> str | None:
    """The spec of a described region, where there is one."""
    try:
        return spec_from_region(from_description(description))
    except InvalidValueError:
        return None


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
    if sys.stdin is None:
        raise InputPathError("cannot read standard input: it is closed")
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


def _describe(table: BandTable, path: str) -> dict[str, Any]:
    """The metadata of a table file, numbers as numbers."""
    metadata = table.metadata
    return {
        "path": path,
        "format": metadata["format"],
        "format_version": int(metadata["format_version"]),
        "spec": _spec_or_none(table.describe()),
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
        region = description["spec"] or json.dumps(description["region"], sort_keys=True)
        shown = {name: value for name, value in description.items() if name != "spec"}
        _print_fields({**shown, "region": region})


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    # On standard error, because standard output belongs to the result.
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _surrogate_text(rule: Mapping[str, Any]) -> str:
    """The surrogate of a rule with its parameters, and what else differs from the defaults."""
    name, *parameters = rule["surrogate"].items()
    texts = [name[1], *(key for key, value in parameters if value is True)]
    parameters = [pair for pair in parameters if pair[1] is not True]
    if len(parameters) == 1:
        texts += [f"{key.replace('_', ' ')} {value:g}" for key, value in parameters]
    elif parameters:
        texts[0] += " " + "/".join(f"{value:g}" for _, value in parameters)
    if rule["ratio_level"] != "token":
        texts.append(rule["ratio_level"])
    if rule["log_ratio_penalty"]:
        texts.append(f"penalty {rule['log_ratio_penalty']:g}")
    if correction := rule["correction"]:
        # What it allows; its level and action would take the width of the sources.
        allowed = correction.get("region") or "{statistic} {threshold:g}".format(**correction)
        texts.append(f"corrected: {allowed}")
    return ", ".join(texts)


def _without_spec(preset: Preset) -> str:
    """The region of a preset that no spec can write."""
    region = preset.region
    if isinstance(region, BySign):
        positive, negative = map(spec_from_region, region)
        return f"A > 0: {positive}, else {negative}"
    if isinstance(region, PrefixBudget):
        return f"{region.divergence} budget {region.delta:g} a token"
    return "changes with the batch"


def _correction_of(preset: Preset) -> dict[str, Any] | None:
    """A correction as JSON takes it."""
    if preset.correction is None:
        return None
    return {
        name: spec_from_region(value) if isinstance(value, Region) else value
        for name, value in preset.correction.items()
    }


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
        "log_ratio_penalty": preset.log_ratio_penalty,
        "correction": _correction_of(preset),
        "source": preset.source,
    }
