"""The version of gpt2-edge; the packaging reads it from here."""

VERSION = "0.1.0"
