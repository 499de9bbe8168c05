"""Owns what is installed for a client: an environment of its own below the working folder."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .catalogue import Client

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Installed:
    """How to run a client's program, and which versions it runs with."""

    command: tuple[str, ...]
    versions: str
    missing: str = ""
    """Why it cannot run here; empty if it can."""


def install(client: Client, work: Path, newest: bool) -> Installed:
    """Installs the client's packages, unless the same list is installed already."""
    names = [_without_version(name) if newest else name for name in client.packages]
    bare = [_without_version(name) if newest else name for name in client.without_dependencies]
    wanted = json.dumps([names, bare])
    folder = work / f"{client.name}{'-newest' if newest else ''}"
    stamp = folder / "installed"
    program = HERE / client.language / client.program
    if client.language == "java":
        return _java(program)
    if client.language == "node" and shutil.which("npm") is None:
        return Installed((), "", "npm is not installed")
    if newest or not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"installing {client.name}: {' '.join(names + bare)}", file=sys.stderr, flush=True)
        (_install_python if client.language == "python" else _install_node)(folder, names, bare)
        stamp.write_text(wanted)
    if client.language == "python":
        python = str(folder / "bin" / "python")
        versions = subprocess.run(
            [python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True
        ).stdout
        found = {row["name"].lower(): row["version"] for row in json.loads(versions)}
        shown = [_without_version(name) for name in client.packages[:1] + client.without_dependencies]
        command = (python, str(HERE / "python" / "run.py"), str(program))
        return Installed(command, ", ".join(f"{name} {found.get(name.lower(), '?')}" for name in shown))
    # Packages are found from where the program lies.
    for file in (HERE / "node").glob("*.mjs"):
        shutil.copy(file, folder / file.name)
    package = _without_version(client.packages[0])
    version = json.loads((folder / "node_modules" / package / "package.json").read_text())["version"]
    return Installed(("node", str(folder / "run.mjs"), str(folder / client.program)), f"{package} {version}")


def _without_version(package: str) -> str:
    name, _, _ = package.partition("==")
    at = name.rfind("@")
    return name[:at] if at > 0 else name


def _install_python(folder: Path, names: list[str], bare: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *names], check=True)
    if bare:
        subprocess.run([*pip, "--no-deps", *bare], check=True)


def _install_node(folder: Path, names: list[str], _: list[str]) -> None:
    (folder / "package.json").write_text('{"private": true}')
    environment = os.environ | {"npm_config_update_notifier": "false"}
    subprocess.run(
        ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", *names],
        cwd=folder,
        check=True,
        env=environment,
    )


def _java(program: Path) -> Installed:
    if shutil.which("java") is None:
        return Installed((), "", "java is not installed")
    answer = subprocess.run(["java", "--list-modules"], capture_output=True, text=True, check=False).stdout
    if "jdk.compiler" not in answer:
        return Installed((), "", "a JDK is needed to run a source file")
    version = next((line for line in answer.splitlines() if line.startswith("java.base@")), "java ?")
    return Installed(("java", str(program)), version.replace("java.base@", "JDK "))
