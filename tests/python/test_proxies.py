"""Streams through real reverse proxies: nothing is held back, and heartbeats outlast a proxy's patience."""

import concurrent.futures
import time

import httpx
import pytest
from conftest import DEFAULT_MODEL
from proxies import PROXIES, Proxy, read_stream

MODEL = "smollm2-135m-instruct"
LONG = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 4000, "ignore_eos": True}
SHORT = LONG | {"max_tokens": 30}
# A proxy gives up after this much silence, and a waiting stream is silent for longer.
PROXY_TIMEOUT_S = 3
WAIT_S = 8
# What waits behind a reply of 4,000 tokens is not to be refused for it.
PATIENT = ("--queue-timeout", "3600")


def chat(url: str, body: dict):
    return read_stream(url, body | {"model": MODEL, "temperature": 0})


@pytest.fixture(scope="module")
def start_proxies(tmp_path_factory):
    """Starts every proxy before a server, and stops them at the end."""
    running = []

    def start(server) -> dict[str, Proxy]:
        folder = tmp_path_factory.mktemp("proxies")
        proxies = {}
        for name in PROXIES:
            proxies[name] = Proxy(name, folder / name, server.port, PROXY_TIMEOUT_S)
            running.append(proxies[name])
        return {name: proxy.wait_ready() for name, proxy in proxies.items()}

    yield start
    for proxy in running:
        proxy.stop()


@pytest.fixture(scope="module")
def server(start_server):
    return start_server(DEFAULT_MODEL, "--max-num-seqs", "1", "--keep-alive-comment", "1", *PATIENT)


@pytest.fixture(scope="module")
def proxies(server, start_proxies):
    return start_proxies(server)


def wait_behind_a_long_stream(server, proxies) -> dict:
    """A stream through each proxy, all queued behind one that runs for WAIT_S and then vanishes."""
    urls = {name: proxy.url for name, proxy in proxies.items()} | {"direct": server.url}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        with httpx_stream(server.url, LONG):
            server.wait_metric("glmserve_requests_running", 1)
            readings = {name: pool.submit(chat, url, LONG | {"max_tokens": 5}) for name, url in urls.items()}
            time.sleep(WAIT_S)
        return {name: reading.result() for name, reading in readings.items()}


def httpx_stream(url: str, body: dict):
    request = body | {"model": MODEL, "stream": True}
    return httpx.stream("POST", url + "/v1/chat/completions", json=request, timeout=60)


@pytest.mark.parametrize("name", PROXIES)
def test_a_stream_flows_through(server, proxies, name):
    """The first event comes as soon as without the proxy, and the others one by one."""
    direct, through = chat(server.url, SHORT), chat(proxies[name].url, SHORT)
    assert through.done, through.error
    assert [data.split('"choices"')[-1] for _, data in through.events] == [
        data.split('"choices"')[-1] for _, data in direct.events
    ]
    first, last = through.events[0][0], through.events[-1][0]
    print(f"{name}: first event after {first * 1000:.0f} ms, directly {direct.events[0][0] * 1000:.0f} ms")
    assert first < direct.events[0][0] + 0.5
    assert last - first > (direct.events[-1][0] - direct.events[0][0]) / 2, "the events came in a lump"
    assert len(through.reads) > len(direct.events) / 2, "the events came in lumps"


def test_heartbeats_outlast_the_patience_of_every_proxy(server, proxies):
    readings = wait_behind_a_long_stream(server, proxies)
    for name, reading in readings.items():
        print(f"{name}: {len(reading.comments)} comments, longest silence {reading.max_gap:.2f} s")
        assert reading.done, f"{name}: {reading}"
        assert reading.events[-1][0] > WAIT_S > PROXY_TIMEOUT_S
        assert len(reading.comments) >= WAIT_S / 2, name
        assert reading.max_gap < 2, f"{name} held heartbeats back"


def test_without_heartbeats_the_same_wait_is_cut(start_server, start_proxies):
    """The control: the limits above are real. traefik has none to set."""
    server = start_server(DEFAULT_MODEL, "--max-num-seqs", "1", "--keep-alive-comment", "3600", *PATIENT)
    readings = wait_behind_a_long_stream(server, start_proxies(server))
    assert {name for name, reading in readings.items() if reading.done} == {"direct", "traefik"}
