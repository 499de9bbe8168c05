"""Owns manifest.json: what the Rust side reads besides the graph, field for field as
engine/src/model/manifest.rs.

Invariant: it is written last and lists every other file, so a folder with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glm_export import __version__, progress
from glm_export.graph import interface, onnx_graph
from glm_export.graph.target import Target
from glm_export.read import tokenizer
from glm_export.read.config import Config

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
_CHUNK_BYTES = 1 << 20


def write(config: Config, target: Target, folder: Path) -> str:
    """Writes the manifest of a folder whose other files are in place; returns its digest."""
    paths = sorted(folder.iterdir())
    with progress.phase("digests", sum(path.stat().st_size for path in paths)) as advance:
        files = {path.name: _entry(path, advance) for path in paths}
    content = describe(config, target, files)
    (folder / MANIFEST_FILE).write_text(to_text(content), encoding="utf-8")
    return content["digest"]


def to_text(content: dict[str, Any]) -> str:
    """The file's text."""
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def describe(config: Config, target: Target, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The manifest's content."""
    return {
        "schema_version": SCHEMA_VERSION,
        "generator": f"glm-export {__version__}",
        "model": {
            "name": config.name,
            "architecture": config.architecture,
            "license": config.license,
            "origin": config.origin,
        },
        "geometry": asdict(config.geometry),
        "graph": {
            "file": onnx_graph.GRAPH_FILE,
            "precision": target.precision,
            "provider": target.provider,
            "activation_dtype": target.activations,
            "kv_cache_dtype": target.kv_cache,
            "block_size": target.block_size,
            "output": target.output,
            "kernel": target.kernel,
            "names": interface.names(target),
        },
        "tokenizer": {"file": tokenizer.TOKENIZER_FILE, "pieces": config.tokenizer.pieces},
        "chat": {
            "format": config.chat.format,
            "special_tokens": config.chat.special_tokens,
            "default_system": config.chat.default_system,
        },
        "stop_token_ids": config.chat.stop_token_ids,
        "generation": config.generation,
        "files": files,
        "digest": digest(files),
    }


def digest(files: dict[str, dict[str, Any]]) -> str:
    """Names the model exactly: a hash over the sorted lines of name and hash."""
    lines = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _entry(path: Path, advance: progress.Advance) -> dict[str, Any]:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
            advance(path.name, len(chunk))
    return {"bytes": path.stat().st_size, "sha256": hasher.hexdigest()}
