"""Ed25519 signatures of manifests, which carry the hashes of all files. The cryptography package does the mathematics.

`manifest.sig` has 96 bytes: the signer's public key, which only serves to tell a wrong key from a changed manifest, and
the signature (RFC 8032) of the bytes of `manifest.json`.
"""

from pathlib import Path
from typing import Any, Final

from gpt2_edge.errors import MissingDependencyError, ModelFolderError, OptionError
from gpt2_edge.folder import ModelFolder
from gpt2_edge.pack_format import SIGNATURE_NAME
from gpt2_edge.seal import new_file

_PUBLIC_KEY_BYTES: Final = 32
_SIGNATURE_BYTES: Final = 64
_KEY_FILE_LIMIT_BYTES: Final = 10_000
_MAKE_KEY: Final = "`openssl genpkey -algorithm ed25519 -out key.pem`"
_MAKE_PUBLIC: Final = "`openssl pkey -in key.pem -pubout -out public.pem`"


def sign_manifest(manifest_bytes: bytes, key: Path) -> bytes:
    """Return the content of `manifest.sig` for a manifest.

    Args:
        manifest_bytes: The manifest as it is stored.
        key: A PEM file with an Ed25519 private key, as `openssl genpkey -algorithm ed25519` makes it.

    Raises:
        OptionError: The key cannot be read, or is another kind of key.
    """
    private = _private_key(key)
    public: bytes = private.public_key().public_bytes_raw()
    signature: bytes = private.sign(manifest_bytes)
    return public + signature


def write_signature(folder: ModelFolder, key: Path) -> None:
    """Sign a model folder, whose files are compared with its manifest first.

    Raises:
        ModelFolderError: It is a pack, is damaged, or cannot be written.
        OptionError: The key cannot be read, or is another kind of key.
    """
    if folder.is_pack:
        raise ModelFolderError(f"{folder.path} is a pack: pack its folder again with `gpt2-edge pack --sign KEY`")
    signature = sign_manifest(folder.manifest_bytes, key)
    folder.check_hashes()
    with new_file(folder.path / SIGNATURE_NAME) as file:
        file.write(signature)


def check_signature(folder: ModelFolder, public_key: str | Path | bytes) -> None:
    """Refuse a folder whose manifest was not signed with the key that belongs to a public key.

    Args:
        folder: An opened model folder.
        public_key: A PEM file, or its content.

    Raises:
        ModelFolderError: It is not signed, was signed with another key, or was changed after it was signed.
        OptionError: The public key cannot be read, or is another kind of key.
    """
    from_file = _public_key(public_key)
    expected = from_file.public_bytes_raw()
    signature = folder.signature
    if signature is None:
        raise ModelFolderError(f"{folder.path} is not signed: sign it with `gpt2-edge sign`, or load it without a key")
    if len(signature) != _PUBLIC_KEY_BYTES + _SIGNATURE_BYTES:
        raise ModelFolderError(f"{folder.path} has a damaged signature: copy it again")
    if signature[:_PUBLIC_KEY_BYTES] != expected:
        raise ModelFolderError(
            f"{folder.path} was signed with another key, {_name(signature[:_PUBLIC_KEY_BYTES])}: the one given is "
            f"{_name(expected)}"
        )
    from cryptography.exceptions import InvalidSignature

    try:
        from_file.verify(signature[_PUBLIC_KEY_BYTES:], folder.manifest_bytes)
    except InvalidSignature as error:
        raise ModelFolderError(f"{folder.path} was changed after it was signed: get it again from its maker") from error


def _private_key(path: Path) -> Any:
    ed25519, serialization = _cryptography()
    pem = _read(path)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise OptionError(f"{path} is encrypted: give a key without a password") from error
    except ValueError as error:
        raise OptionError(f"{path} is not a private key: make one with {_MAKE_KEY}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise OptionError(f"{path} is another kind of key: make an Ed25519 key with {_MAKE_KEY}")
    return key


def _public_key(given: str | Path | bytes) -> Any:
    ed25519, serialization = _cryptography()
    name = "the public key" if isinstance(given, bytes) else str(given)
    pem = given if isinstance(given, bytes) else _read(Path(given))
    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError as error:
        raise OptionError(f"{name} is not a public key: make it from the private one with {_MAKE_PUBLIC}") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise OptionError(f"{name} is another kind of key: give an Ed25519 public key")
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_KEY_FILE_LIMIT_BYTES)
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read the key {path}: {getattr(error, 'strerror', None) or error}") from error


def _name(public_key: bytes) -> str:
    return public_key.hex()[:16] + "..."


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingDependencyError(
            "signatures need cryptography, which is not installed: run pip install 'gpt2-edge[sign]'"
        ) from error
    return ed25519, serialization
