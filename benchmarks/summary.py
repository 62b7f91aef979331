"""What a report says, in a sentence or two, and what has to be said beside it."""

from gpt2_edge.benchmarks.report import Quality, Report, Variant
from gpt2_edge.benchmarks.spread import supported_ratio, two_digits


def summary_sentences(report: Report) -> list[str]:
    """Compare each row with the first full-precision one, as far as the spreads support it.

    Without one, or if it is alone, say what each row is by itself.
    """
    measured = [variant for variant in report.variants if variant.error is None and variant.load_seconds is not None]
    own = [variant for variant in measured if variant.peer is None]
    reference = reference_of(report)
    others = [each for each in own if reference and each is not reference and each.threads == reference.threads]
    if reference is None or not others:
        sentences = [_sentence_alone(variant) for variant in own]
    else:
        sentences = [_sentence(variant, reference) for variant in others]
    return sentences + _peer_sentences(own, [variant for variant in measured if variant.peer is not None])


def reference_of(report: Report) -> Variant | None:
    """Return the first full-precision row of gpt2-edge's own that was measured."""
    own = (each for each in report.variants if each.peer is None and each.error is None)
    return next((each for each in own if each.precision == "fp32"), None)


def decode_test(report: Report) -> str | None:
    """Return the name of the tg test that rows are compared by: the first that one of them has a result for."""
    return next((test for variant in report.variants if (test := _first_measured(variant, "tg"))), None)


def prefill_test(report: Report) -> str | None:
    """Return the name of the pp test that rows are compared by: the last, which is the longest by default."""
    names = [name for variant in report.variants for name in variant.speeds if name.startswith("pp")]
    return next((name for name in reversed(names) if any(each.speed(name) for each in report.variants)), None)


def remarks(report: Report) -> list[str]:
    """Return what a reader has to know before believing the numbers."""
    found = ["Interrupted: this is what was measured until then."] if report.interrupted else []
    about: dict[str, list[str]] = {}
    for variant in report.variants:
        for remark in _remarks_about(variant, report.environment.get("cores_allowed")):
            about.setdefault(remark, []).append(variant.name)
    found += [f"{', '.join(names)}: {remark}" for remark, names in about.items()]
    load, cores = report.environment.get("load_average"), report.environment.get("cores_allowed")
    if isinstance(load, float) and isinstance(cores, int) and load > cores / 2:
        found.append(f"The machine was busy before this began: load average {load:g} on {cores} cores.")
    if report.environment.get("on_battery"):
        found.append("The machine runs on its battery.")
    return found


def _remarks_about(variant: Variant, cores: int | None) -> list[str]:
    found = [] if variant.error is None else [variant.error]
    if variant.disturbed:
        found.append(f"disturbed (spread above 10 %) in {', '.join(variant.disturbed)}")
    if variant.threads is not None and isinstance(cores, int) and variant.threads > cores:
        found.append(f"{variant.threads} threads on {cores} cores")
    return [*found, *variant.notes, *_skipped(variant)]


def _first_measured(variant: Variant, kind: str) -> str | None:
    return next((name for name in variant.speeds if name.startswith(kind) and variant.speed(name)), None)


def _last_measured(variant: Variant, kind: str) -> str | None:
    return next((name for name in reversed(variant.speeds) if name.startswith(kind) and variant.speed(name)), None)


def _skipped(variant: Variant) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, speed in variant.speeds.items():
        if speed.skipped is not None:
            by_reason.setdefault(speed.skipped, []).append(name)
    return [f"skipped {', '.join(names)} ({reason})" for reason, names in by_reason.items()]


def _sentence_alone(variant: Variant) -> str:
    test = _first_measured(variant, "tg")
    speed = variant.speed(test) if test else None
    parts = [f"{variant.name} has {(variant.size_bytes or 0) / 1e6:,.1f} MB"]
    if speed is not None:
        spread = "" if speed.stddev is None else f" ± {two_digits(speed.stddev)}"
        parts.append(f"decodes {speed.mean:,.0f}{spread} tokens/s ({test})")
    if variant.memory is not None:
        parts.append(f"keeps {variant.memory.steady_bytes / 1e6:,.0f} MB resident")
    return f"{', '.join(parts[:-1])} and {parts[-1]}." if len(parts) > 1 else f"{parts[0]}."


def _sentence(variant: Variant, reference: Variant) -> str:
    parts = [_speed_clause(variant, reference), _size_clause(variant, reference)]
    sentence = f"{variant.name} is {' and '.join(part for part in parts if part)}"
    quality = _quality_clause(variant.quality)
    return f"{sentence}; {quality}." if quality else f"{sentence}."


def _peer_sentences(own: list[Variant], peers: list[Variant]) -> list[str]:
    """Compare each row with the fastest peer of as many threads: decoding, and the longest prompt.

    With those of its precision, if there are any.
    """
    sentences = []
    for variant in own:
        rivals = [peer for peer in peers if peer.threads == variant.threads]
        alike = [peer for peer in rivals if peer.precision and peer.precision == variant.precision]
        fastest = f"the fastest {variant.precision} peer" if alike else "the fastest peer"
        tests = {"decodes": _first_measured(variant, "tg"), "reads prompts": _last_measured(variant, "pp")}
        clauses = [
            _peer_clause(verb, test, variant, alike or rivals, fastest)
            for verb, test in tests.items()
            if test is not None
        ]
        if any(clauses):
            sentences.append(f"{variant.name} {' and '.join(clause for clause in clauses if clause)}.")
    return sentences


def _peer_clause(verb: str, test: str, variant: Variant, peers: list[Variant], which: str) -> str:
    speeds = [(speed.mean, place) for place, peer in enumerate(peers) if (speed := peer.speed(test)) is not None]
    if not speeds:
        return ""
    fastest = peers[max(speeds)[1]]
    ratio = supported_ratio(variant.speed(test), fastest.speed(test))
    if ratio is None:
        return f"{verb} not faster or slower than {which}, {fastest.name}, beyond the spread ({test})"
    return f"{verb} {ratio} as fast as {which}, {fastest.name} ({test})"


def _speed_clause(variant: Variant, reference: Variant) -> str:
    test = _first_measured(variant, "tg")
    if test is None or reference.speed(test) is None:
        return ""
    ratio = supported_ratio(variant.speed(test), reference.speed(test))
    if ratio is None:
        return f"not faster or slower than {reference.name} beyond the spread ({test})"
    return f"{ratio} as fast as {reference.name} ({test})"


def _size_clause(variant: Variant, reference: Variant) -> str:
    if not variant.size_bytes or not reference.size_bytes:
        return ""
    if variant.size_bytes <= reference.size_bytes:
        return f"{two_digits(reference.size_bytes / variant.size_bytes)} x smaller"
    return f"{two_digits(variant.size_bytes / reference.size_bytes)} x larger"


def _quality_clause(quality: Quality | None) -> str:
    if quality is None or quality.perplexity_change_percent is None:
        return ""
    change = f"{quality.perplexity_change_percent:+.2f} % ± {quality.perplexity_change_error_percent or 0:.2f} %"
    return f"perplexity {change}, the same likeliest token {quality.same_top_percent:.1f} % of the time"
