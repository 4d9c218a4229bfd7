"""The sizes of a base model that memory, traffic and time are computed from."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Linear:
    """A kind of linear: O = out_features, I = in_features. `names`: those of the model; without any, one a block.

    num_weights: how many weights they have, fewer where several share one; None if each has its own.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool = False
    names: tuple[str, ...] = ()
    is_trained_by_text: bool = True
    num_weights: int | None = None

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Llama-style decoder: equal blocks of seven linears and two norms, embeddings, a final norm and a head."""

    source: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_head: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def is_known_by_block(self) -> bool:
        """Whether all that a block computes and keeps is known, and not only its linears."""
        return True

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linears of one block, in the order they run."""
        h, f, q, kv = (
            self.hidden_size,
            self.intermediate_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        return (
            Linear("q_proj", h, q, self.qkv_bias),
            Linear("k_proj", h, kv, self.qkv_bias),
            Linear("v_proj", h, kv, self.qkv_bias),
            Linear("o_proj", q, h, self.o_bias),
            Linear("gate_proj", h, f, self.mlp_bias),
            Linear("up_proj", h, f, self.mlp_bias),
            Linear("down_proj", f, h, self.mlp_bias),
        )

    @property
    def vectors(self) -> tuple[int, ...]:
        """Lengths of a block's norms and biases."""
        norms = (self.hidden_size, self.hidden_size) + ((self.head_dim, self.head_dim) if self.qk_norm else ())
        return norms + tuple(linear.out_features for linear in self.linears if linear.bias)

    @property
    def others(self) -> tuple[tuple[int, int], ...]:
        """Length, and number in the whole model, of what is neither a linear's weight nor embedding nor head."""
        return tuple((length, self.num_layers) for length in self.vectors) + ((self.hidden_size, 1),)

    @property
    def expert_multiplications(self) -> int:
        """Multiplications of a token in experts of the base that are no linears."""
        return 0

    def copies(self, linear: Linear) -> int:
        """Count the linears of a kind in the whole model."""
        return len(linear.names) or self.num_layers

    def stored(self, linear: Linear) -> int:
        """Count the weights that the linears of a kind have in memory."""
        return self.copies(linear) if linear.num_weights is None else linear.num_weights

    def names_of(self, linear: Linear) -> tuple[str, ...]:
        """Return the whole names of the linears of a kind."""
        part = "mlp" if linear.name in MLP else "self_attn"
        return linear.names or tuple(f"model.layers.{n}.{part}.{linear.name}" for n in range(self.num_layers))

    @property
    def embedding_numel(self) -> int:
        """Weights of the embedding, and of the head where it is not tied to it."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights of the base model; a tied head counts once."""
        block = sum(linear.weights for linear in self.linears) + sum(self.vectors)
        embeddings = self.embedding_numel * (1 if self.tied_head else 2)
        return self.num_layers * block + embeddings + self.hidden_size


MLP = ("gate_proj", "up_proj", "down_proj")
# What a config.json may leave to its model_type, by key of the file; True where the type has it always.
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 128},
}
