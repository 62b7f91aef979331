"""A checkpoint's tokenizer comes into the model folder giving the token ids that transformers gives."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gpt2_edge import CheckpointError
from gpt2_edge.export.tokenizer_files import read_tokenizer

DATA: Final = Path(__file__).resolve().parent / "data" / "gpt2-tokenizer"
GPT2_VOCABULARY_SIZE: Final = 50257
END_OF_TEXT: Final = "<|endoftext|>"

# Pieces that a fuzzed text is made of beside arbitrary characters: where the splitting and the merging have corners.
PIECES: Final = [
    END_OF_TEXT,
    "<|endoftext|",
    "|endoftext|>",
    "<|end|>",
    "[PAD]",
    "<user>",
    "<USER>",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n ",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x00",
    "\x1b[0m",
    "\x7f",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\u00ad",
    "\u202e",
    "'s",
    "'LL",
    "’s",
    "don't",
    "I'm",
    "hello",
    " hello",
    "Hello",
    "SolidGoldMagikarp",
    " SolidGoldMagikarp",
    "1234567890",
    "½²",
    "٣٤",
    "日本語",
    "한국어",
    "ภาษาไทย",
    "हिन्दी",
    "עברית",
    "العربية",
    "naïve",
    "nai\u0308ve",
    "ﬁ",
    "ß",
    "🦊",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "🇫🇷",
    "👍🏽",
    "\U0010ffff",
    "a" * 70,
    "=" * 40,
    " " * 33,
    "!?…—",
    "Ġ",
    "Ċ",
]
TEXTS: Final = [
    "",
    " ",
    "Hello, world!",
    f"{END_OF_TEXT}{END_OF_TEXT} {END_OF_TEXT}\n{END_OF_TEXT}",
    f"a{END_OF_TEXT}b <user>c[PAD] d",
    "  <user>  spaces [PAD]  ",
    "Ġ is U+0120, which GPT-2's files write for a space",
    "".join(PIECES),
    " ".join(PIECES),
]

any_text: Final = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=("Cs",)), max_size=6)), max_size=12
).map("".join)


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vocab.json` and `merges.txt` as OpenAI published them, beside a config."""
    folder = tmp_path_factory.mktemp("gpt2")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes(gzip.decompress((DATA / f"{name}.gz").read_bytes()))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


@pytest.fixture(scope="module")
def gpt2_tokenizer(gpt2_files: Path) -> Tokenizer:
    return read_tokenizer(gpt2_files, GPT2_VOCABULARY_SIZE)


@pytest.fixture(scope="module")
def expected_gpt2(gpt2_files: Path) -> Any:
    return AutoTokenizer.from_pretrained(gpt2_files)


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """As the runtime encodes a prompt."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_vocabulary_is_gpt2s(gpt2_tokenizer: Tokenizer) -> None:
    assert gpt2_tokenizer.get_vocab_size() == GPT2_VOCABULARY_SIZE
    assert tokens_of(gpt2_tokenizer, "Hello, world!") == [15496, 11, 995, 0]
    assert tokens_of(gpt2_tokenizer, END_OF_TEXT) == [50256]


@pytest.mark.parametrize("text", [*TEXTS, *PIECES], ids=repr)
def test_gpt2s_own_files(text: str, gpt2_tokenizer: Tokenizer, expected_gpt2: Any) -> None:
    check_gpt2(text, gpt2_tokenizer, expected_gpt2)


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(text=any_text)
def test_gpt2s_own_files_over_fuzzed_texts(text: str, gpt2_tokenizer: Tokenizer, expected_gpt2: Any) -> None:
    check_gpt2(text, gpt2_tokenizer, expected_gpt2)


def check_gpt2(text: str, tokenizer: Tokenizer, expected: Any) -> None:
    tokens = tokens_of(tokenizer, text)
    assert tokens == expected.encode(text)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text


Change = Callable[[Path], None]


def write(name: str, document: Any) -> Change:
    return lambda folder: (folder / name).write_text(json.dumps(document)) and None


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


def whole(**settings: Any) -> Change:
    """Put a `tokenizer.json` in the place of the two files."""

    def change(folder: Path) -> None:
        tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.add_special_tokens([END_OF_TEXT])
        tokenizer.add_tokens([AddedToken("<user>", lstrip=True, normalized=True)])
        tokenizer.save(str(folder / "tokenizer.json"))
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()

    return change


PAD: Final = token("[PAD]")
USER: Final = token("<user>", special=False, normalized=True, rstrip=True)

# Ways in which published checkpoints say more than their vocabulary does.
SETTINGS: Final[dict[str, Change]] = {
    "gpt2's own": write("tokenizer_config.json", {"model_max_length": 1024}),
    "DialoGPT's": write(
        "tokenizer_config.json",
        {
            "unk_token": token(END_OF_TEXT, normalized=True) | {"__type": "AddedToken"},
            "bos_token": token(END_OF_TEXT, normalized=True) | {"__type": "AddedToken"},
            "eos_token": END_OF_TEXT,
            "add_prefix_space": False,
            "add_bos_token": False,
            "errors": "replace",
            "pad_token": None,
            "tokenizer_class": "GPT2Tokenizer",
        },
    ),
    "prefix space": write("tokenizer_config.json", {"add_prefix_space": True}),
    "added tokens": write("added_tokens.json", {"[PAD]": 50257, "<user>": 50258}),
    "added tokens out of order": write("added_tokens.json", {"<user>": 50258, "[PAD]": 50257}),
    "added tokens, one of them special": both(
        write("added_tokens.json", {"[PAD]": 50257, "<user>": 50258}),
        write("special_tokens_map.json", {"pad_token": "[PAD]", "eos_token": END_OF_TEXT}),
    ),
    "special token without an id": write("special_tokens_map.json", {"pad_token": "[PAD]"}),
    "special tokens with flags": write(
        "special_tokens_map.json",
        {"pad_token": token("[PAD]", lstrip=True, rstrip=True), "additional_special_tokens": ["<user>", "<USER>"]},
    ),
    "special tokens of the settings": write(
        "tokenizer_config.json", {"pad_token": "[PAD]", "additional_special_tokens": ["<user>", "[PAD]"]}
    ),
    "special token that is a word": write("special_tokens_map.json", {"sep_token": "hello"}),
    "decoder of added tokens": write(
        "tokenizer_config.json",
        {
            "added_tokens_decoder": {"50256": token(END_OF_TEXT), "50257": PAD, "50258": USER},
            "pad_token": "[PAD]",
            "tokenizer_class": "GPT2Tokenizer",
        },
    ),
    "decoder of added tokens, over the older files": both(
        write("tokenizer_config.json", {"added_tokens_decoder": {"50257": PAD}, "pad_token": "[PAD]"}),
        write("added_tokens.json", {"<user>": 50257}),
        write("special_tokens_map.json", {"sep_token": "<user>"}),
    ),
    "plain token that settings name": write(
        "tokenizer_config.json",
        {"added_tokens_decoder": {"50257": token("<user>", special=False)}, "pad_token": "<user>"},
    ),
    "tokenizer.json": whole(),
    "tokenizer.json and settings": both(
        whole(),
        write("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "pad_token": "[PAD]"}),
    ),
    "tokenizer.json and a decoder of added tokens": both(
        whole(),
        write("tokenizer_config.json", {"added_tokens_decoder": {"50256": token(END_OF_TEXT), "50258": PAD}}),
    ),
    "tokenizer.json with a prefix space": both(
        whole(add_prefix_space=True), write("tokenizer_config.json", {"add_prefix_space": True})
    ),
    "tokenizer.json with a prefix space that the settings lack": whole(add_prefix_space=True),
    "tokenizer.json without a prefix space that the settings have": both(
        whole(), write("tokenizer_config.json", {"add_prefix_space": True})
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_beside_the_vocabulary(case: str, gpt2_files: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2_files, tmp_path / "checkpoint")
    SETTINGS[case](folder)
    tokenizer = read_tokenizer(folder, GPT2_VOCABULARY_SIZE + 10)
    # The runtime reads what was written, not the object that was made.
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = AutoTokenizer.from_pretrained(folder)
    assert isinstance(expected, PreTrainedTokenizerFast)
    for text in [*TEXTS, *PIECES]:
        assert tokens_of(tokenizer, text) == expected.encode(text, add_special_tokens=False), text
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert_fuzzed_equal(tokenizer, expected)


def assert_fuzzed_equal(tokenizer: Tokenizer, expected: Any) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(text=any_text)
    def check(text: str) -> None:
        assert tokens_of(tokenizer, text) == expected.encode(text, add_special_tokens=False)

    check()


def test_special_token_without_an_embedding_is_text(gpt2_files: Path, tmp_path: Path) -> None:
    """A fine-tune that only names a padding token, as many do, would give ids beyond the model's embeddings."""
    folder = shutil.copytree(gpt2_files, tmp_path / "checkpoint")
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    plain = read_tokenizer(gpt2_files, GPT2_VOCABULARY_SIZE)
    tokenizer = read_tokenizer(folder, GPT2_VOCABULARY_SIZE)
    assert tokens_of(tokenizer, "x[PAD]") == tokens_of(plain, "x[PAD]")
    assert max(tokens_of(read_tokenizer(folder, GPT2_VOCABULARY_SIZE + 1), "x[PAD]")) == GPT2_VOCABULARY_SIZE


def whole_with(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        whole()(folder)
        document = json.loads((folder / "tokenizer.json").read_text())
        document["model"] |= fields.pop("model", {})
        (folder / "tokenizer.json").write_text(json.dumps(document | fields))

    return change


BEGINNING: Final = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [50256], "tokens": [END_OF_TEXT]}},
}

REFUSALS: Final[dict[str, tuple[Change, list[str]]]] = {
    "token before each text": (
        write("tokenizer_config.json", {"add_bos_token": True}),
        ["tokenizer_config.json", "add_bos_token"],
    ),
    "token before each text, by tokenizer.json": (
        whole_with(post_processor=BEGINNING),
        ["tokenizer.json", "post_processor"],
    ),
    "special tokens as text": (
        write("tokenizer_config.json", {"split_special_tokens": True}),
        ["split_special_tokens"],
    ),
    "code of its own": (write("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}), ["auto_map"]),
    "another class": (write("tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"}), ["RobertaTokenizer"]),
    "dropout": (whole_with(model={"dropout": 0.1}), ["dropout is 0.1"]),
    "added token with another id": (write("added_tokens.json", {"[PAD]": 50300}), ["[PAD]", "50300", "50257"]),
    "added token with the id of a word": (write("added_tokens.json", {"[PAD]": 5}), ["[PAD]", "id 5", "50257"]),
    "added token that the model lacks": (
        write("added_tokens.json", {"[PAD]": 50257, "<user>": 50258}),
        ["50258", "<user>", "ends at 50257"],
    ),
    "id that is none": (write("added_tokens.json", {"[PAD]": "x"}), ["added_tokens.json", "[PAD]", "'x'"]),
    "added tokens that are a list": (write("added_tokens.json", ["[PAD]"]), ["added_tokens.json", "JSON object"]),
    "settings that are no JSON": (
        lambda folder: (folder / "tokenizer_config.json").write_text("{") and None,
        ["cannot read", "tokenizer_config.json"],
    ),
    "settings nested without end": (
        lambda folder: (folder / "special_tokens_map.json").write_text("[" * 100_000) and None,
        ["cannot read", "special_tokens_map.json"],
    ),
    "special token that is a number": (write("special_tokens_map.json", {"pad_token": 5}), ["5", "not a token"]),
    "special token without a content": (write("special_tokens_map.json", {"pad_token": {}}), ["not a token"]),
    "special tokens that are a text": (
        write("special_tokens_map.json", {"additional_special_tokens": "<user>"}),
        ["additional_special_tokens", "list"],
    ),
    "decoder of added tokens that is a list": (
        write("tokenizer_config.json", {"added_tokens_decoder": [PAD]}),
        ["added_tokens_decoder"],
    ),
    "prefix space that is a text": (
        write("tokenizer_config.json", {"add_prefix_space": "yes"}),
        ["add_prefix_space", "'yes'", "true or false"],
    ),
    "no merges": (lambda folder: (folder / "merges.txt").unlink(), ["merges.txt"]),
    "merges of another vocabulary": (
        lambda folder: (folder / "merges.txt").write_text("#version: 0.2\nzz qq\n") and None,
        ["cannot read the tokenizer"],
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_tokenizer_is_refused_by_name(case: str, gpt2_files: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2_files, tmp_path / "checkpoint")
    change, words = REFUSALS[case]
    change(folder)
    with pytest.raises(CheckpointError) as refusal:
        read_tokenizer(folder, GPT2_VOCABULARY_SIZE + 1)
    message = str(refusal.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
