"""Vector quantization: the nearest row of a codebook learned by moving averages or by gradient.

    codebook = ema_sum / max(ema_count, 0.01)          after an optimizer step, with γ the setting `ema`:
    ema_sum ← γ·ema_sum + (1−γ)·Σ_{t: z_t=s} k_t       ema_count ← γ·ema_count + (1−γ)·#{t: z_t=s}   [Lingle 2309.16354]

vector-quantize-pytorch 1.32.0 updates in every forward pass and smooths the counts (Laplace, 1e-5) before it divides;
we follow the paper: once per optimizer step, with a floor. With `lookup: cosine` it normalises keys and codes, so that
its quantized keys have length 1; we look up by angle only, because attention needs the code to stand for the key, and
its length is part of the logit. It starts by k-means from as few keys as there are, some twice; we ask for more keys.

Axes:  B batch  H heads  T length  K key width  S codes
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformer_vq.config.base import ConfigError
from transformer_vq.config.quantizer import VQConfig
from transformer_vq.quantizers.health import ROUNDING, running_health
from transformer_vq.quantizers.initialize import KEYS_PER_CODE, kmeans, sample_keys
from transformer_vq.quantizers.losses import diversity, orthogonality, wasserstein
from transformer_vq.quantizers.nearest import NearestQuantizer
from transformer_vq.quantizers.processes import add_over_processes, is_first_process, take_from_first_process
from transformer_vq.quantizers.seeds import seeded
from transformer_vq.quantizers.statistics import Statistics

COUNT_FLOOR = 0.01  # the reference's: a code that is never used keeps a finite row
LEAST_TIME = 10  # steps that a code has before its running count is judged, where the count forgets sooner


class VectorQuantizer(NearestQuantizer):
    """Keys in; codes, quantized keys and losses out. Owns the codebook and its statistics; the arithmetic is in ops/.

    codebook: ema       buffers `ema_sum` (H, S, K) and `ema_count` (H, S), fp32 or wider whatever the model's dtype
    codebook: gradient  parameter `weight` (H, S, K), and `ema_count`

    Dead codes (`dead_code_threshold`): a code is judged by its running count once that has run, `time` = 1/(1−γ) steps
    (at least ten) after the code was made, be it at random, from keys, or in place of a dead one. A fresh count is the
    threshold (at least 1), so that from then on a code with as many keys a step as the threshold on average stays.
    Buffer `age` (H, S), in steps; a checkpoint without it, of a version that had none, gives every code its time anew.
    """

    config: VQConfig
    ema_sum: Tensor
    ema_count: Tensor
    age: Tensor

    def __init__(self, config: VQConfig, heads: int, dim: int, seed: int = 0, layer: int = 0) -> None:
        super().__init__(config, seed, layer, sees_keys_first=config.init != "normal")
        H, S = heads, config.size
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)  # a loader may have set bf16
        rows = torch.randn(H, S, dim, generator=seeded(seed, layer, "codebook"), dtype=wide) * (H * S) ** -0.5
        self.metric = config.lookup
        self.by_ema = config.codebook == "ema"
        self.fresh_count = max(config.dead_code_threshold, 1.0)
        self.time = max(LEAST_TIME, math.ceil(round(1 / (1 - config.ema), 6)))
        if self.by_ema:
            self.register_buffer("ema_sum", rows * self.fresh_count)
        else:
            self.weight = nn.Parameter(rows.to(torch.get_default_dtype()))
        self.register_buffer("ema_count", torch.full((H, S), self.fresh_count, dtype=wide))
        if config.dead_code_threshold > 0:
            self.register_buffer("age", torch.zeros(H, S, dtype=torch.int64))
        self.statistics = Statistics(sums=self.by_ema, candidates=S if config.dead_code_threshold > 0 else 0)

    @property
    def codebook(self) -> Tensor:
        """(H, S, K); the EMA codebook is fp32 or wider."""
        return self.ema_sum / self.ema_count.clamp_min(COUNT_FLOOR)[..., None] if self.by_ema else self.weight

    def codebook_loss(self, k: Tensor, nearest: Tensor, codebook: Tensor, mask: Tensor | None) -> Tensor | float:
        """The terms whose weights are not zero."""
        config = self.config
        terms: list[Tensor | float] = []
        if not self.by_ema:
            terms.append(super().codebook_loss(k, nearest, codebook, mask))
        if config.orthogonality_weight:
            terms.append(config.orthogonality_weight * orthogonality(codebook))
        if config.diversity_weight:
            terms.append(config.diversity_weight * diversity(k, codebook, mask, config.temperature))
        if config.wasserstein_weight:
            terms.append(config.wasserstein_weight * wasserstein(k, codebook, mask))
        return sum(terms)

    def collect(self, k: Tensor, codes: Tensor, counts: Tensor, mask: Tensor | None) -> None:
        """Add this forward pass to the statistics of the optimizer step."""
        wanted = self.config.dead_code_threshold > 0
        self.statistics.collect(k, codes, counts, mask, self.names(k, mask) if wanted else None)

    def running_metrics(self) -> dict[str, Tensor]:
        """Of the running counts."""
        return running_health(self.ema_count, 1.0)

    @property
    def first_keys(self) -> int:
        """See the base: 64 a code for k-means, one a code for `init: data`."""
        if self.config.init == "normal" and self.config.start_step == 0:
            return 0
        return self.config.size * (1 if self.config.init == "data" else KEYS_PER_CODE)

    def initialise(self, keys: Tensor) -> None:
        """Codebook from the keys (H, N, K) of process 0: with `init: data` some of them, else their k-means centres.

        Raises ConfigError on every process when they are fewer than the codes.
        """
        if not self.first_keys:
            return
        like = self._statistics_like()
        found = torch.tensor(keys.shape[1], device=like.device)
        take_from_first_process(found)
        if found < self.config.size:
            name = "start_step" if self.config.start_step else "init"
            raise ConfigError(
                f"quantizer.{name} = {getattr(self.config, name)}: makes the codebook from the keys of one step, and "
                f"{found} a head are fewer than codes = {self.config.size}; enlarge the batch or take fewer codes"
            )
        rows = torch.zeros_like(like)
        if is_first_process():
            generator = seeded(self.seed, self.layer, "first codebook")
            if self.config.init == "data":
                rows.copy_(sample_keys(keys, self.config.size, generator))
            else:
                rows.copy_(kmeans(keys, self.config.size, generator, self.metric))
        take_from_first_process(rows)
        self._replace(torch.ones_like(self.ema_count, dtype=torch.bool), rows)

    def pending(self) -> tuple[Tensor, Tensor]:
        """What this process collected since the last application: sum (H, S, K) and count (H, S)."""
        return self.statistics.pending(self._statistics_like())

    def ema_target(self, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """What `ema_sum` and `ema_count` become for a step's sums: γ·old + (1−γ)·new."""
        keep = self.config.ema
        return keep * self.ema_sum + (1 - keep) * total, keep * self.ema_count + (1 - keep) * count

    @torch.no_grad()
    def apply_codebook_statistics(self) -> None:
        """Move the codebook by what all processes collected; nothing moves when none collected anything.

        Every process must call it. Codes that had their time and whose running
        count is then below the threshold become keys of this step.
        """
        total, count = self.pending()
        add_over_processes(total, count)
        collected = count.any()  # stays on the device, which would have to be waited for
        keep = self.config.ema
        if self.by_ema:
            moved = self.ema_sum.mul(keep).add_(total, alpha=1 - keep)
            self.ema_sum.copy_(torch.where(collected, moved, self.ema_sum))
        moved = self.ema_count.mul(keep).add_(count, alpha=1 - keep)
        self.ema_count.copy_(torch.where(collected, moved, self.ema_count))
        threshold = self.config.dead_code_threshold
        if threshold > 0:
            self.age += collected
            rows, n = self.statistics.candidates(self._statistics_like())
            dead = (self.ema_count < threshold * (1 - ROUNDING)) & (self.age >= self.time) & collected
            turn = dead.cumsum(-1) - 1  # the first dead code takes the first candidate
            dead &= turn < n
            rows = rows.gather(1, turn.clamp_min(0)[..., None].expand_as(rows))
            self._replace(dead, rows)
        self.statistics.discard()

    def discard_codebook_statistics(self) -> None:
        """Forget what was collected, for a step that is skipped."""
        self.statistics.discard()

    @torch.no_grad()
    def _replace(self, where: Tensor, rows: Tensor) -> None:
        """Set the rows (H, S, K) of the codes where (H, S) is true, with fresh counts, sums to match, and age 0."""
        self.ema_count.masked_fill_(where, self.fresh_count)
        if self.by_ema:
            self.ema_sum.copy_(torch.where(where[..., None], rows * self.fresh_count, self.ema_sum))
        else:
            self.weight.copy_(torch.where(where[..., None], rows, self.weight))
        if self.config.dead_code_threshold > 0:
            self.age.masked_fill_(where, 0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A state without `age` gives every code its time; one of a run with a threshold loads where there is none."""
        tensors, age = dict(state_dict), f"{prefix}age"
        if self.config.dead_code_threshold > 0:
            tensors.setdefault(age, torch.zeros_like(self.age))
        else:
            tensors.pop(age, None)
        super()._load_from_state_dict(tensors, prefix, *rest)

    def _statistics_like(self) -> Tensor:
        """A tensor of the shape (H, S, K) and the type in which statistics are kept."""
        return self.ema_sum if self.by_ema else self.weight.detach().to(self.ema_count.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep the statistics at fp32 or wider when the model is cast to a narrower type."""
        statistics = {id(self.ema_count), id(self.ema_sum) if self.by_ema else None}

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32
            return tensor.to(moved.device) if narrow and id(tensor) in statistics else moved

        return super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
