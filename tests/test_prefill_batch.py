"""Short prompts that wait together are computed in one run, and each gets the very bits that it gets alone."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from fake_session import (
    PATIENCE_SECONDS,
    BatchingFakeSession,
    Spoken,
    compute,
    engine_over,
    finish,
    made_up_prompt,
)
from generating import SAMPLED, STORY, assert_same, write_words

import gpt2_edge
from gpt2_edge import Model
from gpt2_edge.batch_rule import batch_rule
from gpt2_edge.engine import Engine
from gpt2_edge.generation import LogitsRow, NextTokenRow
from gpt2_edge.graph_reader import Graph, Node, Tensor
from gpt2_edge.kv_cache import KVCache, SequenceCache
from gpt2_edge.prefill import PREFILL_CHUNK_TOKENS
from gpt2_edge.prefill_batch import MOST_PADDING_TOKENS, companions
from gpt2_edge.quantize.pipeline import quantize_folder
from gpt2_edge.quantize.recipes import MatrixFormat, Recipe
from gpt2_edge.row import Row
from gpt2_edge.session import Logits, StepSession

# Which prompts go together.


@pytest.mark.parametrize("seed", range(30))
def test_companions_waste_little_and_leave_none_behind_that_would_fit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, *waiting = rng.integers(1, 30, 12).tolist()
    most_prompts, most_tokens = int(rng.integers(1, 10)), int(rng.integers(30, 200))
    chosen = companions(first, waiting, most_prompts, most_tokens)
    lengths = [first, *(waiting[index] for index in chosen)]
    assert len(set(chosen)) == len(chosen) < most_prompts
    if chosen:
        assert len(lengths) * max(lengths) <= most_tokens
        assert len(lengths) * max(lengths) - sum(lengths) <= len(chosen) * MOST_PADDING_TOKENS
    for index in set(range(len(waiting))) - set(chosen) if len(lengths) < most_prompts else ():
        more = [*lengths, waiting[index]]
        padding = len(more) * max(more) - sum(more) - (len(lengths) * max(lengths) - sum(lengths))
        assert len(more) * max(more) > most_tokens or padding > MOST_PADDING_TOKENS


def test_equal_lengths_go_in_their_order() -> None:
    assert companions(5, [5, 30, 5, 5, 6, 4], 4, 256) == [0, 2, 3]
    assert companions(64, [64] * 9, 64, 256) == [0, 1, 2]
    assert companions(200, [5, 5], 64, 256) == []


def graph_of(*operators: str, few: bytes | None = None) -> Graph:
    limit = [Tensor("branches.most_few_tokens", raw=memoryview(few))] if few is not None else []
    return Graph([Node(operator) for operator in operators], limit)


EIGHT: Final = (8).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("operators", "longest"),
    [
        (["MatMul", "MatMul", "Gemm"], 64),
        (["MatMulIntegerToFloat", "MatMulIntegerToFloat", "MatMulNBits"], 64),
        (["MatMulNBits", "MatMulNBits"], 16),
    ],
)
def test_prompts_are_computed_together_up_to_where_it_pays(operators: list[str], longest: int) -> None:
    rule = batch_rule(graph_of(*operators, few=EIGHT))
    assert [rule.batch_class(tokens) for tokens in range(1, 300)] == [1] * longest + [None] * (299 - longest)
    assert rule.example_lengths(1) == [1, 5, 2]


def test_a_graph_with_two_branches_computes_rows_of_one_branch_together() -> None:
    """What is few for one row must not be many for its padding."""
    rule = batch_rule(graph_of("Gemm", "If", few=EIGHT))
    assert [rule.batch_class(tokens) for tokens in range(1, 65)] == [0] * 8 + [1] * 56
    assert [rule.example_lengths(each) for each in (0, 1)] == [[1, 5, 2], [9, 13, 10]]
    assert batch_rule(graph_of("Gemm", "If")).batch_class(5) is None, "nobody knows where the branches part"


# The engine.


@pytest.fixture
def session() -> Iterator[BatchingFakeSession]:
    session = BatchingFakeSession()
    yield session
    assert session.violations == []


@pytest.fixture
def engine(session: BatchingFakeSession) -> Engine:
    return engine_over(session)


def test_prompts_that_wait_together_are_one_run(engine: Engine, session: BatchingFakeSession) -> None:
    rows = [Spoken(made_up_prompt(seed, length), wanted=3) for seed, length in enumerate([5, 300, 7, 20, 6, 8, 22])]
    compute(engine, *rows)
    for row in rows:
        row.check()
    assert session.batch_sizes() == [4, 2]
    assert session.calls.count("prefill") == 2  # of the long one


def test_the_row_that_waits_longest_begins(engine: Engine) -> None:
    """Others join its run, and nobody's; so a prompt that goes with no other is not left behind."""
    lengths = [5, 300, 5, 20, 5, 5, 39, 21, 5]
    rows = [Spoken(made_up_prompt(seed, length), wanted=400) for seed, length in enumerate(lengths)]
    engine.join(rows)
    finished_prefill: list[int] = []
    for _ in range(4):  # runs
        known = len(finished_prefill)
        engine.run_until(lambda known=known: sum(bool(row.said) for row in rows) > known)
        finished_prefill += [place for place, row in enumerate(rows) if row.said and place not in finished_prefill]
    assert finished_prefill == [0, 2, 4, 5, 8, 1, 3, 7, 6]
    engine.leave(rows)


def test_decoding_goes_on_between_runs(engine: Engine, session: BatchingFakeSession) -> None:
    talking = Spoken([1], wanted=30)
    engine.join([talking])
    engine.run_until(lambda: len(talking.said) == 3)
    session.calls.clear()
    rows = [Spoken(made_up_prompt(seed, 30), wanted=1) for seed in range(24)]
    compute(engine, *rows)
    steps = [call.split()[0] for call in session.calls if call.startswith(("prefill", "decode"))]
    assert steps[:6] == ["decode", "prefill"] * 3
    assert session.batch_sizes() == [8, 8, 8]
    finish(engine, [talking])
    talking.check()


def test_no_more_are_computed_than_have_room(
    engine: Engine, session: BatchingFakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_most_rows", 4)
    talking = Spoken([1], wanted=40)
    engine.join([talking])
    engine.run_until(lambda: talking.said)
    rows = [Spoken(made_up_prompt(seed, 7), wanted=3) for seed in range(8)]
    compute(engine, *rows)
    for row in rows:
        row.check()
    assert session.batch_sizes() == [3, 3, 2]
    finish(engine, [talking])
    talking.check()


def test_equal_prompts_are_computed_once(engine: Engine, session: BatchingFakeSession) -> None:
    prompts = [made_up_prompt(seed, 12) for seed in (1, 2)] * 6
    rows = [Spoken(prompt, wanted=4, accent=place) for place, prompt in enumerate(prompts)]
    compute(engine, *rows)
    for row in rows:
        row.check()
    assert session.batch_sizes() == [2]
    assert "prefill" not in session.calls


def test_rows_that_go_on_with_what_was_saved_begin_alone(engine: Engine, session: BatchingFakeSession) -> None:
    saved = Spoken(made_up_prompt(1, 6), wanted=2)
    saved.keeps_cache = True
    compute(engine, saved)
    again = Spoken(saved.tokens, wanted=3)
    again.initial_cache = saved.final_cache
    others = [Spoken(made_up_prompt(seed, 8), wanted=3) for seed in (2, 3)]
    session.calls.clear()
    compute(engine, others[0], again, others[1])
    for row in (again, *others):
        row.check()
    assert session.batch_sizes() == [2]
    assert session.calls.count("prefill") == 1


def test_one_that_is_cancelled_ends_the_run_and_the_others_begin_again(
    engine: Engine, session: BatchingFakeSession
) -> None:
    rows = [Spoken(made_up_prompt(seed, 30), wanted=5) for seed in range(4)]
    in_prefill = threading.Event()

    def hang(call: str) -> None:
        if call == "prefill batch 4":
            in_prefill.set()
            session.wait_until_terminated()

    session.on_call = hang
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(compute, engine, *rows)
        assert in_prefill.wait(PATIENCE_SECONDS)
        engine.leave([rows[1]])
        computing.result(timeout=PATIENCE_SECONDS)
    assert rows[1].left
    assert rows[1].said == []
    assert session.batch_sizes() == [4, 3]
    for row in (rows[0], *rows[2:]):
        row.check()


def test_who_cancelled_does_not_wait_for_the_others(engine: Engine, session: BatchingFakeSession) -> None:
    rows = [Spoken(made_up_prompt(seed, 30), wanted=5) for seed in range(4)]
    in_prefill, is_back = threading.Event(), threading.Event()

    def hang(call: str) -> None:
        if call == "prefill batch 4":
            in_prefill.set()
            session.wait_until_terminated()
        elif call == "prefill batch 3":
            assert is_back.wait(PATIENCE_SECONDS), "the one that was cancelled is still waited for"

    def wait_for_the_second() -> None:
        finish(engine, [rows[1]])
        is_back.set()

    session.on_call = hang
    engine.join(rows)
    with ThreadPoolExecutor(2) as pool:
        others = pool.submit(finish, engine, [rows[0], *rows[2:]])
        assert in_prefill.wait(PATIENCE_SECONDS)
        cancelled = pool.submit(wait_for_the_second)
        while not engine._waiters:
            time.sleep(0.001)
        rows[1].abandoned = True
        cancelled.result(timeout=2 * PATIENCE_SECONDS)
        others.result(timeout=2 * PATIENCE_SECONDS)
    assert rows[1].said == []


def test_a_run_that_fails_fails_its_rows_and_no_other(engine: Engine, session: BatchingFakeSession) -> None:
    rows = [Spoken(made_up_prompt(seed, 30), wanted=5) for seed in range(10)]
    error = RuntimeError("the run failed")

    def fail(call: str) -> None:
        if call == "prefill batch 8":
            raise error

    session.on_call = fail
    compute(engine, *rows)
    assert [row.failure for row in rows] == [error] * 8 + [None] * 2
    for row in rows[8:]:
        row.check()


def test_a_row_that_fails_in_company_fails_alone(engine: Engine) -> None:
    rows = [Spoken(made_up_prompt(seed, 7), wanted=4) for seed in range(5)]
    rows[2].fails_after = 0
    compute(engine, *rows)
    for row in rows:
        row.check_beginning() if row.fails else row.check()
        assert isinstance(row.failure, ArithmeticError) == row.fails


# The real models.


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How long the prompts of each run of several are."""
    found: list[list[int]] = []
    prefill_batch = StepSession.prefill_batch

    def recording(session: StepSession, slot: int, prompts: Sequence[Sequence[int]], positions: Any) -> Logits:
        found.append([len(prompt) for prompt in prompts])
        return prefill_batch(session, slot, prompts, positions)

    monkeypatch.setattr(StepSession, "prefill_batch", recording)
    return found


@pytest.fixture(scope="module")
def small_fp32(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    """A model that is quantized quickly."""
    from gpt2_edge.export import export_checkpoint

    place = tmp_path_factory.mktemp("batch")
    write_words(place / "words")
    checkpoint = write_checkpoint(place / "checkpoint", n_embd=128, n_positions=128, initializer_range=0.1)
    export_checkpoint(checkpoint, place / "fp32")
    return place / "fp32"


def quantized(source: Path, name: str, linear: MatrixFormat, cache: str = "fp32") -> Path:
    head = MatrixFormat(8, 64, "nearest")
    recipe = Recipe(name=name, precision=f"int{linear.bits}", linear=linear, head=head, note="for a test")
    quantize_folder(source, source.with_name(name), recipe, calibration=source.with_name("words"), cache=cache)
    return source.with_name(name)


@pytest.fixture(scope="module")
def small_int4(small_fp32: Path) -> Path:
    return quantized(small_fp32, "small-blocks", MatrixFormat(4, 32, "nearest"))


@pytest.fixture(scope="module")
def small_cache8(small_fp32: Path) -> Path:
    return quantized(small_fp32, "integer-cache", MatrixFormat(8, None, "nearest"), cache="int8")


FOLDERS: Final = ["storyteller_fp32", "storyteller_int8", "small_int4", "small_cache8"]


@pytest.fixture(scope="module", params=FOLDERS)
def loaded(request: pytest.FixtureRequest) -> Iterator[Model]:
    with gpt2_edge.load(request.getfixturevalue(request.param)) as model:
        yield model


def made_up(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 8192, length).tolist()


@pytest.mark.parametrize(
    "lengths", [[1, 1], [1] * 8, [1, 5], [2, 1, 3, 5, 4], [8, 4], [9, 13], [12, 14, 12], [15, 16] * 4], ids=str
)
@pytest.mark.parametrize("kind", [NextTokenRow, LogitsRow])
@pytest.mark.usefixtures("forgetful")
def test_logits_and_keys_are_the_same_bits(
    loaded: Model, batches: list[list[int]], lengths: list[int], kind: type[Row]
) -> None:
    prompts = [made_up(seed, length) for seed, length in enumerate(lengths)]
    together = computed(loaded, prompts, kind)
    assert batches == [sorted(lengths, key=lambda length: abs(length - lengths[0]))]
    for prompt, row in zip(prompts, together, strict=True):
        (alone,) = computed(loaded, [prompt], kind)
        np.testing.assert_array_equal(all_logits(row), all_logits(alone))
        for found, expected in zip(arrays(row.final_cache), arrays(alone.final_cache), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert len(batches) == 1, "a row alone was computed with others"


def computed(model: Model, prompts: list[list[int]], kind: Any) -> list[Any]:
    rows = [kind(prompt) for prompt in prompts]
    for row in rows:
        row.keeps_cache = True
    model._core.run(rows)
    return rows


@pytest.mark.usefixtures("forgetful")
def test_padding_takes_no_row_to_the_other_branch(small_cache8: Path, batches: list[list[int]]) -> None:
    prompts = [made_up(seed, length) for seed, length in enumerate([7, 9, 8, 10, 6, 11])]
    with gpt2_edge.load(small_cache8) as model:
        together = computed(model, prompts, NextTokenRow)
        assert batches == [[7, 8, 6], [9, 10, 11]]
        for prompt, row in zip(prompts, together, strict=True):
            (alone,) = computed(model, [prompt], NextTokenRow)
            np.testing.assert_array_equal(row.logits, alone.logits)


def all_logits(row: Any) -> Logits:
    return np.concatenate(row.chunks) if isinstance(row, LogitsRow) else row.logits


def arrays(cache: SequenceCache | None) -> list[Any]:
    assert cache is not None
    return cache.arrays


def test_rows_decode_from_a_shared_run_as_from_their_own(loaded: Model, batches: list[list[int]]) -> None:
    """Padding that a slot holds after its prompt, and what was computed from it, changes nothing."""
    prompts = [STORY[start : start + 8 + 3 * (start % 5)] for start in range(0, 400, 36)]
    for options in ({}, SAMPLED):
        batches.clear()
        rows = loaded.generate(prompts, max_new_tokens=24, **options)
        assert sum(map(len, batches)) >= len(prompts) - 2
        for prompt, row in zip(prompts, rows, strict=True):
            assert_same(row, loaded.generate(prompt, max_new_tokens=24, **({**options, "seed": row.seed})))
            loaded._core.engine._prefill._prompts.keep_only(None)


def test_what_padding_leaves_in_a_slot_is_never_read(storyteller_int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding gives numbers of some sort; here it is made NaN, which would spread."""
    prefill_batch = StepSession.prefill_batch

    def poisoning(session: StepSession, slot: int, prompts: Sequence[Sequence[int]], positions: Any) -> Logits:
        logits = prefill_batch(session, slot, prompts, positions)
        for place, prompt in enumerate(prompts):
            for buffer in session._cache._buffers:
                buffer[slot + place, :, len(prompt) :] = np.nan
        return logits

    prompts = [made_up(seed, 8 + seed % 5) for seed in range(6)]
    with gpt2_edge.load(storyteller_int8) as model:
        expected = [model.generate(prompt, max_new_tokens=30, ignore_eos=True).tokens for prompt in prompts]
        monkeypatch.setattr(StepSession, "prefill_batch", poisoning)
        found = model.generate(prompts, max_new_tokens=30, ignore_eos=True)
        assert [each.tokens for each in found] == expected
        again = model.generate(prompts[::-1] * 2, max_new_tokens=30, ignore_eos=True)  # from what the slots hold
        assert [each.tokens for each in again] == expected[::-1] * 2


def test_prompts_of_a_shared_run_are_known(int8_model: Model, batches: list[list[int]]) -> None:
    """The last of them keeps its slot; what is known of it has the bits that it would be computed with."""
    prompts = [made_up(seed, 20) for seed in range(4)]
    int8_model.generate(prompts, max_new_tokens=2, ignore_eos=True)
    assert batches == [[20] * 4]
    repeated = int8_model.generate(prompts[0], max_new_tokens=2)
    assert repeated.timings.prompt_tokens == 0
    assert batches == [[20] * 4]


def test_threads_share_a_run(int8_model: Model, batches: list[list[int]]) -> None:
    prompts = [made_up(100 + seed, 20) for seed in range(8)]
    expected = [int8_model.generate(prompt, max_new_tokens=5, ignore_eos=True).tokens for prompt in prompts]
    batches.clear()
    with int8_model.stream(made_up(1, 500), max_new_tokens=5, ignore_eos=True) as stream, ThreadPoolExecutor(8) as pool:
        begun = pool.submit(next, stream)  # they come while its prompt is computed
        found = list(pool.map(lambda prompt: int8_model.generate(prompt, max_new_tokens=5, ignore_eos=True), prompts))
        begun.result(timeout=PATIENCE_SECONDS)
    assert [each.tokens for each in found] == expected
    assert sum(map(len, batches)) >= 4


def test_cancelling_one_of_many_takes_effect_at_once(fp32_model: Model) -> None:
    cancel = threading.Event()
    prompts = [made_up(200 + seed, 64) for seed in range(16)]
    row_options: list[Any] = [{"cancel": cancel} if place == 2 else {} for place in range(16)]
    timer = threading.Timer(0.02, cancel.set)
    timer.start()
    rows = fp32_model.generate(prompts, row_options=row_options, max_new_tokens=3, ignore_eos=True)
    timer.join()
    assert [row.finish_reason for row in rows] == ["cancelled" if place == 2 else "length" for place in range(16)]
    alone = fp32_model.generate(prompts[3], max_new_tokens=3, ignore_eos=True)
    assert rows[3].tokens == alone.tokens


def test_short_windows_of_texts_are_scored_together(model: Model, batches: list[list[int]]) -> None:
    texts = [made_up(300 + seed, 2 + seed % 40) for seed in range(60)] + [made_up(9, 700)]
    together = model.score(texts)
    assert sum(map(len, batches)) >= 50
    assert all(len(batch) * max(batch) <= PREFILL_CHUNK_TOKENS for batch in batches)
    batches.clear()
    assert together == [model.score(text) for text in texts]
    assert batches == []


@pytest.mark.usefixtures("forgetful")
def test_a_folder_whose_rows_would_differ_is_computed_row_by_row(small_fp32: Path) -> None:
    """On processors whose kernel adds large blocks up in another order when there are several rows; on some it does."""
    large = quantized(small_fp32, "large-blocks", MatrixFormat(4, 128, "nearest"))
    texts = [made_up(seed, 10) for seed in range(5)]
    prompts = [made_up(seed, 6) for seed in range(5)]
    with gpt2_edge.load(large) as loaded:
        assert loaded.score(texts) == [loaded.score(text) for text in texts]
        for prompt, row in zip(prompts, computed(loaded, prompts, NextTokenRow), strict=True):
            (alone,) = computed(loaded, [prompt], NextTokenRow)
            np.testing.assert_array_equal(row.logits, alone.logits)


@pytest.mark.parametrize("different", [1, 2])
def test_kernels_that_give_other_bits_are_found_out(
    storyteller_int8: Path, batches: list[list[int]], monkeypatch: pytest.MonkeyPatch, different: int
) -> None:
    """Those of a single row, which mostly are others, and those of more."""
    run_prefill = StepSession._run_prefill

    def changing(session: StepSession, binding: Any, inputs: Any) -> Logits:
        logits = run_prefill(session, binding, inputs)
        if len(inputs["input_ids"]) > 1:
            for row, last in enumerate(inputs["seqlens_k"]):
                logits[row] *= np.float32(1 + 1e-6) if min(last, 1) + 1 == different else 1
        return logits

    monkeypatch.setattr(StepSession, "_run_prefill", changing)
    with gpt2_edge.load(storyteller_int8) as model:
        model.generate([made_up(seed, 5) for seed in range(5)], max_new_tokens=2)
        assert batches == []
        monkeypatch.setattr(StepSession, "_run_prefill", run_prefill)
        model.generate([made_up(seed, 6) for seed in range(5)], max_new_tokens=2)
        assert batches == [], "it was tried out again"


def test_keys_that_differ_are_found_out(
    storyteller_int8: Path, batches: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of the first token may be the same all the same."""
    save = KVCache.save

    def changed(cache: KVCache, slot: int, length: int) -> SequenceCache:
        saved = save(cache, slot, length)
        saved.arrays[0][0, 0, 0] += slot
        return saved

    monkeypatch.setattr(KVCache, "save", changed)
    with gpt2_edge.load(storyteller_int8) as model:
        model.generate([made_up(seed, 5) for seed in range(5)], max_new_tokens=1)
    assert batches == []


def test_memory_for_trying_out_that_is_not_there_is_no_failure(
    storyteller_int8: Path, batches: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpt2_edge.load(storyteller_int8) as model:
        session: Any = model._core.engine._session

        def failing(binding: Any, inputs: Any) -> Logits:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(session, "_run_prefill", failing)
            assert session.batch_class(5) is None
        assert len(model.generate([[1, 2], [3, 4]], max_new_tokens=2)) == 2
        assert batches == []
