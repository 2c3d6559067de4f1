"""The pictures of docs/concepts, computed with the package's own functions.

python scripts/site/figures.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import colors
from matplotlib import pyplot as plt
from torch import Tensor
from torch.nn.functional import one_hot

from transformer_vq.ops import estimators, fsq, vq_attention
from transformer_vq.ops.attention.quadratic import gradient_rule
from transformer_vq.ops.nearest import lookup, nearest_code
from transformer_vq.quantizers.initialize import kmeans

FOLDER = Path(__file__).parents[2] / "docs" / "concepts"
COLOURS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860"]
WINDOW = "#333333"


def main(folder: Path) -> None:
    """Write every picture into `folder`."""
    plt.switch_backend("Agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 160})
    for draw in (cache, gradients, pulled, codebooks):
        torch.manual_seed(0)
        figure = draw()
        figure.savefig(folder / f"{draw.__name__}.png", bbox_inches="tight")
        plt.close(figure)


def cache() -> Any:
    """One sequence's attention weights: by key, and the same weights as a cache of codes beside a window."""
    T, M, S, K = 48, 12, len(COLOURS), 8
    q, k, v = (0.8 * torch.randn(1, 1, T, K, dtype=torch.float64) for _ in range(3))
    codebook = kmeans(k[0], S, torch.Generator().manual_seed(0), "euclidean")
    codes = nearest_code(k, codebook)
    k_hat = lookup(codebook, codes)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    weights = (q @ k_hat.mT)[0, 0].masked_fill(j > i, -torch.inf).softmax(-1)
    far = i - j > M
    by_code = (weights * far) @ one_hot(codes[0, 0], S).double()
    nothing = torch.zeros(M, dtype=torch.float64)
    in_window = torch.stack([torch.cat([nothing[:d], weights.diagonal(-d)]) for d in range(M, -1, -1)], 1)

    o, _ = vq_attention(q, k_hat, v, codes, codebook, window=M, block_len=16)  # what is drawn is what is computed
    assert torch.allclose(weights @ v[0, 0], o[0, 0])
    assert torch.allclose(by_code.sum(1) + in_window.sum(1), torch.ones(T, dtype=torch.float64))

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.4), width_ratios=[T, S + M + 6], layout="constrained")
    palette = torch.tensor([colors.to_rgb(colour) for colour in COLOURS], dtype=torch.float64)
    grey = torch.tensor(colors.to_rgb(WINDOW), dtype=torch.float64)
    left.imshow(painted(weights, torch.where(far[..., None], palette[codes[0, 0]], grey)), interpolation="nearest")
    left.set(xlabel="key $j$", ylabel="query $i$", title=f"a weight for every key: {T} columns, growing")
    gap = torch.zeros(T, 1, dtype=torch.float64)
    columns = torch.cat([by_code, gap, in_window], 1)
    colour = torch.cat([palette, grey.expand(M + 2, 3)]).expand(T, -1, -1)
    right.imshow(painted(columns, colour), interpolation="nearest", aspect="auto")
    right.set(title=f"the same weights: {S} codes + {M + 1} keys, always", yticks=[])
    right.set_xticks([S / 2 - 0.5, S + 1 + M / 2], ["cached codes $s$", "window $i-M \\ldots i$"])
    return figure


def painted(weights: Tensor, colour: Tensor) -> Tensor:
    """Each weight (…) in its colour (…, 3), white for none; the power shows small ones."""
    return 1 - ((weights / weights.max()) ** 0.35)[..., None] * (1 - colour)


def gradients() -> Any:
    """Which pairs of query and key send gradient to the key, under the two rules."""
    T, M, L = 32, 6, 8
    i, j = torch.arange(T)[:, None], torch.arange(T)
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.7), layout="constrained", sharey=True)
    for panel, rule in zip(panels, ("window", "block"), strict=True):
        call = SimpleNamespace(gradients=rule, window=M, block_len=L, grad_through_cache=True)
        alive = gradient_rule(call, i, j)[0] & (j <= i)
        shown = torch.where(j > i, 0, torch.where(alive, 2, 1))
        panel.imshow(shown, cmap=colors.ListedColormap(["white", "#dddddd", COLOURS[0]]), vmin=0, vmax=2)
        panel.set(title=f"gradients: {rule}", xlabel="key $j$")
        for edge in range(L, T, L):
            panel.axhline(edge - 0.5, color="#999999", lw=0.6)
    panels[0].set_ylabel("query $i$")
    return figure


def pulled() -> Any:
    """Gradients at a code, and what each estimator hands to a key beside it: Gᵀg for unit g all around."""
    names = ("ste", "rotation", "rotation_unscaled", "scale", "rotation_tangent", "diveq")
    k, q = torch.tensor([1.0, 0.15]), torch.tensor([0.35, 0.62])
    angle = torch.arange(24) * (2 * torch.pi / 24)
    g = torch.stack([angle.cos(), angle.sin()], 1)
    figure, panels = plt.subplots(2, 3, figsize=(8.4, 5.8), layout="constrained", sharex=True, sharey=True)
    for name, panel in zip(names, panels.flat, strict=True):
        keys = k.expand(24, 2).clone().requires_grad_()
        (out,) = torch.autograd.grad(estimators.apply(name, keys, q.expand(24, 2)), keys, g)
        for at, arrows in ((q, g), (k, out)):
            ends = at + 0.28 * arrows
            for n, end in enumerate(ends):
                panel.plot(*zip(at.tolist(), end.tolist(), strict=True), color=plt.cm.hsv(n / 24), lw=1.2)
        for at, text in ((q, "$q$"), (k, "$k$")):
            panel.plot([0, at[0]], [0, at[1]], color="#bbbbbb", lw=0.8, zorder=0)
            panel.plot(*at, "o", color="black", ms=4)
            panel.annotate(text, at.tolist(), xytext=(5, 7), textcoords="offset points", fontsize=11)
        panel.plot(0, 0, "+", color="#888888")
        panel.set(title=name, aspect="equal", xlim=(-0.1, 1.4), ylim=(-0.25, 1.0))
        panel.axis("off")
    return figure


def codebooks() -> Any:
    """The same keys with a learned codebook, rounded on a grid, and with signs: codes, and which cell is whose."""
    keys = torch.randn(1500, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.45]]) + torch.tensor([0.2, -0.1])
    grid = torch.stack(torch.meshgrid(*(torch.linspace(-3, 3, 500),) * 2, indexing="xy"), -1)
    learned = kmeans(keys[None], 16, torch.Generator().manual_seed(0), "euclidean")
    levels = [4, 4]
    digits = lambda z: fsq.bounded_to_digits(fsq.bound(z, levels), levels)
    by_fsq = fsq.digits_to_codes(digits(grid), levels)
    by_vq = nearest_code(grid.reshape(1, 1, -1, 2), learned[None, 0]).reshape(grid.shape[:2])
    by_sign = (grid[..., 0] >= 0).long() + 2 * (grid[..., 1] >= 0).long()
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.4), layout="constrained", sharey=True)
    drawn = {
        "vq: 16 codes where the keys are": (by_vq, learned[0]),
        "fsq: levels 4 × 4, cells of a grid": (by_fsq, None),
        "lfq, bsq: signs, 4 codes": (by_sign, torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])),
    }
    for panel, (title, (cells, codes)) in zip(panels, drawn.items(), strict=True):
        panel.contour(grid[0, :, 0], grid[:, 0, 1], edges(cells), levels=[0.5], colors="#999999", linewidths=0.7)
        panel.scatter(*keys.T, s=2, color=COLOURS[0], alpha=0.35, lw=0)
        if codes is not None:
            panel.scatter(*codes.T, s=26, color=COLOURS[3], marker="D", zorder=3)
        panel.set(title=title, aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    return figure


def edges(cells: Tensor) -> Tensor:
    """1 where a cell's neighbour to the right or above is another, else 0."""
    other = torch.zeros_like(cells, dtype=torch.float32)
    other[:, :-1] += cells[:, 1:] != cells[:, :-1]
    other[:-1] += cells[1:] != cells[:-1]
    return other.clamp_max(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
