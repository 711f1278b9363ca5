"""A mixture of very many experts of one neuron each, of which each token chooses a few by product keys.

Source: He 2024, "Mixture of a Million Experts" (PEER), arXiv 2407.04153; product keys: Lample et al. 2019, arXiv
1907.05242.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedConfig


class ExpertTable(nn.Embedding):
    """One vector for each expert, on the way into it or out of it.

    Args:
        gain: Factor on the initial scale. One for what comes out, since few vectors are added, by weights of sum 1.
    """

    def __init__(self, num_experts: int, hidden_size: int, gain: float = 1.0):
        super().__init__(num_experts, hidden_size)
        self.gain = gain


class PeerFeedForward(nn.Module):
    """The sum over heads h and their best experts i of softmax(s_hi) GELU(u_i x) v_i, where s_hi = q_h k_i.

    The key of expert i = a sqrt(N) + b is the pair of half-keys (c_a, d_b), so that s_hi is a sum of two products, and
    the best of N experts are among the pairs of the best of each sqrt(N) half-keys. All heads share keys and experts.
    Queries have a LayerNorm where the paper has batch norm: a row would not be the same in another batch.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.num_heads, self.top_k = config.peer_num_heads, config.peer_top_k
        self.num_keys = math.isqrt(config.peer_num_experts)
        hidden, key_dim = config.hidden_size, config.peer_key_dim
        self.query_proj = nn.Linear(hidden, self.num_heads * key_dim, bias=False)
        self.query_norm = nn.LayerNorm(key_dim, eps=config.norm_eps)
        self.keys = nn.Parameter(torch.empty(2, self.num_keys, key_dim // 2))
        self.expert_in = ExpertTable(config.peer_num_experts, hidden)
        self.expert_out = ExpertTable(config.peer_num_experts, hidden, gain=math.sqrt(hidden))
        self.expert_out.is_output_projection = True

    @property
    def num_active_weights(self) -> int:
        """Elements of keys and experts that a token is multiplied with."""
        return self.num_heads * (self.keys.numel() + 2 * self.top_k * self.expert_in.embedding_dim)

    def retrieve(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.LongTensor]:
        """(batch, sequence, hidden) -> the largest scores of each head and whose they are, (batch, sequence, heads,
        top_k), float32 and indices of experts, the best first.
        """
        query = self.query_norm(self.query_proj(hidden).unflatten(-1, (self.num_heads, -1)))
        halves = query.unflatten(-1, (2, -1))  # (batch, sequence, heads, 2, key_dim / 2)
        products = torch.einsum("...pd,pnd->...pn", halves.to(self.keys.dtype), self.keys).float()
        best, places = products.topk(self.top_k, dim=-1)  # (batch, sequence, heads, 2, top_k)
        sums = best[..., 0, :, None] + best[..., 1, None, :]  # of all pairs of the best
        scores, chosen = sums.flatten(-2).topk(self.top_k, dim=-1)
        first = places[..., 0, :].gather(-1, chosen // self.top_k)
        return scores, first * self.num_keys + places[..., 1, :].gather(-1, chosen % self.top_k)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, sequence, hidden) -> the same."""
        return self.apply_experts(hidden, *self.retrieve(hidden))

    def apply_experts(self, hidden: torch.Tensor, scores: torch.Tensor, experts: torch.LongTensor) -> torch.Tensor:
        """The sum of the outputs of those that `retrieve` has found."""
        products = torch.einsum("...hkd,...d->...hk", self.expert_in(experts), hidden)
        gates = scores.softmax(dim=-1).to(products.dtype)
        return torch.einsum("...hk,...hkd->...d", gates * nn.functional.gelu(products), self.expert_out(experts))
