"""What each precision costs, as `glm-export --quality` measures it: the default model and a random one.

    make quality [ARGS="default random"]

The default model's weights lie on a 4-bit grid of another kind, which makes 4 bits look worse than they are
for weights that are quantised for the first time. The random model's do not; its perplexity means nothing.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from glm_export import calibration, cli, default_model
from glm_export.dev import tiny
from glm_export.verify import quality

# The engine's product has one zero point for all blocks, ONNX Runtime's one for each of 4 bits; "cuda" is
# what ONNX Runtime has on a GPU. The last word tells `--calibrate`.
VARIANTS = [
    ("int8", 64, "glmserve", False),
    ("int4", 32, "glmserve", False),
    ("int8", 32, "glmserve", False),
    ("int8", 128, "glmserve", False),
    ("int8", 64, "ort", False),
    ("int4", 32, "ort", False),
    ("int4", 64, "glmserve", False),
    ("int4", 128, "glmserve", False),
    ("int4", 32, "glmserve", True),
    ("int4", 64, "glmserve", True),
    ("int4", 128, "glmserve", True),
    ("int4", 16, "ort", False),
    ("int4", 64, "ort", False),
    ("int4", 128, "ort", False),
    ("fp8", 128, "cuda", False),
]
# 38 million weights in layers.
MEDIUM = tiny.Shape(
    num_layers=12,
    hidden_size=512,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=128,
    ffn_size=1536,
    padded_vocab_size=4096,
)
MODELS = {
    "default": default_model.write,
    "random": lambda folder: tiny.write(folder, MEDIUM),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)} (all)")
    print(
        "| model | precision | error of weights | perplexity | KL divergence | same first choice | folder |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in parser.parse_args().models:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, exported = Path(folder) / "checkpoint", Path(folder) / "exported"
            MODELS[name](checkpoint)
            reference = None
            for precision, block, kernel, is_calibrated in VARIANTS:
                of = {"provider": "cuda"} if kernel == "cuda" else {"kernel": kernel}
                options = of | {"quant_block_size": block, "force": True}
                text = calibration.TEXT if is_calibrated else None
                cli.export(checkpoint, exported, precision, calibrate=text, **options)
                reference = reference or quality.Reference(checkpoint, exported)
                label = f"{precision}, block {block}, {kernel}" + ", calibrated" * is_calibrated
                print(row(name, label, reference.compare(exported)), flush=True)
        perplexity = quality.perplexity(reference.expected, reference.ids)
        print(f"{name}: {len(reference.ids)} tokens, perplexity {perplexity:.2f} in float32", flush=True)


def row(model: str, precision: str, found: quality.Quality) -> str:
    error = float(np.mean(list(found.weight_errors.values())))
    return (
        f"| {model} | {precision} | {error:.4f} | {found.perplexity:.2f} | {found.divergence:.4f} "
        f"| {100 * found.agreement:.0f} % | {found.num_bytes / 1e6:.0f} MB |"
    )


if __name__ == "__main__":
    main()
