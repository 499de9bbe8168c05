"""What each precision costs the default model: perplexity, KL divergence to fp32, same first choice.

    make quality

The logits are the engine's own (`glmserve logits`), in one step of the whole text.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Precision, what multiplies, block size.
VARIANTS = [
    ("fp32", None, None),
    ("int8", "glmserve", 32),
    ("int8", "glmserve", 64),
    ("int8", "glmserve", 128),
    ("int8", "ort", 64),
    ("int4", "glmserve", 32),
    ("int4", "glmserve", 64),
    ("int4", "ort", 32),
]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def main() -> None:
    text = Path(__file__).with_name("quality.txt").read_text()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        subprocess.run([BIN / "glm-default-model", checkpoint], check=True, stdout=subprocess.DEVNULL)
        reference = None
        for precision, kernel, block in VARIANTS:
            name = precision + (f", {kernel}, block {block}" if block else "")
            model, out = Path(folder) / name.replace(", ", "-"), Path(folder) / "logits.npy"
            options = ["--precision", precision]
            if block:
                options += ["--kernel", kernel, "--quant-block-size", str(block)]
            subprocess.run(
                [BIN / "glm-export", checkpoint, model, *options], check=True, stdout=subprocess.DEVNULL
            )
            ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
            command = [ROOT / "target/release/glmserve", "logits", "--model", model, "--out", out]
            subprocess.run([*command, "--ids", ",".join(map(str, ids))], check=True)
            found = log_softmax(np.load(out)[:-1])
            reference = found if reference is None else reference
            perplexity = np.exp(-found[np.arange(len(ids) - 1), ids[1:]].mean())
            divergence = (np.exp(reference) * (reference - found)).sum(axis=-1).mean()
            same = (reference.argmax(axis=-1) == found.argmax(axis=-1)).mean()
            megabytes = sum(file.stat().st_size for file in model.iterdir()) / 1e6
            print(
                f"| {name} | {perplexity:.2f} | {divergence:.4f} | {100 * same:.0f} % | {megabytes:.0f} MB |",
                flush=True,
            )
        print(f"{len(ids)} tokens")


if __name__ == "__main__":
    main()
