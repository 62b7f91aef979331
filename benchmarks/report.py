"""What was measured, as typed objects, and as JSON with a versioned schema.

The JSON has the names of these classes' attributes. Quantities are in bytes, seconds and tokens a second unless a name
says otherwise.
"""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from gpt2_edge.benchmarks.spread import Measurement
from gpt2_edge.errors import OptionError

SCHEMA: Final = "gpt2-edge bench 1"

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One test with one model.

    Attributes:
        n_prompt: Prompt tokens that were timed; 0 in a tg test.
        n_gen: Tokens that were timed, one after another; 0 in a pp test.
        n_depth: Tokens before them, which were not timed.
        batch: Sequences side by side.
        tokens_per_second: Of all sequences together, without tokenization and sampling; None if there is none.
        skipped: Why the test was not made; None if it was.
        error: Why it failed; None if it did not.
    """

    n_prompt: int
    n_gen: int
    n_depth: int
    batch: int
    tokens_per_second: Measurement | None = None
    skipped: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """What a caller of `generate` waits for, with sampling (temperature 0.8, top-k 40).

    Attributes:
        prompt_tokens: Of the random prompts.
        new_tokens: Generated after each.
        time_to_first_token: Seconds from the first step of the prompt until a token is chosen.
        inter_token_ms: Milliseconds between two tokens, of all repetitions.
        p50_ms: Median of them.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        sampling_share: Fraction of the decoding time that choosing tokens took.
        python_share: Fraction that was neither choosing nor inside ONNX Runtime.
    """

    prompt_tokens: int
    new_tokens: int
    time_to_first_token: Measurement
    inter_token_ms: tuple[float, ...]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    sampling_share: float
    python_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of the process that ran one model, the Python interpreter included.

    Attributes:
        before_loading_bytes: Resident with everything imported and no model.
        steady_bytes: Resident after the speed tests, idle.
        peak_bytes: The most that was resident until then.
    """

    before_loading_bytes: int
    steady_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """How near decoding comes to the speed of memory.

    Attributes:
        buffer_bytes: What was read: as much as the weights.
        read_bytes_per_second: Reached by all cores that the process may use.
        bytes_per_token: Weights, keys and values that a token of the test `test` reads, on average.
        limit_tokens_per_second: `read_bytes_per_second / bytes_per_token`.
        test: The tg test that is compared; None if there is none.
        fraction: Its tokens a second as a fraction of the limit.
    """

    buffer_bytes: int
    read_bytes_per_second: Measurement
    bytes_per_token: int
    limit_tokens_per_second: float
    test: str | None
    fraction: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How well a model predicts a text, and how far it is from the full-precision one.

    Attributes:
        text: Which text.
        tokens: Scored tokens.
        perplexity: `exp` of the mean negative log-probability.
        reference: Name of the full-precision row; None if there is none with the same vocabulary.
        perplexity_change_percent: Against the reference.
        perplexity_change_error_percent: Standard error of that, from the differences token by token.
        mean_kl_divergence: From the reference's distribution, in nats a token.
        same_top_percent: Positions at which both find the same token the likeliest.
    """

    text: str
    tokens: int
    perplexity: float
    reference: str | None = None
    perplexity_change_percent: float | None = None
    perplexity_change_error_percent: float | None = None
    mean_kl_divergence: float | None = None
    same_top_percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SustainedSpeed:
    """Decoding without a pause.

    Attributes:
        seconds: When each sample ended, since the beginning.
        tokens_per_second: The samples.
    """

    seconds: tuple[float, ...]
    tokens_per_second: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row: a model folder with a number of threads.

    Attributes:
        name: Tells the rows apart.
        folder: As it was given.
        error: Why it could not be measured, or not to the end; None if it could.
        threads: Threads that compute.
        device: Where it ran.
        peer: Package and version of the other program that ran it; None for gpt2-edge itself.
        precision: "fp32", "fp16", "int8" or "int4"; of a peer, the one that it is compared with.
        recipe: How it was quantized.
        parameters: How many weights.
        size_bytes: Of all files of the folder, the manifest not counted.
        weights_bytes: Of the graphs and their weights.
        context_length: Tokens that the model can hold.
        vocabulary_size: How many tokens there are.
        content_sha256: What tells one model from another.
        load_seconds: `gpt2_edge.load`, hashes checked, files in the system's cache.
        speeds: By the name of the test, such as "pp128", "tg128" or "tg128 @ d512".
        latency: What a caller waits for.
        memory: Of the process.
        idle_cpu_percent: Of one core, after the tests, with the model loaded.
        bandwidth: How near decoding comes to the speed of memory.
        quality: How well it predicts a text.
        sustained: Decoding without a pause.
        notes: What else is to be known about the row.
    """

    name: str
    folder: str
    error: str | None = None
    threads: int | None = None
    device: str | None = None
    peer: str | None = None
    precision: str | None = None
    recipe: str | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    weights_bytes: int | None = None
    context_length: int | None = None
    vocabulary_size: int | None = None
    content_sha256: str | None = None
    load_seconds: float | None = None
    speeds: dict[str, Speed] = field(default_factory=dict)
    latency: Latency | None = None
    memory: Memory | None = None
    idle_cpu_percent: float | None = None
    bandwidth: Bandwidth | None = None
    quality: Quality | None = None
    sustained: SustainedSpeed | None = None
    notes: tuple[str, ...] = ()

    def speed(self, test: str) -> Measurement | None:
        """Return tokens a second of a test; None if it was not measured."""
        found = self.speeds.get(test)
        return None if found is None else found.tokens_per_second

    @property
    def disturbed(self) -> list[str]:
        """Names of the tests whose spread is above 10 %."""
        return [
            name
            for name, speed in self.speeds.items()
            if speed.tokens_per_second is not None and speed.tokens_per_second.disturbed
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One quantity of a row, now and in an earlier report.

    Attributes:
        name: Of the row.
        quantity: Name of the test, or "time to first token".
        before: In the earlier report.
        now: In this one.
        verdict: "faster" or "slower" if the spreads support it, otherwise why there is none.
        times_as_fast: How many times; None without a difference.
    """

    name: str
    quantity: str
    before: Measurement
    now: Measurement
    verdict: str
    times_as_fast: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """This report against an earlier one.

    Attributes:
        earlier: Where and when that was made.
        verdicts: Of what both have.
        notes: Why the two may not be comparable.
    """

    earlier: str
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All rows, and where, when and how they were measured.

    Attributes:
        schema: Name and version of this format.
        created_at: UTC, as in RFC 3339.
        command: The command line that measures the same again.
        settings: What was asked for.
        environment: The machine and the versions, by name.
        variants: The rows.
        interrupted: Whether Ctrl-C ended it before everything was measured.
        seconds: How long it took.
        comparison: With an earlier report, if that was asked for.
    """

    schema: str = SCHEMA
    created_at: str
    command: tuple[str, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]
    variants: tuple[Variant, ...]
    interrupted: bool = False
    seconds: float = 0.0
    comparison: Comparison | None = None

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, name: str = "the report") -> "Report":
        """Read what `to_json` wrote.

        Raises:
            OptionError: It is not such a report, or one of another schema.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{name} is not JSON: {error}") from error
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            found = "no schema" if schema is None else f"the schema {schema!r}"
            raise OptionError(f"{name} has {found}, expected {SCHEMA!r}: make it with `gpt2-edge bench --format json`")
        return decode(Report, document, name)


def decode(record: type[_Record], document: Any, where: str) -> _Record:
    """Make a dataclass of this file from what JSON made of it.

    Raises:
        OptionError: A field is missing or has another type.
    """
    if not isinstance(document, dict):
        raise OptionError(f"{where} is not an object")
    hints = typing.get_type_hints(record)
    values = {}
    for each in dataclasses.fields(record):  # type: ignore[arg-type]
        if each.name in document:
            values[each.name] = _decode_value(hints[each.name], document[each.name], f"{where}: {each.name}")
    try:
        return record(**values)
    except TypeError as error:
        raise OptionError(f"{where}: {error}") from error


def _decode_value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in arguments:
            return None
        return _decode_value(next(each for each in arguments if each is not types.NoneType), value, where)
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type, hint), value, where)
    expected = (int, float) if hint is float else (list if origin is tuple else origin or hint)
    if hint is not Any and (not isinstance(value, expected) or (isinstance(value, bool) and hint is not bool)):
        raise OptionError(f"{where} is {str(value)[:60]!r}, expected {getattr(hint, '__name__', hint)}")
    if origin is tuple:
        return tuple(_decode_value(arguments[0], each, where) for each in value)
    if origin is dict:
        return {str(name): _decode_value(arguments[1], each, f"{where}: {name}") for name, each in value.items()}
    return value
