"""A Llama-family decoder in plain PyTorch, small enough to read, used for the teacher and the student alike."""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    rope_theta: float
    eps: float = 1e-5
    max_positions: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def to_hugging_face(self) -> dict:
        """The `config.json` that transformers and `edge-agent --model` read."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 2, "vocab_size": self.vocab, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "intermediate_size": self.ffn, "rms_norm_eps": self.eps, "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


class Cache:
    """Keys and values per layer, each [batch, kv_heads, positions, head_dim]; grows by concatenation.

    `shared` holds those of a prefix that every sequence of the batch begins with, once ([1, kv_heads, prefix, head_dim]).
    """

    def __init__(self, shared: "Cache | None" = None) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.shared = shared.layers if shared else {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self.layers[layer] = (k, v)
        return k, v

    def keep(self, rows: Tensor) -> None:
        self.layers = {n: (k[rows], v[rows]) for n, (k, v) in self.layers.items()}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in Hugging Face's half-split layout. x: [batch, heads, positions, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend_after_prefix(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Tensor) -> Tensor:
    """Attention over a shared prefix and a sequence's own positions, without a copy of the prefix per sequence.

    q: [batch, heads, length, head_dim]; mask: [batch, 1, length, prefix + own positions], True where attention is allowed.
    """
    batch, heads, length, size = q.shape
    kv = k.shape[1]
    groups, prefix = heads // kv, prefix_k.shape[2]
    q = q.view(batch, kv, groups * length, size) * size ** -0.5
    flat = q.transpose(0, 1).reshape(kv, -1, size)
    to_prefix = (flat @ prefix_k[0].transpose(1, 2)).view(kv, batch, groups * length, prefix).transpose(0, 1)
    scores = torch.cat((to_prefix, q @ k.transpose(2, 3)), dim=-1).view(batch, kv, groups, length, -1).float()
    weights = scores.masked_fill(~mask[:, :, None], float("-inf")).softmax(dim=-1).to(q.dtype).view(batch, kv, groups * length, -1)
    from_prefix = weights[..., :prefix].transpose(0, 1).reshape(kv, -1, prefix) @ prefix_v[0]
    out = from_prefix.view(kv, batch, groups * length, size).transpose(0, 1) + weights[..., prefix:] @ v
    return out.reshape(batch, heads, length, size)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        c, self.config, self.index = config, config, index
        self.input_layernorm = Norm(c.hidden, c.eps)
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.post_attention_layernorm = Norm(c.hidden, c.eps)
        self.gate_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        c, (batch, length, _) = self.config, x.shape
        h = self.input_layernorm(x)
        q = self.q_proj(h).view(batch, length, c.heads, c.head_dim).transpose(1, 2)
        k = self.k_proj(h).view(batch, length, c.kv_heads, c.head_dim).transpose(1, 2)
        v = self.v_proj(h).view(batch, length, c.kv_heads, c.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        if cache is not None and cache.shared:
            attended = attend_after_prefix(q, k, v, *cache.shared[self.index], mask)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and length > 1, enable_gqa=True)
        x = x + self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = Norm(config.hidden, config.eps)
        steps = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        angles = torch.arange(config.max_positions).float()[:, None] / config.rope_theta ** steps[None, :]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden(self, tokens: Tensor, cache: Cache | None = None, positions: Tensor | None = None,
               mask: Tensor | None = None) -> Tensor:
        """Final hidden states [batch, length, hidden] of `tokens` [batch, length].

        `positions` ([batch, length] or [length]) default to counting from 0; `mask` is True where attention is allowed.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[positions].to(x.dtype), self.sin[positions].to(x.dtype)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits; input and output embeddings are tied."""
        return hidden @ self.embed_tokens.weight.to(hidden.dtype).T

    def hugging_face_state(self) -> dict[str, Tensor]:
        """The weights under the names that Hugging Face's LlamaForCausalLM uses."""
        names = {}
        for name, tensor in self.state_dict().items():
            parts = name.split(".")
            if parts[-2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
                parts.insert(2, "self_attn")
            elif parts[-2] in ("gate_proj", "up_proj", "down_proj"):
                parts.insert(2, "mlp")
            names["model." + ".".join(parts)] = tensor
        return names

    def load_hugging_face(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict({k.removeprefix("model.").replace(".self_attn", "").replace(".mlp", ""): v
                              for k, v in state.items() if k != "lm_head.weight"})
