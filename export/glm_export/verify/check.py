"""Owns `--check`: the exported folder, run by glmserve, against transformers' GlmForCausalLM in float32.

Knows the engine only by its command line, `glmserve logits --model DIR --ids 1,2,3 --out FILE.npy`, and the
variable that names its library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glm_export.error import ExportError
from glm_export.read import config, weights
from glm_export.read.config import Config

if TYPE_CHECKING:
    from transformers import GlmForCausalLM

NUM_IDS = 64
TIMEOUT_SECONDS = 600
# Relative errors beyond these are a fault, not rounding: twice and more what random weights show.
LIMITS = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.15, "fp8": 0.4, "int8": 0.1, "int4": 0.8}
LIBRARY_VARIABLE = "GLMSERVE_ORT_LIB"
EXTRA = "--check needs the extra: pip install 'glm-export[check]'"


@dataclass(frozen=True)
class Difference:
    """How far two sets of logits, one row a token, are apart."""

    num_tokens: int
    largest: float
    relative: float
    # Share of tokens after which both would go on with the same one.
    agreement: float

    def __str__(self) -> str:
        return (
            f"{self.num_tokens} tokens: largest difference {self.largest:.3g}, relative error "
            f"{self.relative:.3g}, top-1 agreement {self.agreement:.1%}"
        )


def compare(
    checkpoint: Path,
    exported: Path,
    precision: str,
    glmserve: str,
    max_model_len: int | None = None,
    adapter: Path | None = None,
) -> Difference:
    """Runs both on the same ids; refuses more than rounding."""
    ids = sample_ids(config.load(checkpoint, max_model_len))
    expected = reference_logits(checkpoint, ids, adapter)
    return difference(_engine_logits(exported, ids, glmserve), expected, precision)


def sample_ids(settings: Config) -> list[int]:
    """The same random tokens each time."""
    count = min(NUM_IDS, settings.geometry.max_model_len)
    return np.random.default_rng(0).integers(0, settings.geometry.vocab_size, count).tolist()


def difference(found: np.ndarray, expected: np.ndarray, precision: str) -> Difference:
    """The difference of what was found; more than the precision may be off is an error."""
    if found.shape != expected.shape:
        raise ExportError(f"glmserve gave logits of shape {found.shape}, expected {expected.shape}")
    apart = Difference(
        len(found),
        float(np.abs(found - expected).max()),
        float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
        float(np.mean(found.argmax(axis=-1) == expected.argmax(axis=-1))),
    )
    # Written so that NaN is a fault too.
    if not apart.relative <= LIMITS[precision]:
        raise ExportError(f"{apart}: more than the {LIMITS[precision]} that {precision} may be off")
    return apart


def require_tools(glmserve: str) -> None:
    """Looks, before an export that takes long, for what the comparison after it needs."""
    _binary(glmserve)
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise ExportError(f"no {missing[0]}; {EXTRA}")


def _binary(glmserve: str) -> str:
    binary = shutil.which(glmserve)
    if binary is None:
        raise ExportError(f"{glmserve}: no such program; --glmserve names the binary for --check")
    return binary


def _engine_logits(exported: Path, ids: list[int], glmserve: str) -> np.ndarray:
    binary = _binary(glmserve)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        listed = ",".join(map(str, ids))
        command = [binary, "logits", "--model", str(exported), "--ids", listed, "--out", str(out)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                env=_environment(),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ExportError(f"glmserve logits took more than {TIMEOUT_SECONDS} s") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ExportError(f"glmserve logits failed with {done.returncode}: {last}")
        return np.load(out)


def _environment() -> dict[str, str]:
    """This process's variables, and the library of the wheel installed beside us unless one is named."""
    spec = find_spec("onnxruntime")
    folders = (spec.submodule_search_locations if spec else None) or []
    libraries = [
        path for folder in folders for path in sorted(Path(folder, "capi").glob("libonnxruntime.so*"))
    ]
    return {LIBRARY_VARIABLE: str(libraries[0]), **os.environ} if libraries else dict(os.environ)


def reference_logits(checkpoint: Path, ids: list[int], adapter: Path | None = None) -> np.ndarray:
    """Float32 logits of transformers for one sequence, a row a token."""
    model = reference_model(checkpoint, adapter)
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def reference_model(checkpoint: Path, adapter: Path | None = None) -> GlmForCausalLM:
    """The checkpoint as transformers' model: weights renamed, packed QKV rows split."""
    try:
        import torch
        from transformers import GlmConfig, GlmForCausalLM
    except ImportError as error:
        raise ExportError(f"{error}; {EXTRA}") from None
    settings = config.load(checkpoint)
    model = GlmForCausalLM(GlmConfig(**_reference_config(settings))).eval()
    tensors = weights.open_checkpoint(settings, checkpoint, adapter)
    state = {}
    for weight in weights.every(settings):
        counts = [shape[0] for shape in weight.parts.values()]
        parts = np.split(tensors[weight.source].rows(), np.cumsum(counts)[:-1])
        state |= {name: torch.from_numpy(part) for name, part in zip(weight.reference, parts, strict=True)}
    model.load_state_dict(state, strict=True)
    return model


def _reference_config(settings: Config) -> dict[str, object]:
    g = settings.geometry
    return {
        "vocab_size": g.padded_vocab_size,
        "hidden_size": g.hidden_size,
        "intermediate_size": settings.ffn_size,
        "num_hidden_layers": g.num_layers,
        "num_attention_heads": g.num_attention_heads,
        "num_key_value_heads": g.num_kv_heads,
        "head_dim": g.head_dim,
        "attention_bias": settings.qkv_bias,
        "rms_norm_eps": settings.norm_epsilon,
        "max_position_embeddings": g.max_model_len,
        "tie_word_embeddings": settings.is_tied,
        "rope_parameters": {
            "rope_type": "linear",
            "factor": settings.position_divisor,
            "rope_theta": settings.rope_base,
            "partial_rotary_factor": g.rotary_dim / g.head_dim,
        },
        # Ids that exist at any vocabulary size; they play no part in the logits.
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
