"""What our loop adds to a step: against a bare loop and the peers' loops, in one process.

    python tests/bench/train.py [--rounds 7] [--steps 100]

Every loop does the same: forward, our loss, backward, clipping at 1, AdamW, and a scalar for
TensorBoard each 20 steps; ours and the bare one also keep an average of the weights where the row
says so. CPU time of the process, one thread, rounds in turn, medians. Lightning and MONAI walk the
batches themselves: for them the clock is read where they ask for a batch. Peers are looked for in
.venv-bench/train (see the Makefile); a missing one loses its row.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".venv-bench" / "train"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from launch.measure import parts_of_fit
from medpsp.config import Config
from medpsp.model.loss import segmentation_loss
from medpsp.model.psp import build_model
from medpsp.stages import lr_at
from medpsp.train.batch import Batch
from medpsp.train.board import Board
from medpsp.train.loop import enter_stage, report_step, train_step
from medpsp.train.optimizer import no_moments
from medpsp.train.ranks import Agreement
from medpsp.types import World
from tests.bench.results import Row, paired, report, versions

CPU = torch.device("cpu")
CLIP, LOG_EVERY, DECAY = 1.0, 20, 0.999
WARM = 5
Step = Callable[[int], None]
Round = Callable[[int], float]
"""A number of steps to CPU seconds."""


class Tiny(nn.Module):
    """A step of about a millisecond, with the two parts that our optimizer tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, None]:
        return self.head(self.backbone(x)), None

    def part_parameters(self, part: str) -> list[nn.Parameter]:
        return list((self.backbone if part == "backbone" else self.head).parameters())


def config_of(size: int, batch: int, ema: float) -> Config:
    stages = [{"name": "a", "steps": 10**6, "lr": 1e-3}]
    train = {"stages": stages, "size": [size, size], "batch_size": batch, "ema": ema}
    tree = {
        "data": {"archive": "none", "classes": ["a", "b"]},
        "model": {"backbone": "resnet18", "aux": False},
        "train": train,
    }
    return Config.model_validate(tree)


def batch_of(size: int, count: int, classes: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        image=torch.rand(count, 1, size, size, generator=generator),
        label=torch.randint(0, classes, (count, size, size), generator=generator).to(torch.uint8),
        patients=("p",) * count,
        keys=torch.arange(count),
        samples=tuple(f"s{n}" for n in range(count)),
    )


def ours(model: Any, config: Config, batch: Batch, folder: Path) -> Step:
    """Everything that `fit` does in a step."""
    run, progress = parts_of_fit(model, config, World(), CPU)
    run = replace(run, board=Board(folder / "ours", 0))
    engine = enter_stage(model, config.train.stages[0], run, no_moments())
    agreement = Agreement()

    def step(number: int) -> None:
        began = time.perf_counter()
        run.at(number, "step")
        loss, norm = train_step(run, engine, progress, batch, number)
        progress.clock.add(len(batch.label), 0.0, time.perf_counter() - began)
        if (number + 1) % LOG_EVERY == 0:
            progress.guard.look()
            report_step(run, progress, loss, norm, number)
        agreement.say(run.stop.code)

    return step


def bare(model: nn.Module, config: Config, batch: Batch, folder: Path) -> Step:
    """What a careful engineer writes for one process."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    writer, weights = SummaryWriter(str(folder / "bare")), torch.ones(2)
    means = [p.detach().clone() for p in model.parameters()] if config.train.ema else []

    def step(number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(config.train, number)
        optimizer.zero_grad()
        logits, _ = model(batch.image, batch.keys)
        loss = segmentation_loss(logits, batch.label, config.loss, weights, lambda x: x)
        loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if means:
            torch._foreach_lerp_(means, [p.detach() for p in model.parameters()], 1 - DECAY)
        if (number + 1) % LOG_EVERY == 0:
            writer.add_scalar("loss", float(loss.total.detach()), number)
            writer.add_scalar("norm", float(norm), number)

    return step


def parts_of(model: nn.Module, config: Config, folder: Path, name: str) -> tuple[Any, ...]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    return optimizer, SummaryWriter(str(folder / name)), torch.ones(2)


def fabric(model: nn.Module, config: Config, batch: Batch, folder: Path) -> Step:
    from lightning_fabric import Fabric

    optimizer, writer, weights = parts_of(model, config, folder, "fabric")
    with quiet():
        fab = Fabric(accelerator="cpu", devices=1)
        net, optimizer = fab.setup(model, optimizer)

    def step(number: int) -> None:
        optimizer.zero_grad()
        logits, _ = net(batch.image, batch.keys)
        loss = segmentation_loss(logits, batch.label, config.loss, weights, lambda x: x)
        fab.backward(loss.total)
        fab.clip_gradients(net, optimizer, max_norm=CLIP)
        optimizer.step()
        if (number + 1) % LOG_EVERY == 0:
            writer.add_scalar("loss", float(loss.total.detach()), number)

    return step


def accelerate(model: nn.Module, config: Config, batch: Batch, folder: Path) -> Step:
    from accelerate import Accelerator

    optimizer, writer, weights = parts_of(model, config, folder, "accelerate")
    acc = Accelerator(cpu=True)
    net, optimizer = acc.prepare(model, optimizer)

    def step(number: int) -> None:
        with acc.accumulate(net):
            optimizer.zero_grad()
            logits, _ = net(batch.image, batch.keys)
            loss = segmentation_loss(logits, batch.label, config.loss, weights, lambda x: x)
            acc.backward(loss.total)
            acc.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
        if (number + 1) % LOG_EVERY == 0:
            writer.add_scalar("loss", float(loss.total.detach()), number)

    return step


class Clocked:
    """A batch, again and again, and the CPU seconds between the first counted and the last one."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch, self.steps, self.seconds = batch, steps, 0.0

    def __len__(self) -> int:
        return self.steps + WARM + 1

    def __iter__(self) -> Any:
        began = 0.0
        for number in range(len(self)):
            if number == WARM:
                began = time.process_time()
            if number == WARM + self.steps:
                self.seconds = time.process_time() - began
            yield self.batch


def lightning(model: nn.Module, config: Config, batch: Batch, folder: Path) -> Round:
    import logging

    import pytorch_lightning as pl
    from pytorch_lightning.loggers import TensorBoardLogger

    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.weights = model, torch.ones(2)

        def training_step(self, batch: Batch, number: int) -> Tensor:
            logits, _ = self.net(batch.image, batch.keys)
            loss = segmentation_loss(logits, batch.label, config.loss, self.weights, lambda x: x)
            self.log("loss", loss.total)
            return loss.total

        def transfer_batch_to_device(self, batch: Batch, *_: object) -> Batch:
            return batch  # theirs walks our dataclass by reflection, and cannot set its fields

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-2)

    def run(steps: int) -> float:
        batches = Clocked(batch, steps)
        with quiet():
            trainer = pl.Trainer(
                accelerator="cpu",
                max_epochs=1,
                gradient_clip_val=CLIP,
                log_every_n_steps=LOG_EVERY,
                logger=TensorBoardLogger(str(folder), "lightning"),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(Module(), batches)
        return batches.seconds

    return run


def monai(model: nn.Module, config: Config, batch: Batch, folder: Path) -> Round:
    import logging

    from monai.engines import SupervisedTrainer
    from monai.engines.utils import IterationEvents
    from monai.handlers import TensorBoardStatsHandler

    logging.getLogger("ignite").setLevel(logging.ERROR)
    optimizer, writer, weights = parts_of(model, config, folder, "monai")

    def loss_of(found: Any, label: Tensor) -> Tensor:
        loss = segmentation_loss(found[0], label, config.loss, weights, lambda x: x)
        return loss.total

    def run(steps: int) -> float:
        batches = Clocked(batch, steps)
        with quiet():
            trainer = SupervisedTrainer(
                device=CPU,
                max_epochs=1,
                train_data_loader=batches,
                network=model,
                optimizer=optimizer,
                loss_function=loss_of,
                prepare_batch=lambda found, *_, **__: (found.image, found.label),
                optim_set_to_none=True,
                decollate=False,
                train_handlers=[
                    TensorBoardStatsHandler(
                        writer,
                        iteration_log=LOG_EVERY,
                        output_transform=lambda out: out["loss"],
                    )
                ],
            )
            trainer.add_event_handler(
                IterationEvents.BACKWARD_COMPLETED,
                lambda _: torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP),
            )
            trainer.run()
        return batches.seconds

    return run


def in_steps(step: Step) -> Round:
    """Rounds of a loop that we walk."""
    numbers = itertools.count()

    def run(steps: int) -> float:
        began = time.process_time()
        for _ in range(steps):
            step(next(numbers))
        return time.process_time() - began

    return run


def quiet() -> Any:
    import contextlib
    import warnings

    @contextlib.contextmanager
    def within() -> Any:
        with warnings.catch_warnings(), contextlib.redirect_stderr(open(os.devnull, "w")):
            warnings.simplefilter("ignore")
            yield

    return within()


WALKERS = (lightning, monai)


def compare(
    make: Callable[[], nn.Module], loops: dict[str, Any], setting: tuple[int, int], args: Any
) -> dict[str, list[float]]:
    """ms of a step, one figure a round, for each loop that is installed."""
    size, count = setting
    config = config_of(size, count, args.ema)
    with tempfile.TemporaryDirectory() as folder:
        rounds: dict[str, Round] = {}
        for name, loop in loops.items():
            torch.manual_seed(0)
            try:
                made = loop(make(), config, batch_of(size, count), Path(folder))
            except ImportError as error:
                print(f"  {name}: not installed ({error.name})")
                continue  # its rows say so
            rounds[name] = made if loop in WALKERS else in_steps(made)
        times: dict[str, list[float]] = {name: [] for name in rounds}
        for number in range(args.rounds + 1):
            order = list(rounds) if number % 2 else list(rounds)[::-1]
            for name in order:
                times[name].append(rounds[name](args.steps) / args.steps * 1e3)
    return {name: found[1:] for name, found in times.items()}


def rows(times: dict[str, list[float]], loops: Iterable[str], wanted: float) -> list[Row]:
    """What each loop adds to the bare one, in ms, and how ours stands to those of others."""
    made = []
    pairs = [(name, "bare") for name in loops if name != "bare"]
    pairs += [("ours", name) for name in loops if name not in ("bare", "ours")]
    for name, other in pairs:
        mine, theirs = times.get(name, []), times.get(other, [])
        most = None if name != "ours" else wanted if other == "bare" else 0.0
        label = f"{name}: a step, more than {other}"
        if not mine or not theirs:
            made.append(Row(label=label, value=None, most=most, why="not installed"))
            continue
        more = sorted(a - b for a, b in zip(mine, theirs, strict=True))
        made.append(
            Row(
                label=label,
                value=statistics.median(more),
                most=most,
                unit="ms",
                ours=f"{statistics.median(mine):.3f} ms",
                theirs=f"{statistics.median(theirs):.3f} ms",
                spread=f"{more[0]:.3f} to {more[-1]:.3f}",
            )
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ("torch", "lightning-fabric", "monai", "accelerate", "pytorch-lightning")
    facts = {"versions": versions(*names)}
    facts["setting"] = f"1 thread, CPU time, medians of {args.rounds} rounds in turn"
    loops = {
        "bare": bare,
        "ours": ours,
        "Fabric": fabric,
        "MONAI": monai,
        "Accelerate": accelerate,
        "Lightning": lightning,
    }
    for args.ema in (0.0, DECAY):
        title = f"loop, tiny network, 32 x 32, batch 4, average {'on' if args.ema else 'off'}"
        few = {name: loops[name] for name in (loops if not args.ema else ("bare", "ours"))}
        report("train", title, rows(compare(Tiny, few, (32, 4), args), few, 0.2), facts)
    args.ema, args.steps = 0.0, 3
    resnet = {"bare": bare, "ours": ours}
    found = compare(lambda: build_model(config_of(256, 4, 0.0).model, 2), resnet, (256, 4), args)
    title = "loop, ResNet18, refine, 256 x 256, batch 4"
    row = paired("ours / bare, CPU time of a step", found["ours"], found["bare"], most=1.02)
    report("train", title, [row], facts)


if __name__ == "__main__":
    main()
