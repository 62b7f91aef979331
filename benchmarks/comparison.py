"""Compare a report with an earlier one: a verdict only where the spreads support it."""

from typing import Final

from gpt2_edge.benchmarks.report import Comparison, Report, Variant, Verdict
from gpt2_edge.benchmarks.spread import FEWEST_SAMPLES, Measurement, supported_ratio

NO_DIFFERENCE: Final = "not beyond the spread"
FIRST_TOKEN: Final = "time to first token"
_SAME_MACHINE: Final = ("cpu", "cores_allowed", "onnxruntime", "governor")


def compare_reports(now: Report, before: Report, name: str) -> Comparison:
    """Compare rows of the same name and number of threads.

    Args:
        now: What was measured now.
        before: The earlier report.
        name: Of the earlier report.
    """
    earlier = {(variant.name, variant.threads): variant for variant in before.variants}
    verdicts: list[Verdict] = []
    notes = [
        f"{fact} was {before.environment.get(fact)}, is {now.environment.get(fact)}"
        for fact in _SAME_MACHINE
        if before.environment.get(fact) != now.environment.get(fact)
    ]
    for variant in now.variants:
        counterpart = earlier.get((variant.name, variant.threads))
        if counterpart is None:
            notes.append(f"{variant.name} with {variant.threads} threads is not in the earlier report")
            continue
        if counterpart.content_sha256 != variant.content_sha256:
            notes.append(f"{variant.name} holds another model than in the earlier report")
        verdicts += _verdicts(variant, counterpart)
    return Comparison(earlier=f"{name} of {before.created_at}", verdicts=tuple(verdicts), notes=tuple(notes))


def _verdicts(now: Variant, before: Variant) -> list[Verdict]:
    verdicts = []
    for test in now.speeds:
        speed, earlier_speed = now.speed(test), before.speed(test)
        if speed is not None and earlier_speed is not None:
            verdicts.append(judge(now.name, test, before=earlier_speed, now=speed))
    if now.latency is not None and before.latency is not None:
        verdicts.append(
            judge(
                now.name,
                FIRST_TOKEN,
                before=before.latency.time_to_first_token,
                now=now.latency.time_to_first_token,
                less_is_faster=True,
            )
        )
    return verdicts


def judge(name: str, quantity: str, *, before: Measurement, now: Measurement, less_is_faster: bool = False) -> Verdict:
    """Say whether a quantity changed beyond the spread of both measurements."""
    ratio = supported_ratio(before, now) if less_is_faster else supported_ratio(now, before)
    if ratio is None:
        verdict = NO_DIFFERENCE
        if min(len(now.samples), len(before.samples)) < FEWEST_SAMPLES:
            verdict = f"fewer than {FEWEST_SAMPLES} samples"
    else:
        verdict = "faster" if ratio.value > 1 else "slower"
    return Verdict(
        name=name,
        quantity=quantity,
        before=before,
        now=now,
        verdict=verdict,
        times_as_fast=None if ratio is None else str(ratio),
    )
