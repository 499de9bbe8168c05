"""A graph that returns candidates gives the very replies of one that returns whole rows."""

import subprocess
import sys
from pathlib import Path

import openai


def replies(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    found = []
    for seed in range(6):
        for options in [
            {"temperature": 0},
            {"temperature": 0.7, "top_p": 0.3},
            {"temperature": 1, "extra_body": {"top_k": 5}},
            {"temperature": 0, "frequency_penalty": 1},
            {"temperature": 1.5},
        ]:
            body = {"ignore_eos": True} | options.pop("extra_body", {})
            answer = client.chat.completions.create(
                model="tiny-random",
                messages=[{"role": "user", "content": f"question {seed}"}],
                max_tokens=12,
                seed=seed,
                extra_body=body,
                **options,
            )
            found.append(answer.choices[0].message.content)
    return found


def test_candidates_change_no_reply(tiny_model, start_server, tmp_path):
    export = Path(sys.executable).with_name("glm-export")
    command = [export, tiny_model.parent / "checkpoint", tmp_path / "model", "--precision", "fp32"]
    subprocess.run([*command, "--output", "topk"], check=True)
    servers = [start_server(model, "--kv-cache-memory", "64") for model in (tiny_model, tmp_path / "model")]
    whole, candidates = map(replies, servers)
    assert whole == candidates
    assert len(set(whole)) > 10
