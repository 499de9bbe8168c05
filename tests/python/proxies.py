"""Owns the reverse proxies that streams are sent through, and the client that times what arrives.

Each proxy runs with its defaults, but for what the comments say, and with a limit on silence that the caller
chooses. `tests/bench/idle.py` runs them for minutes; `test_proxies.py` for seconds.
"""

import itertools
import json
import os
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def nginx(folder: Path, port: int, upstream: int, timeout_s: int) -> list[str]:
    """Buffering is on, and HTTP/1.0 is spoken to the server: nginx's defaults."""
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"""daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
        events {{}}
        http {{ access_log off; {paths}
            server {{ listen 127.0.0.1:{port};
                proxy_read_timeout {timeout_s}s;
                location / {{ proxy_pass http://127.0.0.1:{upstream}; }} }} }}"""
    )
    return [f"{ROOT}/.tools/bin/nginx", "-p", f"{folder}", "-c", "nginx.conf", "-e", f"{folder}/error.log"]


def haproxy(folder: Path, port: int, upstream: int, timeout_s: int) -> list[str]:
    """Without http-no-delay it may hold a chunk back for 200 ms."""
    (folder / "haproxy.cfg").write_text(
        f"""defaults
    mode http
    option http-no-delay
    timeout connect 5s
    timeout client {timeout_s}s
    timeout server {timeout_s}s
frontend web
    bind 127.0.0.1:{port}
    default_backend glmserve
backend glmserve
    server one 127.0.0.1:{upstream}
"""
    )
    return [f"{ROOT}/.tools/bin/haproxy", "-db", "-f", f"{folder}/haproxy.cfg"]


def envoy(folder: Path, port: int, upstream: int, timeout_s: int) -> list[str]:
    """The route's timeout is off: by default it ends every answer, silent or not, after 15 s."""

    def address(number: int) -> dict:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3"
        ".HttpConnectionManager",
        "stat_prefix": "web",
        "stream_idle_timeout": f"{timeout_s}s",
        "http_filters": [
            {
                "name": "router",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
                },
            }
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "glmserve", "timeout": "0s"}}],
                }
            ]
        },
    }
    endpoints = [{"lb_endpoints": [{"endpoint": {"address": address(upstream)}}]}]
    cluster = {"name": "glmserve", "load_assignment": {"cluster_name": "glmserve", "endpoints": endpoints}}
    filters = [{"filters": [{"name": "http", "typed_config": manager}]}]
    resources = {
        "listeners": [{"address": address(port), "filter_chains": filters}],
        "clusters": [cluster],
    }
    (folder / "envoy.json").write_text(json.dumps({"static_resources": resources}))
    options = ["--disable-hot-restart", "--concurrency", "1", "--log-level", "error"]
    return [f"{ROOT}/.venv/bin/envoy", "-c", f"{folder}/envoy.json", *options]


def traefik(folder: Path, port: int, upstream: int, timeout_s: int) -> list[str]:
    """It has no limit on the silence of an answer."""
    servers = {"loadBalancer": {"servers": [{"url": f"http://127.0.0.1:{upstream}"}]}}
    routers = {"all": {"rule": "PathPrefix(`/`)", "service": "glmserve"}}
    config = {"http": {"routers": routers, "services": {"glmserve": servers}}}
    (folder / "routes.yml").write_text(json.dumps(config))
    return [
        f"{ROOT}/.venv/bin/traefik",
        f"--entryPoints.web.address=127.0.0.1:{port}",
        f"--providers.file.filename={folder}/routes.yml",
        "--log.level=ERROR",
        "--global.checkNewVersion=false",
        "--global.sendAnonymousUsage=false",
    ]


def caddy(folder: Path, port: int, upstream: int, timeout_s: int) -> list[str]:
    """It has no limit on the silence of an answer unless one is set."""
    (folder / "Caddyfile").write_text(
        f"""{{
    admin off
    auto_https off
    persist_config off
}}
http://127.0.0.1:{port} {{
    reverse_proxy 127.0.0.1:{upstream} {{
        transport http {{
            read_timeout {timeout_s}s
        }}
    }}
}}
"""
    )
    return [f"{ROOT}/.venv/bin/caddy", "run", "--config", f"{folder}/Caddyfile", "--adapter", "caddyfile"]


PROXIES = {proxy.__name__: proxy for proxy in (nginx, haproxy, envoy, traefik, caddy)}


class Proxy:
    """A running proxy before a server."""

    def __init__(self, name: str, folder: Path, upstream: int, timeout_s: int):
        folder.mkdir(parents=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        command = PROXIES[name](folder, self.port, upstream, timeout_s)
        environment = os.environ | {"HOME": str(folder), "XDG_DATA_HOME": str(folder)}
        self.process = subprocess.Popen(
            command, stdout=self.log.open("w"), stderr=subprocess.STDOUT, env=environment
        )

    def wait_ready(self, timeout_s: float = 20) -> "Proxy":
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(self.url + "/readyz").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        self.stop()
        raise AssertionError(f"the proxy is not ready:\n{self.log.read_text()}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()


@dataclass
class Reading:
    """What arrived, and when, in seconds from the request."""

    headers: dict[str, str] = field(default_factory=dict)
    events: list[tuple[float, str]] = field(default_factory=list)
    comments: list[tuple[float, str]] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    ended: float = 0
    error: str = ""

    @property
    def done(self) -> bool:
        return bool(self.events) and self.events[-1][1] == "[DONE]" and not self.error

    @property
    def max_gap(self) -> float:
        """The longest silence between two reads, or before the end."""
        times = [*self.reads, self.ended]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0)


def read_stream(url: str, body: dict) -> Reading:
    """Sends a streaming chat and notes every event and comment as it comes."""
    reading, rest, began = Reading(), b"", time.monotonic()
    try:
        with httpx.stream(
            "POST", url + "/v1/chat/completions", json=body | {"stream": True}, timeout=600
        ) as answer:
            reading.headers = dict(answer.headers)
            if answer.is_error:
                reading.error = f"HTTP {answer.status_code}: {answer.read().decode()}"
            for data in answer.iter_bytes():
                now = time.monotonic() - began
                reading.reads.append(now)
                *frames, rest = (rest + data).split(b"\n\n")
                for frame in frames:
                    for line in frame.decode().split("\n"):
                        if line.startswith("data: "):
                            reading.events.append((now, line.removeprefix("data: ")))
                        elif line.startswith(":"):
                            reading.comments.append((now, line[1:].strip()))
    except httpx.TransportError as error:
        reading.error = repr(error)
    reading.ended = time.monotonic() - began
    return reading
