"""What the cards of the mini models have in common: what made the weights, and which weights they are."""
from __future__ import annotations

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def made_by(command: str, device: str, continues: dict[str, str] | None = None) -> str:
    """The line on the run. command: the command line that was run; device: "cpu" or "cuda"; continues: names and SHA-256 of
    the files that a warm start began with."""
    line = f"- **Made by** `{command}`, on {'a GPU' if device == 'cuda' else 'the CPU'}, bf16 autocast."
    if continues:
        line += "\n  It went on from earlier weights:\n" + _list(continues)
    return line


def weights_lines(files: dict[str, Path]) -> str:
    """The lines on the weight files."""
    return "- **Weights**, fp16 safetensors:\n" + _list({name: sha256(path) for name, path in files.items()})


def _list(hashes: dict[str, str]) -> str:
    return "\n".join(f"  - {name}: SHA-256 `{value}`" for name, value in hashes.items())
