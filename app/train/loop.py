"""The training loop: `torchrun ... -m app.train`. Reads downwards: connect, agree, build, resume, step, stop."""

import os
import signal
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from math import ceil, inf
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from app.train.checkpoint import CheckpointFolder, State, agree, disk_owner, gathered, node
from app.train.data import Corpus, held_out_batch, load_corpus, training_batch
from app.train.metrics import Mark, Metrics, Step, mark
from app.train.model import GPT, adamw, learning_rate, replicate, sample, shard, uses_bf16
from app.train.settings import TrainError, TrainSettings, leave, reached, refuse, say

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
ALONE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket closed")
"""How gloo words the loss of another rank, in gloo/transport/tcp/{pair,unbound_buffer}.cc."""


@record
def train(settings: TrainSettings) -> NoReturn:
    """Trains, and ends the process: 0 finished, 1 failed, 2 wrong settings, 128 + n stopped by signal n."""
    try:
        leave(Run(settings).train())
    except TrainError as error:
        refuse(error)


class Run:
    """One start of a run on this rank."""

    def __init__(self, settings: TrainSettings) -> None:
        """Builds everything and resumes from the newest checkpoint.

        Raises:
            TrainError: the ranks disagree, or data, folders or checkpoints cannot be used.
        """
        self.settings, self.device = settings, connect(settings)
        reached("rendezvous")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        place = f"rank {self.rank} of {self.world}, local rank {os.environ['LOCAL_RANK']}, {node()}"
        say(f"{place}, device {self.device} {device_name}".rstrip())
        self.corpus = agreed_corpus(settings)
        disk_owner(Path(settings.run_dir), "RUN_DIR")
        self.sharded = settings.sharding == "fsdp"
        self.checkpoints = CheckpointFolder(settings.checkpoints, keep=settings.keep, sharded=self.sharded)

        torch.manual_seed(settings.seed)
        shape = {name: getattr(settings, name) for name in ("vocab", "context", "layers", "heads", "width")}
        self.net = GPT(**shape).to(self.device)
        bf16 = uses_bf16(settings.precision, self.device)
        # FSDP2 has a policy of its own.
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16 and not self.sharded)
        self.names = gathered(f"rank {self.rank} on {node()}")
        self.metrics = Metrics(settings, self.names, device_name, self.net.flops_per_token())
        if settings.compile:
            self.net.compile()
        # `model` is what to call; `net` stays what to evaluate and to save.
        self.model: nn.Module = self.net
        self.gradients_there: Mark = None
        if self.sharded:
            shard(self.net, self.device, bf16=bf16)
        else:
            self.model = replicate(self.net, self.device, self._on_last_gradient)
        self.optimizer = adamw(self.net, settings)
        self.step = self.position = self.received = 0
        self.question: tuple[Tensor, Any] | None = None
        self._resume()
        reached("checkpoint load")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def train(self) -> int:
        """Steps until the end, a signal, or the loss of another rank; returns the exit code.

        Raises:
            FloatingPointError: a loss or a gradient norm is no number.
        """
        try:
            return self._end(self._steps())
        except Exception as error:
            if not self.sharded:
                # The save in the background needs no other rank and may be the newest.
                self.checkpoints.wait()
            what = next(iter(str(error).splitlines()), type(error).__name__)
            say(f"{self.names[self.rank]} ends at step {self.step}: {what}\nNewest: {self.checkpoints.newest()}")
            if isinstance(error, dist.DistError) or any(sign in what for sign in LOST):
                return 1  # another rank is to blame, and tells why
            raise

    def _steps(self) -> int:
        settings, number, first = self.settings, 0, self.step + 1
        if self.world > 2 and not self.sharded:
            self._settle_buckets()
        while self.step < settings.steps and not number:
            self.metrics.trace(self.step + 1)
            self.take_step()
            if self.step == first:
                reached("first step")
            number = self.agreed_signal()
            last = number or self.step == settings.steps
            due = settings.checkpoint_every and self.step % settings.checkpoint_every == 0
            if last or due or self.step % settings.log_every == 0:
                self.metrics.report(self.step)  # raises before anything that is no number is saved
            if last or due:
                self.checkpoints.save(self.state(), self.step)
            if settings.eval_every and (self.step % settings.eval_every == 0 or self.step == settings.steps):
                self._evaluate()
            self.checkpoints.poll()
        self.metrics.trace(settings.steps + 1)
        return number

    def _settle_buckets(self) -> None:
        """One pass that is thrown away. After its first backward DDP lays out its buckets anew, and with more than two
        ranks the sums then round differently: so no step may be the first, or a resume would not repeat the bits.
        """
        for piece in self._pieces():
            self.model(piece[:, :-1], piece[:, 1:]).backward()
        self.optimizer.zero_grad()

    def take_step(self) -> None:
        """One optimizer step over `batch` sequences."""
        settings, began = self.settings, mark(self.device)
        # Randomness of a step (a dropout that you may add) depends on the step alone, so that a resume repeats it.
        torch.manual_seed(settings.seed + 1 + self.step * self.world + self.rank)
        pieces = self._pieces()
        data_there = mark(self.device)

        loss = torch.zeros((), device=self.device)
        tokens = settings.batch * settings.context
        for number, piece in enumerate(pieces, start=1):
            with self._exchange(number == len(pieces)):
                with self.autocast:
                    part = self.model(piece[:, :-1], piece[:, 1:])
                # DDP and FSDP2 average over the ranks: so scaled, uneven shares give the mean of all tokens.
                (part * (self.world / tokens)).backward()
            loss += part.detach()
        all_there = mark(self.device)

        norm = nn.utils.clip_grad_norm_(self.net.parameters(), settings.clip or inf)
        rate = learning_rate(settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.position = self.step + 1, self.position + settings.batch
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        marks = (began, data_there, self.gradients_there or all_there, all_there)
        self.metrics.steps.append(Step(loss / tokens, norm, rate, marks))

    def agreed_signal(self) -> int:
        """The signal that all ranks know of, or 0. The question is asked now and read one step later: nobody waits."""
        if self.question:
            flag, work = self.question
            work.wait()
            if flag:
                return int(flag)
        flag = torch.tensor(self.received)
        self.question = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        return 0

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Mean loss of held-out text, every rank its share."""
        count, sums = self.settings.eval_sequences, torch.zeros(2, dtype=torch.float64)
        for piece in self._cut(held_out_batch(self.corpus, count=count, rank=self.rank, world=self.world), count):
            with self.autocast:
                loss = self.net(piece[:, :-1], piece[:, 1:])
            sums += torch.tensor([float(loss), piece[:, 1:].numel()], dtype=torch.float64)
        dist.all_reduce(sums)
        value = float(sums[0] / sums[1])
        if self.rank == 0:
            self.metrics.write([{"step": self.step, "eval_loss": value}])
        self._say_once(f"step {self.step}/{self.settings.steps}  held-out loss {value:.4f} nats/token")

    def state(self) -> State:
        """What a checkpoint holds. Its tensors are those of the run, not copies."""
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        model, optimizer = get_state_dict(self.net, self.optimizer, options=options)
        # Its settings are not restored: those of this start apply.
        moments = {f"optimizer.{name}": value for name, value in optimizer.items() if name.startswith("state.")}
        progress = {"step": self.step, "position": self.position, **self._order()}
        return {f"model.{name}": value for name, value in model.items()} | moments | {"progress": progress}

    def _order(self) -> dict[str, Any]:
        """What the order of the data depends on."""
        return {"seed": self.settings.seed, "context": self.settings.context, "corpus": self.corpus.digest[:16]}

    def _resume(self) -> None:
        state = self.checkpoints.restore(self.state)
        if state is None:
            self._say_once(f"starting at step 0: no complete checkpoint in {self.checkpoints.folder}")
            return
        progress = state["progress"]
        self.step, self.position = progress["step"], progress["position"]
        for name, value in self._order().items():
            if progress[name] != value:
                self._say_once(f"warning: {name} was {progress[name]}, is {value}: the order of the data changes here")
        again = max(self.metrics.read(), default=0) - self.step if self.rank == 0 else 0
        self._say_once(f"resumed after step {self.step}; {max(0, again)} logged steps are done again")
        if self.step >= self.settings.steps:
            more = "RUN_NAME=another begins a new one, a higher TRAIN_STEPS goes on with this one"
            self._say_once(f"this run is finished: {self.step} steps are done; {more}")
        # A disk that lacks it gets its copy now, not after the next interval.
        self.checkpoints.save(state, self.step)

    def _end(self, number: int) -> int:
        settings = self.settings
        self.checkpoints.wait()
        self._say_once(f"checkpoint: {self.checkpoints.newest()}")
        saved = any(gathered(self.step in self.checkpoints.complete()))
        if number:
            self._say_once(f"stopped by signal {number} after step {self.step} of {settings.steps}")
            return 128 + number
        if settings.sample and settings.vocab == 256:
            with self.autocast:
                self._say_once("a sample:\n" + sample(self.net, count=settings.sample, seed=settings.seed))
        if self.rank == 0:
            self.metrics.draw()
        self._say_once(f"finished {settings.steps} steps; metrics: {self.metrics.path}")
        return int(not saved)

    def _pieces(self) -> list[Tensor]:
        """This rank's share of the step."""
        count, seed = self.settings.batch, self.settings.seed
        share = training_batch(
            self.corpus, position=self.position, count=count, rank=self.rank, world=self.world, seed=seed
        )
        return self._cut(share, count)

    def _cut(self, share: Tensor, count: int) -> list[Tensor]:
        """Equally many micro-batches on every rank, (sequences, context + 1) each; the host does not wait."""
        if len(share) and (highest := int(share.max())) >= self.settings.vocab:
            raise TrainError(f"DATA has a token {highest}, vocab is {self.settings.vocab}: raise TRAIN_VOCAB.")
        pieces = share.tensor_split(ceil(ceil(count / self.world) / self.settings.micro_batch))
        on_gpu = self.device.type == "cuda"
        return [piece.pin_memory().to(self.device, non_blocking=True) if on_gpu else piece for piece in pieces]

    def _exchange(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged with the last micro-batch only."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        elif isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def _on_last_gradient(self, _: Tensor) -> None:
        self.gradients_there = mark(self.device)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.received = number

    def _say_once(self, text: str) -> None:
        if self.rank == 0:
            say(text)


def connect(settings: TrainSettings) -> torch.device:
    """Joins the process group: NCCL for GPUs and gloo for CPUs, both where there are GPUs. Without torchrun, one rank.

    Raises:
        TrainError: this node has more ranks than GPUs; all its ranks say so, since only the first is heard.
    """
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    device, ranks, gpus = torch.device("cpu"), int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if settings.device == "cuda" or (settings.device == "auto" and gpus):
        if ranks > gpus:
            fix = "lower NPROC_PER_NODE, or set TRAIN_DEVICE=cpu"
            raise TrainError(f"{node()}: {ranks} ranks need a GPU each and there are {gpus}: {fix}.")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Gloo carries the agreement to stop and the checkpoints' messages; neither may wait for the GPU.
    nccl = device.type == "cuda" and os.environ.get("BACKEND") != "gloo"
    backend, limit = "cpu:gloo,cuda:nccl" if nccl else "gloo", timedelta(seconds=settings.timeout)
    dist.init_process_group(backend, timeout=limit, device_id=device if nccl else None)
    return device


def agreed_corpus(settings: TrainSettings) -> Corpus:
    """The data, which is the same on all ranks, as the settings and torch are.

    Raises:
        TrainError: it cannot be used, or a rank differs.
    """
    problem = ""
    try:
        corpus = load_corpus(settings.data, settings.context)
    except TrainError as error:
        problem = str(error)
    if settings.batch < dist.get_world_size():
        problem = f"batch={settings.batch} is less than one sequence for each rank: raise TRAIN_BATCH."
    agree(problem)
    own = asdict(settings) | {"corpus": corpus.digest[:16], "torch": torch.__version__}
    first = gathered(own)[0]
    differing = [
        f"{name} is {value}, on rank 0 it is {first[name]}"
        for name, value in own.items()
        if value != first[name] and name not in {"run_dir", "checkpoint_dir", "data"}
    ]
    agree(f"rank {dist.get_rank()}: {'; '.join(differing)}. Make them equal." if differing else "")
    return corpus
