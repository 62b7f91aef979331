"""Speed, memory and quality, side by side.

    report = gpt2_edge.benchmarks.run(["gpt2-fp32", "gpt2-int8"])
    report.variants[1].speeds["tg128"].tokens_per_second.mean

`gpt2-edge bench` is the same on the command line.
"""

if __name__ != "gpt2_edge.benchmarks":
    raise ImportError(f"this package is imported as gpt2_edge.benchmarks, not as {__name__}: run pip install .")

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_edge.benchmarks.coordinator import run
    from gpt2_edge.benchmarks.plan import Settings
    from gpt2_edge.benchmarks.report import Report, Speed, Variant
    from gpt2_edge.benchmarks.spread import Measurement

__all__ = ["Measurement", "Report", "Settings", "Speed", "Variant", "run"]

# Imported when first asked for, so that the parts that need no model, no psutil and no rich work without.
_MODULE_OF = {
    "run": "coordinator",
    "Settings": "plan",
    **dict.fromkeys(("Report", "Speed", "Variant"), "report"),
    "Measurement": "spread",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gpt2_edge.benchmarks' has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(f"gpt2_edge.benchmarks.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
