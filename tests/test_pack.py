"""Packs and signatures: one file for a folder, and who made it."""

import json
import mmap
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from model_folders import copy_of_storyteller

import gpt2_edge
from gpt2_edge.cli import main
from gpt2_edge.errors import ModelFolderError, OptionError
from gpt2_edge.folder import open_folder
from gpt2_edge.manifest import MANIFEST_NAME
from gpt2_edge.onnxruntime_import import onnxruntime
from gpt2_edge.pack import pack_folder, unpack_folder
from gpt2_edge.pack_format import ALIGNMENT_BYTES

GREEDY: Final = {"max_new_tokens": 8}
MODEL_FILES: Final = ["golden.json", "model.onnx", "model.onnx.data", "tokenizer.json"]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "model.gpt2"
    pack_folder(open_folder("storyteller"), path, None)
    return path


@pytest.fixture
def damaged_pack(pack: Path, tmp_path: Path) -> Path:
    """A copy of the pack that may be changed."""
    return Path(shutil.copy(pack, tmp_path / "damaged.gpt2"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pairs of Ed25519 keys, an RSA pair, and a key with a password."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    folder = tmp_path_factory.mktemp("keys")
    pem, public_format = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    plain = serialization.NoEncryption()
    pairs = {
        "mine": ed25519.Ed25519PrivateKey.generate(),
        "other": ed25519.Ed25519PrivateKey.generate(),
        "rsa": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    }
    for name, key in pairs.items():
        (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(pem, public_format))
    secret = serialization.BestAvailableEncryption(b"password")
    (folder / "secret.pem").write_bytes(pairs["mine"].private_bytes(pem, serialization.PrivateFormat.PKCS8, secret))
    return folder


# Packs.


def test_a_pack_computes_what_its_folder_computes(pack: Path) -> None:
    with gpt2_edge.load("storyteller") as folder, gpt2_edge.load(pack) as packed:
        assert (
            packed.generate("Once upon a time", **GREEDY).tokens == folder.generate("Once upon a time", **GREEDY).tokens
        )
        assert packed.manifest == folder.manifest


def test_a_pack_is_a_plain_archive(pack: Path) -> None:
    """Any program that reads ZIP gets the folder's files."""
    home = open_folder("storyteller").path
    with zipfile.ZipFile(pack) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [MANIFEST_NAME, *MODEL_FILES]
        assert all(archive.read(name) == (home / name).read_bytes() for name in archive.namelist())


def test_every_file_can_be_mapped_where_it_lies(pack: Path) -> None:
    opened = open_folder(pack)
    assert all(opened.content(entry.name).offset % ALIGNMENT_BYTES == 0 for entry in opened.manifest.files)
    assert ALIGNMENT_BYTES % mmap.PAGESIZE == 0


def test_the_same_folder_makes_the_same_pack(pack: Path, tmp_path: Path) -> None:
    folder = copy_of_storyteller(tmp_path / "copy")
    for file in folder.iterdir():
        os.utime(file, (1, 1))
        file.chmod(0o600)
    pack_folder(open_folder(folder), tmp_path / "from-folder.gpt2", None)
    pack_folder(open_folder(pack), tmp_path / "from-pack.gpt2", None)
    assert (tmp_path / "from-folder.gpt2").read_bytes() == pack.read_bytes()
    assert (tmp_path / "from-pack.gpt2").read_bytes() == pack.read_bytes()


def test_unpacking_gives_the_folder_back(pack: Path, tmp_path: Path) -> None:
    unpack_folder(open_folder(pack), tmp_path / "folder")
    home = open_folder("storyteller").path
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == sorted(file.name for file in home.iterdir())
    assert all((tmp_path / "folder" / file.name).read_bytes() == file.read_bytes() for file in home.iterdir())


def test_files_beyond_four_gigabytes(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried with a low limit: what changes is where the sizes stand."""
    monkeypatch.setattr("gpt2_edge.pack._FIRST_ZIP64_BYTES", 100_000)
    pack_folder(open_folder("storyteller"), tmp_path / "large.gpt2", None)
    assert (tmp_path / "large.gpt2").read_bytes() != pack.read_bytes()
    opened = open_folder(tmp_path / "large.gpt2")
    opened.check_hashes()
    assert opened.content("model.onnx.data").offset % ALIGNMENT_BYTES == 0
    with zipfile.ZipFile(tmp_path / "large.gpt2") as archive:
        assert archive.testzip() is None


def test_damaged_folders_are_not_packed(tmp_path: Path) -> None:
    folder = copy_of_storyteller(tmp_path / "copy")
    with (folder / "model.onnx.data").open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(ModelFolderError, match=r"model\.onnx\.data is damaged"):
        pack_folder(open_folder(folder), tmp_path / "model.gpt2", None)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_overwritten(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "model.gpt2"
    place.write_text("mine") if kind == "file" else place.mkdir()
    with pytest.raises(ModelFolderError, match=r"already exists|is a folder"):
        pack_folder(open_folder("storyteller"), place, None)
    assert place.read_text() == "mine" if kind == "file" else place.is_dir()


@pytest.mark.parametrize("kept", [0.0001, 0.1, 0.5, 0.97, 0.99999])
def test_a_pack_that_is_cut_off(damaged_pack: Path, kept: float) -> None:
    os.truncate(damaged_pack, int(kept * damaged_pack.stat().st_size))
    with pytest.raises(ModelFolderError, match=r"is cut off|is not JSON"):
        open_folder(damaged_pack)


def test_a_changed_byte_in_a_pack(damaged_pack: Path) -> None:
    offset = open_folder(damaged_pack).content("model.onnx.data").offset
    with damaged_pack.open("r+b") as file:
        file.seek(offset + 1_000_000)
        byte = file.read(1)[0]
        file.seek(offset + 1_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ModelFolderError, match=r"damaged\.gpt2.model\.onnx\.data is damaged: its SHA-256"):
        gpt2_edge.load(damaged_pack)


def compressed(path: Path, home: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (MANIFEST_NAME, *MODEL_FILES):
            archive.write(home / name, name)


def not_aligned(path: Path, home: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in (MANIFEST_NAME, *MODEL_FILES):
            archive.write(home / name, name)


def without_a_manifest(path: Path, home: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(home / "model.onnx", "model.onnx")


def with_a_file_that_is_not_listed(path: Path, home: Path) -> None:
    pack_folder(open_folder(home), path, None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more", b"more")


def text(path: Path, home: Path) -> None:
    path.write_text("This is no archive, though it is long enough to be the beginning of one.")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (compressed, "its files are compressed"),
        (not_aligned, r"golden\.json is not where memory can be mapped"),
        (without_a_manifest, r"begins with 'model\.onnx', not with manifest\.json"),
        (with_a_file_that_is_not_listed, "it has more files than the manifest"),
        (text, "is a file: give the model folder that it lies in"),
    ],
)
def test_what_is_no_pack(tmp_path: Path, make: Callable[[Path, Path], None], message: str) -> None:
    make(tmp_path / "x.gpt2", open_folder("storyteller").path)
    with pytest.raises(ModelFolderError, match=message):
        open_folder(tmp_path / "x.gpt2")


def test_an_onnxruntime_that_cannot_load_a_pack(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    monkeypatch.setattr("gpt2_edge.graph_session._TAKES_WEIGHTS_FROM_MEMORY", "what 1.23 has not")
    with pytest.raises(ModelFolderError, match=r"ONNX Runtime 1\.23\.2 cannot load.*gpt2-edge unpack"):
        gpt2_edge.load(pack)


def test_commands_take_a_pack(pack: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["info", str(pack)], ["verify", str(pack)], ["next", str(pack), "Once", "-k", "1"]):
        assert main(command) == 0
    assert main(["unpack", str(pack), "-o", str(tmp_path / "folder")]) == 0
    assert main(["pack", str(tmp_path / "folder"), "-o", str(tmp_path / "again.gpt2")]) == 0
    assert (tmp_path / "again.gpt2").read_bytes() == pack.read_bytes()
    assert "not signed" in capsys.readouterr().out


# The memory of unchanged files.


def test_files_that_nobody_touched_are_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt2_edge import known_hashes
    from gpt2_edge.file_content import FileContent

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setattr(known_hashes, "_SETTLED_AFTER_SECONDS", 0)
    monkeypatch.setattr(known_hashes, "memory_path", lambda: tmp_path / "cache" / "hashes.json")
    folder = copy_of_storyteller(tmp_path / "copy")
    hashed: list[str] = []
    sha256 = FileContent.sha256
    monkeypatch.setattr(
        FileContent, "sha256", lambda self, *rest: (hashed.append(self.path.name), sha256(self, *rest))[1]
    )

    def load() -> list[str]:
        hashed.clear()
        gpt2_edge.load(folder, verify_hashes="changed").close()
        return sorted(hashed)

    assert load() == MODEL_FILES
    assert load() == []
    os.utime(folder / "model.onnx.data", (1, 1))
    assert load() == ["model.onnx.data"]
    with (folder / "model.onnx.data").open("r+b") as file:
        file.write(b"damage")
    os.utime(folder / "model.onnx.data", (1, 1))  # the time of the inode's change still tells
    with pytest.raises(ModelFolderError, match="is damaged"):
        load()
    (tmp_path / "cache" / "hashes.json").write_text("[" * 100_000)
    shutil.rmtree(folder)
    copy_of_storyteller(folder)
    assert load() == MODEL_FILES


def test_the_choices_of_verify_hashes() -> None:
    with pytest.raises(OptionError, match="verify_hashes is 'always': give True, False or 'changed'"):
        gpt2_edge.load("storyteller", verify_hashes="always")  # type: ignore[arg-type]


# Signatures.


@pytest.fixture
def signed(tmp_path: Path, keys: Path) -> Path:
    folder = copy_of_storyteller(tmp_path / "signed")
    assert main(["sign", str(folder), "--key", str(keys / "mine.pem")]) == 0
    return folder


def test_a_signed_folder_and_its_pack_are_loaded(signed: Path, keys: Path, tmp_path: Path) -> None:
    pack_folder(open_folder(signed), tmp_path / "a.gpt2", open_folder(signed).signature)
    assert main(["pack", str(signed), "-o", str(tmp_path / "b.gpt2"), "--sign", str(keys / "mine.pem")]) == 0
    assert (tmp_path / "a.gpt2").read_bytes() == (tmp_path / "b.gpt2").read_bytes()
    unpack_folder(open_folder(tmp_path / "a.gpt2"), tmp_path / "unpacked")
    for folder in (signed, tmp_path / "a.gpt2", tmp_path / "unpacked"):
        gpt2_edge.load(folder, public_key=keys / "mine.pub").close()
        gpt2_edge.load(folder, public_key=(keys / "mine.pub").read_bytes()).close()
        gpt2_edge.load(folder).close()


def test_the_signature_is_what_openssl_checks(signed: Path, keys: Path, tmp_path: Path) -> None:
    """The last 64 bytes, over the manifest as it is stored."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    (tmp_path / "signature").write_bytes((signed / "manifest.sig").read_bytes()[-64:])
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", keys / "mine.pub", "-rawin"]
    done = subprocess.run(
        [*command, "-in", signed / MANIFEST_NAME, "-sigfile", tmp_path / "signature"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def change_the_manifest(folder: Path) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    (folder / MANIFEST_NAME).write_text(json.dumps(document | {"end_of_text": 1}), encoding="utf-8")


def change_the_weights(folder: Path) -> None:
    with (folder / "model.onnx.data").open("r+b") as file:
        file.write(b"damage")


def cut_the_signature(folder: Path) -> None:
    os.truncate(folder / "manifest.sig", 95)


def change_the_signature(folder: Path) -> None:
    whole = (folder / "manifest.sig").read_bytes()
    (folder / "manifest.sig").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def remove_the_signature(folder: Path) -> None:
    (folder / "manifest.sig").unlink()


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (change_the_manifest, "mine.pub", "was changed after it was signed"),
        (change_the_signature, "mine.pub", "was changed after it was signed"),
        (change_the_weights, "mine.pub", r"model\.onnx\.data is damaged"),
        (cut_the_signature, "mine.pub", "has a damaged signature"),
        (remove_the_signature, "mine.pub", "is not signed"),
        (nothing, "other.pub", "was signed with another key"),
    ],
)
def test_what_a_public_key_refuses(
    signed: Path, keys: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], key: str, message: str
) -> None:
    change(signed)
    capsys.readouterr()
    assert main(["verify", str(signed), "--public-key", str(keys / key)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"gpt2-edge: [^\n]*{message}[^\n]*\n", printed.err), printed.err


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("rsa.pub", "is another kind of key"),
        ("mine.pem", "is not a public key"),
        ("missing.pub", "cannot read the key"),
    ],
)
def test_public_keys_that_are_none(signed: Path, keys: Path, key: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        gpt2_edge.load(signed, public_key=str(keys / key))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("rsa.pem", "is another kind of key"),
        ("mine.pub", "is not a private key"),
        ("secret.pem", "is encrypted"),
        ("missing.pem", "cannot read the key"),
    ],
)
def test_private_keys_that_are_none(
    keys: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, message: str
) -> None:
    folder = copy_of_storyteller(tmp_path / "copy")
    assert main(["sign", str(folder), "--key", str(keys / key)]) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "manifest.sig").exists()


def test_a_signature_without_hashes_would_say_nothing(signed: Path, keys: Path) -> None:
    with pytest.raises(OptionError, match="public_key needs verify_hashes"):
        gpt2_edge.load(signed, public_key=keys / "mine.pub", verify_hashes=False)


def test_a_pack_is_signed_when_it_is_made(pack: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sign", str(pack), "--key", str(keys / "mine.pem")]) == 1
    assert "gpt2-edge pack --sign KEY" in capsys.readouterr().err
