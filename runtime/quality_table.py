"""What a manifest says was measured of a quantized model, as lines for people; `docs/quality.md` explains them."""

from collections.abc import Mapping
from typing import Any, Final

# Name, field, and the number's form; a field `X_error` beside X is its standard error.
_PERCENTILES: Final = (
    ("median", "median_kl_divergence"),
    ("90 %", "kl_divergence_90"),
    ("95 %", "kl_divergence_95"),
    ("99 %", "kl_divergence_99"),
    ("99.9 %", "kl_divergence_99_9"),
    ("maximum", "largest_kl_divergence"),
)


def quality_rows(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of the quality that `gpt2-edge quantize` measured.

    Args:
        measured: The field `quality` of the manifest's `measured`. Another program may have written it, so what is
            missing or no number is left out.
    """
    rows = [
        ("text", _text(measured)),
        ("perplexity", _perplexity(measured)),
        ("mean KLD", _with_error(measured, "mean_kl_divergence", "{:.5f}", " nats a token")),
        ("KLD percentiles", _percentiles(measured)),
        ("same top token", _with_error(measured, "same_top_percent", "{:.2f}", " %")),
        ("mean Δp", _with_error(measured, "mean_probability_change_percent", "{:+.3f}", " %")),
        ("RMS Δp", _with_error(measured, "rms_probability_change_percent", "{:.3f}", " %")),
        ("greedy text", _greedy(measured)),
        ("rows of a batch", _in_batch(measured)),
    ]
    return [(name, value) for name, value in rows if value]


def _text(measured: Mapping[str, Any]) -> str:
    tokens = _number(measured, "tokens", "{:,.0f}")
    return f"{tokens} tokens of {measured.get('text', 'an unknown text')}" if tokens else ""


def _perplexity(measured: Mapping[str, Any]) -> str:
    now, before = (_number(measured, name, "{:.3f}") for name in ("perplexity", "full_precision_perplexity"))
    change = _with_error(measured, "perplexity_change_percent", "{:+.2f}", " %")
    return f"{now}, at full precision {before}: {change}" if now and before and change else ""


def _percentiles(measured: Mapping[str, Any]) -> str:
    found = ((name, _number(measured, field, "{:.5f}")) for name, field in _PERCENTILES)
    return ", ".join(f"{name} {value}" for name, value in found if value)


def _greedy(measured: Mapping[str, Any]) -> str:
    found = _divergent(measured, "first_divergent_tokens")
    return f"first divergent token of {found}" if found else ""


def _in_batch(measured: Mapping[str, Any]) -> str:
    found = _divergent(measured, "first_divergent_in_batch")
    return f"first token other than alone of {found}" if found else ""


def _divergent(measured: Mapping[str, Any], field: str) -> str:
    count, divergent = measured.get("greedy_tokens"), measured.get(field)
    if not isinstance(count, int) or not isinstance(divergent, list) or not divergent:
        return ""
    places = ", ".join("none" if place == count else str(place) for place in divergent)
    return f"{len(divergent)} texts of {count}: {places}"


def _with_error(measured: Mapping[str, Any], field: str, form: str, unit: str) -> str:
    value = _number(measured, field, form)
    stem = field.removesuffix("_percent")
    error = _number(measured, field.replace(stem, f"{stem}_error"), form.replace("+", ""))
    return "" if not value else f"{value} ± {error}{unit}" if error else value + unit


def _number(measured: Mapping[str, Any], field: str, form: str) -> str:
    value = measured.get(field)
    return form.format(value) if isinstance(value, int | float) and not isinstance(value, bool) else ""
