"""Every member of the family, from a tiny checkpoint to a server: what `check` says, what a client gets."""

import json
import subprocess
import urllib.error
import urllib.request

import pytest
from conftest import GLMSERVE
from glm_export.cli import export
from glm_export.dev import tiny
from tokenizers import Tokenizer

TEXTS = (
    *(
        "你好",
        "I'll pay 12345 元，\n\n  ok",
        "<|user|>\n[gMASK]<sop>",
        " \n\n leading",
        "\t tabs\r\nand\u3000wide",
    ),
    *("'S ſ'ſ don't", "naïve café 👋🏽", "a1b22c333d4444", "x  \n  y   ", "…‥「」。"),
)


def exported(folder, member):
    tiny.write(folder / "checkpoint", member=member)
    export(folder / "checkpoint", folder / "model", "int8")
    return folder / "model"


@pytest.mark.parametrize("member", tiny.MEMBERS)
def test_check_takes_the_folder(tmp_path, member):
    """Graph and known answer, a tokenizer that gives texts back, special tokens that nobody can write."""
    model = exported(tmp_path, member)
    done = subprocess.run([GLMSERVE, "check", model], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok   known answer" in done.stdout


def post(server, content):
    body = {
        "model": tiny.NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1,
        "temperature": 0,
    }
    request = urllib.request.Request(
        server.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# What surrounds a text, as tokens and as texts.
PROMPTS = {
    "chatglm2-6b": (2, lambda text: [f"[Round 1]\n\n问：{text}\n\n答："]),
    "glm-4-9b-chat": (4, lambda text: ["\n", text]),
    "glm-edge-1.5b-chat": (2, lambda text: [f"\n{text}"]),
}


@pytest.mark.parametrize("member", PROMPTS)
def test_prompts_are_as_long_as_the_tokenizer_says(tmp_path, start_server, member):
    model = exported(tmp_path, member)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    num_specials, parts = PROMPTS[member]
    server = start_server(model)
    for text in TEXTS:
        status, body = post(server, text)
        assert status == 200, body
        expected = num_specials + sum(len(tokenizer.encode(part).ids) for part in parts(text))
        assert body["usage"]["prompt_tokens"] == expected, text
    assert server.stop() == 0


def test_a_base_model_is_ready_and_does_not_chat(tmp_path, start_server):
    server = start_server(exported(tmp_path, "glm-4-9b-hf"))
    status, body = post(server, "hi")
    assert (status, body["error"]["code"]) == (400, "chat_not_supported")
    assert server.stop() == 0
