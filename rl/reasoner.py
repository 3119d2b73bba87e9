"""Train a nano reasoner from nothing: ``python -m ttc.rl.reasoner --size s``.

Plain torch and supervised traces (ttc.rl.traces). One run owns a folder: ``checkpoint.pt`` (network,
optimisers, the state of the data stream), ``loss.json`` (the curve) and ``model/`` (Hugging Face format,
rewritten at every checkpoint). The same command resumes it; with the token schedule the resumed run repeats
the uninterrupted one exactly (tests/rl/test_reasoner.py).

Runs unchanged on a CPU (float32, one thread is enough) and a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttc import nano
from ttc.errors import InputError
from ttc.rl import card, heldout
from ttc.rl.model import Nano, Shape, config_shape, load, save, size_config, use_half
from ttc.rl.tokenizer import PAD
from ttc.rl.traces import Corpus, Trace

LOG_STEPS = 25


class Batch(NamedTuple):
    """Padded traces: ids and target weights, both (B, T)."""

    ids: Tensor
    weights: Tensor


class Run:
    """A training run: what a checkpoint holds, and the step that advances it."""

    def __init__(self, config: Mapping[str, Any], seed: int, device: str, held_out: frozenset[str]) -> None:
        self.config, self.device, self.seed = config, torch.device(device), seed
        self.training: Mapping[str, Any] = config["training"]
        torch.manual_seed(seed)
        self.model = Nano(Shape(**config["shape"])).to(self.device)
        use_half(self.model, self.training["half_matmul"] and torch.cpu._is_avx512_bf16_supported())
        self.optimizers = optimizers(self.model, self.training)
        self.corpus = Corpus(random.Random(seed), config["data"], held_out)
        self.step, self.tokens, self.read_tokens, self.seconds = 0, 0, 0, 0.0
        self.first_step = 0  # of this run's optimisers: the rate warms up from here
        self.curve: list[dict[str, float]] = []
        self.recent: list[float] = []

    def advance(self, progress: float) -> float:
        """One optimiser step on fresh traces; the mean loss of a target token."""
        self._set_rates(progress)
        traces = _step_traces(self.corpus, progress, self.training["step_tokens"])
        total = sum(sum(trace.weights[1:]) for trace in traces)
        loss_sum = 0.0
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for batch in batches(traces, self.training["micro_tokens"]):
            loss = target_loss(self.model, Batch(*(part.to(self.device) for part in batch))) / total
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.tokens += sum(sum(weight > 0 for weight in trace.weights[1:]) for trace in traces)
        self.read_tokens += sum(len(trace.ids) for trace in traces)
        self.recent = [*self.recent, loss_sum][-LOG_STEPS:]
        return loss_sum

    def _set_rates(self, progress: float) -> None:
        t = self.training
        fall = max(0.0, (progress - t["decay_from"]) / (1 - t["decay_from"]))
        warm = (self.step + 1 - self.first_step) / t["warmup_steps"]
        scale = min(1.0, warm) * (1 - fall * (1 - t["final_rate"]))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = t["learning_rate"] * scale

    def log(self) -> dict[str, float]:
        """Append a point of the loss curve."""
        loss = sum(self.recent) / len(self.recent)
        point = {
            "step": self.step,
            "tokens": self.tokens,
            "minutes": self.seconds / 60,
            "loss": round(loss, 4),
        }
        self.curve.append(point)
        return point

    def save(self, out: Path) -> None:
        """Checkpoint (written whole, then renamed), loss curve and model folder."""
        out.mkdir(parents=True, exist_ok=True)
        state = {
            "config": dict(self.config),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": self.corpus.rng.getstate(),
            "written": self.corpus.written,
            **{name: getattr(self, name) for name in _COUNTERS},
        }
        torch.save(state, out / "checkpoint.tmp")
        (out / "checkpoint.tmp").replace(out / "checkpoint.pt")
        (out / "loss.json").write_text(json.dumps(self.curve, indent=1))
        save(self.model, out / "model")

    def start_from(self, folder: Path) -> None:
        """Continue the schedule of a shipped model from its weights alone: its card says how far it got. The optimisers start
        anew (the rate warms up again) and the data are fresh."""
        if config_shape(folder) != self.model.shape:
            raise InputError(
                f"--from {folder}: has another shape than this size; use a model of the same size"
            )
        self.model.load_state_dict(load(folder).state_dict())
        made = card.read(folder)["training"]
        self.step = self.first_step = made["steps"]
        self.tokens, self.read_tokens, self.seconds = (
            made["tokens"],
            made["tokens_read"],
            60 * made["minutes"],
        )
        self.curve = json.loads((folder / "loss.json").read_text())
        self.corpus.rng.seed(f"{self.seed} from {self.tokens}")

    def resume(self, out: Path) -> None:
        """Continue from a checkpoint of the same configuration."""
        state = torch.load(out / "checkpoint.pt", map_location=self.device, weights_only=True)
        if _identity(state["config"]) != _identity(self.config):
            raise InputError(
                f"--out {out}: was trained with another configuration; choose another --out or --restart"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.corpus.rng.setstate(state["rng"])
        self.corpus.written = dict(state["written"])
        for name in _COUNTERS:
            setattr(self, name, state[name])


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change between a checkpoint and its continuation."""
    return {key: config[key] for key in ("shape", "data")}


_COUNTERS = ("step", "first_step", "tokens", "read_tokens", "seconds", "curve", "recent")


def optimizers(model: nn.Module, training: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, head and norms. ``training``: learning_rate, weight_decay, muon."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    tables = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" not in name]
    norms = [p for p in model.parameters() if p.dim() < 2]
    rate, decay = training["learning_rate"], training["weight_decay"]
    groups = [{"params": tables, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    if not training.get("muon", True):
        groups[0]["params"] = tables + matrices
        return [torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))]
    return [
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98)),
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
    ]


def _step_traces(corpus: Corpus, progress: float, step_tokens: int) -> list[Trace]:
    """Fresh traces, as many as fill a step."""
    traces: list[Trace] = []
    size = 0
    while size < step_tokens:
        traces.append(corpus.draw(progress))
        size += len(traces[-1].ids)
    return traces


def batches(traces: list[Trace], micro_tokens: int) -> list[Batch]:
    """One step's traces as padded batches of near-equal length.

    Sorting inside a step saves the padding; the step as a whole stays a fair sample, where sorted *steps*
    would each be of one style (a trap of the first prototype).
    """
    groups: list[list[Trace]] = [[]]
    for trace in sorted(traces, key=lambda trace: len(trace.ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(trace.ids) > micro_tokens:
            groups.append([])
        groups[-1].append(trace)
    return [_pad(group) for group in groups]


def _pad(traces: list[Trace]) -> Batch:
    longest = max(len(trace.ids) for trace in traces)
    ids = torch.tensor([trace.ids + [PAD] * (longest - len(trace.ids)) for trace in traces])
    weights = torch.tensor([trace.weights + [0.0] * (longest - len(trace.ids)) for trace in traces])
    return Batch(ids, weights)


def target_loss(model: Nano, batch: Batch) -> Tensor:
    """Weighted sum of cross-entropies over the target tokens (logits are computed only there)."""
    hidden = model.hidden(batch.ids[:, :-1])
    weights = batch.weights[:, 1:]
    chosen = weights > 0
    losses = F.cross_entropy(
        model.lm_head(hidden[chosen]).float(), batch.ids[:, 1:][chosen], reduction="none"
    )
    return (losses * weights[chosen]).sum()


def train(
    size: str = "s",
    out: str | Path | None = None,
    *,
    minutes: float | None = None,
    tokens: int | None = None,
    seed: int = 0,
    restart: bool = False,
    start: str | Path | None = None,
    checkpoint_minutes: float = 3.0,
    device: str | None = None,
    ship: bool = False,
    quiet: bool = False,
) -> Path:
    """Train (or resume) one size and return its model folder; with ``ship`` the package's own copy,
    ``nano-SIZE``.

    The schedule runs over ``tokens`` targets (default: the size's TOML file); ``minutes`` ends it earlier,
    with the schedule squeezed to fit, which no longer repeats exactly. ``start`` (a folder or an embedded model's name)
    continues the schedule from a model whose checkpoint is gone.
    """
    config = size_config(size)
    config["training"]["tokens"] = tokens or config["training"]["tokens"]
    config["training"]["seed"] = seed
    folder = Path(out) if out is not None else Path("runs") / f"reasoner-{size}-{seed}"
    run = Run(config, seed, device or ("cuda" if torch.cuda.is_available() else "cpu"), heldout.keys())
    if not restart and (folder / "checkpoint.pt").exists():
        run.resume(folder)
    elif start is not None:
        run.start_from(nano.resolve(str(start)) or Path(start))
    started, earlier, saved = time.monotonic(), run.seconds, time.monotonic()
    while (progress := _progress(run, minutes)) < 1:
        run.advance(progress)
        run.seconds = earlier + time.monotonic() - started
        if run.step % LOG_STEPS == 0:
            point = run.log()
            if not quiet:
                rate = run.tokens / run.seconds
                print(f"{progress:6.1%}  {json.dumps(point)}  {rate:.0f} targets/s", flush=True)
        if time.monotonic() - saved > 60 * checkpoint_minutes:
            run.save(folder)
            saved = time.monotonic()
    run.save(folder)
    return _ship(run, size, folder) if ship else folder / "model"


def _ship(run: Run, size: str, folder: Path) -> Path:
    """Put the model into ttc/nano; its figures come from ``python -m ttc.rl.evaluate``."""
    training = {
        "tokens": run.tokens,
        "tokens_read": run.read_tokens,
        "steps": run.step,
        "minutes": round(run.seconds / 60, 1),
        "final_loss": run.curve[-1]["loss"],
        "machine": f"{run.device.type}, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "torch": torch.__version__,
        "seed": run.training["seed"],
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python -m ttc.rl.reasoner --size {size} --seed {run.training['seed']} --ship",
    }
    if run.first_step:
        training["legs"] = (
            f"2: weights and schedule from step {run.first_step} on, with fresh optimisers (--from)"
        )
    tasks = [task for family in heldout.GRADED.values() for task in family]
    return card.ship(folder, f"nano-{size}", tasks, training)


def _progress(run: Run, minutes: float | None) -> float:
    """Share of training done, by tokens or by the clock, whichever is further."""
    by_tokens: float = run.tokens / run.training["tokens"]
    return max(by_tokens, run.seconds / 60 / minutes) if minutes else by_tokens


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ttc.rl.reasoner", description=train.__doc__)
    parser.add_argument("--size", default="s", help="xs, s, m or l")
    parser.add_argument("--out", help="run folder (default runs/reasoner-SIZE-SEED)")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--tokens", type=int, help="targets to train on (default: the size's file)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restart", action="store_true", help="ignore a checkpoint in --out")
    parser.add_argument("--from", dest="start", help="a model whose schedule is continued from its weights")
    parser.add_argument("--device")
    parser.add_argument("--ship", action="store_true", help="put the model into ttc/nano as nano-SIZE")
    print(train(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
