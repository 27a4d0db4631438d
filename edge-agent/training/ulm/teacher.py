"""The teacher: SmolLM2-135M-Instruct, read from the GGUF that `make setup` brings, in the plain-dialogue layout."""
from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from .llama import Cache, Config, Llama

# The dialogue that the continuator's default layout uses too (cloud-continuator/src/layout.rs): with it, a model this small
# answers usefully; with its bare chat template it does not.
INTRODUCTION = ("The following is a conversation between a user and a helpful voice assistant. "
                "The assistant gives short, friendly and correct answers.\n\n")
EXAMPLES = [
    ("Set an alarm for seven tomorrow morning.", "Sure, I'll set an alarm for seven tomorrow morning."),
    ("How do I make tea?", "To make tea, boil some water and pour it over a tea bag."),
    ("who painted the mona lisa", "The Mona Lisa was painted by Leonardo da Vinci."),
    ("thanks!", "You're welcome! Let me know if there is anything else I can do."),
]
DIALOGUE = INTRODUCTION + "".join(f"User: {q}\nAssistant: {a}\n\n" for q, a in EXAMPLES)


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[Llama, Tokenizer]:
    """Dequantises a Llama-family GGUF with tied embeddings and a byte-level BPE vocabulary."""
    reader = gguf.GGUFReader(path)
    field = lambda key: reader.fields[key].contents()  # noqa: E731
    config = Config(
        vocab=len(field("tokenizer.ggml.tokens")), hidden=field("llama.embedding_length"), layers=field("llama.block_count"),
        heads=field("llama.attention.head_count"), kv_heads=field("llama.attention.head_count_kv"),
        ffn=field("llama.feed_forward_length"), rope_theta=field("llama.rope.freq_base"),
        eps=field("llama.attention.layer_norm_rms_epsilon"))
    names = {"attn_norm": "input_layernorm", "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
             "ffn_norm": "post_attention_layernorm", "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
    state = {}
    for tensor in reader.tensors:
        weights = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).copy())
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                weights = unpermute(weights, config.heads if parts[2] == "attn_q" else config.kv_heads)
            state[f"layers.{parts[1]}.{names[parts[2]]}.weight"] = weights
        elif parts[0] == "token_embd":
            state["embed_tokens.weight"] = weights
        elif parts[0] == "output_norm":
            state["norm.weight"] = weights
    model = Llama(config)
    model.load_state_dict(state)
    return model.to(dtype).eval(), bpe(field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges"),
                                       field("tokenizer.ggml.token_type"))


def unpermute(weights: Tensor, heads: int) -> Tensor:
    """Undoes the row order that llama.cpp's converter gives q and k (interleaved pairs for its rotary embedding)."""
    rows, columns = weights.shape
    return weights.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def bpe(tokens: list[str], merges: list[str], kinds: list[int]) -> Tokenizer:
    """SmolLM2's byte-level BPE: digits stand alone, then GPT-2's splitting."""
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False)
                                  for t, kind in zip(tokens, kinds) if kind == gguf.TokenType.CONTROL])
    return tokenizer


def smaller_tokenizer(tokens: list[str], merges: list[str], kinds: list[int], size: int) -> Tokenizer:
    """The first `size` entries as a tokenizer of its own: entries are in merge order, so the cut keeps it valid."""
    kept = set(tokens[:size])
    merges = [m for m in merges if all(part in kept for part in m.split(" ")) and m.replace(" ", "") in kept]
    return bpe(tokens[:size], merges, kinds[:size])


def gguf_vocabulary(path: Path) -> tuple[list[str], list[str], list[int]]:
    reader = gguf.GGUFReader(path)
    return tuple(reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type"))


class Teacher:
    """Batched generation after a fixed prefix, with the distribution behind every token."""

    def __init__(self, gguf_path: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model, self.tokenizer = read_gguf(gguf_path, dtype)
        self.model.to(device)
        self.device = device
        self.newline = self.tokenizer.encode("\n").ids[0]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @torch.inference_mode()
    def prefill(self, text: str) -> tuple[Cache, int]:
        """A cache of one sequence that holds `text`, and its length in tokens."""
        cache, tokens = Cache(), torch.tensor([self.ids(text)], device=self.device)
        self.model.hidden(tokens, cache)
        return cache, tokens.shape[1]

    @torch.inference_mode()
    def generate(self, prefix: tuple[Cache, int], prompts: list[str], max_tokens: int, generator: torch.Generator | None = None,
                 temperature: float = 0.0, top_p: float = 0.95, top_k: int = 0):
        """Continues each prompt until a newline or `max_tokens`.

        Returns per prompt (tokens, ended, top) with `top` a list of (ids, log-probabilities) of the `top_k` best
        candidates at each step, the newline's step included. Prompts are padded on the left; padding is masked.
        """
        shared, offset = prefix
        encoded = [self.ids(p) for p in prompts]
        batch, width = len(encoded), max(map(len, encoded))
        tokens = torch.tensor([[0] * (width - len(e)) + e for e in encoded], device=self.device)
        pad = torch.tensor([width - len(e) for e in encoded], device=self.device)
        columns = torch.arange(width, device=self.device)
        real = columns[None, :] >= pad[:, None]
        seen = torch.cat((torch.ones(batch, offset, dtype=torch.bool, device=self.device), real), dim=1)
        causal = columns[None, :, None] >= columns[None, None, :]
        mask = torch.cat((seen[:, None, :offset].expand(-1, width, -1), causal & real[:, None, :]), dim=2)
        positions = (offset + columns[None, :] - pad[:, None]).clamp(min=0)
        cache = Cache(shared)
        hidden = self.model.hidden(tokens, cache, positions, mask[:, None])[:, -1:]
        out: list[list[int]] = [[] for _ in prompts]
        top: list[list[tuple[list[int], list[float]]]] = [[] for _ in prompts]
        ended = [False] * batch
        rows = list(range(batch))
        position = positions[:, -1:]
        for _ in range(max_tokens + 1):
            logits = self.model.logits(hidden[:, 0]).float()
            if top_k:
                best = torch.log_softmax(logits, dim=-1).topk(top_k)
            step = sample(logits, temperature, top_p, generator).tolist()
            alive = []
            for slot, (row, token) in enumerate(zip(rows, step)):
                if top_k:
                    top[row].append((best.indices[slot].tolist(), best.values[slot].tolist()))
                if token == self.newline or token <= 2:
                    ended[row] = True
                elif len(out[row]) < max_tokens:
                    out[row].append(token)
                    alive.append(slot)
            if not alive:
                break
            keep = torch.tensor(alive, device=self.device)
            rows = [rows[slot] for slot in alive]
            if len(alive) < len(step):
                cache.keep(keep)
                seen, position = seen[keep], position[keep]
            seen = torch.cat((seen, torch.ones(len(rows), 1, dtype=torch.bool, device=self.device)), dim=1)
            position = position + 1
            fed = torch.tensor([[step[slot]] for slot in alive], device=self.device)
            hidden = self.model.hidden(fed, cache, position, seen[:, None, None, :])
        return [(out[i], ended[i], top[i]) for i in range(batch)]


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    values, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    values = values.masked_fill(values.cumsum(dim=-1) - values > top_p, 0)
    return order.gather(1, torch.multinomial(values, 1, generator=generator))[:, 0]
