"""Vision transformer, small, and V-MoE: the same with banks of MLPs that route each token.

ViT: Dosovitskiy et al., ICLR 2021 (arXiv 2010.11929), pre-norm blocks. V-MoE: Riquelme et al.,
NeurIPS 2021 (arXiv 2106.05974); its robustness: Puigcerver et al., NeurIPS 2022 (arXiv 2210.10253).

Tokens are averaged before the head. A class token would be one row among equals that a capacity
limit may drop, and all that the head sees; it also makes the number of tokens odd.

Shapes: N images, T tokens, D embedding, R = N * T rows, E experts, C channels, H height, W width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advmoe_deploy.models.base import Classifier
from advmoe_deploy.models.routing.dispatch import run_experts
from advmoe_deploy.models.routing.routing import Routes, RoutingRule
from advmoe_deploy.specs import ModelSpec

_NORM_EPSILON = 1e-6  # as ViT has it, not torch's 1e-5
_SMALL = 0.02  # standard deviation of what starts near nothing: positions, gates


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of each image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return [N, T, D]."""
        # 3 x [N, heads, T, D / heads]; batch and tokens are never named, so that any may vary.
        qkv = self.qkv(x_NTD).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        y_NTD: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y_NTD


class Mlp(nn.Module):
    """Linear, GELU, linear: a block's feed-forward part, or one expert."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape of ``x``, whose last dimension is D."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class MoEMlp(nn.Module):
    """A bank of MLPs and the linear gate, without bias, that scores them for each token."""

    def __init__(self, width: int, hidden: int, rule: RoutingRule) -> None:
        super().__init__()
        self.rule = rule
        self.gate = nn.Linear(width, rule.num_experts, bias=False)
        self.experts = nn.ModuleList(Mlp(width, hidden) for _ in range(rule.num_experts))

    def forward(self, x_RD: Tensor, routes: Routes) -> Tensor:
        """Return [R, D]: nothing at all for a row whose weights are 0."""
        routing = routes.decide(self.rule, self.gate, x_RD)
        return run_experts(routing, x_RD, list(self.experts), routes.execution)


class Block(nn.Module):
    """One pre-norm transformer block, in the parts that a plan cuts it into."""

    def __init__(self, width: int, heads: int, mlp: Mlp | MoEMlp) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.mlp = mlp

    def attend(self, x_NTD: Tensor) -> Tensor:
        """Return ``x`` plus attention, [N, T, D]: the residual that the MLP adds to."""
        y_NTD: Tensor = x_NTD + self.attention(self.norm1(x_NTD))
        return y_NTD

    def rows(self, x_NTD: Tensor) -> Tensor:
        """Return what gate and MLP see of ``attend``'s answer: normalised tokens [R, D]."""
        rows_RD: Tensor = self.norm2(x_NTD).flatten(0, 1)
        return rows_RD

    def add(self, x_NTD: Tensor, y_RD: Tensor) -> Tensor:
        """Return the residual plus what the MLP made of its rows, [N, T, D]."""
        return x_NTD + y_RD.view(-1, *x_NTD.shape[1:])

    def forward(self, x_NTD: Tensor, routes: Routes | None = None) -> Tensor:
        """Return [N, T, D]; ``routes`` are needed where the MLP is a bank of experts."""
        x_NTD = self.attend(x_NTD)
        if isinstance(self.mlp, MoEMlp):
            assert routes is not None, "a bank of experts needs routes"
            return self.add(x_NTD, self.mlp(self.rows(x_NTD), routes))
        y_NTD: Tensor = x_NTD + self.mlp(self.norm2(x_NTD))
        return y_NTD


class ViT(nn.Module):
    """Patch embedding, learned positions, blocks, LayerNorm, mean over tokens, linear head.

    ``ratio`` scales the hidden width of the MLPs: of the experts, or, in a dense network, of all.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.transformer is not None, "validated by ModelSpec"
        shape, width = spec.transformer, spec.width
        patches = spec.image_size // shape.patch_size
        self.patches = nn.Conv2d(spec.in_channels, width, shape.patch_size, stride=shape.patch_size)
        self.positions = nn.Parameter(torch.empty(1, patches * patches, width))
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(width, shape.heads, _mlp_of(spec, index)) for index in range(shape.depth)
        )
        self.norm = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.head = nn.Linear(width, spec.num_classes)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.positions, std=_SMALL)
        for module in self.modules():
            if isinstance(module, MoEMlp):
                nn.init.normal_(module.gate.weight, std=_SMALL)
            elif isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def rules(self) -> tuple[RoutingRule, ...]:
        """The rules of the routed blocks, in order."""
        return tuple(block.mlp.rule for block in self.blocks if isinstance(block.mlp, MoEMlp))

    def embed(self, x_NCHW: Tensor) -> Tensor:
        """Return tokens [N, T, D], patches row by row."""
        x_NTD: Tensor = self.patches(x_NCHW).flatten(2).transpose(1, 2) + self.positions
        return x_NTD

    def classify(self, x_NTD: Tensor) -> Tensor:
        """Return logits [N, classes]."""
        logits: Tensor = self.head(self.norm(x_NTD).mean(dim=1))
        return logits

    def forward(self, x_NCHW: Tensor, routes: Routes | None = None) -> Tensor:
        """Return logits [N, classes]; ``routes`` are needed where blocks hold experts."""
        x_NTD = self.embed(x_NCHW)
        for block in self.blocks:
            x_NTD = block(x_NTD, routes)
        return self.classify(x_NTD)


def _mlp_of(spec: ModelSpec, block: int) -> Mlp | MoEMlp:
    assert spec.transformer is not None, "validated by ModelSpec"
    hidden = int(spec.width * spec.transformer.mlp_ratio)
    scaled = max(1, int(hidden * spec.ratio))
    if spec.family != "vit-moe":
        return Mlp(spec.width, scaled)
    if block not in spec.transformer.moe_blocks:
        return Mlp(spec.width, hidden)
    layer = f"block-{block}"
    dropped = spec.dropped_experts.get(layer, ())
    rule = RoutingRule(layer, spec.num_experts, spec.top_k, spec.weighting, dropped)
    return MoEMlp(spec.width, scaled, rule)


class ViTMoE(Classifier):
    """V-MoE: a ViT some of whose MLPs are banks of experts, chosen anew for each token.

    Rows of a routing are tokens, image by image: row n * T + t. A token whose weights are all 0
    (capacity, by ``Routes.adjust``) keeps only its residual. At ``top_k=1`` and ``ratio=1`` the
    dense network ``spec.dense()`` costs the same but for the gates.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.backbone = ViT(spec)
        self.rules = self.backbone.rules

    def forward(self, images: Tensor, routes: Routes | None = None) -> Tensor:
        """Return logits [N, classes]."""
        logits: Tensor = self.backbone(self.normalise(images), routes or Routes())
        return logits
