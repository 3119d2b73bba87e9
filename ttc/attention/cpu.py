"""The sparse backend for vLLM's CPU attention: the stock kernel, called on chosen pages.

Each step ``SparseBuilder.build`` works out what all layers share (which rows decode sparsely, how many pages each KV head keeps,
the kernel's schedule, which depends on lengths alone); each layer's ``forward`` picks its pages and makes one stock call in which
every (row, KV head) is a sequence of its own with one KV head: the cache [N, H, page, 2D] is viewed as [N*H, 1, page, 2D]. The
last page is always kept, so a row's reduced length is the same in all layers. Prefill rows, and layers that can't (sliding windows,
encoders), go through vLLM's own path. Read and run against vLLM 0.32.0.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import cpu_attn as base

from ttc.attention import choose
from ttc.attention.pages import Cache, key_order, unusual
from ttc.attention.rows import Row, batch_of
from ttc.attention.settings import CONFIG_KEY, KvSetting, SparseOptions

log = logging.getLogger("ttc.attention")
Factors = tuple[float, ...]
KINDS = {"block-topk": "mean", "quest": "bounds"}
_WARNED: set[str] = set()


@dataclass(slots=True)
class LayerPlan:
    """What the layers with the same budgets share in a step. H KV heads, b rows."""

    keep: Tensor  # [b, H] pages
    lengths: Tensor  # [b * H] tokens left
    schedule: Tensor
    table: Tensor  # [b * H, W]: static and dense rows filled in
    rules: Tensor  # [b]: as select.cpp has them
    oracle: list[int]
    query_start: Tensor


@dataclass(slots=True)
class Step:
    """One engine step with sparse rows among its first ``rows`` rows, which all decode one token."""

    builder: SparseBuilder
    rows: int
    lengths: Tensor
    pages: Tensor
    tables: Tensor
    settings: list[Row | None]
    stale: dict[str, Tensor]
    rest: tuple[Tensor, Tensor, Tensor, Tensor, int] | None
    plans: dict[Factors, LayerPlan] = field(default_factory=dict)
    chosen: dict[Any, Tensor] = field(default_factory=dict)
    again: bool = False  # the choices of an earlier step still hold

    def plan(self, factors: Factors) -> LayerPlan:
        found = self.plans.get(factors)
        if found is None:
            found = self.plans[factors] = self.builder.layer_plan(self, factors)
        return found


def pages_kept(
    setting: KvSetting, pages: int, page: int, factors: Sequence[float], always: bool = False
) -> list[int]:
    """Pages that each KV head of a row reads, each at least one, together no more than the budget times the sum of ``factors``.

    All of them (dense) where choosing would read as many bytes as it saves: a summary of n vectors costs n / 2 tokens of KV, so a
    full read of up to budget + pages * n / 2 tokens is no dearer.
    """
    most = max(1, setting.budget // page)
    vectors = choose.RULES.get(setting.method, 0)
    if not always and pages * page <= most * page + pages * vectors / 2:
        return [pages] * len(factors)
    shares = [most * factor for factor in factors]
    kept = [max(1, int(share + 1e-9)) for share in shares]
    spare = int(sum(shares) + 1e-9) - sum(kept)
    for head in sorted(range(len(kept)), key=lambda h: kept[h] - shares[h])[: max(0, spare)]:
        kept[head] += 1
    return [min(pages, k) for k in kept]


class SparseBuilder(base.CPUAttentionMetadataBuilder):  # type: ignore[misc]  # vLLM is not type-checked here
    """Adds ``metadata.ttc_step`` in steps in which some row decodes sparsely."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.options = SparseOptions.of((vllm_config.additional_config or {}).get(CONFIG_KEY))
        self.batch = batch_of(vllm_config)
        self.layers = sorted(layer_names, key=extract_layer_index)
        found = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        impls = [layer.impl for layer in found.values()]
        self.reason = next(filter(None, map(self._unusual, impls)), "")
        self.order: Tensor | None = None
        if not self.reason:
            self.order = key_order(self.isa, self.block_size, self.head_dim, self.dtype)
            if self.order is None:
                self.reason = f"keys packed for {self.isa} in a way that can't be read back"
        if self.order is not None:
            self._init_reorder_batch_threshold(1)  # rows that decode come first
            each = self.options.factors(len(self.layers), self.num_kv_heads)
            self.factors = dict(zip(self.layers, each, strict=True))
            anchors = {(i // self.options.share_layers, f) for i, f in enumerate(each) if f is not None}
            self.choosing = len(anchors) / len(each)  # the part of the layers that score pages
        self.position = {name: i for i, name in enumerate(self.layers)}
        self.valid: dict[str, Tensor] = {}  # kind -> [N] pages whose summary is that of what they hold now
        self.external = vllm_config.kv_transfer_config is not None
        self.kept: dict[Any, Tensor] = {}  # choices that later steps may take over
        self.mark: Any = None
        self.age = 0  # steps that they have served
        self.batch.served[self.layers[0]] = self.reason

    def _unusual(self, impl: Any) -> str:
        return unusual(
            {
                "cross": self.is_cross_attention, "encoder": self.is_encoder_only_attention,
                "window": self.window_size != -1 or getattr(impl, "sliding_window", -1) != -1,
                "fp8": getattr(impl, "is_fp8_kv_cache", False), "alibi": getattr(impl, "alibi_slopes", None) is not None,
                "sinks": getattr(impl, "sinks", None) is not None,
                "decoder": getattr(impl, "attn_type", None) == AttentionType.DECODER,
            }
        )  # fmt: skip

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.ttc_step = None
        wanted = self.batch.rows
        if not wanted and not self.valid:
            return metadata
        if self.order is None or metadata.causal is not True:
            if wanted:
                _warn(f"{self.layers[0]} and its like stay dense: {self.reason or 'not causal'}")
            return metadata
        metadata.ttc_step = self._step(common_attn_metadata, metadata)
        return metadata

    def _step(self, common: Any, metadata: Any) -> Step | None:
        n, page = common.num_reqs, self.block_size
        lengths, starts, tables = (
            metadata.seq_lens[:n],
            metadata.query_start_loc[: n + 1],
            metadata.block_table,
        )
        fresh = starts[1:] - starts[:-1]
        before, full = (lengths - fresh) // page, lengths // page
        for i in (full > before).nonzero().flatten().tolist():
            done = tables[i, int(before[i]) : int(full[i])].long()
            for valid in self.valid.values():
                valid[done] = False
        decoding = fresh == 1
        if common.is_prefilling is not None:
            decoding &= ~common.is_prefilling[:n]
        rows = int(decoding.int().cumprod(0).sum())
        settings = [self.batch.rows.get(i) for i in range(rows)]
        if self.external:
            self._forget(tables, full, n)
        if not any(settings):
            return None
        pages = ((lengths[:rows] + page - 1) // page).to(torch.int32)
        step = Step(self, rows, lengths[:rows], pages, tables[:rows], settings, {}, None)
        if self.options.share_steps > 1:
            mark = (self.batch.version, pages.tolist())
            step.again = mark == self.mark and self.age < self.options.share_steps
            self.mark, self.age = mark, self.age + 1 if step.again else 1
        if not self._count(step):
            self.mark = None
            return None
        step.stale = self._stale(tables, full, settings)
        if rows < n:
            cut = starts[rows:] - starts[rows]
            left = lengths[rows:].contiguous()
            schedule = self._schedule(n - rows, self.num_heads, self.num_kv_heads, left, cut)
            step.rest = (schedule, cut, left, tables[rows:n], int(starts[rows]))
        return step

    def _forget(self, tables: Tensor, full: Tensor, n: int) -> None:
        """A KV connector may have loaded a new row's pages behind our back: none of their summaries is trusted."""
        for i in [i for i in self.batch.fresh if i < n]:
            for valid in self.valid.values():
                valid[tables[i, : int(full[i])].long()] = False
        self.batch.fresh.clear()

    def _stale(self, tables: Tensor, full: Tensor, settings: list[Row | None]) -> dict[str, Tensor]:
        """Pages of sparse rows whose summary must be made in this step, by kind."""
        stale = {}
        for kind in {KINDS[r.setting.method] for r in settings if r and r.setting.method in KINDS}:
            if kind not in self.valid:
                count = int(self.vllm_config.cache_config.num_gpu_blocks) + 1
                self.valid[kind] = torch.zeros(count, dtype=torch.bool)
            mine = torch.tensor([bool(r) and KINDS.get(r.setting.method) == kind for r in settings])  # type: ignore[union-attr]
            most = int(full[: len(settings)].max())
            ids = tables[: len(settings), :most].long()
            missing = (
                (torch.arange(most) < full[: len(settings), None]) & mine[:, None] & ~self.valid[kind][ids]
            )
            if bool(missing.any()):
                stale[kind] = torch.unique(ids[missing])
                self.valid[kind][stale[kind]] = True
        return stale

    def _count(self, step: Step) -> bool:
        """Count for each row what it skips and scores. False if all stay dense."""
        any_sparse = self.options.always
        classes = list(self.factors.values())
        kinds = {factors for factors in classes if factors is not None}
        for i, row in enumerate(step.settings):
            if row is None:
                continue
            pages, skipped = int(step.pages[i]), 0.0
            for factors in kinds:
                keep = self._keep(row, pages, factors)
                skipped += classes.count(factors) * (pages - sum(keep) / len(keep)) * self.block_size
            if skipped > 0:
                any_sparse = True
                vectors = 0 if step.again else choose.RULES.get(row.setting.method, 0)
                row.count(skipped / len(classes), pages * vectors * self.choosing)
        return any_sparse

    def _keep(self, row: Row | None, pages: int, factors: Factors) -> list[int]:
        if row is None:
            return [pages] * len(factors)
        return pages_kept(row.setting, pages, self.block_size, factors, self.options.always)

    def layer_plan(self, step: Step, factors: Factors) -> LayerPlan:
        heads, page = self.num_kv_heads, self.block_size
        counts = step.pages.tolist()
        keep = torch.tensor(
            [self._keep(row, p, factors) for row, p in zip(step.settings, counts, strict=True)],
            dtype=torch.int32,
        )
        reduced = step.lengths[:, None].to(torch.int32) - (step.pages[:, None] - keep) * page
        lengths = reduced.reshape(-1).contiguous()
        table = torch.zeros(step.rows * heads, int(keep.max()), dtype=torch.int32)
        rules, oracle = torch.zeros(step.rows, dtype=torch.int32), []
        for i, row in enumerate(step.settings):
            method = row.setting.method if row else "streaming"
            if method in choose.RULES and int(keep[i].min()) < counts[i]:
                rules[i] = choose.RULES[method]
            elif method == "oracle-topk" and int(keep[i].min()) < counts[i]:
                oracle.append(i)
            else:
                own = table[i * heads : (i + 1) * heads]
                choose.fill_static(own, method, step.tables[i, : counts[i]], counts[i], keep[i])
        starts = torch.arange(step.rows * heads + 1, dtype=torch.int32)
        schedule = self._schedule(step.rows * heads, self.num_heads // heads, 1, lengths, starts)
        return LayerPlan(keep, lengths, schedule, table, rules, oracle, starts)

    def _schedule(self, rows: int, heads: int, kv_heads: int, lengths: Tensor, starts: Tensor) -> Tensor:
        made: Tensor = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=rows, num_heads=heads, num_kv_heads=kv_heads, head_dim=self.head_dim, seq_lens=lengths, dtype=self.dtype,
            query_start_loc=starts, causal=True, sliding_window_size=-1, isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV, kv_cache_dtype=self.kv_cache_dtype,
        )  # fmt: skip
        return made


class SparseImpl(base.CPUAttentionBackendImpl):  # type: ignore[misc]
    """One layer. Chooses pages and calls the stock kernel; all else is vLLM's own."""

    cache: Cache | None = None

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        step: Step | None = getattr(attn_metadata, "ttc_step", None)
        factors = step.builder.factors.get(layer.layer_name) if step is not None else None
        if step is None or factors is None:
            return super().forward(  # type: ignore[no-any-return]
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if self.cache is None or self.cache.where != kv_cache.data_ptr():
            assert step.builder.order is not None
            self.cache = Cache(kv_cache, step.builder.order)
        for kind, ids in step.stale.items():
            self.cache.update(kind, kv_cache, ids)
        blocks, heads, page, both = kv_cache.shape
        plan = step.plan(factors)
        table = self._table(layer.layer_name, query, kv_cache, step, plan, factors)
        group, channels = self.num_heads // heads, both // 2
        keys, values = kv_cache.view(blocks * heads, 1, page * 2, channels).chunk(2, dim=2)
        self._attend(
            layer, query[: step.rows].reshape(step.rows * heads, group, channels), keys, values,
            output[: step.rows].view(step.rows * heads, group, channels), plan.query_start, plan.lengths, table, plan.schedule,
        )  # fmt: skip
        if step.rest is not None:
            schedule, starts, lengths, tables, first = step.rest
            keys, values = kv_cache.view(blocks, heads, page * 2, channels).chunk(2, dim=2)
            end = attn_metadata.num_actual_tokens
            self._attend(
                layer, query[first:end], keys, values, output[first:end], starts, lengths, tables, schedule
            )
        return output

    def _table(
        self, name: str, query: Tensor, kv_cache: Tensor, step: Step, plan: LayerPlan, factors: Factors
    ) -> Tensor:
        """The pages of this layer [b * H, W], its own or shared with a neighbour or an earlier step."""
        builder, options = step.builder, step.builder.options
        if not plan.oracle and not bool(plan.rules.any()):
            return plan.table
        anchor = (builder.position[name] // options.share_layers, factors)
        shared = builder.kept.get(anchor) if step.again else step.chosen.get(anchor)
        if shared is not None:
            return shared
        table = plan.table.clone()
        heads = builder.num_kv_heads
        grouped = query[: step.rows].view(step.rows, heads, self.num_heads // heads, -1)
        assert self.cache is not None
        if bool(plan.rules.any()):
            kept = self.cache.kept
            choose.select(
                table, grouped, kept.get("mean"), kept.get("bounds"), step.tables, step.pages, plan.keep, plan.rules,
                kind=options.selector,
            )  # fmt: skip
        for i in plan.oracle:
            ids = step.tables[i, : int(step.pages[i])].long()
            mass = choose.oracle_scores(
                grouped[i], self.cache.keys(kv_cache, ids), int(step.lengths[i]), self.scale
            )
            choose.fill_scored(table[i * heads : (i + 1) * heads], mass, ids, plan.keep[i])
        step.chosen[anchor] = builder.kept[anchor] = table
        return table

    def _attend(
        self, layer: Any, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, starts: Tensor, lengths: Tensor,
        table: Tensor, schedule: Tensor,
    ) -> None:  # fmt: skip
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=keys, value_cache=values, output=output, query_start_loc=starts, seq_lens=lengths,
            scale=self.scale, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table,
            softcap=self.logits_soft_cap, scheduler_metadata=schedule, s_aux=None, k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float, kv_cache_dtype=self.kv_cache_dtype,
        )  # fmt: skip


class SparseCPUBackend(base.CPUAttentionBackend):  # type: ignore[misc]
    """What vLLM is given in the place of its CPU backend."""

    @staticmethod
    def get_impl_cls() -> type[SparseImpl]:
        return SparseImpl

    @staticmethod
    def get_builder_cls() -> type[SparseBuilder]:
        return SparseBuilder


def _warn(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        log.warning("sparse decoding: %s", message)
