"""Owns the command line, and the order of an export: check, convert into a temporary folder, rename."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from glm_export import __version__, calibration, kv_scales
from glm_export.error import ExportError
from glm_export.graph import manifest, onnx_graph, target
from glm_export.graph.products import AnyScheme
from glm_export.graph.target import BLOCK_SIZES, KERNELS, KV_CACHES, OUTPUTS, PRECISIONS, PROVIDERS
from glm_export.output_folder import output_folder
from glm_export.quantise.fp8 import Fp8Scheme
from glm_export.quantise.quantize import MAX_BLOCK_SIZE, Scheme
from glm_export.read import config, tokenizer, weights
from glm_export.read.prequantised import Matrix
from glm_export.verify import check, known_answer, quality

DEFAULT_QUANT_BLOCK_SIZE = 32
# Terms that must travel with the weights, under the names that publishers use.
NOTICE_FILES = (
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "MODEL_LICENSE",
    "MODEL_LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
)


def export(
    checkpoint: Path,
    out: Path,
    precision: str,
    *,
    name: str | None = None,
    provider: str = "cpu",
    activations: str | None = None,
    kv_cache_dtype: str | None = None,
    kv_cache_scales: Path | None = None,
    output: str | None = None,
    kernel: str | None = None,
    block_size: int | None = None,
    quant_block_size: int = DEFAULT_QUANT_BLOCK_SIZE,
    calibrate: Path | None = None,
    lora: Path | None = None,
    max_model_len: int | None = None,
    force: bool = False,
) -> str:
    """Exports a checkpoint folder; returns the digest of what was written."""
    made_for = target.choose(
        precision,
        provider,
        activations=activations,
        kv_cache=kv_cache_dtype,
        block_size=block_size,
        output=output,
        kernel=kernel,
    )
    if calibrate is not None and (precision != "int4" or made_for.kernel != "glmserve"):
        raise ExportError(
            "--calibrate and --calibration-text round weights of --precision int4 and --kernel glmserve, "
            "no others"
        )
    source, destination = checkpoint.resolve(), out.resolve()
    if destination == source or destination in source.parents:
        raise ExportError(f"{out} must not be or contain the checkpoint folder {checkpoint}")
    settings = config.load(checkpoint, max_model_len)
    target.check_geometry(made_for, settings.geometry)
    made_for = target.with_scales(made_for, kv_cache_scales, settings.geometry.num_layers)
    if name is not None and not name.strip():
        raise ExportError("--name is empty")
    if name is not None:
        settings = replace(settings, name=name)
    scheme = _scheme(precision, quant_block_size)
    if isinstance(scheme, Scheme) and made_for.kernel == "ort" and quant_block_size > MAX_BLOCK_SIZE:
        raise ExportError(f"--quant-block-size {quant_block_size}: --kernel ort has up to {MAX_BLOCK_SIZE}")
    tensors = weights.open_checkpoint(settings, checkpoint, lora)
    with output_folder(out, force, manifest.MANIFEST_FILE) as folder:
        tokenizer.write(settings.tokenizer, settings.chat.special_tokens, checkpoint, folder)
        # Before the weights, so that a text which does not serve is refused at once.
        sequences = None if calibrate is None else calibration.sequences(settings, calibrate, folder)
        onnx_graph.write(settings, tensors, scheme, made_for, folder)
        if sequences is not None:
            calibration.refine(settings, tensors, sequences, folder)
        if made_for.has_quantised_cache and not made_for.key_scales:
            texts = calibration.sequences(settings, calibration.TEXT, folder)
            kv_scales.measure(texts, made_for.kv_cache, folder)
        known_answer.write(settings.geometry, folder, onnx_graph.GRAPH_FILE, onnx_graph.NAMES)
        for notice in NOTICE_FILES:
            if (checkpoint / notice).is_file():
                shutil.copyfile(checkpoint / notice, folder / notice)
        # Codes that are taken as they are stay with ONNX Runtime, whatever multiplies by the rest.
        if any(isinstance(tensors[weight.source], Matrix) for weight in weights.every(settings)):
            made_for = replace(made_for, kernel="ort")
        return manifest.write(settings, made_for, folder)


def _scheme(precision: str, quant_block_size: int) -> AnyScheme | None:
    bits = PRECISIONS[precision]
    if bits is None:
        return None
    return Fp8Scheme() if precision == "fp8" else Scheme(bits, quant_block_size)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `glm-export`."""
    options = _parser().parse_args(arguments)
    try:
        if options.check:
            check.require_tools(options.glmserve)
        digest = export(
            options.checkpoint,
            options.out,
            options.precision,
            name=options.name,
            provider=options.provider,
            activations=options.activations,
            kv_cache_dtype=options.kv_cache_dtype,
            kv_cache_scales=options.kv_cache_scales,
            output=options.output,
            kernel=options.kernel,
            block_size=options.block_size,
            quant_block_size=options.quant_block_size,
            calibrate=options.calibration_text or (calibration.TEXT if options.calibrate else None),
            lora=options.lora,
            max_model_len=options.max_model_len,
            force=options.force,
        )
        print(f"{options.out}: {options.precision}, {digest}")
        if options.quality:
            print(quality.measure(options.checkpoint, options.out, options.lora))
        if options.check:
            print(
                check.compare(
                    options.checkpoint,
                    options.out,
                    options.precision,
                    options.glmserve,
                    options.max_model_len,
                    options.lora,
                )
            )
    except (ExportError, OSError) as error:
        print(f"glm-export: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glm-export", description="Export a ChatGLM3-family checkpoint to a folder that glmserve runs."
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="folder with config.json and weights"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--precision", choices=PRECISIONS, required=True, help="type of the weights")
    parser.add_argument("--provider", choices=PROVIDERS, default="cpu", help="what runs it (%(default)s)")
    parser.add_argument(
        "--activations",
        choices=("fp16", "bf16"),
        help="for --provider cuda with quantised weights: what it computes in (fp16)",
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=KV_CACHES, help="type of keys and values (as activations)"
    )
    parser.add_argument(
        "--kv-cache-scales",
        type=Path,
        metavar="FILE",
        help='for a quantised cache, JSON: {"key": [one a layer], "value": [...]} (measured)',
    )
    parser.add_argument(
        "--output", choices=OUTPUTS, help="what leaves the graph besides logits (cpu: nothing, cuda: topk)"
    )
    parser.add_argument(
        "--kernel",
        choices=KERNELS,
        help="what multiplies by quantised weights (on the CPU: the engine's own operator, glmserve)",
    )
    parser.add_argument("--name", help="name the model is served under")
    parser.add_argument(
        "--block-size",
        type=int,
        help=f"tokens a KV block holds (cpu: {BLOCK_SIZES['cpu']}, cuda: {BLOCK_SIZES['cuda']})",
    )
    parser.add_argument(
        "--quant-block-size",
        type=int,
        choices=(16, 32, 64, 128, 256, 512),
        default=DEFAULT_QUANT_BLOCK_SIZE,
        help="weights that share a scale (%(default)s); larger is faster and less exact; 256 and 512 pay at "
        "int8, and are not for --kernel ort",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="round int4 by what the model computes on a text: slower, and far more exact",
    )
    parser.add_argument(
        "--calibration-text", type=Path, metavar="FILE", help="--calibrate on this text in place of ours"
    )
    parser.add_argument(
        "--lora", type=Path, metavar="DIR", help="LoRA adapter (PEFT's folder) to merge into the weights"
    )
    parser.add_argument("--max-model-len", type=int, help="longest sequence (the checkpoint's seq_length)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--quality",
        action="store_true",
        help="say what rounding costs: error of each layer's weights, perplexity and KL divergence",
    )
    parser.add_argument(
        "--check", action="store_true", help="run the export in glmserve and compare with transformers"
    )
    parser.add_argument(
        "--glmserve", default="glmserve", metavar="BINARY", help="for --check (%(default)s on PATH)"
    )
    parser.add_argument("--version", action="version", version=f"glm-export {__version__}")
    return parser
